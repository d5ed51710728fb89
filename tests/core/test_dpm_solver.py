"""DPM-Solver-v3 against ODEs with a closed form. Golden numbers: tests/parity/test_edm2_samplers.py."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddo_jax.core.dpm_solver import (
    DPMSettings,
    derivative_weights,
    dpm_grid,
    dpm_sample,
    dpm_schedule,
    exponential_sum,
)
from ddo_jax.core.edm import expand
from ddo_jax.core.samplers import guided

MEAN, STD = 0.3, 0.5
FINE = DPMSettings(sigma_min=0.02, sigma_max=20.0, grid="log", intervals=2**17)  # the trapezoid rule costs 3e-10
EVERYTHING = DPMSettings(num_steps=7, order=3, p_pseudo=True, c_pseudo=True)


def gaussian(x, sigma):
    """The exact denoiser of N(MEAN, STD^2)."""
    assert sigma.shape == x.shape[:1] and sigma.dtype == x.dtype
    s2 = expand(sigma, x.ndim) ** 2
    return (STD**2 * x + s2 * MEAN) / (STD**2 + s2)


def exact(latents, settings, mean=MEAN):
    """dx/dt = t (x - MEAN) / (STD^2 + t^2), so x - MEAN is proportional to sqrt(STD^2 + t^2)."""
    low, high = (np.hypot(STD, t) for t in (settings.sigma_min, settings.sigma_max))
    return mean + (settings.sigma_max * latents - mean) * low / high


def latents(dtype=jnp.float32):
    return jnp.linspace(-2, 2, 6, dtype=dtype).reshape(2, 3)


# ---- the numbers ----


def test_the_grid_ends_at_its_ends():
    settings = DPMSettings(num_steps=9, sigma_min=0.01, sigma_max=50.0, intervals=123)
    lam, indices = dpm_grid(settings)
    assert indices[0] == 0 and indices[-1] == 123 == len(lam) - 1
    np.testing.assert_allclose(np.exp(-lam[[0, -1]]), [50, 0.01], rtol=1e-12)
    np.testing.assert_allclose(np.diff(lam), lam[1] - lam[0], rtol=1e-12)
    np.testing.assert_allclose(dpm_schedule(settings).sigma, np.exp(-lam[indices[:-1]]), rtol=1e-12)


def test_more_steps_than_the_grid_can_hold_are_refused():
    assert len(np.unique(dpm_grid(DPMSettings(num_steps=139))[1])) == 140
    with pytest.raises(ValueError, match="num_steps is 140: two times fall on one node of the grid of 250 intervals"):
        dpm_grid(DPMSettings(num_steps=140))
    dpm_grid(DPMSettings(num_steps=140, intervals=1000))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_steps": 0}, "num_steps is 0: .* at least 1"),
        ({"sigma_min": 0.0}, "sigma_min is 0.0 .* need 0 < sigma_min"),
        ({"sigma_min": 90.0}, "sigma_max is 80.0"),
        ({"order": 0}, "order is 0: allowed are 1, 2, 3"),
        ({"order": 4}, "order is 4"),
        ({"grid": "edm"}, "grid is 'edm': allowed are karras, log, uniform, quadratic"),
        ({"intervals": 0}, "intervals is 0"),
        ({"c_pseudo": True, "corrector": False}, "c_pseudo is True and corrector is False"),
    ],
)
def test_bad_settings_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        dpm_sample(gaussian, latents(), DPMSettings(**change))


def test_exponential_sums():
    """Close to the integrals on a fine grid; the sum itself, (h/2) coth(h/2) times it, on the default one."""
    u = np.linspace(0, 1.5, 20_001)
    integrals = [math.exp(1.5) - 1, 0.5 * math.exp(1.5) + 1, (math.exp(1.5) * 1.25 - 2) / 2]
    np.testing.assert_allclose([exponential_sum(u - 4, k) for k in range(3)], integrals, rtol=1e-8)
    lam, _ = dpm_grid(DPMSettings())
    h, kappa = lam[1] - lam[0], 1.00014971
    np.testing.assert_allclose(exponential_sum(lam[7:30], 0), kappa * math.expm1(22 * h), rtol=1e-8)


@pytest.mark.parametrize("pseudo", [False, True])
def test_derivatives(pseudo):
    """Of a polynomial around its first point; Newton's differences are the same for 2 points only."""
    lam = np.array([-1.0, -1.5, 0.5])
    polynomial = lambda v: 3 - 2 * (v + 1) + 5 * (v + 1) ** 2  # noqa: E731
    for p in (1, 2, 3):
        got = derivative_weights(lam[:p], pseudo) @ polynomial(lam[:p])
        slope = (polynomial(lam[1]) - 3) / -0.5
        expected = [3, slope, 10] if pseudo else ([3, slope] if p == 2 else [3, -2, 10])
        np.testing.assert_allclose(got, expected[:p], rtol=1e-12)


def test_weights_do_not_move_data_that_sit_at_one_point():
    """x = D = c with sigma -> 0 stays: all weights of x and D add up to 1, up to the trapezoid rule."""
    schedule = dpm_schedule(EVERYTHING._replace(intervals=100_000))
    np.testing.assert_allclose(schedule.correct.sum(1), 1, rtol=1e-8)
    np.testing.assert_allclose(schedule.predict.sum(1), 1, rtol=1e-8)


