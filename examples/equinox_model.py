"""DDO on an Equinox model: the loss takes two modules, `eqx.filter_grad` differentiates the first.

    python examples/equinox_model.py

A denoiser of two moons in EDM's form, trained too briefly, plays two rounds against itself (`ddo_jax.self_play`).
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import toys

import ddo_jax

SIGMA_DATA, ALPHA, BETA = 0.6, 1.0, 1.0
BATCH, POOL, STEPS, EVERY = 512, 8192, 60, 20


class Denoiser(eqx.Module):
    """F(x_in, c_noise): [B, 2], [B] -> [B, 2]."""

    mlp: eqx.nn.MLP

    def __init__(self, key, width=96):
        self.mlp = eqx.nn.MLP(10, 2, width, depth=2, activation=jax.nn.silu, key=key)

    def __call__(self, x_in, c_noise):
        angles = c_noise[:, None] * 2.0 ** jnp.arange(4)[None]
        return jax.vmap(self.mlp)(jnp.concatenate([x_in, jnp.sin(angles), jnp.cos(angles)], axis=1))


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


@eqx.filter_jit
def trained(model, loss, data, pool, key, steps, rate):
    """The model after `steps` of Adam, its parameters averaged."""
    tx, ref = optax.adam(rate), model
    arrays, static = eqx.partition(model, eqx.is_inexact_array)

    def step(carry, key):
        arrays, mean, opt = carry
        rows, own = jax.random.split(key)
        i, j = jax.random.randint(rows, (2, BATCH), 0, len(data))
        grads = eqx.filter_grad(loss)(eqx.combine(arrays, static), ref, data[i], pool[j], own)
        updates, opt = tx.update(eqx.filter(grads, eqx.is_inexact_array), opt)
        arrays = eqx.apply_updates(arrays, updates)
        return (arrays, ddo_jax.ema_update(mean, arrays, 0.95), opt), None

    (_, mean, _), _ = jax.lax.scan(step, (arrays, arrays, tx.init(arrays)), jax.random.split(key, steps))
    return eqx.combine(mean, static)


@eqx.filter_jit
def sample(model, key, n):
    """n points by the EDM sampler."""

    def denoise(x, sigma):
        x_in, c_noise, _ = ddo_jax.edm_inputs(x, sigma, jnp.zeros_like(x), SIGMA_DATA)
        return ddo_jax.denoised(model(x_in, c_noise), x, sigma, SIGMA_DATA)

    return ddo_jax.heun_sample(denoise, jax.random.normal(key, (n, 2)), ddo_jax.HeunSettings())


def main(rounds=2, pretraining=800):
    """(energy distance to fresh data of the start, after DDO, after as many steps of MLE), times 1000."""
    rng = np.random.default_rng(0)
    data, fresh, other = (toys.moons(rng, n) for n in (POOL, 2048, 2048))

    def distance(model, seed, points):
        return 1000 * float(toys.energy_distance(sample(model, jax.random.key(seed), len(points)), points))

    def fakes(ref, n):
        return sample(ref, jax.random.key(100 + n), POOL)

    def train(ref, pool, n):
        for steps in range(EVERY, STEPS + 1, EVERY):  # each from ref anew: a longer run repeats a shorter one
            yield trained(ref, ddo, data, pool, jax.random.key(10 + n), steps, 1e-3)

    start = trained(Denoiser(jax.random.key(0)), mle, data, data, jax.random.key(1), pretraining, 3e-3)
    best, _ = ddo_jax.self_play(start, rounds=rounds, fakes=fakes, train=train, score=lambda m: distance(m, 4, fresh))
    control = trained(start, mle, data, data, jax.random.key(3), rounds * STEPS, 1e-3)
    found = [distance(m, 5, other) for m in (start, best, control)]  # on what selected nothing
    print("energy distance x 1000: start {:.2f}, after DDO {:.2f}, after as many steps of MLE {:.2f}".format(*found))
    return found


if __name__ == "__main__":
    with jax.default_matmul_precision("highest"):
        main()
