"""The parts of a DDO step of a VAR: make fakes, encode them again, ask the reference, update the target.

    python benchmarks/var_step.py                                             # configs/digits_var.py
    python benchmarks/var_step.py --config=var_in256 --batch=25 --peak_tflops=989     # on a GPU: random weights will do

Expected, in forward passes of a row of tokens with B real and B fake rows: generating B fakes costs 1 B (keys and
values are kept, so that all scales together are one pass over the tokens), the reference 2 B, the target 2 B + 4 B.
The step proper is 8 B; with a pool, once what the reference said is known by (row, label dropped or not), 6 B: a ratio
of 0.75. (At the second visit nine rows of ten are known: a tenth of the labels is dropped anew.) Encoding again is the
tokenizer's decoder and encoder, whose share has no such number.
"""

import argparse
import importlib
import statistics
import sys
import time
from types import SimpleNamespace

import jax
import numpy as np
from common import ROOT, report, spread

sys.path.insert(0, str(ROOT))
from ddo_jax import sharding  # noqa: E402
from ddo_jax.errors import UserError  # noqa: E402
from ddo_jax.families import get_family  # noqa: E402
from ddo_jax.plan import dry_run, memory
from ddo_jax.run import reference_scores, state, step


def weights_of(family, mesh):
    """(params, frozen): the tokenizer's own weights where its file is at hand; else random, which cost the same."""
    params = jax.jit(family.init)(jax.random.key(0))[0]
    try:
        frozen = family.companions()
    except UserError:
        shapes, rng = family.companion_shapes(), np.random.default_rng(0)
        frozen = jax.tree.map(lambda x: rng.normal(0, 0.02, x.shape).astype(np.float32), shapes)
    return sharding.place(mesh, (params, frozen))


def programs(config) -> dict:
    """{part: function that runs it once and waits}."""
    family, mesh, c = get_family(config), sharding.make_mesh(), config.ddo
    params, frozen = weights_of(family, mesh)
    rng, key = np.random.default_rng(0), jax.random.key(0)
    labels = rng.integers(0, family.spec.num_classes, c.batch).astype(np.int32)
    pixels = rng.integers(0, family.spec.levels, (c.batch, *family.spec.image_shape)).astype(np.uint8)
    pixels = sharding.put_batch(mesh, {"image": pixels, "label": labels})
    keys = jax.random.split(key, c.batch)
    plain = family.fake_settings(family.settings({}))._replace(reencode=False)

    def generate(settings):
        @jax.jit
        def run(params, frozen, labels, keys):
            made = family.sample((params, None), frozen, labels, family.latents(keys), keys, settings)
            return family.store(frozen, made)

        return lambda: run(params, frozen, pixels["label"], keys)

    tokens = jax.jit(lambda frozen, record: family.store(frozen, family.encode(frozen, record, key)))
    record, noise = tokens(frozen, pixels), (0.0, 1.0)
    hyper = step.Hyper(10.0, 0.02, 1e-6, noise)
    both, asks = dict.fromkeys(("real", "fake"), record), reference_scores.programs(family, c, mesh)

    def ask(kept):
        rows = dict.fromkeys(both, np.arange(c.batch) if kept else None)
        phase = SimpleNamespace(partners=SimpleNamespace(ref=params, kept=kept), hyper=hyper)
        return reference_scores.ReferenceScores(asks, mesh, frozen, phase, key)(0, both, rows)

    training = step.Training(family, mesh, c, "ddo", warmup=0.0, total=1e6)
    current, advance = sharding.place(mesh, state.new_state(params, training.config)), step.make_step(training)
    held = [current, sharding.replicate(mesh, step.zero_totals(family, "ddo"))]

    def update(s_ref):
        held[:] = advance(*held, step.Inputs(frozen, record, record, key, hyper, s_ref=s_ref))
        return held[0]

    kept = {name: reference_scores.Kept(c.batch) for name in both}
    for _ in range(2):
        ask(kept)  # from now on it knows them all
    return {
        "tokenise": lambda: tokens(frozen, pixels),
        "generate": generate(plain),
        "generate_and_encode": generate(plain._replace(reencode=True)),
        "reference": lambda: ask({}),
        "update_kept": lambda: update(ask(kept)),
        "update_and_reference": lambda: update(ask({})),
    }


def timed(parts: dict, repeats: int) -> tuple[dict, dict]:
    """({part: seconds of the first call}, {part: [seconds]}), in turn: the machine's drift meets all alike."""
    first, seconds = {}, {name: [] for name in parts}
    for i in range(repeats + 2):
        for name, run in parts.items():
            began = time.perf_counter()
            jax.block_until_ready(run())
            took = time.perf_counter() - began
            if i == 0:
                first[name] = round(took, 1)
            elif i > 1:
                seconds[name].append(took)
    return first, seconds


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--config", default="digits_var", help="of configs/, with a variant: var_in256:d16")
    p.add_argument("--batch", type=int, help="real images a step (default: the config's)")
    p.add_argument("--accumulation", type=int, default=1)
    p.add_argument("--repeats", type=int, default=15)
    p.add_argument(
        "--peak_tflops", type=float, help="of the device at this dtype (H100, bfloat16: 989): per cent of it"
    )
    args = p.parse_args()
    name, _, variant = args.config.partition(":")
    config = importlib.import_module(f"configs.{name}").get_config(variant)
    config.ddo.update(batch=args.batch or config.ddo.batch, accumulation=args.accumulation)
    first, seconds = timed(programs(config), args.repeats)

    family = get_family(config)
    rates = [config.ddo.batch / s for s in seconds["generate"]]  # a fake costs one forward pass over its tokens
    tflops = dry_run.forward_flops(family, *memory.abstract(family))[0] * statistics.median(rates) / 1e12
    peak = {"percent_of_peak": round(100 * tflops / args.peak_tflops, 2)} if args.peak_tflops else {}

    def ratio(a, b):
        return spread([x / y for x, y in zip(seconds[a], seconds[b], strict=True)])

    report(
        f"var_step/{args.config}",
        batch=config.ddo.batch,
        accumulation=args.accumulation,
        dtype=config.dtype,
        ms={name: spread([1000 * s for s in times]) for name, times in seconds.items()},
        first_call_s=first,
        kept_over_asked=ratio("update_kept", "update_and_reference"),
        generate_over_step=ratio("generate", "update_and_reference"),
        generate_and_encode_over_step=ratio("generate_and_encode", "update_and_reference"),
        images_per_s_generated=spread(rates),
        generate_tflops=round(tflops, 4),
        **peak,
        device=jax.devices()[0].device_kind,
    )


if __name__ == "__main__":
    main()