# ---- the solver ----


def test_two_steps_by_hand():
    """sigma 4 -> 2 -> 1 on two intervals, D = 1 then 3: first order, then (for lack of steps) first order."""
    settings = DPMSettings(num_steps=2, sigma_min=1.0, sigma_max=4.0, grid="log", intervals=2)
    calls, kappa = [], 3 * math.log(2) / 2  # (h/2) coth(h/2)

    def denoise(x, sigma):
        calls.append((float(x[0, 0]), float(sigma[0])))
        return jnp.full_like(x, (1.0, 3.0)[len(calls) - 1])

    x = dpm_sample(denoise, jnp.full((1, 1), 2.0), settings, scan=False)
    middle = 8 / 2 + kappa / 2
    np.testing.assert_allclose(calls, [(8, 4), (middle, 2)], rtol=1e-6)
    np.testing.assert_allclose(x[0, 0], middle / 2 + kappa * 3 / 2, rtol=1e-6)
    calls.clear()  # second order: the slope of D over ln 2 is 2
    x = dpm_sample(denoise, jnp.full((1, 1), 2.0), settings._replace(lower_order_final=False), scan=False)
    e_1 = math.log(2) / 2 * (2 * math.log(2))  # trapezoid of e^u u
    np.testing.assert_allclose(x[0, 0], middle / 2 + kappa * 3 / 2 + e_1 / 2 * 2 / math.log(2), rtol=1e-6)


@pytest.mark.parametrize(
    "change, n, low, high",
    [
        ({"order": 1}, 256, 1.9, 2.1),
        ({"corrector": False}, 256, 3.8, 4.2),
        ({}, 256, 3.6, 4.2),  # with fewer steps the terms of higher order matter
        ({"c_pseudo": True}, 256, 3.8, 4.2),
        ({"order": 3, "corrector": False, "lower_order_final": False, "sigma_max": 80.0}, 64, 8, 18),
    ],
)
def test_converges_at_its_order(change, n, low, high):
    """Ratios 2, 4, and at least 8; the first step, of order 1, matters little: there D is nearly constant."""
    errors = []
    with jax.enable_x64(True):
        x = latents(jnp.float64)
        for steps in (n, 2 * n, 4 * n):
            settings = FINE._replace(num_steps=steps, **change)
            out = dpm_sample(gaussian, x, settings)
            assert out.dtype == jnp.float64
            errors.append(np.abs(out - exact(np.asarray(x), settings)).max())
    ratios = np.array(errors[:-1]) / errors[1:]
    assert errors[0] < 0.01
    assert ((low < ratios) & (ratios < high)).all(), ratios


def test_float32_costs_little():
    low = dpm_sample(gaussian, latents(), DPMSettings())
    with jax.enable_x64(True):
        high = np.asarray(dpm_sample(gaussian, latents(jnp.float64), DPMSettings()))
    assert low.dtype == jnp.float32
    assert np.abs(low - high).max() / np.abs(high).max() < 2e-6


@pytest.mark.parametrize("settings", [DPMSettings(num_steps=7), DPMSettings(num_steps=1, order=1), EVERYTHING])
def test_scan_equals_the_unrolled_loop(settings):
    calls = []

    def denoise(x, sigma):
        calls.append(sigma)
        return gaussian(x, sigma)

    scanned = dpm_sample(denoise, latents(), settings)
    assert len(calls) == 1  # traced, so compiled, once
    looped = dpm_sample(denoise, latents(), settings, scan=False)
    assert len(calls) == 1 + settings.nfe == 1 + settings.num_steps
    np.testing.assert_allclose(scanned, looped, rtol=1e-5, atol=1e-6)


def test_settings_are_a_static_argument():
    sample = jax.jit(dpm_sample, static_argnums=(0, 2))
    first, second = (sample(gaussian, latents(), DPMSettings(num_steps=4)) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert sample._cache_size() == 1


def test_differentiable_and_independent_of_the_batch():
    settings = DPMSettings(num_steps=5)
    together = dpm_sample(gaussian, latents(), settings)
    alone = [dpm_sample(gaussian, latents()[i : i + 1], settings)[0] for i in range(2)]
    np.testing.assert_allclose(together, np.stack(alone), rtol=1e-5, atol=1e-6)
    mapped = jax.vmap(lambda x: dpm_sample(gaussian, x[None], settings)[0])(latents())
    np.testing.assert_allclose(mapped, together, rtol=1e-5, atol=1e-6)
    grad = jax.grad(lambda x: jnp.sum(dpm_sample(gaussian, x, settings)))(latents())
    shifted = dpm_sample(gaussian, latents() + 4, settings) - together  # the map is affine
    np.testing.assert_allclose(grad, shifted / 4, rtol=1e-4)


def test_guidance_acts_on_every_denoised_image():
    """D_w of two Gaussians of one STD is that of a third, whose mean is pushed away from the guide's."""
    guide = lambda x, sigma: gaussian(x + 0.4, sigma) - 0.4  # noqa: E731  # of N(MEAN - 0.4, STD^2)
    settings = FINE._replace(num_steps=128)
    out = dpm_sample(guided(gaussian, guide, 1.5), latents(), settings)
    np.testing.assert_allclose(out, exact(np.asarray(latents()), settings, MEAN + 0.2), atol=2e-4)
