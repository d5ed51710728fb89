"""Time of a DDO step of B real + B fake images over that of an MLE step of B images.

    python benchmarks/step.py

Expected: 2.67, for DDO has 8 forward-equivalents (target on 2B: 2 forward + 4 backward; reference on 2B: 2)
against 3 (1 forward + 2 backward); less where the optimizer and the dispatch weigh, which both pay once.
"""

import sys
import time

import jax
import numpy as np
from common import ROOT, paired, report, spread

sys.path.insert(0, str(ROOT))
from configs import digits  # noqa: E402
from ddo_jax import sharding  # noqa: E402
from ddo_jax.families import get_family  # noqa: E402
from ddo_jax.run import state, step  # noqa: E402


def make(config, objective: str):
    """A function that advances one training state by `repeat` steps and waits for the result."""
    family, mesh = get_family(config), sharding.make_mesh()
    c = config.ddo if objective == "ddo" else config.pretrain
    training, key = step.Training(family, mesh, c, objective, warmup=0.0, total=1e6), jax.random.key(0)
    params, frozen = jax.jit(family.init)(key)
    current, advance = sharding.place(mesh, state.new_state(params, training.config)), step.make_step(training)
    generator = np.random.default_rng(0)
    images = generator.integers(0, config.model.levels, (2, c.batch, *family.spec.image_shape)).astype(np.uint8)
    labels = generator.integers(0, 10, (2, c.batch)).astype(np.int32)
    real, fake = ({"image": i, "label": y} for i, y in zip(images, labels, strict=True))
    real, fake = sharding.put_batch(mesh, real), sharding.put_batch(mesh, fake)
    hyper = step.Hyper(4.0, 0.2, 1e-6, (-0.4, 1.2))
    held = [current, sharding.replicate(mesh, step.zero_totals(family, objective))]
    partners = dict(ref=params, fake=fake) if objective == "ddo" else dict(fake=None)
    inputs = step.Inputs(frozen, real, key=key, hyper=hyper, **partners)

    def run(repeat: int):
        for _ in range(repeat):
            held[:] = advance(*held, inputs)
        jax.block_until_ready(held[0])

    began = time.perf_counter()
    run(1)
    return run, time.perf_counter() - began


def main() -> None:
    for variant, repeat in (("", 50), ("unet", 2)):
        config = digits.get_config(variant)
        (ddo, ddo_compile), (mle, mle_compile) = make(config, "ddo"), make(config, "mle")
        seconds = paired(lambda f=ddo, n=repeat: f(n), lambda f=mle, n=repeat: f(n))
        ratios = [a / b for a, b in zip(*seconds, strict=True)]
        milliseconds = [spread([1000 * s / repeat for s in x]) for x in seconds]
        report(
            f"step/{variant or 'mlp'}",
            batch=config.ddo.batch,
            ddo_over_mle=spread(ratios),
            ddo_ms=milliseconds[0],
            mle_ms=milliseconds[1],
            first_call_s={"ddo": round(ddo_compile, 1), "mle": round(mle_compile, 1)},
            device=jax.devices()[0].device_kind,
        )


if __name__ == "__main__":
    main()
