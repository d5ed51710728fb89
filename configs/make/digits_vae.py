"""A small real VAE for the 8x8 digits, so that the latent path of EDM2 can be tried on a laptop.

    python configs/make/digits_vae.py [digits_vae.safetensors]

About a minute on 2 CPU cores. The network is SD-VAE's (AutoencoderKL of diffusers) at 43,421 parameters: 8x8 grey
pixels in [0, 1] become 4x4x4 latents. It writes a file with diffusers' parameter names; its metadata hold what
EDM2 needs beside the weights: mean and deviation of each latent channel over the training images. The shipped
configs/digits_vae.safetensors was made by this script. Expected: held-out digits come back with a mean absolute
error of about 0.3 of the 17 grey levels (the mean training image in their place: 3.1).
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
from ddo_jax.data.sources import open_source
from ddo_jax.models.sdvae import from_config

CONFIG = {  # diffusers' argument names
    "in_channels": 1,
    "out_channels": 1,
    "latent_channels": 4,
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
LEVELS = 17  # grey levels 0..16; the network sees level / 16
# The posterior becomes about 1 % as wide as the latents themselves. At 1e-4 (5000 steps) one channel of four was
# noise for the most part: posterior deviation 0.7, deviation of its means 0.5.
KL_WEIGHT = 1e-5
MODULE = from_config(CONFIG)


def to_unit(levels):
    """uint8 grey levels -> float32 in [0, 1]: EDM2's VAE input is not centred."""
    return jnp.asarray(levels, jnp.float32) / (LEVELS - 1)


@jax.jit
def encode(params, x):
    return MODULE.apply({"params": params}, x, method="encode")


@jax.jit
def decode(params, z):
    return MODULE.apply({"params": params}, z, method="decode")


def loss_fn(params, x, key):
    """|y - x|^2 + KL_WEIGHT KL(posterior, N(0, 1)) per image; y is decoded from one sample of the posterior."""
    mean, std = encode(params, x)
    y = decode(params, mean + std * jax.random.normal(key, mean.shape))
    kl = (jnp.square(mean) + jnp.square(std) - 1) / 2 - jnp.log(std)
    return (jnp.sum(jnp.square(y - x)) + KL_WEIGHT * jnp.sum(kl)) / len(x)


def train(images, steps, batch=32, learning_rate=8e-3, seed=0):
    """Parameters fitted to uint8 images [N, 8, 8, 1]."""
    x, key = to_unit(images), jax.random.key(seed)
    params = jax.jit(MODULE.init)(key, x[:1])["params"]
    tx = optax.adam(optax.cosine_decay_schedule(learning_rate, steps))
    opt_state = tx.init(params)

    @jax.jit
    def step(params, opt_state, key):
        key_rows, key_noise = jax.random.split(key)
        rows = jax.random.randint(key_rows, (batch,), 0, len(x))
        loss, grads = jax.value_and_grad(loss_fn)(params, x[rows], key_noise)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    start = time.time()
    for i in range(steps):
        params, opt_state, loss = step(params, opt_state, jax.random.fold_in(key, i + 1))
        if (i + 1) % 500 == 0:
            print(f"step {i + 1:5d}  loss {loss:.3f}  {time.time() - start:.0f} s", flush=True)
    return params


def reconstruct(params, images):
    """Grey levels, not rounded, of the decoded posterior means: uint8 [N, 8, 8, 1] -> float32."""
    y = decode(params, encode(params, to_unit(images))[0])
    return (LEVELS - 1) * np.clip(np.asarray(y), 0, 1)


def main(out="digits_vae.safetensors", steps=4000):
    """Train, score on the held-out digits, write `out`; returns the mean absolute error in grey levels."""
    images, held_out = (open_source("digits", split).images for split in ("train", "test"))
    params = train(images, steps)

    levels = reconstruct(params, held_out)
    error = float(np.mean(np.abs(levels - held_out)))
    exact = np.mean(np.round(levels) == held_out)
    print(f"{len(held_out)} held-out digits: mean absolute error {error:.3f} grey levels, {exact:.0%} of pixels exact")

    mean, std = (np.asarray(v, np.float64) for v in encode(params, to_unit(images)))
    print("deviation of the posterior, per channel", std.mean((0, 1, 2)).round(3))
    statistics = {"raw_mean": mean.mean((0, 1, 2)).tolist(), "raw_std": mean.std((0, 1, 2)).tolist()}
    print("\n".join(f"{name} {np.round(v, 3)}" for name, v in statistics.items()))
    metadata = {"format": "pt", "ddo_jax_kind": "sdvae", "ddo_jax_config": json.dumps(CONFIG)}
    metadata |= {name: json.dumps(v) for name, v in statistics.items()}
    data = safetensors.dumps(convert.to_torch("sdvae", CONFIG, {"params": params}), metadata)
    files.write_bytes(out, data)
    print(f"wrote {out}: {len(data):,} bytes")
    return error


if __name__ == "__main__":
    with jax.default_matmul_precision("highest"):  # true float32, also on GPUs and TPUs
        main(*sys.argv[1:])
