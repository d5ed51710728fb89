"""EMA lengths in images."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddo_jax.core.ema import decay_to_half_life, ema_update, half_life_beta

GOLDEN = np.load(Path(__file__).parents[1] / "goldens" / "edm_units.npz")


@pytest.mark.parametrize("key, ratio", [("ramp005", 0.05), ("noramp", None)])
def test_goldens(key, ratio):
    betas = [half_life_beta(int(n), 512, 500_000, ratio) for n in GOLDEN["sched/cur_nimg"]]
    # At 512 images the half-life is 25.6, so float32 carries its rounding 20-fold: rtol, not ulp.
    np.testing.assert_allclose(betas, GOLDEN[f"sched/ema_beta_{key}"], rtol=3e-6)
    assert all(beta.dtype == jnp.float32 for beta in betas)


def test_edges():
    assert half_life_beta(10_000, batch=512, half_life=0) == 0
    assert half_life_beta(0, batch=512, half_life=1e6, rampup_ratio=0.05) == 0
    assert half_life_beta(5_000_000_000, batch=512, half_life=512) == 0.5  # more images than an int32 holds
    jitted = jax.jit(half_life_beta)(jnp.float32(1e6), 512, 500_000, 0.05)
    np.testing.assert_allclose(jitted, 0.5 ** (512 / 50_000), rtol=1e-6)


def test_half_life_means_half():
    ema, zero = {"w": jnp.ones(3)}, {"w": jnp.zeros(3)}
    beta = half_life_beta(0, batch=100, half_life=1000)
    for _ in range(10):
        ema = ema_update(ema, zero, beta)
    np.testing.assert_allclose(ema["w"], 0.5, rtol=1e-5)


def test_update():
    ema, params = {"a": [jnp.array([1.0, 2.0])]}, {"a": [jnp.array([3.0, 4.0])]}
    np.testing.assert_allclose(ema_update(ema, params, 0.75)["a"][0], [1.5, 2.5])
    np.testing.assert_array_equal(ema_update(ema, params, 0.0)["a"][0], params["a"][0])
    np.testing.assert_array_equal(ema_update(params, params, 0.9)["a"][0], params["a"][0])  # fixed point
    mixed = ema_update(ema, {"a": [params["a"][0].astype(jnp.bfloat16)]}, jnp.float32(0.75))
    assert mixed["a"][0].dtype == jnp.float32


def test_decay_to_half_life_is_the_inverse():
    half_life = decay_to_half_life(0.9999, batch=128)
    np.testing.assert_allclose(half_life_beta(0, 128, half_life), 0.9999, rtol=1e-7)
    assert decay_to_half_life(0, batch=128) == 0
    for decay in (1.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match="decay is"):
            decay_to_half_life(decay, batch=128)
