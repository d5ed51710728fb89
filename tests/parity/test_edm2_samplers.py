"""The samplers of the EDM2 family against the numbers of the public reference (specs/edm2.md sections 14-16, 18, 19).

First with denoisers in closed form, in float64 (no network error) and in float32; then DPM-Solver-v3 with the small
EDM2 networks (Heun with them: test_edm2.py). `pytest -s` prints the errors, relative to the largest golden value of
the call.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddo_jax.convert import from_torch
from ddo_jax.core import dpm_solver
from ddo_jax.core.dpm_solver import DPMSettings, dpm_sample, dpm_schedule
from ddo_jax.core.edm import expand
from ddo_jax.core.samplers import HeunSettings, guided, heun_sample, heun_schedule, heun_times

GOLDENS = Path(__file__).parents[1] / "goldens"
TOLERANCE = {"heun": 1e-10, "dpm": 5e-6, "sum": 1e-5, "float32": 2e-5}
WEIGHT = 1.5

with np.load(GOLDENS / "edm2_sampler.npz") as f:
    GOLDEN = dict(f)


def check(golden, key, value, kind):
    value, expected = np.asarray(value), golden[key]
    assert value.shape == expected.shape, key
    axes = tuple(range(1, expected.ndim)) if expected.ndim > 4 else None  # each call by itself
    error = np.max(np.abs(value - expected) / np.abs(expected).max(axes, keepdims=True))
    print(f"\n{key}: {error:.1e} (tolerance {TOLERANCE[kind]:.0e})", end="")
    assert error <= TOLERANCE[kind], f"{key}: error {error:.2e}, tolerance {TOLERANCE[kind]:.0e}"


# ----------------------------------------------------------------------------------------------------
# Denoisers in closed form


def gaussian(std):
    """The exact denoiser of N(0, std^2)."""
    return lambda x, sigma: x * (std**2 / (std**2 + expand(sigma, 4) ** 2))


def mixture(means, tau, share):
    """The exact denoiser of share N(m_1, tau^2) + (1 - share) N(m_2, tau^2)."""

    def denoise(x, sigma):
        s2, t2 = expand(sigma, 4) ** 2, tau**2
        m = [jnp.asarray(m, x.dtype)[None] for m in means]
        logits = jnp.stack([-jnp.sum((x - m) ** 2, (1, 2, 3), keepdims=True) / (2 * (t2 + s2)) for m in m])
        prior = jnp.log(jnp.asarray([share, 1 - share], x.dtype)).reshape(2, 1, 1, 1, 1)
        w = jax.nn.softmax(logits + prior, axis=0)
        return sum(w[k] * (t2 * x + s2 * m[k]) / (t2 + s2) for k in range(2))

    return denoise


def denoisers(name):
    """(main, guide)."""
    if name == "gauss":
        std = float(GOLDEN["sigma_data"])
        return gaussian(std), gaussian(1.4 * std)
    means, tau = [GOLDEN["mix_m1"], GOLDEN["mix_m2"]], float(GOLDEN["mix_tau"])
    halves = [0.5 * m for m in means]
    return mixture(means, tau, float(GOLDEN["mix_pi"])), mixture(halves, 1.5 * tau, 0.5)


def run(sample, name, key, dtype):
    """The final x, and x, sigma, D (guided and main) of every evaluation, while `sample(denoise, z)` runs."""
    main, guide = denoisers(name)
    denoise = guided(main, guide, WEIGHT if "_guid" in key else 1)
    calls = []

    def recorded(x, sigma):
        d = denoise(x, sigma)
        calls.append((x, sigma[0], d, main(x, sigma)))
        return d

    with jax.enable_x64(dtype == "float64"):
        x = sample(recorded, jnp.asarray(GOLDEN["z"], dtype))
        assert x.dtype == dtype
        return np.asarray(x), *(np.stack([np.asarray(v) for v in part]) for part in zip(*calls, strict=True))


CASES = pytest.mark.parametrize("name", ["gauss", "mix"])
DTYPES = pytest.mark.parametrize("dtype", ["float64", "float32"])


@DTYPES
@CASES
@pytest.mark.parametrize("key", ["heun/8", "heun/32", "heun_guid/8", "heun_guid/32", "churn/8"])
def test_heun(key, name, dtype):
    churn = json.loads(str(GOLDEN["churn/params"])) if key == "churn/8" else {}
    settings = HeunSettings(num_steps=int(key.split("/")[1]), **{k.lower(): v for k, v in churn.items()})
    noise = None
    if churn:
        draws = np.zeros((settings.num_steps, *GOLDEN["z"].shape))
        draws[heun_schedule(settings).noise_std > 0] = GOLDEN[f"{key}/{name}/draws"]
        noise = lambda i: jnp.asarray(draws[i], dtype)  # noqa: E731
    sample = lambda denoise, z: heun_sample(denoise, z, settings, noise, scan=False)  # noqa: E731
    x, x_eval, t_eval, *_ = run(sample, name, key, dtype)
    kind = "heun" if dtype == "float64" else "float32"
    check(GOLDEN, f"{key}/{name}/t_eval", t_eval, kind)
    check(GOLDEN, f"{key}/{name}/x_eval", x_eval, kind)
    check(GOLDEN, f"{key}/{name}/x_final", x, kind)


@pytest.mark.parametrize("n, exact", [(8, 8), (32, 31)])  # section 14: 39 of 40 to the bit
def test_float32_grid_of_heun(n, exact):
    times, expected = heun_times(HeunSettings(num_steps=n, grid="float32")), GOLDEN[f"heun/{n}/t_steps_f32"]
    assert np.count_nonzero(times[:-1] == expected) == exact
    np.testing.assert_allclose(times[:-1], expected, rtol=1.3e-7)
    assert np.count_nonzero(heun_times(HeunSettings(num_steps=n))[:-1].astype(np.float32) == expected) < n / 4


def test_sigmas_that_the_network_saw():
    """The reference's float32 run, to the bit."""
    schedule = heun_schedule(HeunSettings(num_steps=8, grid="float32"))
    with np.load(GOLDENS / "edm2_small.npz") as f:
        np.testing.assert_array_equal(np.stack(schedule[:2], axis=1).ravel()[:-1], f["heun/t_eval"])


