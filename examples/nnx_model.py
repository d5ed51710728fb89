"""DDO on a Flax NNX model: the loss takes two modules, `nnx.grad` differentiates the first.

    python examples/nnx_model.py

A denoiser of two moons in EDM's form, trained too briefly, then fine-tuned on its own samples.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import toys
from flax import nnx

import ddo_jax

SIGMA_DATA, ALPHA, BETA = 0.6, 1.0, 1.0
BATCH, POOL, STEPS = 512, 8192, 30


class Denoiser(nnx.Module):
    """F(x_in, c_noise): [B, 2], [B] -> [B, 2]."""

    def __init__(self, rngs, width=96):
        self.layers = nnx.List(nnx.Linear(m, n, rngs=rngs) for m, n in ((10, width), (width, width), (width, 2)))

    def __call__(self, x_in, c_noise):
        angles = c_noise[:, None] * 2.0 ** jnp.arange(4)[None]
        h = jnp.concatenate([x_in, jnp.sin(angles), jnp.cos(angles)], axis=1)
        for layer in self.layers[:-1]:
            h = nnx.silu(layer(h))
        return self.layers[-1](h)


def draw(key, n):
    """All the randomness of a step: (sigma, eps), the same for row i of real and fake, target and reference."""
    key_sigma, key_eps = jax.random.split(key)
    sigma = ddo_jax.noise_level(jax.random.normal(key_sigma, (n,)), -0.8, 1.2)
    return sigma, jax.random.normal(key_eps, (n, 2))


def ratio(model, ref, x, sigma, eps):
    x_in, c_noise, f_hat = ddo_jax.edm_inputs(x, sigma, eps, SIGMA_DATA)
    return ddo_jax.diffusion_log_ratio(model(x_in, c_noise), ref(x_in, c_noise), f_hat)  # stops ref's gradient


def ddo(model, ref, real, fake, key):
    draws = draw(key, len(real))
    r_real, r_fake = (ratio(model, ref, x, *draws) for x in (real, fake))
    return ddo_jax.ddo_loss(r_real, r_fake, alpha=ALPHA, beta=BETA)[0]


def mle(model, ref, real, fake, key):
    x_in, c_noise, f_hat = ddo_jax.edm_inputs(real, *draw(key, len(real)), SIGMA_DATA)
    return jnp.mean((model(x_in, c_noise) - f_hat) ** 2)


def trained(model, loss, data, pool, key, steps, rate):
    """A copy of the model after `steps` of Adam, its parameters averaged."""
    ref, model, mean = nnx.clone(model), nnx.clone(model), nnx.clone(model)
    optimizer = nnx.Optimizer(model, optax.adam(rate), wrt=nnx.Param)

    @nnx.jit
    def step(model, mean, optimizer, ref, key):
        rows, own = jax.random.split(key)
        i, j = jax.random.randint(rows, (2, BATCH), 0, len(data))
        optimizer.update(model, nnx.grad(loss)(model, ref, data[i], pool[j], own))
        nnx.update(mean, ddo_jax.ema_update(nnx.state(mean), nnx.state(model), 0.95))

    for k in jax.random.split(key, steps):
        step(model, mean, optimizer, ref, k)
    return mean


@nnx.jit(static_argnames="n")
def sample(model, key, n):
    """n points by the EDM sampler."""

    def denoise(x, sigma):
        x_in, c_noise, _ = ddo_jax.edm_inputs(x, sigma, jnp.zeros_like(x), SIGMA_DATA)
        return ddo_jax.denoised(model(x_in, c_noise), x, sigma, SIGMA_DATA)

    return ddo_jax.heun_sample(denoise, jax.random.normal(key, (n, 2)), ddo_jax.HeunSettings())


def main(pretraining=250):
    """(energy distance to fresh data of the start, after DDO, after as many steps of MLE), times 1000."""
    rng = np.random.default_rng(0)
    data, fresh = toys.moons(rng, POOL), toys.moons(rng, 2048)
    start = trained(Denoiser(nnx.Rngs(0)), mle, data, data, jax.random.key(1), pretraining, 3e-3)
    tuned = trained(start, ddo, data, sample(start, jax.random.key(2), POOL), jax.random.key(3), STEPS, 1e-3)
    control = trained(start, mle, data, data, jax.random.key(3), STEPS, 1e-3)
    models = (start, tuned, control)
    found = [1000 * float(toys.energy_distance(sample(m, jax.random.key(4), len(fresh)), fresh)) for m in models]
    print("energy distance x 1000: start {:.2f}, after DDO {:.2f}, after as many steps of MLE {:.2f}".format(*found))
    return found


if __name__ == "__main__":
    with jax.default_matmul_precision("highest"):
        main()
