"""The EDM sampler against a Gaussian whose ODE has a closed form, and the reference's time grids; guidance.

Golden images: tests/parity/test_edm2_samplers.py.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddo_jax.core.edm import expand
from ddo_jax.core.samplers import HeunSettings, guided, heun_sample, heun_schedule, heun_step, heun_times

GOLDEN = np.load(Path(__file__).parents[1] / "goldens" / "edm_units.npz")
RELEASED = {
    "cifar18": HeunSettings(),
    "ffhq40": HeunSettings(num_steps=40),
    "imagenet256": HeunSettings(num_steps=256, s_churn=40, s_min=0.05, s_max=50, s_noise=1.003),
}
MEAN, STD = 0.3, 0.5


def gaussian(x, sigma):
    """The exact denoiser of N(MEAN, STD^2)."""
    assert sigma.shape == x.shape[:1] and sigma.dtype == x.dtype
    s2 = expand(sigma, x.ndim) ** 2
    return (STD**2 * x + s2 * MEAN) / (STD**2 + s2)


def exact(latents, sigma_max=80.0):
    """dx/dt = t (x - MEAN) / (STD^2 + t^2), so x - MEAN is proportional to sqrt(STD^2 + t^2)."""
    return MEAN + (sigma_max * latents - MEAN) * STD / np.sqrt(STD**2 + sigma_max**2)


def latents(dtype=jnp.float32):
    return jnp.linspace(-2, 2, 6, dtype=dtype).reshape(2, 3)


# ---- the time grid ----


@pytest.mark.parametrize("name", RELEASED)
def test_noise_levels_seen_by_the_network(name):
    settings = RELEASED[name]
    schedule = heun_schedule(settings)
    seen = np.stack([schedule.t_hat, schedule.t_next], axis=1).reshape(-1)[:-1]
    assert len(seen) == settings.nfe
    np.testing.assert_allclose(seen, GOLDEN[f"time/{name}_sigmas_seen"], rtol=1e-12)


def test_the_network_is_called_at_these_levels_in_this_order():
    seen = []

    def denoise(x, sigma):
        seen.append(float(sigma[0]))
        return 0 * x

    heun_sample(denoise, latents(), RELEASED["cifar18"], scan=False)
    np.testing.assert_allclose(seen, GOLDEN["time/cifar18_sigmas_seen"], rtol=1e-6)


def test_churn_only_between_its_limits():
    settings = HeunSettings(num_steps=8, s_churn=2.0, s_min=0.1, s_max=10.0, s_noise=1.5)
    t, schedule = heun_times(settings)[:-1], heun_schedule(settings)
    inside = (t >= 0.1) & (t <= 10)
    assert 0 < inside.sum() < 8
    np.testing.assert_array_equal(schedule.noise_std > 0, inside)
    np.testing.assert_allclose(schedule.t_hat[inside] / t[inside], 1.25)
    np.testing.assert_allclose(schedule.noise_std[inside], 1.5 * 0.75 * t[inside])  # sqrt(1.25^2 - 1) = 0.75
    first, last = np.flatnonzero(inside)[[0, -1]]
    limits = heun_schedule(settings._replace(s_min=t[last], s_max=t[first]))
    np.testing.assert_array_equal(limits.noise_std > 0, inside)  # both limits are inclusive
    capped = heun_schedule(settings._replace(s_churn=100.0))
    np.testing.assert_allclose((capped.t_hat / t)[inside], np.sqrt(2))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_steps": 1}, "num_steps is 1: .* at least 2"),
        ({"sigma_min": 0.0}, "sigma_min is 0.0 .* need 0 < sigma_min"),
        ({"sigma_min": 90.0}, "sigma_max is 80.0"),
        ({"rho": 0.0}, "rho is 0.0"),
        ({"s_churn": -1.0}, "s_churn is -1.0"),
        ({"s_churn": float("inf")}, "s_churn is inf: it must be >= 0 .* and finite"),
        ({"s_noise": float("nan")}, "s_noise is nan"),
        ({"s_noise": float("inf"), "s_churn": 1.0}, "s_noise is inf"),
        ({"s_min": float("nan")}, "s_min is nan"),
        ({"s_max": float("nan")}, "s_max is nan"),
        ({"sigma_max": float("inf")}, "sigma_max is inf: gives the noise level inf; allowed: 1.1e-19 to 1.8e.19"),
        ({"sigma_max": 1e25}, "sigma_max is 1e.25: gives the noise level 1e.25"),
        ({"sigma_min": 1e-40}, "sigma_min is 1e-40: gives the noise level 1e-40"),
        ({"sigma_min": float("nan")}, "sigma_min is nan"),
        ({"sigma_min": 79.9999999}, "two of the 2 noise levels are equal in float32"),
        ({"rho": float("inf")}, "rho is inf: two of the 18 noise levels are equal in float32"),
        ({"rho": float("nan")}, "rho is nan"),
        ({"rho": 1e-3}, "rho is 0.001: .* take a larger rho"),
        ({"rho": 1e-2}, "rho is 0.01: gives the noise level 0"),
        ({"rho": 1e-300}, "rho is 1e-300"),
        ({"rho": 1e12, "grid": "float32"}, "rho is "),
        ({"grid": "float16"}, "grid is .float16.: allowed are float64, float32"),
    ],
)
def test_bad_settings_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        heun_sample(gaussian, latents(), HeunSettings(**change))


def test_settings_are_a_static_argument():
    sample = jax.jit(heun_sample, static_argnums=(0, 2))
    first, second = (sample(gaussian, latents(), HeunSettings(num_steps=4)) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert sample._cache_size() == 1


# ---- the solver ----


def test_converges_to_the_exact_solution_at_second_order():
    errors = []
    with jax.enable_x64(True):
        x = latents(jnp.float64)
        for n in (32, 64, 128):
            out = heun_sample(gaussian, x, HeunSettings(num_steps=n, sigma_min=1e-4))
            assert out.dtype == jnp.float64
            errors.append(np.abs(out - exact(np.asarray(x))).max())
    ratios = np.array(errors[:-1]) / errors[1:]
    assert errors[-1] < 2e-3
    assert ((3.7 < ratios) & (ratios < 4.7)).all(), ratios  # Euler would halve


def test_float32_costs_little():
    settings = HeunSettings(num_steps=18)
    low = heun_sample(gaussian, latents(), settings)
    with jax.enable_x64(True):
        high = np.asarray(heun_sample(gaussian, latents(jnp.float64), settings))
    assert low.dtype == jnp.float32
    assert np.abs(low - high).max() / np.abs(high).max() < 2e-6


def test_one_step_by_hand():
    x_hat, t_hat, t_next = jnp.array([[2.0]]), 4.0, 1.0
    slopes = []

    def denoise(x, sigma):
        slopes.append((float(x[0, 0]), float(sigma[0])))
        return 0.5 * x

    euler = heun_step(denoise, x_hat, t_hat, t_next, last=True)
    np.testing.assert_allclose(euler, 2 - 3 * 0.25)  # d = 1 / 4
    heun = heun_step(denoise, x_hat, t_hat, t_next, last=False)
    np.testing.assert_allclose(heun, 2 - 3 * (0.25 + 0.625) / 2)  # d' = 0.625
    assert slopes == [(2.0, 4.0), (2.0, 4.0), (1.25, 1.0)]


@pytest.mark.parametrize("s_churn", [0.0, 4.0])
def test_scan_equals_the_unrolled_loop(s_churn):
    settings = HeunSettings(num_steps=6, s_churn=s_churn, s_max=30.0)
    noises = jnp.asarray(np.random.default_rng(0).normal(size=(6, 2, 3)), jnp.float32)
    noise = lambda i: noises[i]  # noqa: E731
    outs = [heun_sample(gaussian, latents(), settings, noise, scan=scan) for scan in (True, False)]
    np.testing.assert_allclose(outs[0], outs[1], rtol=1e-5, atol=1e-6)
    if s_churn:
        still = heun_sample(gaussian, latents(), settings._replace(s_churn=0.0))
        assert np.abs(outs[0] - still).max() > 0.01


def test_differentiable_and_vmappable():
    settings = HeunSettings(num_steps=3)
    grad = jax.grad(lambda x: jnp.sum(heun_sample(gaussian, x, settings)))(latents())
    # The map is affine, so a difference over a long way is its derivative.
    shifted = heun_sample(gaussian, latents() + 4, settings) - heun_sample(gaussian, latents(), settings)
    np.testing.assert_allclose(grad, shifted / 4, rtol=1e-4)
    mapped = jax.vmap(lambda x: heun_sample(gaussian, x[None], settings)[0])(latents())
    np.testing.assert_allclose(mapped, heun_sample(gaussian, latents(), settings), rtol=1e-5, atol=1e-6)


# ---- churn ----


def test_churn_needs_noise_and_nothing_else_does():
    settings = HeunSettings(num_steps=4, s_churn=1.0)
    with pytest.raises(ValueError, match="s_churn is 1.0 and noise is None"):
        heun_sample(gaussian, latents(), settings)

    def refuse(i):
        raise AssertionError("noise was asked for")

    heun_sample(gaussian, latents(), settings._replace(s_churn=0.0), refuse)
    heun_sample(gaussian, latents(), settings._replace(s_min=100.0), refuse)  # churn set, but no step inside


@pytest.mark.parametrize("scan", [True, False])
def test_the_noise_added_is_noise_std_times_noise(scan):
    """With D(x) = x nothing else moves, so the result is the latents plus every step's noise."""
    settings = HeunSettings(num_steps=5, s_churn=1.0, s_noise=1.1, sigma_max=4.0)
    noises = np.random.default_rng(0).normal(size=(5, 2, 3)).astype(np.float32)
    out = heun_sample(lambda x, sigma: x, latents(), settings, lambda i: jnp.asarray(noises)[i], scan=scan)
    std = heun_schedule(settings).noise_std
    expected = 4 * np.asarray(latents()) + np.einsum("n,nbd->bd", std, noises)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)


