"""Small multi-scale VQ-VAEs, so that VAR can be tried on a laptop: of the 8x8 digits and of Fashion-MNIST.

    python configs/make/vqvae.py digits                               # writes digits_vqvae.safetensors
    python configs/make/vqvae.py fashion [idx:DIR]                    # writes fashion_vqvae.safetensors

VAR's tokenizer in little. Digits: 51,793 parameters, 8x8 grey pixels become maps of 1x1, 2x2 and 4x4 tokens from a
codebook of 128; 95 s on one CPU core. Fashion: 209,977 parameters, 28x28 pixels become maps of 1x1, 2x2, 4x4 and 7x7
tokens from a codebook of 256; 35 minutes on one core. It writes a file with the released parameter names; its metadata
hold the constructor's arguments. The shipped configs/*_vqvae.safetensors were made by this script. Expected: held-out
digits come back with a mean absolute error of about 0.65 of the 17 grey levels (the mean training image in their
place: 3.1), and the decoded training images are at FD x 100 = 0.45 from the training images, all codes in use; fashion
10.1 of 256 grey levels, FD x 100 = 27.
"""

import functools
import json
import sys
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ddo_jax import convert, files
from ddo_jax.convert import safetensors
from ddo_jax.core.stats import frechet
from ddo_jax.data.sources import open_source
from ddo_jax.evaluate import classifier
from ddo_jax.models.vqvae import from_config

NETWORKS = {  # the released constructor's argument names
    "digits": {
        "vocab_size": 128,
        "z_channels": 8,
        "ch": 8,
        "ch_mult": [1, 2],
        "num_res_blocks": 1,
        "patch_nums": [1, 2, 4],
        "in_channels": 1,
        "norm_groups": 4,
    },
    "fashion": {
        "vocab_size": 256,
        "z_channels": 16,
        "ch": 8,
        "ch_mult": [1, 2, 4],
        "num_res_blocks": 1,
        "patch_nums": [1, 2, 4, 7],
        "in_channels": 1,
        "norm_groups": 4,
    },
}


class Recipe(NamedTuple):
    """data: of `open_source`. levels: grey levels, 0 ... levels - 1. steps, batch, lr: of Adam, cosine to 0."""

    data: str
    levels: int
    steps: int
    batch: int
    lr: float


RECIPES = {
    "digits": Recipe("digits", 17, 2500, 32, 4e-3),
    "fashion": Recipe("idx:/usr/share/datasets/fashion-mnist", 256, 2500, 64, 4e-3),
}
SOME = 10_000  # images, at most, in which unused codes are looked for, and that are scored
VQ_WEIGHT = 0.25
RESEED = 100  # steps between two looks for unused codes


def to_signed(pixels, levels):
    """uint8 grey levels 0 ... levels - 1 -> float32 in [-1, 1]."""
    return jnp.asarray(pixels, jnp.float32) / ((levels - 1) / 2) - 1


@functools.partial(jax.jit, static_argnums=0)
def encode(module, variables, x):
    """Tokens [N, L] of images in [-1, 1]."""
    return module.apply(variables, x, method="tokens")


@functools.partial(jax.jit, static_argnums=0)
def decode(module, variables, tokens):
    """Images in [-1, 1] of tokens."""
    return module.apply(variables, module.apply(variables, tokens, method="f_hat"), method="decode")


@functools.partial(jax.jit, static_argnums=0)
def remainders(module, variables, x):
    """What every code is chosen for: vectors [N * L, z] that the coarser scales left over; and the codes' numbers."""

    def collect(module, x):
        f, quantizer = module.features(x), module.quantizer
        tokens, sums = quantizer.encode(f)
        rests = [f, *(f - f_hat for f_hat in sums[:-1])]
        return jnp.concatenate([quantizer.pooled(s, rest) for s, rest in enumerate(rests)], axis=1), tokens

    vectors, tokens = module.apply(variables, x, method=collect)
    return vectors.reshape(-1, vectors.shape[-1]), tokens.reshape(-1)


def reseed(module, variables, x, key, least):
    """Variables in which codes used for fewer than `least` of all tokens of x have moved to vectors drawn from x's."""
    vectors, tokens = remainders(module, variables, x)
    params = variables["params"]
    codes = params["quantize"]["embedding"]["weight"]
    share = jnp.bincount(tokens, length=len(codes)) / tokens.size
    drawn = jax.random.choice(key, vectors, (len(codes),), replace=False)
    codes = jnp.where((share < least)[:, None], drawn, codes)
    quantize = params["quantize"] | {"embedding": {"weight": codes}}
    return variables | {"params": params | {"quantize": quantize}}


