"""The DDO loss in a stranger's training loop: plain JAX and optax, no trainer, a few seconds on a CPU.

    python examples/optax_loop.py

A small denoiser of two half-moons is trained too briefly, its samples become the fakes, and DDO fine-tunes it
against itself. Only `ratio` and `loss_fn` below are about DDO; `apply_fn` and the rest could be anybody's.
"""

import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import optax
import toys

import ddo_jax

SIGMA_DATA, P_MEAN, P_STD = 0.5, -1.2, 1.2
# beta is about 0.2 alpha / std(r) and r grows with the dimension: images take 0.01 to 0.1, with alpha 0.5 to 6.
# At alpha = 1 r stays centred; more first pulls r down on data and fakes alike, which would hide the margin.
ALPHA, BETA = 1.0, 1.0
LINE = (
    "step {step:3d}  loss {loss:.4f}  r_real {r_real_mean:+.4f} (std {r_real_std:.4f})  "
    "r_fake {r_fake_mean:+.4f}  margin {margin:+.4f}  accuracy {accuracy:.3f}  energy distance x 1000 {score:.2f}"
)


def init(key, width=64):
    """Parameters of an MLP: 2 coordinates and a noise embedding of 8 -> 2 coordinates."""
    shapes = zip(jax.random.split(key, 3), [2 + 8, width, width], [width, width, 2], strict=True)
    return [{"w": jax.random.normal(k, (m, n)) / np.sqrt(m), "b": jnp.zeros(n)} for k, m, n in shapes]


def apply_fn(params, x_in, c_noise):
    """The raw network F: x_in [B, 2], c_noise [B] -> [B, 2]."""
    angles = c_noise[:, None] * 2.0 ** jnp.arange(4.0)[None]
    h = jnp.concatenate([x_in, jnp.sin(angles), jnp.cos(angles)], axis=1)
    for i, layer in enumerate(params):
        h = h @ layer["w"] + layer["b"][None]
        h = jax.nn.silu(h) if i < len(params) - 1 else h
    return h


def ratio(params, ref, x, sigma, eps):
    x_in, c_noise, f_hat = ddo_jax.edm_inputs(x, sigma, eps, SIGMA_DATA)
    f, f_ref = apply_fn(params, x_in, c_noise), apply_fn(jax.lax.stop_gradient(ref), x_in, c_noise)
    return ddo_jax.diffusion_log_ratio(f, f_ref, f_hat)


def loss_fn(params, ref, real, fake, sigma, eps):
    r_real, r_fake = ratio(params, ref, real, sigma, eps), ratio(params, ref, fake, sigma, eps)  # the same sigma, eps
    return ddo_jax.ddo_loss(r_real, r_fake, alpha=ALPHA, beta=BETA)


def mse(params, ref, real, fake, sigma, eps):
    """What a denoiser is pretrained by; nothing but the error, in the place of statistics."""
    x_in, c_noise, f_hat = ddo_jax.edm_inputs(real, sigma, eps, SIGMA_DATA)
    return (error := jnp.mean((apply_fn(params, x_in, c_noise) - f_hat) ** 2)), error


def train(params, ref, real, fake, key, loss, steps, batch, rate):
    """Yields (parameters, loss, statistics) of every step; a fresh optimizer."""
    tx = optax.adam(rate)

    # The reference is an argument: XLA would fold a constant, round differently, and r would start at 1e-7.
    @jax.jit
    def step(params, ref, opt_state, key):
        key_rows, key_sigma, key_eps = jax.random.split(key, 3)
        i, j = jax.random.randint(key_rows, (2, batch), 0, len(real))
        sigma = ddo_jax.noise_level(jax.random.normal(key_sigma, (batch,)), P_MEAN, P_STD)
        draws = sigma, jax.random.normal(key_eps, (batch, 2))
        (value, stats), grads = jax.value_and_grad(loss, has_aux=True)(params, ref, real[i], fake[j], *draws)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value, stats

    opt_state = tx.init(params)
    for i in range(steps):
        params, opt_state, value, stats = step(params, ref, opt_state, jax.random.fold_in(key, i))
        yield params, value, stats


@functools.partial(jax.jit, static_argnames="n")
def sample(params, key, n):
    """n samples of the model, by the 35-evaluation EDM sampler."""

    def denoise(x, sigma):
        x_in, c_noise, _ = ddo_jax.edm_inputs(x, sigma, jnp.zeros_like(x), SIGMA_DATA)
        return ddo_jax.denoised(apply_fn(params, x_in, c_noise), x, sigma, SIGMA_DATA)

    return ddo_jax.heun_sample(denoise, jax.random.normal(key, (n, 2)), ddo_jax.HeunSettings())


def main(steps=300, pretraining=200, batch=512, every=50, pool=4096, seed=0):
    """One DDO round; returns what it printed: step 0, then means, and the score of the average of the parameters."""
    rng, keys = np.random.default_rng(seed), jax.random.split(jax.random.key(seed), 4)
    real, fresh = toys.moons(rng, pool), toys.moons(rng, 2048)
    *_, (ref, _, _) = train(init(keys[0]), None, real, real, keys[0], mse, pretraining, 256, 3e-3)
    fake = sample(ref, keys[1], pool)
    print(f"at the reference r = 0 and the loss is (1 + alpha) log 2 = {(1 + ALPHA) * np.log(2):.4f}")
    history, window, mean = [], [], ref
    for i, (params, *step) in enumerate(train(ref, ref, real, fake, keys[2], loss_fn, steps + 1, batch, 1e-3)):
        window, mean = [*window, step], ddo_jax.ema_update(mean, params, 0.95)
        if i % every == 0:
            losses, stats = zip(*window, strict=True)
            total = functools.reduce(functools.partial(jax.tree.map, operator.add), stats)
            means = {k: float(v) for k, v in ddo_jax.summarize(total).items()}
            score = 1000 * float(toys.energy_distance(sample(mean, keys[3], len(fresh)), fresh))
            history.append({"step": i, "loss": float(np.mean(losses)), "score": score} | means)
            print(LINE.format(**history[-1]))
            window = []
    return history


if __name__ == "__main__":
    # r is a small difference of two networks: true float32 products, also on GPUs and TPUs.
    with jax.default_matmul_precision("highest"):
        main()