# ----------------------------------------------------------------------------------------------------
# DPM-Solver-v3 in closed form


def corrected(settings, x_eval, d):
    """The x kept by every step, from what the network was asked and answered."""
    kept = [np.zeros_like(x_eval[0])]
    for i, row in enumerate(dpm_schedule(settings).correct):
        history = list(d[i::-1][: len(row) - 2])
        kept.append(sum(w * v for w, v in zip(row, [x_eval[i], kept[-1], *history], strict=False)))
    return np.stack(kept[1:])


def check_grid(prefix, settings):
    lam, indices = dpm_solver.dpm_grid(settings)
    np.testing.assert_array_equal(indices, GOLDEN[f"{prefix}/indexes"])
    np.testing.assert_allclose(np.exp(-lam[indices]), GOLDEN[f"{prefix}/timesteps"], rtol=2e-6)
    return lam


def check_dpm(prefix, name, settings, dtype):
    lam = check_grid(prefix, settings)
    sample = lambda denoise, z: dpm_sample(denoise, z, settings, scan=False)  # noqa: E731
    x, x_eval, t_eval, d, main = run(sample, name, prefix, dtype)
    kind = "dpm" if dtype == "float64" else "float32"
    np.testing.assert_allclose(t_eval, GOLDEN[f"{prefix}/timesteps"][:-1], rtol=2e-6)
    check(GOLDEN, f"{prefix}/x_eval", x_eval, kind)
    check(GOLDEN, f"{prefix}/x_corrected", corrected(settings, x_eval, d), kind)
    check(GOLDEN, f"{prefix}/D", main, kind)
    check(GOLDEN, f"{prefix}/x_final", x, kind)
    for (a, b, k), value in zip(GOLDEN[f"{prefix}/E_keys"], GOLDEN[f"{prefix}/E_vals"], strict=True):
        mine = dpm_solver.exponential_sum(lam[a : b + 1], int(k) - 1)
        np.testing.assert_allclose(mine, value, rtol=TOLERANCE["sum"])


