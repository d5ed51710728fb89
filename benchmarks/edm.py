"""Forward, training steps and 18-step sampling of the released CIFAR-10 network, beside PyTorch.

    python benchmarks/edm.py [--batches 1,16] [--what forward,train,sample] [--torch [eager,compile]] [--small]

One JSON line per measurement. The network is `edm-cifar10-32x32-uncond-vp` (55.7M parameters) with random
weights; with --torch the same weights run in benchmarks/torch_ddpmpp.py, eager and torch.compile, TF32 off,
called in turn with ours in one process (extra [bench]). Without --batches: 1, 16 on a CPU, 32..512 otherwise.

    images/s      images (forward, sample), real images (mle), pairs of a real and a fake (ddo) a second
    compile_s     trace + lower + compile, without the persistent cache; torch.compile: its first call, which
                  finds what earlier measurements left in its cache
    peak_mb       ours: XLA's arguments + results + temporaries - donated; torch: the CUDA allocator's, null on a CPU
    gflop         XLA's count for the program as lowered, before optimisation, per image (sample: 35 forwards)
    peak_percent  achieved FLOP/s over the matrix peak of the device in that precision; null where not known
    ours_over_*   images/s of ours over that of the other, per pair of calls in turn; > 1: ours is faster

`float32` is precision "highest" (no TF32), `bfloat16` the image path alone. A measurement that would take
longer than --limit seconds a call is reported as NOT RUN.

OpenMP's threads wait passively here: spinning ones, where other processes want the same cores, made a torch
forward of 10 ms take 0.5 to 1 s, a "speed-up" of 100 that is nobody's merit.
"""

import argparse
import functools
import os
import sys
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from common import ROOT, report, spread

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported
sys.path.insert(0, str(ROOT))
from ddo_jax import sharding  # noqa: E402
from ddo_jax.config import base
from ddo_jax.convert import edm as convert  # noqa: E402
from ddo_jax.core import samplers  # noqa: E402
from ddo_jax.families import get_family  # noqa: E402
from ddo_jax.models import edm as networks  # noqa: E402
from ddo_jax.run import state, step  # noqa: E402

NAME = "edm-cifar10-32x32-uncond-vp"
SMALL = {"img_resolution": 16, "model_channels": 32, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [8]}
HEUN = samplers.HeunSettings(num_steps=18)

# Dense matrix TFLOP/s from the vendor's data sheets; the first key that device_kind starts with
PEAKS = {
    "NVIDIA H100 PCIe": {"float32": 51.0, "tf32": 378.0, "bfloat16": 756.0},
    "NVIDIA H100 NVL": {},  # not looked up
    "NVIDIA H100": {"float32": 67.0, "tf32": 494.7, "bfloat16": 989.4},
    "NVIDIA H200 NVL": {},
    "NVIDIA H200": {"float32": 67.0, "tf32": 494.7, "bfloat16": 989.4},
    "NVIDIA A100": {"float32": 19.5, "tf32": 156.0, "bfloat16": 312.0},
}


class Program(NamedTuple):
    """One contestant: call() runs it once and waits for the device."""

    call: Any
    compile_s: float | None = None
    peak_mb: int | None = None
    flops: float | None = None


# ----------------------------------------------------------------------------------------------------
# Measuring


def in_turn(calls: dict, budget_s: float, most: int = 15, least: int = 2):
    """(seconds of the first call, [seconds of each later call]) per name, round by round within the budget."""
    seconds = {name: [] for name in calls}
    for i in range(most + 1):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - began)
        if i >= least and sum(sum(s[1:]) for s in seconds.values()) > budget_s * len(calls):
            break
    return {name: s[0] for name, s in seconds.items()}, {name: s[1:] for name, s in seconds.items()}


def ratios(seconds: dict, first: str, others) -> dict:
    """How many times as fast `first` is as each other, pair by pair."""
    return {
        f"{first}_over_{other}": spread([b / a for a, b in zip(seconds[first], seconds[other], strict=True)])
        for other in others
    }


def peak_bytes(compiled) -> int:
    """Arguments, results and the temporary arena. Not XLA's peak_memory_in_bytes: on a CPU it has no temporaries."""
    m = compiled.memory_analysis()
    return m.argument_size_in_bytes + m.output_size_in_bytes + m.temp_size_in_bytes - m.alias_size_in_bytes


def ahead(f, *args):
    """(compiled, seconds of trace + lower + compile, FLOPs as lowered)."""
    began = time.perf_counter()
    lowered = f.lower(*args)
    compiled = lowered.compile()
    elapsed = time.perf_counter() - began
    return compiled, elapsed, (lowered.cost_analysis() or {}).get("flops")


def program(f, *args) -> Program:
    """A pure function of fixed arguments."""
    compiled, seconds, flops = ahead(jax.jit(f), *args)
    return Program(lambda: jax.block_until_ready(compiled(*args)), seconds, peak_bytes(compiled) >> 20, flops)


