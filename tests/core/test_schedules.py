"""Learning rates by images seen."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddo_jax.core import schedules

GOLDEN = np.load(Path(__file__).parents[1] / "goldens" / "edm_units.npz")
NAMES = {
    "constant": dict(warmup=1000),
    "cosine": dict(warmup=1000, final_lr=1e-4, total=9000),
    "inverse_sqrt": dict(warmup=1000, t_ref=4000),
    "linear": dict(warmup=1000, final_lr=1e-4, total=9000, hold=0.5),
}
VAR = np.load(Path(__file__).parents[1] / "goldens" / "var_lr_schedule.npz")
VAR_CASES = json.loads(str(VAR["config"]))["cases"]


def test_edm_goldens():
    rates = [schedules.constant(int(n), lr=1.0, warmup=10_000_000) for n in GOLDEN["sched/cur_nimg"]]
    np.testing.assert_allclose(rates, GOLDEN["sched/lr_factor"], rtol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_common_behaviour(name):
    schedule, kwargs = getattr(schedules, name), NAMES[name] | {"lr": 1e-3}
    assert schedule(0, **kwargs) == 0  # seen BEFORE the step: the first rate is exactly 0
    np.testing.assert_allclose(schedule(250, **kwargs), 0.25e-3, rtol=1e-6)
    np.testing.assert_allclose(schedule(1000, **kwargs), 1e-3, rtol=1e-6)
    np.testing.assert_allclose(schedule(0, **kwargs | {"warmup": 0}), 1e-3, rtol=1e-6)  # 0: no warm-up
    traced = jax.jit(schedule)(jnp.float32(5000), **kwargs)
    assert traced.dtype == jnp.float32 and traced.shape == ()
    np.testing.assert_allclose(traced, schedule(5000, **kwargs), rtol=1e-6)
    assert np.isfinite(jax.grad(lambda n: schedule(n, **kwargs | {"warmup": 0}))(0.0))


def test_constant_stays():
    assert schedules.constant(1e9, lr=1e-3, warmup=1000) == np.float32(1e-3)
    assert schedules.constant(123, lr=1e-3) == np.float32(1e-3)


def test_cosine():
    kwargs = NAMES["cosine"] | {"lr": 1e-3}
    for seen, p in [(3000, 0.25), (5000, 0.5), (7000, 0.75)]:
        expected = 1e-4 + 0.9e-3 * (1 + np.cos(np.pi * p)) / 2
        np.testing.assert_allclose(schedules.cosine(seen, **kwargs), expected, rtol=1e-5)
    assert schedules.cosine(9000, **kwargs) == schedules.cosine(99_000, **kwargs) == np.float32(1e-4)
    assert schedules.cosine(100, lr=1e-3, final_lr=0.0, warmup=100, total=100) == np.float32(1e-3)  # no 0/0


def test_inverse_sqrt():
    kwargs = NAMES["inverse_sqrt"] | {"lr": 1e-3}
    assert schedules.inverse_sqrt(4000, **kwargs) == np.float32(1e-3)
    np.testing.assert_allclose(schedules.inverse_sqrt(25_000, **kwargs), 1e-3 * 0.4, rtol=1e-6)  # sqrt(4/25)
    assert schedules.inverse_sqrt(25_000, **kwargs | {"t_ref": 0}) == np.float32(1e-3)  # 0: no decay
    overlapping = schedules.inverse_sqrt(4000, lr=1.0, warmup=16_000, t_ref=1000)  # both factors at once
    np.testing.assert_allclose(overlapping, 0.25 / 2, rtol=1e-6)


def var_arguments(case):
    """In VAR's own unit, steps: W is rounded, and the end is the last step."""
    lr = case["peak_lr"]
    return {"lr": lr, "final_lr": lr * case["wpe"], "warmup": round(case["warmup_its"]), "total": case["max_it"] - 1}


@pytest.mark.parametrize("j", [j for j, case in enumerate(VAR_CASES) if case["sche"] in ("lin0", "lin", "lin00")])
def test_var_goldens(j):
    case = VAR_CASES[j]
    hold = {"lin0": 0.05, "lin": 0.15, "lin00": 0.0}[case["sche"]]
    how = var_arguments(case) | {"start_lr": case["peak_lr"] * case["wp0"], "hold": hold}
    rates = [schedules.linear(int(it), **how) for it in VAR[f"{j}/it"]]
    assert len(rates) > 15
    np.testing.assert_allclose(rates, VAR[f"{j}/lr"], rtol=2e-6)


def test_var_cosine_and_weight_decay_goldens():
    """Both are `cosine`; only the warm-up of the rate starts elsewhere."""
    (j,) = (j for j, case in enumerate(VAR_CASES) if case["sche"] == "cos")
    how = var_arguments(VAR_CASES[j])
    after = VAR[f"{j}/it"] >= how["warmup"]
    assert after.sum() > 10
    rates = [schedules.cosine(int(it), **how) for it in VAR[f"{j}/it"][after]]
    np.testing.assert_allclose(rates, VAR[f"{j}/lr"][after], rtol=2e-6)
    for j, case in enumerate(VAR_CASES):
        decay = {"lr": case["wd"], "final_lr": case["wd_end"], "warmup": 0, "total": case["max_it"] - 1}
        values = [schedules.cosine(int(it), **decay) for it in VAR[f"{j}/it"]]
        np.testing.assert_allclose(values, VAR[f"{j}/wd"], rtol=2e-6)


def test_linear():
    kwargs = NAMES["linear"] | {"lr": 1e-3}
    np.testing.assert_allclose([schedules.linear(n, **kwargs) for n in (3000, 5000)], 1e-3, rtol=1e-6)
    np.testing.assert_allclose(schedules.linear(7000, **kwargs), 5.5e-4, rtol=1e-6)
    assert schedules.linear(9000, **kwargs) == schedules.linear(99_000, **kwargs) == np.float32(1e-4)
