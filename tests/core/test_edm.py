"""EDM preconditioning against the reference's numbers, and the F form against the D form."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddo_jax.core.edm import denoised, edm_inputs, expand, loss_weight, noise_level, preconditioning

GOLDEN = np.load(Path(__file__).parents[1] / "goldens" / "edm_units.npz")


def test_expand():
    v = expand(jnp.array([1, 2]), 4)
    assert v.shape == (2, 1, 1, 1) and v.dtype == jnp.int32
    assert expand(jnp.ones(3), 1).shape == (3,)


def test_preconditioning_goldens():
    sigma = jnp.asarray(GOLDEN["pre/sigma"])
    c = preconditioning(sigma, 0.5)
    for name in c._fields:
        np.testing.assert_allclose(getattr(c, name), GOLDEN[f"pre/{name}"], rtol=1e-6, err_msg=name)
        assert getattr(c, name).dtype == jnp.float32
    np.testing.assert_allclose(loss_weight(sigma, 0.5), GOLDEN["pre/loss_weight"], rtol=1e-6)


def test_noise_level():
    sigma = noise_level(jnp.array([-1.0, 0.0, 2.0]), p_mean=-1.2, p_std=jnp.float32(1.6))
    np.testing.assert_allclose(sigma, np.exp([-2.8, -1.2, 2.0]), rtol=1e-6)


def batch(dtype):
    rng = np.random.default_rng(0)
    x, eps, f = (jnp.asarray(rng.normal(size=(5, 2, 3, 1)), dtype) for _ in range(3))
    return x, jnp.asarray(GOLDEN["pre/sigma"], dtype), eps, f


def test_f_form_equals_d_form():
    """lambda ||D - x||^2 == ||F - f_hat||^2, with D from `denoised` and the noisy input undone from x_in."""
    with jax.enable_x64(True):
        x, sigma, eps, f = batch(jnp.float64)
        x_in, c_noise, f_hat = edm_inputs(x, sigma, eps, 0.5)
        assert x_in.dtype == f_hat.dtype == jnp.float64
        x_noisy = x + expand(sigma, 4) * eps
        d = denoised(f, x_noisy, sigma, 0.5)
        c = preconditioning(sigma, 0.5)
        np.testing.assert_allclose(x_in, expand(c.c_in, 4) * x_noisy, rtol=1e-12)
        np.testing.assert_allclose(c_noise, np.log(sigma) / 4, rtol=1e-12)
        np.testing.assert_allclose(denoised(f_hat, x_noisy, sigma, 0.5), x, rtol=1e-9)
        d_form = loss_weight(sigma, 0.5) * jnp.sum((d - x) ** 2, axis=(1, 2, 3))
        np.testing.assert_allclose(d_form, jnp.sum((f - f_hat) ** 2, axis=(1, 2, 3)), rtol=1e-8)


def test_f_hat_does_not_cancel_at_small_sigma():
    x, sigma, eps, _ = batch(jnp.float32)
    _, _, f_hat = edm_inputs(x, sigma, eps, 0.5)
    with jax.enable_x64(True):
        wide = (jnp.asarray(v, jnp.float64) for v in (x, sigma, eps))
        exact = np.asarray(edm_inputs(*wide, 0.5)[2])
    c = preconditioning(sigma, 0.5)
    naive = (x - expand(c.c_skip, 4) * (x + expand(sigma, 4) * eps)) / expand(c.c_out, 4)
    assert np.abs(f_hat - exact).max() < 1e-6
    assert np.abs(naive - exact)[0].max() > 1e-5  # sigma = 0.002


@pytest.mark.parametrize("sigma_dtype", [jnp.float32, jnp.bfloat16])
def test_low_precision_inputs_are_widened(sigma_dtype):
    x, sigma, eps, f = batch(jnp.bfloat16)
    sigma = sigma.astype(sigma_dtype)
    outputs = edm_inputs(x, sigma, eps, 0.5)
    assert {v.dtype for v in outputs} == {jnp.dtype("float32")}
    assert denoised(f, x, sigma, 0.5).dtype == jnp.float32


def test_jit_with_traced_sigma_data_and_vmap():
    x, sigma, eps, _ = batch(jnp.float32)
    plain = edm_inputs(x, sigma, eps, 0.5)
    jitted = jax.jit(edm_inputs)(x, sigma, eps, 0.5)
    mapped = jax.vmap(lambda *v: edm_inputs(*v, 0.5))(*(v[:, None] for v in (x, sigma, eps)))
    for a, b, c in zip(plain, jitted, mapped, strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(c[:, 0], a, rtol=1e-5, atol=1e-6)


def test_shapes_are_enforced():
    """By the jaxtyping hook of setup.cfg: a sigma of [B, 1] is refused before it can broadcast."""
    x, sigma, eps, _ = batch(jnp.float32)
    with pytest.raises(Exception, match="Type-check error"):
        edm_inputs(x, sigma[:, None], eps, 0.5)