def matrix_peak(dtype: str) -> float | None:
    """TFLOP/s of the first device in `dtype`, None where not known."""
    kind = jax.devices()[0].device_kind
    return next((row.get(dtype) for name, row in PEAKS.items() if kind.startswith(name)), None)


# ----------------------------------------------------------------------------------------------------
# Ours


def random_weights(config: dict) -> dict:
    """{released name: array} with weights of the scale of a trained network: none is zero."""
    rng = np.random.default_rng(0)
    _, shapes, filt = convert.layout(config)

    def draw(name, shape):
        if name.endswith("resample_filter"):
            return filt
        noise = rng.standard_normal(shape, np.float32)
        if len(shape) > 1:
            return noise / np.sqrt(np.prod(shape[1:], dtype=np.float32))
        return np.float32(0.1) * noise + np.float32(".norm" in name and name.endswith("weight"))

    return {name: draw(name, shape) for name, shape in shapes.items()}


def noisy(module, batch: int):
    rng = np.random.default_rng(1)
    shape = (batch, module.img_resolution, module.img_resolution, module.img_channels)
    return rng.standard_normal(shape, np.float32), np.exp(rng.standard_normal(batch, np.float32))


def denoiser(config: dict, dtype: str):
    """(module, D(variables, x, sigma)) in the precision that `dtype` stands for."""
    module = networks.from_config(config, dtype=None if dtype == "float32" else jnp.dtype(dtype))

    def denoise(variables, x, sigma):
        with jax.default_matmul_precision("highest" if dtype == "float32" else "default"):
            return module.apply(variables, x, sigma)

    return module, denoise


def forward(config, weights, batch: int, dtype: str) -> Program:
    module, denoise = denoiser(config, dtype)
    return program(denoise, jax.device_put(convert.from_torch(config, weights)[1]), *noisy(module, batch))


def sample(config, weights, batch: int, dtype: str) -> Program:
    module, denoise = denoiser(config, dtype)
    variables = jax.device_put(convert.from_torch(config, weights)[1])

    def run(variables, latents):
        return samplers.heun_sample(functools.partial(denoise, variables), latents, HEUN)

    return program(run, variables, noisy(module, batch)[0])._replace(flops=None)  # XLA counts a loop once


def training_config(config: dict, batch: int):
    c = base()
    with c.unlocked():
        c.model.update({k: v for k, v in config.items() if k not in ("model_type", "use_fp16")})
    c.model.arch = config["model_type"]
    c.ddo.batch = c.pretrain.batch = batch
    return c


def train(config, weights, batch: int, objective: str) -> Program:
    """The step of the product: forward, backward, Adam, EMA, statistics; its state is donated and carried on."""
    whole = training_config(config, batch)
    family, mesh, key = get_family(whole), sharding.make_mesh(), jax.random.key(0)
    c = whole.ddo if objective == "ddo" else whole.pretrain
    training = step.Training(family, mesh, c, objective, warmup=0.0, total=1e6)
    params = jax.device_put(convert.from_torch(config, weights)[1]["params"])
    current, advance = sharding.place(mesh, state.new_state(params, training.config)), step.make_step(training)
    images = np.random.default_rng(0).integers(0, 256, (2, batch, *family.spec.image_shape)).astype(np.uint8)
    labels = np.zeros(batch, np.int32)
    real, fake = (sharding.put_batch(mesh, {"image": i, "label": labels}) for i in images)
    partners = dict(ref=params, fake=fake) if objective == "ddo" else dict(fake=None)
    inputs = step.Inputs({}, real, key=key, hyper=step.Hyper(4.0, 0.05, 1e-6, (-1.2, 1.2)), **partners)
    held = [current, sharding.replicate(mesh, step.zero_totals(family, objective))]
    compiled, seconds, flops = ahead(advance, *held, inputs)

    def call():
        held[:] = compiled(*held, inputs)
        jax.block_until_ready(held)

    return Program(call, seconds, peak_bytes(compiled) >> 20, flops)


# ----------------------------------------------------------------------------------------------------
# PyTorch


def torch_programs(kinds, config, weights, what: str, batch: int, dtype: str) -> dict[str, Program]:
    """{kind: Program} of the same work on the same kind of device; kinds: "eager", "compile"."""
    import torch
    import torch_ddpmpp as baseline

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.benchmark = True
    net = baseline.from_config(config, None if dtype == "float32" else getattr(torch, dtype))
    net.load_state_dict({k: torch.from_numpy(v) for k, v in weights.items()})
    net = net.to(device).eval()
    x, sigma = noisy(denoiser(config, "float32")[0], batch)
    x, sigma = torch.from_numpy(x.transpose(0, 3, 1, 2).copy()).to(device), torch.from_numpy(sigma).to(device)

    def make(compiled: bool):
        if what in ("ddo", "mle"):
            trainer = baseline.Trainer(net, compiled)
            images = torch.randint(0, 256, (2, *x.shape), dtype=torch.uint8, device=device)
            return lambda: trainer.ddo(*images) if what == "ddo" else trainer.mle(images[0])
        denoise = torch.compile(net) if compiled else net
        if what == "sample":
            return lambda: baseline.heun_sample(denoise, x, HEUN.num_steps)
        return torch.no_grad()(lambda: denoise(x, sigma))

    def waiting(f):
        f()
        if device == "cuda":
            torch.cuda.synchronize()

    return {kind: Program(functools.partial(waiting, make(kind == "compile"))) for kind in kinds}


