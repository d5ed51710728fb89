"""Power-function EMA and post-hoc reconstruction against the public reference (specs/edm2.md section 9)."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddo_jax.core import phema
from ddo_jax.core.ema import ema_update

GOLDEN = dict(np.load(Path(__file__).parents[1] / "goldens" / "edm2_phema.npz"))


def close(actual, key, rtol=1e-10):
    expected = GOLDEN[key]
    assert np.shape(actual) == expected.shape, key
    np.testing.assert_allclose(actual, expected, rtol=0, atol=rtol * np.abs(expected).max(), err_msg=key)


def test_std_and_gamma():
    close([phema.std_to_gamma(s) for s in GOLDEN["std_to_gamma/std"]], "std_to_gamma/gamma")
    close([phema.gamma_to_std(g) for g in GOLDEN["gamma_to_std/gamma"]], "gamma_to_std/std")
    for std in (0.01, 0.05, 0.1, 0.25, 0.288):
        np.testing.assert_allclose(phema.gamma_to_std(phema.std_to_gamma(std)), std, rtol=1e-12)
    for std in (0, -0.1, 0.289, 1):
        with pytest.raises(ValueError, match=rf"EMA std is {std}: it must be between 0 and 0\.2887"):
            phema.std_to_gamma(std)


def test_beta():
    for std, t, delta, expected in GOLDEN["beta/std_tnext_tdelta_beta"]:
        np.testing.assert_allclose(phema.beta(t, delta, std), expected, rtol=1e-10)
        traced = jax.jit(phema.power_beta, static_argnums=2)(jnp.float32(t - delta), jnp.float32(delta), float(std))
        assert traced.dtype == jnp.float32
        np.testing.assert_allclose(traced, expected, rtol=3e-6)
    assert phema.power_beta(0, 512, 0.05) == 0 and phema.beta(512, 512, 0.05) == 0


def test_tracking():
    batch, params = int(GOLDEN["ema/batch_size"]), GOLDEN["ema/params"]
    values, exact = np.empty(GOLDEN["ema/values"].shape), np.empty(GOLDEN["ema/values"].shape)
    for k, std in enumerate(GOLDEN["ema/stds"]):
        ema = jnp.asarray(GOLDEN["ema/init"], jnp.float32)
        mean = GOLDEN["ema/init"]
        for i, theta in enumerate(params):
            ema = ema_update(ema, jnp.asarray(theta, jnp.float32), phema.power_beta(i * batch, batch, float(std)))
            mean = mean + (1 - phema.beta((i + 1) * batch, batch, std)) * (theta - mean)
            values[i, k], exact[i, k] = ema, mean
    close(exact, "ema/values")
    close(values, "ema/values", rtol=1e-6)


@pytest.mark.parametrize("case", ["last", "prev"])
def test_posthoc(case):
    at = f"posthoc/{case}/"
    t, std = GOLDEN[f"{at}in_nimg"], GOLDEN[f"{at}in_std"]
    t_out, std_out = int(GOLDEN[f"{at}out_nimg"]), GOLDEN[f"{at}out_std"]
    coefficients = phema.posthoc_coefficients(t, std, t_out, std_out)
    close(coefficients, f"{at}coefs")
    close(coefficients.T @ GOLDEN[f"{at}in_values"], f"{at}reconstructed")
    later = phema.posthoc_coefficients([*t, 2 * t_out], [*std, 0.1], t_out, std_out)  # ignored
    np.testing.assert_array_equal(later, np.vstack([coefficients, np.zeros(len(std_out))]))
    with pytest.raises(ValueError, match="no snapshot at 7 images; there are "):
        phema.posthoc_coefficients(t, std, 7, std_out)


def test_overlaps():
    t, std = GOLDEN["posthoc/last/in_nimg"], GOLDEN["posthoc/last/in_std"]
    close(phema.inner_products(t, std, t, std), "posthoc/corr_matrix")


def test_response():
    length, t = int(GOLDEN["response/len"]), int(GOLDEN["response/ofs"])
    close(np.stack([phema.response(std, length, t) for std in GOLDEN["response/std"]], axis=1), "response/values")


def test_snapshot_names():
    np.testing.assert_array_equal(phema.snapshot_images(GOLDEN["naming/kimg"]), GOLDEN["naming/nimg"])
