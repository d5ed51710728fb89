"""Variants of the EDM programs, each measured against what ddo_jax does: is it worth adopting?

    python benchmarks/variants.py [layout convolution attention batches networks memory sampler]

A small DDPM++ (32 channels, 16x16, 0.6M parameters), batch 16. One JSON line per comparison: `*_ms` of both in
turn, `x_over_ours` = seconds of the variant over ours, pair by pair (> 1: ours is faster), compile seconds, and
temp_mb, peak_mb of XLA's memory analysis. Each docstring holds what was expected before it was measured, and what
was found on two shared CPU cores (benchmarks/results/2026-11-cpu.jsonl). On a GPU: NOT RUN.
"""

import argparse
import contextlib
import dataclasses
import functools
import inspect
from unittest import mock

import edm  # first: it puts the repository on the path
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from common import report, spread

from ddo_jax import sharding
from ddo_jax.core import ddo, samplers
from ddo_jax.families import get_family
from ddo_jax.models import edm as networks
from ddo_jax.models import edm_layers as layers
from ddo_jax.run import state, step

BATCH, BUDGET_S = 16, 5.0
CONFIG = networks.RELEASED[edm.NAME] | edm.SMALL


def build(f, *args):
    """(call, {compile_s, temp_mb, peak_mb}) of a function of fixed arguments, jitted here."""
    compiled, seconds, _ = edm.ahead(jax.jit(f), *args)
    return (lambda: jax.block_until_ready(compiled(*args))), costs(compiled, seconds)


def costs(compiled, seconds: float) -> dict:
    megabytes = {"temp_mb": compiled.memory_analysis().temp_size_in_bytes, "peak_mb": edm.peak_bytes(compiled)}
    return {"compile_s": round(seconds, 1)} | {k: round(v / 2**20, 1) for k, v in megabytes.items()}


def compare(name: str, ours, **variants) -> None:
    """Run ours and the variants in turn; one JSON line with the docstring's expectation."""
    built = {"ours": ours, **variants}
    _, seconds = edm.in_turn({k: call for k, (call, _) in built.items()}, BUDGET_S, most=30)
    numbers = {}
    for k, (_, cost) in built.items():
        numbers[k] = cost | {"ms": spread([1000 * s for s in seconds[k]])}
        if k != "ours":
            numbers[f"{k}_over_ours"] = spread([b / a for a, b in zip(seconds["ours"], seconds[k], strict=True)])
    expected = " ".join(inspect.getdoc(VARIANTS[name.split("/")[0]]).split("Expected: ")[1].split("Found: ")[0].split())
    report(f"variants/{name}", batch=BATCH, **numbers, expected=expected, device=jax.devices()[0].device_kind)


@functools.cache
def setup():
    """(family, params, reference, (real, fake, draws)) of the small network."""
    family = get_family(edm.training_config(CONFIG, BATCH))
    params = jax.device_put(edm.convert.from_torch(CONFIG, edm.random_weights(CONFIG))[1]["params"])
    ref = jax.tree.map(lambda p: 1.001 * p, params)
    images = np.random.default_rng(0).uniform(-1, 1, (2, BATCH, *family.spec.image_shape)).astype(np.float32)
    real, fake = ({"x": i, "label": np.zeros(BATCH, np.int32)} for i in images)
    return family, params, ref, (real, fake, family.draw(jax.random.key(0), BATCH, (-1.2, 1.2)))


def gradient(objective):
    """Of a DDO objective, by the target's parameters."""
    return jax.grad(objective, has_aux=True)


# ----------------------------------------------------------------------------------------------------


def layout():
    """NCHW convolutions: value and gradient of four 3x3 convolutions with bias and silu, 16x16, 64 channels.

    Expected: on a CPU NHWC is up to 1.5 times as fast, as XLA transposes NCHW around its kernels; on a GPU equal in
    float32, NHWC ahead in bfloat16 (cuDNN's tensor cores want channels last).

    Found: NCHW 1.16 times as long.
    """
    rng = np.random.default_rng(0)
    x = rng.standard_normal((BATCH, 16, 16, 64), np.float32)
    weights = rng.standard_normal((4, 3, 3, 64, 64), np.float32) / 24

    def loss(weights, x, layout):
        for w in weights:
            x = nn.silu(jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=layout) + 0.1)
        return jnp.sum(x**2)

    nhwc = functools.partial(loss, layout=("NHWC", "HWIO", "NHWC"))
    nchw = functools.partial(loss, layout=("NCHW", "OIHW", "NCHW"))
    turned = weights.transpose(0, 4, 3, 1, 2).copy(), x.transpose(0, 3, 1, 2).copy()
    compare("layout", build(jax.grad(nhwc), weights, x), nchw=build(jax.grad(nchw), *turned))