def test_churn_keeps_the_distribution():
    settings = HeunSettings(num_steps=32, s_churn=8.0)
    x = jax.random.normal(jax.random.key(0), (1, 20_000))
    out = heun_sample(
        gaussian, x, settings, lambda i: jax.random.normal(jax.random.fold_in(jax.random.key(1), i), x.shape)
    )
    np.testing.assert_allclose([out.mean(), out.std()], [MEAN, STD], atol=0.03)


# ---- guidance ----


def test_guidance_pushes_away_from_the_guide():
    main, guide = (lambda x, sigma: 2 * x + expand(sigma, 2)), (lambda x, sigma: x)
    x, sigma = latents(), jnp.array([1.0, 3.0])
    for weight in (0.0, 0.5, 1.5, jnp.float32(1.0)):
        expected = x + float(weight) * (x + sigma[:, None])
        np.testing.assert_allclose(guided(main, guide, weight)(x, sigma), expected, rtol=1e-6)
    traced = jax.jit(lambda w: guided(main, guide, w)(x, sigma))
    np.testing.assert_allclose(traced(1.5), guided(main, guide, 1.5)(x, sigma), rtol=1e-6)


def test_weight_1_never_calls_the_guide():
    def refuse(x, sigma):
        raise AssertionError("the guide was called")

    settings = HeunSettings(num_steps=3)
    for weight, guide in ((1, refuse), (1.0, refuse), (1, None)):
        out = heun_sample(guided(gaussian, guide, weight), latents(), settings)
        np.testing.assert_array_equal(out, heun_sample(gaussian, latents(), settings))
    with pytest.raises(AssertionError, match="was called"):
        heun_sample(guided(gaussian, refuse, 1.5), latents(), settings)
    with pytest.raises(ValueError, match="weight is 1.5 and guide is None"):
        guided(gaussian, None, 1.5)


def test_guidance_of_half_precision_networks_keeps_the_state():
    half = lambda x, sigma: gaussian(x, sigma).astype(jnp.bfloat16)  # noqa: E731
    d = guided(half, half, 2.0)(latents(), jnp.ones(2))
    assert d.dtype == jnp.float32
    np.testing.assert_allclose(d, gaussian(latents(), jnp.ones(2)), atol=0.01)