@DTYPES
@CASES
@pytest.mark.parametrize("key", ["dpmv3/6", "dpmv3/10", "dpmv3_guid/6", "dpmv3_guid/10"])
def test_dpm(key, name, dtype):
    check_dpm(f"{key}/{name}", name, DPMSettings(num_steps=int(key.split("/")[1])), dtype)


VARIANTS = sorted({key.split("/")[1] for key in GOLDEN if key.startswith("dpmv3_variant/")})


@pytest.mark.parametrize("tag", VARIANTS)
def test_dpm_variants(tag):
    options = json.loads(str(GOLDEN[f"dpmv3_variant/{tag}/options"]))
    settings = DPMSettings(num_steps=options.pop("steps"), corrector=options.pop("use_corrector"), **options)
    check_dpm(f"dpmv3_variant/{tag}", "mix", settings, "float64")


def test_every_variant_is_there():
    assert len(VARIANTS) == 7


@pytest.mark.parametrize("n", [5, 6, 8, 10, 12, 15, 20, 25, 32, 50])
def test_dpm_grid(n):
    check_grid(f"dpmv3/grid/{n}", DPMSettings(num_steps=n))


@pytest.mark.parametrize("key, grid", [("logSNR", "log"), ("time_uniform", "uniform"), ("time_quadratic", "quadratic")])
def test_other_dpm_grids(key, grid):
    check_grid(f"dpmv3/grid_{key}/10", DPMSettings(num_steps=10, grid=grid))


def test_dpm_tables():
    """I_m, the trapezoid sum of e^L, is what the solver weighs D with."""
    lam, _ = dpm_solver.dpm_grid(DPMSettings())
    np.testing.assert_allclose(lam, GOLDEN["dpmv3/ems/lambda"], rtol=0, atol=1e-6)
    np.testing.assert_allclose(lam - lam[0], GOLDEN["dpmv3/ems/L"], rtol=0, atol=1e-6)
    sums = [dpm_solver.exponential_sum(lam[: m + 1], 0) for m in range(1, len(lam))]
    np.testing.assert_allclose(sums, GOLDEN["dpmv3/ems/I"][1:], rtol=TOLERANCE["sum"])


# ----------------------------------------------------------------------------------------------------
# DPM-Solver-v3 with the networks


def nhwc(v):
    return jnp.asarray(np.moveaxis(v, -3, -1), "float32")


@pytest.fixture(scope="module")
def networks():
    """The golden, and both networks with the goldens' labels bound; each is compiled once."""
    with np.load(GOLDENS / "edm2_small.npz") as f:
        golden = dict(f)
    labels = jnp.asarray(golden["heun/labels"])

    def denoiser(config, prefix):
        state = {k.removeprefix(prefix): v for k, v in golden.items() if k.startswith(prefix)}
        module, variables = from_torch("edm2", json.loads(str(golden[config])), state)
        return jax.jit(lambda x, sigma: module.apply(variables, x, sigma, labels))

    with jax.default_matmul_precision("float32"):
        yield SimpleNamespace(golden=golden, main=denoiser("config", "param/"), guide=denoiser("gconfig", "gparam/"))


@pytest.mark.parametrize("key, weight", [("dpmv3", 1), ("dpmv3_guid", WEIGHT)])
def test_dpm_with_the_networks(networks, key, weight):
    """The guide, unconditional and smaller, ignores the labels."""
    settings, calls = DPMSettings(num_steps=6), []
    denoise = guided(networks.main, networks.guide, weight)

    def recorded(x, sigma):
        d = denoise(x, sigma)
        calls.append((x, sigma[0], d))
        return d

    x = dpm_sample(recorded, nhwc(networks.golden["heun/noise"]), settings, scan=False)
    x_eval, t_eval, d = (np.stack(part) for part in zip(*calls, strict=True))
    golden = {k: np.moveaxis(v, -3, -1) if v.ndim > 3 else v for k, v in networks.golden.items() if key in k}
    for name, value in {"x_eval": x_eval, "x_cached": corrected(settings, x_eval, d), "x_final": x}.items():
        check(golden, f"{key}/{name}", value, "float32")
    np.testing.assert_allclose(t_eval, golden[f"{key}/t_eval"], rtol=2e-6)
