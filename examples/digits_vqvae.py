"""A small multi-scale VQ-VAE for the 8x8 digits, so that VAR can be tried on a laptop.

    python examples/digits_vqvae.py [digits_vqvae.safetensors]

About 95 s on one CPU core. The network is VAR's tokenizer at 51,793 parameters: 8x8 grey pixels become maps of 1x1,
2x2 and 4x4 tokens from a codebook of 128. It writes a file with the released parameter names; its metadata hold the
constructor's arguments. The shipped configs/digits_vqvae.safetensors was made by this script. Expected: held-out
digits come back with a mean absolute error of about 0.65 of the 17 grey levels (the mean training image in their
place: 3.1), and the decoded training images are at FD x 100 = 0.45 from the training images, all codes in use.
"""

import json
import sys
import time

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

CONFIG = {  # the released constructor's argument names
    "vocab_size": 128,
    "z_channels": 8,
    "ch": 8,
    "ch_mult": [1, 2],
    "num_res_blocks": 1,
    "patch_nums": [1, 2, 4],
    "in_channels": 1,
    "norm_groups": 4,
}
LEVELS = 17  # grey levels 0..16; the network sees level / 8 - 1
VQ_WEIGHT = 0.25
RESEED = 100  # steps between two looks for unused codes
MODULE = from_config(CONFIG)


def to_signed(levels):
    """uint8 grey levels -> float32 in [-1, 1]."""
    return jnp.asarray(levels, jnp.float32) / 8 - 1


@jax.jit
def encode(variables, x):
    """Tokens [N, L] of images in [-1, 1]."""
    return MODULE.apply(variables, x, method="tokens")


@jax.jit
def decode(variables, tokens):
    """Images in [-1, 1] of tokens."""
    return MODULE.apply(variables, MODULE.apply(variables, tokens, method="f_hat"), method="decode")


@jax.jit
def remainders(variables, x):
    """What every code is chosen for: vectors [N * L, z] that the coarser scales left over; and the codes' numbers."""

    def collect(module, x):
        f, quantizer = module.features(x), module.quantizer
        tokens, sums = quantizer.encode(f)
        rests = [f, *(f - f_hat for f_hat in sums[:-1])]
        return jnp.concatenate([quantizer.pooled(s, rest) for s, rest in enumerate(rests)], axis=1), tokens

    vectors, tokens = MODULE.apply(variables, x, method=collect)
    return vectors.reshape(-1, vectors.shape[-1]), tokens.reshape(-1)


def reseed(variables, x, key, least):
    """Variables in which codes used for fewer than `least` of all tokens of x have moved to vectors drawn from x's."""
    vectors, tokens = remainders(variables, x)
    params = variables["params"]
    codes = params["quantize"]["embedding"]["weight"]
    share = jnp.bincount(tokens, length=len(codes)) / tokens.size
    drawn = jax.random.choice(key, vectors, (len(codes),), replace=False)
    codes = jnp.where((share < least)[:, None], drawn, codes)
    quantize = params["quantize"] | {"embedding": {"weight": codes}}
    return variables | {"params": params | {"quantize": quantize}}


def loss_fn(params, buffers, x):
    """(mean squared error + VQ_WEIGHT vq, squared error) of a batch."""
    y, vq, _ = MODULE.apply({"params": params, **buffers}, x, method="training_loss")
    error = jnp.mean(jnp.square(y - x))
    return error + VQ_WEIGHT * vq, error


def train(images, steps, batch=32, learning_rate=4e-3, seed=0):
    """Variables fitted to uint8 images [N, 8, 8, 1]; in the first two thirds unused codes are put to use."""
    x, key = to_signed(images), jax.random.key(seed)
    variables = dict(jax.jit(MODULE.init)(key, x[:1]))
    variables = reseed(variables, x, key, least=1.0)  # all: the initial N(0, 1) is far from the encoder's scale
    tx = optax.adam(optax.cosine_decay_schedule(learning_rate, steps))
    opt_state = tx.init(variables["params"])

    @jax.jit
    def step(variables, opt_state, key):
        rows = jax.random.randint(key, (batch,), 0, len(x))
        params, buffers = variables["params"], {k: v for k, v in variables.items() if k != "params"}
        (_, error), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, buffers, x[rows])
        updates, opt_state = tx.update(grads, opt_state, params)
        return variables | {"params": optax.apply_updates(params, updates)}, opt_state, error

    start = time.time()
    for i in range(steps):
        variables, opt_state, error = step(variables, opt_state, jax.random.fold_in(key, i))
        if (i + 1) % RESEED == 0 and 3 * i < 2 * steps:
            variables = reseed(variables, x, jax.random.fold_in(key, steps + i), least=1e-3)
        if (i + 1) % 500 == 0:
            print(f"step {i + 1:5d}  squared error {error:.4f}  {time.time() - start:.0f} s", flush=True)
    return variables


def reconstruct(variables, images):
    """Grey levels, not rounded, of the images that the tokens stand for: uint8 [N, 8, 8, 1] -> float32."""
    return 8 * (np.asarray(decode(variables, encode(variables, to_signed(images)))) + 1)


def distance(images, labels, others):
    """FD x 100 between two sets of uint8 images, in the features that judge the digits experiments."""
    design = classifier.Design((8, 8, 1), 17, 10)
    layers = classifier.train(images, labels, design).layers
    a, b = (np.asarray(classifier.features_and_logits(layers, x, design)[0]) for x in (images, others))
    return 100 * frechet.frechet_from_features(a, b)


def main(out="digits_vqvae.safetensors", steps=2500):
    """Train, score, write `out`; returns the mean absolute error on the held-out digits in grey levels."""
    source, held_out = open_source("digits", "train"), open_source("digits", "test").images
    variables = train(source.images, steps)

    levels = reconstruct(variables, held_out)
    error = float(np.mean(np.abs(levels - held_out)))
    exact = np.mean(np.round(levels) == held_out)
    print(f"{len(held_out)} held-out digits: mean absolute error {error:.3f} grey levels, {exact:.0%} of pixels exact")
    decoded = np.round(reconstruct(variables, source.images)).astype(np.uint8)
    fd = distance(source.images, source.labels, decoded)
    used = len(np.unique(encode(variables, to_signed(source.images))))
    print(f"FD x 100 of the decoded training images {fd:.2f}, {used} of {CONFIG['vocab_size']} codes used")

    metadata = {"format": "pt", "ddo_jax_kind": "vqvae", "ddo_jax_config": json.dumps(CONFIG)}
    data = safetensors.dumps(convert.to_torch("vqvae", CONFIG, variables), metadata)
    files.write_bytes(out, data)
    print(f"wrote {out}: {len(data):,} bytes")
    return error


if __name__ == "__main__":
    with jax.default_matmul_precision("highest"):  # true float32, also on GPUs and TPUs
        main(*sys.argv[1:])