def convolution():
    """3x3 convolutions as nine shifted matrix products: gradient of four with bias and silu, 16x16, 64 channels.

    Expected: on a CPU up to twice as fast, since the DDO step of the real network reached only 33 GFLOP/s there where a
    forward reached 75 to 100, and XLA's gradient of a kernel is a convolution in an unusual layout; more temporary
    memory. On a GPU slower: cuDNN has proper kernels for all three.

    Found: shifted products 7 times as long with 6 times the temporaries: refuted (the 33 GFLOP/s were the machine's
    load; with less of it the step reaches 146).
    """
    rng = np.random.default_rng(0)
    x = rng.standard_normal((BATCH, 16, 16, 64), np.float32)
    weights = rng.standard_normal((4, 3, 3, 64, 64), np.float32) / 24

    def shifted(x, w):
        padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        parts = [(i, j, padded[:, i : i + x.shape[1], j : j + x.shape[2]]) for i in range(3) for j in range(3)]
        return sum(part @ w[i, j] for i, j, part in parts)

    def loss(weights, x, convolve):
        for w in weights:
            x = nn.silu(convolve(x, w) + 0.1)
        return jnp.sum(x**2)

    ours = build(jax.grad(functools.partial(loss, convolve=lambda x, w: layers.convolve(x, w, 1))), weights, x)
    compare("convolution", ours, shifted=build(jax.grad(functools.partial(loss, convolve=shifted)), weights, x))


def attention():
    """jax.nn.dot_product_attention instead of two einsums and a softmax: forward of the network.

    Expected: equal within 5 %; it lowers to the same products (implementation "xla"), and attention over 64 pixels is
    a small part. cuDNN's kernel needs 16 bit and head width <= 256 and is not tried on a CPU.

    Found: 1.00 times, the same memory.
    """
    family, params, _, (real, _, draws) = setup()

    def fused(qkv, heads):
        return jax.nn.dot_product_attention(*layers.split_qkv(qkv, heads)).reshape(*qkv.shape[:3], -1)

    def score(params):
        return family.score(params, {}, real, draws)

    ours = build(score, params)
    with mock.patch.object(networks, "attention", fused):
        other = build(lambda params: score(params), params)
    compare("attention", ours, dot_product_attention=other)


def batches():
    """Two forwards, one for the real and one for the fake rows, instead of one of 2B: gradient of the DDO loss.

    Expected: one forward compiles in about half the time and needs no more memory; on a CPU equally fast within
    10 %, on a GPU it is ahead at small batches, where kernels are short.

    Found: two forwards compile 1.8 times as long and run 0.95 times as long (0.79 to 1.23: within the noise).
    """
    family, params, ref, rows = setup()
    hyper = step.Hyper(4.0, 0.05, 1e-6, (-1.2, 1.2))

    def one(params, ref, rows):
        return step.ddo_objective(family, params, ref, {}, rows, hyper)

    def two(params, ref, rows):
        def ratio(side):
            s, s_ref = (family.score(p, {}, side, rows[2]) for p in (params, jax.lax.stop_gradient(ref)))
            return family.ratio(s, s_ref, side, rows[2])

        return ddo.ddo_loss(ratio(rows[0]), ratio(rows[1]), alpha=hyper.alpha, beta=hyper.beta)

    compare("batches", build(gradient(one), params, ref, rows), two=build(gradient(two), params, ref, rows))


def networks_at_once():
    """Target and reference as one vmap over stacked parameters instead of two forwards: forward only.

    Expected: slower, 1.2 to 2 times: per-network kernels become grouped convolutions, which XLA's CPU backend runs less
    well and cuDNN no better than two launches; in training the reference would get a needless backward pass as well.

    Found: 2.2 times as long.
    """
    family, params, ref, (real, _, draws) = setup()

    def score(p):
        return family.score(p, {}, real, draws)

    def stacked(a, b):
        return jax.vmap(score)(jax.tree.map(lambda a, b: jnp.stack([a, b]), a, b))

    compare("networks", build(lambda a, b: (score(a), score(b)), params, ref), vmap=build(stacked, params, ref))


