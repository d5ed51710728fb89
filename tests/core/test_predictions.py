"""One log-ratio in four parametrisations, and self-play of callables."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ddo_jax
from ddo_jax.core import flow, predictions
from ddo_jax.core.self_play import self_play

SIGMA_DATA = 0.5


@pytest.fixture
def case():
    """Data, noise levels, noise, and the denoised images of two networks, float64."""
    rng = np.random.default_rng(0)
    x, eps, d, d_ref = rng.normal(size=(4, 5, 3, 2))
    return x, np.exp(rng.normal(-1, 1, 5)), eps, d, d_ref


def test_all_predictions_have_the_log_ratio_of_f(case):
    """Breaks if a weight does not turn the error of its prediction into that of F, or a target is another one's."""
    with jax.enable_x64(True):
        x, sigma, eps, d, d_ref = map(jnp.asarray, case)
        s, z = sigma[:, None, None], x + sigma[:, None, None] * eps
        c = ddo_jax.preconditioning(sigma, SIGMA_DATA)
        f, f_ref = ((v - c.c_skip[:, None, None] * z) / c.c_out[:, None, None] for v in (d, d_ref))
        expected = ddo_jax.diffusion_log_ratio(f, f_ref, ddo_jax.edm_inputs(x, sigma, eps, SIGMA_DATA)[2])
        t = flow.time_of(sigma)
        x_t, u = flow.flow_inputs(x, t, eps)
        np.testing.assert_allclose(x_t, t[:, None, None] * z, rtol=1e-12)
        forms = {
            "image": (d, d_ref, x),
            "noise": ((z - d) / s, (z - d_ref) / s, eps),
            "velocity": tuple((v - x_t) / (1 - t)[:, None, None] for v in (d, d_ref)) + (u,),
        }
        for kind, (p, p_ref, target) in forms.items():
            weight = predictions.prediction_weight(kind, sigma, SIGMA_DATA)
            r = predictions.prediction_log_ratio(p, p_ref, target, weight)
            np.testing.assert_allclose(r, expected, rtol=1e-9)
        v, v_ref, _ = forms["velocity"]
        np.testing.assert_allclose(flow.flow_denoised(v, x_t, t), d, rtol=1e-9)
        by_flow = {k: predictions.prediction_log_ratio(v, v_ref, u, flow.flow_weight(k, t, 0.5)) for k in flow.WEIGHTS}
        np.testing.assert_allclose(by_flow["edm"], expected, rtol=1e-9)
        np.testing.assert_allclose(by_flow["x"], by_flow["velocity"] * (1 - t) ** 2, rtol=1e-9)


def test_times_and_noise_levels_are_inverse():
    """Breaks if t counts the other way, or the weight of data without noise (a t that rounds to 1) is not a number."""
    np.testing.assert_array_equal(flow.flow_weight("edm", jnp.ones(1), SIGMA_DATA), 1.0)
    sigma = jnp.array([0.01, 1.0, 80.0])
    np.testing.assert_allclose(flow.sigma_of(flow.time_of(sigma)), sigma, rtol=1e-4)


@pytest.mark.parametrize("call", [lambda: predictions.prediction_weight("v", jnp.ones(1), 0.5)])
def test_unknown_kinds_are_named(call):
    """Breaks if a misspelt kind is another kind."""
    with pytest.raises(ValueError, match="kind is 'v'; allowed: image, noise, velocity"):
        call()
    with pytest.raises(ValueError, match="allowed: velocity, x, edm"):
        flow.flow_weight("eps", jnp.ones(1), 0.5)


def test_self_play_keeps_the_best():
    """Breaks if the last parameters win, fakes are of another reference, or a score that is no number is the best."""
    asked = []

    def fakes(ref, n):
        asked.append((ref, n))
        return ref

    def train(ref, pool, n):
        assert ref == pool
        yield from {1: (8.0, 9.0), 2: (float("nan"), 9.5), 3: (7.0,)}[n]

    best, history = self_play(10.0, rounds=3, fakes=fakes, train=train, score=lambda p: p)
    assert best == 7.0 and asked == [(10.0, 1), (8.0, 2), (8.0, 3)]
    assert [r["improved"] for r in history] == [True, False, True] and history[1]["start"] == 8.0
    for rounds, start in ((0, 1.0), (1, float("nan"))):
        with pytest.raises(ValueError, match="allowed: 1 or more rounds, a number"):
            self_play(start, rounds=rounds, fakes=fakes, train=train, score=lambda p: p)