def torch_peaks(programs) -> dict:
    """Peak of the CUDA allocator over one call, MB (it includes what else lives there)."""
    import torch

    peaks = dict.fromkeys(programs)
    for name, p in programs.items():
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            p.call()
            peaks[name] = torch.cuda.max_memory_allocated() >> 20
    return peaks


# ----------------------------------------------------------------------------------------------------
# The table


def measure(args, config, weights, what: str, batch: int, dtype: str, forward_flops: float | None):
    """Run ours and the others in turn; one JSON line. -> (ours, its median seconds)."""
    build = {"forward": forward, "sample": sample}.get(what)
    ours = build(config, weights, batch, dtype) if build else train(config, weights, batch, what)
    others = torch_programs(args.torch, config, weights, what, batch, dtype) if args.torch else {}
    first, seconds = in_turn({k: p.call for k, p in {"ours": ours, **others}.items()}, args.budget)
    flops = ours.flops or (forward_flops and HEUN.nfe * forward_flops)
    middle = float(np.median(seconds["ours"]))
    peak = matrix_peak(dtype)
    numbers = {f"{k}_images_per_s": spread([batch / t for t in s]) for k, s in seconds.items()}
    if others:
        import torch

        numbers |= {"torch": torch.__version__, "torch_peak_mb": torch_peaks(others)}
        numbers |= {f"torch_{k}_first_call_s": round(first[k], 1) for k in others} | ratios(seconds, "ours", others)
    report(
        f"edm/{what}",
        network=args.name,
        batch=batch,
        dtype=dtype,
        **numbers,
        compile_s=round(ours.compile_s, 1),
        peak_mb=ours.peak_mb,
        gflop_per_image=flops and round(flops / batch / 1e9, 2),
        gflop_per_s=flops and round(flops / middle / 1e9, 1),
        peak_percent=flops and peak and round(100 * flops / middle / 1e12 / peak, 1),
        device=jax.devices()[0].device_kind,
    )
    return ours, middle


def main(args) -> None:
    config = networks.RELEASED[NAME] | (SMALL if args.small else {})
    args.name, weights = f"small {NAME}" if args.small else NAME, random_weights(config)
    for batch in args.batches:
        flops = seconds = None  # of one float32 forward at this batch
        costs = {"forward": 1, "mle": 3, "ddo": 8, "sample": HEUN.nfe}  # in forwards of `batch`
        for what in args.what:
            for dtype in ("float32", "bfloat16") if what == "sample" else ("float32",):
                if seconds and costs[what] * seconds > args.limit:
                    estimate = f"NOT RUN: about {costs[what] * seconds:.0f} s a call"
                    report(f"edm/{what}", network=args.name, batch=batch, dtype=dtype, result=estimate)
                    continue
                ours, middle = measure(args, config, weights, what, batch, dtype, flops)
                if what == "forward":
                    flops, seconds = ours.flops, middle


def parse() -> argparse.Namespace:
    accelerator = jax.default_backend() != "cpu"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", default="32,64,128,256,512" if accelerator else "1,16")
    parser.add_argument("--what", default="forward,train,sample")
    parser.add_argument("--torch", nargs="?", const="eager,compile", default="", help="beside PyTorch ([bench])")
    parser.add_argument("--small", action="store_true", help="a network of 0.6M parameters: checks the script")
    parser.add_argument("--budget", type=float, default=20.0, help="seconds per contestant and measurement")
    parser.add_argument("--limit", type=float, default=60.0, help="longest call that is tried, in seconds")
    args = parser.parse_args()
    args.torch = [kind for kind in args.torch.split(",") if kind]
    args.batches = [int(b) for b in args.batches.split(",")]
    args.what = [w for word in args.what.split(",") for w in (("mle", "ddo") if word == "train" else (word,))]
    if not set(args.torch) <= {"eager", "compile"}:
        parser.error(f"--torch: {','.join(args.torch)}; allowed: eager,compile")
    if unknown := set(args.what) - {"forward", "mle", "ddo", "sample"}:
        parser.error(f"--what: {', '.join(unknown)}; allowed: forward, train, mle, ddo, sample")
    return args


if __name__ == "__main__":
    main(parse())