def loss_fn(params, buffers, x, module):
    """(mean squared error + VQ_WEIGHT vq, squared error) of a batch."""
    y, vq, _ = module.apply({"params": params, **buffers}, x, method="training_loss")
    error = jnp.mean(jnp.square(y - x))
    return error + VQ_WEIGHT * vq, error


def train(module, images, recipe, seed=0):
    """Variables fitted to uint8 images [N, H, W, C]; in the first two thirds unused codes are put to use."""
    x, key, steps = to_signed(images, recipe.levels), jax.random.key(seed), recipe.steps
    variables = dict(jax.jit(module.init)(key, x[:1]))
    # All: the initial N(0, 1) is far from the encoder's scale.
    variables = reseed(module, variables, x[:SOME], key, least=1.0)
    tx = optax.adam(optax.cosine_decay_schedule(recipe.lr, steps))
    opt_state = tx.init(variables["params"])

    @jax.jit
    def step(variables, opt_state, x, key):
        rows = jax.random.randint(key, (recipe.batch,), 0, len(x))
        params, buffers = variables["params"], {k: v for k, v in variables.items() if k != "params"}
        (_, error), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, buffers, x[rows], module)
        updates, opt_state = tx.update(grads, opt_state, params)
        return variables | {"params": optax.apply_updates(params, updates)}, opt_state, error

    start = time.time()
    for i in range(steps):
        variables, opt_state, error = step(variables, opt_state, x, jax.random.fold_in(key, i))
        if (i + 1) % RESEED == 0 and 3 * i < 2 * steps:
            variables = reseed(module, variables, x[:SOME], jax.random.fold_in(key, steps + i), least=1e-3)
        if (i + 1) % 500 == 0:
            print(f"step {i + 1:5d}  squared error {error:.4f}  {time.time() - start:.0f} s", flush=True)
    return variables


def reconstruct(module, variables, images, levels):
    """(Grey levels, not rounded, of the images that the tokens stand for; tokens) of uint8 images [N, H, W, C]."""
    parts = [images[i : i + 1000] for i in range(0, len(images), 1000)]
    tokens = [encode(module, variables, to_signed(part, levels)) for part in parts]
    decoded = [(levels - 1) / 2 * (np.asarray(decode(module, variables, t)) + 1) for t in tokens]
    return np.concatenate(decoded), np.concatenate(tokens)


def distance(images, labels, others, levels):
    """FD x 100 between two sets of uint8 images, in the features that judge the experiments on this data."""
    design = classifier.Design(images.shape[1:], levels, 10)
    layers = classifier.train(images, labels, design).layers
    a, b = (np.asarray(classifier.features_and_logits(layers, x, design)[0]) for x in (images[:SOME], others))
    return 100 * frechet.frechet_from_features(a, b)


def main(name, data=None, out=None, **changes):
    """Train, score, write `out`; returns the mean absolute error on held-out images in grey levels."""
    recipe, config, out = RECIPES[name]._replace(**changes), NETWORKS[name], out or f"{name}_vqvae.safetensors"
    module, levels = from_config(config), recipe.levels
    sets = {split: open_source(data or recipe.data, split) for split in ("train", "test")}
    train_set, test_set = (s.read(np.arange(len(s))) for s in sets.values())
    images, held_out = train_set["image"], test_set["image"]
    variables = train(module, images, recipe)

    pixels = reconstruct(module, variables, held_out, levels)[0]
    error = float(np.mean(np.abs(pixels - held_out)))
    exact = np.mean(np.round(pixels) == held_out)
    print(f"{len(held_out)} held-out images: mean absolute error {error:.3f} grey levels, {exact:.0%} of pixels exact")
    decoded, tokens = reconstruct(module, variables, images[:SOME], levels)
    fd = distance(images, train_set["label"], np.round(decoded).astype(np.uint8), levels)
    used = len(np.unique(tokens))
    print(f"FD x 100 of {len(decoded)} decoded training images {fd:.2f}, {used} of {config['vocab_size']} codes used")

    metadata = {"format": "pt", "ddo_jax_kind": "vqvae", "ddo_jax_config": json.dumps(config)}
    contents = safetensors.dumps(convert.to_torch("vqvae", config, variables), metadata)
    files.write_bytes(out, contents)
    print(f"wrote {out}: {len(contents):,} bytes")
    return error


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in RECIPES:
        sys.exit(f"usage: python configs/make/vqvae.py {'|'.join(RECIPES)} [DATA [OUT]]")
    with jax.default_matmul_precision("highest"):  # true float32, also on GPUs and TPUs
        main(*sys.argv[1:])