def build_step(change=lambda family: family, donate: bool = True):
    """(call, costs) of the DDO step of the product with a changed family; the state is carried on."""
    whole = edm.training_config(CONFIG, BATCH)
    family, params, ref, _ = setup()
    mesh = sharding.make_mesh()
    training = step.Training(change(family), mesh, whole.ddo, "ddo", warmup=0.0, total=1e6)
    current = sharding.place(mesh, state.new_state(params, training.config))
    held, advance = [current, sharding.replicate(mesh, step.zero_totals(family, "ddo"))], step.make_step(training)
    advance = advance if donate else jax.jit(advance.__wrapped__)
    images = np.random.default_rng(0).integers(0, 256, (2, BATCH, *family.spec.image_shape)).astype(np.uint8)
    real, fake = (sharding.put_batch(mesh, {"image": i, "label": np.zeros(BATCH, np.int32)}) for i in images)
    inputs = step.Inputs({}, real, fake, jax.random.key(0), step.Hyper(4.0, 0.05, 1e-6, (-1.2, 1.2)), ref)
    compiled, seconds, _ = edm.ahead(advance, *held, inputs)

    def call():
        held[:] = compiled(*held, inputs)
        jax.block_until_ready(held)

    return call, costs(compiled, seconds)


@contextlib.contextmanager
def blocks_rematerialised():
    """Each U-Net block keeps its inputs only; its inside is computed again in the backward pass."""
    with mock.patch.object(networks, "UNetBlock", nn.remat(networks.UNetBlock, static_argnums=(3,))):
        yield


def memory():
    """The DDO step without donation; with jax.checkpoint of the whole score; with nn.remat of every U-Net block.

    Expected: without donation the same time and a peak higher by the state (4 times the parameters: 9 MB here, 0.9 GB
    for the real network). Both kinds of rematerialisation cost a forward on 2B rows: 10 forward-equivalents instead of
    8, 1.25 times the time. The whole score saves next to nothing, its activations all return for the backward pass; by
    blocks temp_mb falls to about a half.

    Found: donation saves 8 MB and no time. Rematerialisation costs 1.14 (blocks) to 1.18 times the time and saves
    nothing: the recomputed convolutions are in the compiled CPU program, the barriers that would delay them are not.
    So this says nothing about a GPU.
    """

    def checkpointed(family):
        class Checkpointed(type(family)):
            def score(self, *args):
                return jax.checkpoint(super().score)(*args)

        return Checkpointed(**{f.name: getattr(family, f.name) for f in dataclasses.fields(family)})

    variants = {"not_donated": build_step(donate=False), "remat_score": build_step(checkpointed)}
    ours = build_step()
    with blocks_rematerialised():
        variants["remat_blocks"] = build_step()
    compare("memory", ours, **variants)


def sampler():
    """The Heun steps unrolled instead of lax.scan: 8 steps, 15 network evaluations.

    Expected: scan holds 3 networks, the unrolled loop 15: it compiles 5 times as long (12 times at 18 steps) and runs
    equally fast within 5 %.

    Found: unrolled compiles 1.4 times as long only and runs 1.00 times as long.
    """
    family, params, _, _ = setup()
    latents = family.latents(jax.random.split(jax.random.key(0), BATCH))
    settings = samplers.HeunSettings(num_steps=8)

    def run(params, latents, scan):
        def denoise(x, sigma):
            return networks.from_config(CONFIG).apply({"params": params}, x, sigma)

        return samplers.heun_sample(denoise, latents, settings, scan=scan)

    ours, unrolled = (build(functools.partial(run, scan=scan), params, latents) for scan in (True, False))
    compare("sampler", ours, unrolled=unrolled)


VARIANTS = {
    "layout": layout,
    "convolution": convolution,
    "attention": attention,
    "batches": batches,
    "networks": networks_at_once,
    "memory": memory,
    "sampler": sampler,
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(VARIANTS), metavar="variant", help=", ".join(VARIANTS))
    for chosen in parser.parse_args().names:
        if chosen not in VARIANTS:
            parser.error(f"{chosen}: unknown variant; allowed: {', '.join(VARIANTS)}")
        VARIANTS[chosen]()
