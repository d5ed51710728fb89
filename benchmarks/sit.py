"""SiT: forward pass, DDO step and sampling, beside PyTorch in one run, as ratios.

    python -m benchmarks.sit --size=sit-s-2 --batch=4 --torch            # a CPU; [bench] brings PyTorch
    python -m benchmarks.sit --size=sit-xl-2 --batch=64 --torch=eager,compile      # an accelerator

Each is float32 with full products ("highest"; no TF32 in PyTorch), but for `half`: sampling in bfloat16, on GPUs with
cuDNN's attention. A ratio above 1: ours is faster. Sampling is Euler with 10 steps. Weights are random; times do not
depend on them.
"""

import argparse
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.common import report, spread
from ddo_jax import config as configs
from ddo_jax import convert, sharding
from ddo_jax.core.flow_samplers import FlowSettings, flow_sample
from ddo_jax.families import get_family
from ddo_jax.models.sit import SIT_PRESETS
from ddo_jax.run import state, step

STEPS = 10


def weights_of(arguments: dict) -> dict:
    rng = np.random.default_rng(0)
    shapes = convert.layout("sit", arguments)
    return {k: (0.02 * rng.standard_normal(s, np.float32)).astype(np.float32) for k, s in shapes.items()}


def ours(arguments: dict, weights: dict, batch: int) -> dict:
    """{what: callable that waits for its result}."""
    config = configs.base()
    config.family = "sit"
    model = {"arch": "SiT", "img_resolution": 32, "img_channels": 4, "label_dim": 1000, "levels": 256}
    with config.unlocked():
        config.model.update(
            **model, **{k: v for k, v in arguments.items() if k in ("hidden_size", "depth", "num_heads")}
        )
        config.model.update(patch_size=arguments["patch_size"], learn_sigma=arguments["learn_sigma"])
    config.ddo.batch = batch
    family, mesh = get_family(config), sharding.make_mesh(1)
    variables = jax.device_put(convert.from_torch("sit", arguments, weights)[1])
    params, frozen = variables["params"], {"buffers": variables["buffers"]}
    labels, x = jnp.zeros(batch, jnp.int32), jax.random.normal(jax.random.key(0), (batch, 32, 32, 4))

    def velocity(params, x, t, dtype=None):
        return family.velocity(params, frozen, x, t, labels, dtype).astype(x.dtype)

    def sampler(dtype):
        flow, settings = functools.partial(velocity, dtype=dtype), FlowSettings("euler", STEPS)
        return jax.jit(lambda p, x: flow_sample(functools.partial(flow, p), x, settings))

    forward = jax.jit(lambda p, x: velocity(p, x, jnp.full((batch,), 0.5)))
    sample, half = sampler(None), sampler(jnp.bfloat16)
    training = step.Training(family, mesh, config.ddo, "ddo", warmup=0.0, total=1e6)
    advance = step.make_step(training)
    real, fake = (sharding.put_batch(mesh, {"image": np.asarray(x + i), "label": np.asarray(labels)}) for i in (0, 1))
    inputs = step.Inputs(
        frozen, real, key=jax.random.key(0), hyper=step.Hyper(4.0, 0.05, 1e-6, (-0.4, 1.2)), ref=params, fake=fake
    )
    fresh = jax.tree.map(jnp.array, params)
    held = [
        sharding.place(mesh, state.new_state(fresh, training.config)),
        sharding.replicate(mesh, step.zero_totals(family, "ddo")),
    ]

    def train():
        held[:] = advance(*held, inputs)
        jax.block_until_ready(held)

    return {
        "forward": lambda: jax.block_until_ready(forward(params, x)),
        "sample": lambda: jax.block_until_ready(sample(params, x)),
        "half": lambda: jax.block_until_ready(half(params, x)),
        "ddo": train,
    }


def theirs(arguments: dict, weights: dict, batch: int, compiled: bool) -> dict:
    import torch

    from benchmarks import torch_sit

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    net = torch_sit.SiT(arguments)
    net.load_state_dict({k: torch.from_numpy(v) for k, v in weights.items()})
    net = net.to(device)
    x, labels = torch.randn(batch, 4, 32, 32, device=device), torch.zeros(batch, dtype=torch.long, device=device)
    t, run = torch.full((batch,), 0.5, device=device), torch.compile(net) if compiled else net
    trainer = torch_sit.Trainer(net, compiled)
    calls = {
        "forward": torch.no_grad()(lambda: run(x, t, labels)),
        "sample": lambda: torch_sit.euler_sample(run, x, labels, STEPS),
        "half": torch.autocast(device, torch.bfloat16)(lambda: torch_sit.euler_sample(run, x, labels, STEPS)),
        "ddo": lambda: trainer.ddo(x, x + 1, labels),
    }

    def waiting(call):
        call()
        if device == "cuda":
            torch.cuda.synchronize()

    return {what: functools.partial(waiting, call) for what, call in calls.items()}


def in_turn(calls: dict, budget: float) -> dict:
    """{name: seconds of every call}, called in turn after one that is not counted."""
    seconds, end = {name: [] for name in calls}, time.monotonic() + budget * len(calls)
    for call in calls.values():
        call()
    while time.monotonic() < end or len(next(iter(seconds.values()))) < 3:
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - began)
    return seconds


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--size", default="sit-s-2", choices=sorted(SIT_PRESETS))
    p.add_argument("--batch", type=int, default=4)
    p.add_argument("--what", default="forward,sample,ddo")
    p.add_argument("--torch", nargs="?", const="eager", default="", help="beside PyTorch: eager,compile")
    p.add_argument("--budget", type=float, default=20.0, help="seconds per contestant and measurement")
    a = p.parse_args()
    arguments = {"input_size": 32, "patch_size": 2, "in_channels": 4, "num_classes": 1000, "learn_sigma": True}
    arguments |= SIT_PRESETS[a.size]
    weights = weights_of(arguments)
    contestants = {"ours": ours(arguments, weights, a.batch)}
    for kind in filter(None, a.torch.split(",")):
        contestants[kind] = theirs(arguments, weights, a.batch, kind == "compile")
    for what in a.what.split(","):
        seconds = in_turn({name: calls[what] for name, calls in contestants.items()}, a.budget)
        numbers = {f"{k}_images_per_s": spread([a.batch / t for t in s]) for k, s in seconds.items()}
        for kind in seconds.keys() - {"ours"}:
            numbers[f"ratio_{kind}"] = spread([b / a for a, b in zip(seconds["ours"], seconds[kind], strict=True)])
        if len(contestants) > 1:
            import torch

            numbers["torch"] = torch.__version__
        report(
            f"sit/{what}",
            network=a.size,
            batch=a.batch,
            dtype="bfloat16" if what == "half" else "float32",
            **numbers,
            device=jax.devices()[0].device_kind,
        )


if __name__ == "__main__":
    with jax.default_matmul_precision("highest"):
        main()
