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

import ddo_jax

SIGMA_DATA = 0.5
# beta is about 1 / std(r) and r grows with the dimension: images take beta 0.01 to 0.1, with alpha 0.5 to 6.
# At alpha = 1 r stays centred; more first pulls r down on data and fakes alike, which would hide the margin.
ALPHA, BETA = 1.0, 0.5
P_MEAN, P_STD = -1.2, 1.2
CLASSES = 2
LINE = (
    "step {step:3d}  loss {loss:.4f}  r_real {r_real_mean:+.4f} (std {r_real_std:.4f})  "
    "r_fake {r_fake_mean:+.4f}  margin {margin:+.4f}  accuracy {accuracy:.3f}"
)


def init(key, width=64):
    """Parameters of an MLP: 2 coordinates, a noise embedding of 8, a class -> 2 coordinates."""
    sizes = [2 + 8 + CLASSES, width, width, 2]
    return [
        {"w": jax.random.normal(k, (m, n)) / np.sqrt(m), "b": jnp.zeros(n)}
        for k, m, n in zip(jax.random.split(key, len(sizes) - 1), sizes[:-1], sizes[1:], strict=True)
    ]


def apply_fn(params, x_in, c_noise, label):
    """The raw network F: x_in [B, 2], c_noise [B], label [B] -> [B, 2]."""
    angles = c_noise[:, None] * 2.0 ** jnp.arange(4.0)[None]
    h = jnp.concatenate([x_in, jnp.sin(angles), jnp.cos(angles), jax.nn.one_hot(label, CLASSES)], axis=1)
    for i, layer in enumerate(params):
        h = h @ layer["w"] + layer["b"][None]
        h = jax.nn.silu(h) if i < len(params) - 1 else h
    return h


def moons(rng, n):
    """Data: two half-moons, points [n, 2] and labels [n]."""
    label = rng.integers(0, CLASSES, n)
    angle = np.pi * rng.random(n)
    x = np.stack([np.cos(angle) - 0.5, np.sin(angle) - 0.25], axis=1) * np.where(label, -1, 1)[:, None]
    return (0.6 * x + 0.02 * rng.standard_normal((n, 2))).astype(np.float32), label.astype(np.int32)


def draw(key, n):
    """All the randomness of a step: one noise level and one noise vector per row."""
    key_sigma, key_eps = jax.random.split(key)
    sigma = ddo_jax.noise_level(jax.random.normal(key_sigma, (n,)), P_MEAN, P_STD)
    return sigma, jax.random.normal(key_eps, (n, 2))


def ratio(params, ref, x, sigma, eps, label):
    x_in, c_noise, f_hat = ddo_jax.edm_inputs(x, sigma, eps, SIGMA_DATA)
    f = apply_fn(params, x_in, c_noise, label)
    f_ref = apply_fn(jax.lax.stop_gradient(ref), x_in, c_noise, label)
    return ddo_jax.diffusion_log_ratio(f, f_ref, f_hat)


def loss_fn(params, ref, batch, sigma, eps):
    r_real = ratio(params, ref, batch["real"], sigma, eps, batch["real_label"])
    r_fake = ratio(params, ref, batch["fake"], sigma, eps, batch["fake_label"])  # the same sigma and eps
    return ddo_jax.ddo_loss(r_real, r_fake, alpha=ALPHA, beta=BETA)


def pretrain(key, x, label, steps, batch=256):
    """An ordinary denoiser, stopped early: the reference."""
    tx = optax.adam(3e-3)

    @jax.jit
    def step(params, opt_state, key):
        key_rows, key_draw = jax.random.split(key)
        rows = jax.random.randint(key_rows, (batch,), 0, len(x))
        x_in, c_noise, f_hat = ddo_jax.edm_inputs(x[rows], *draw(key_draw, batch), SIGMA_DATA)

        def mse(p):
            return jnp.mean((apply_fn(p, x_in, c_noise, label[rows]) - f_hat) ** 2)

        updates, opt_state = tx.update(jax.grad(mse)(params), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    params = init(key)
    opt_state = tx.init(params)
    for i in range(steps):
        params, opt_state = step(params, opt_state, jax.random.fold_in(key, i))
    return params


@functools.partial(jax.jit, static_argnames="settings")
def sample(params, latents, label, settings):
    """Samples of the model, by the 35-evaluation EDM sampler."""

    def denoise(x, sigma):
        x_in, c_noise, _ = ddo_jax.edm_inputs(x, sigma, jnp.zeros_like(x), SIGMA_DATA)
        return ddo_jax.denoised(apply_fn(params, x_in, c_noise, label), x, sigma, SIGMA_DATA)

    return ddo_jax.heun_sample(denoise, latents, settings)


def finetune(params, batches, key, learning_rate=1e-3):
    """Yields (loss, stats) of every step of one DDO round that starts, and draws its reference, at params."""
    tx = optax.adam(learning_rate)

    # The reference is an argument: XLA would fold a constant, round differently, and r would start at 1e-7.
    @jax.jit
    def step(params, ref_params, opt_state, batch, key):
        sigma, eps = draw(key, len(batch["real"]))
        grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, stats), grads = grad_fn(params, ref_params, batch, sigma, eps)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss, stats

    ref_params, opt_state = params, tx.init(params)
    for i, batch in enumerate(batches):
        key_step = jax.random.fold_in(key, i)
        params, opt_state, loss, stats = step(params, ref_params, opt_state, batch, key_step)
        yield loss, stats


def paired(rng, real, fake, steps, batch):
    """Batches of half data, half fakes; each is (points, labels)."""
    for _ in range(steps):
        i, j = rng.integers(0, len(real[0]), batch), rng.integers(0, len(fake[0]), batch)
        yield {"real": real[0][i], "real_label": real[1][i], "fake": fake[0][j], "fake_label": fake[1][j]}


def main(steps=300, pretrain_steps=200, batch=512, every=50, pool=4096, seed=0):
    """One DDO round; returns what it printed, a list of dicts: step 0, then means over `every` steps."""
    rng = np.random.default_rng(seed)
    key_pretrain, key_sample, key_tune = jax.random.split(jax.random.key(seed), 3)
    real = moons(rng, pool)
    ref_params = pretrain(key_pretrain, *map(jnp.asarray, real), pretrain_steps)
    label = rng.permutation(np.arange(pool, dtype=np.int32) % CLASSES)  # strictly balanced
    latents = jax.random.normal(key_sample, (pool, 2))
    fake = np.asarray(sample(ref_params, latents, label, ddo_jax.HeunSettings())), label

    print(f"at the reference r = 0 and the loss is (1 + alpha) log 2 = {(1 + ALPHA) * np.log(2):.4f}")
    history, window = [], []
    batches = paired(rng, real, fake, steps + 1, batch)
    for i, (loss, stats) in enumerate(finetune(ref_params, batches, key_tune)):
        window.append((loss, stats))
        if i % every == 0:
            losses, all_stats = zip(*window, strict=True)
            total = functools.reduce(functools.partial(jax.tree.map, operator.add), all_stats)
            means = {k: float(v) for k, v in ddo_jax.summarize(total).items()}
            history.append({"step": i, "loss": float(np.mean(losses))} | means)
            print(LINE.format(**history[-1]))
            window = []
    return history


if __name__ == "__main__":
    # r is a small difference of two networks: true float32 products, also on GPUs and TPUs.
    with jax.default_matmul_precision("highest"):
        main()
