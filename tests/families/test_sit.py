"""Family `sit`: laws of t, weights of the log-ratio, samplers, guidance, what cannot be."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddo_jax import config as configs
from ddo_jax import convert
from ddo_jax.convert import safetensors
from ddo_jax.core import flow
from ddo_jax.errors import UserError
from ddo_jax.families import from_released, get_family
from tests.harness import random_variables

MODEL = dict(arch="SiT", img_resolution=8, img_channels=2, label_dim=3, levels=256, patch_size=4, hidden_size=16)
MODEL |= dict(depth=1, num_heads=2, learn_sigma=False)
LAW = (-0.4, 1.2)


def config_of(**changes):
    config = configs.base()
    config.family = "sit"
    with config.unlocked():
        config.model.update(**{**MODEL, **changes})
    return config


@pytest.fixture(scope="module")
def case():
    family = get_family(config_of())
    params, _ = random_variables(family.init)
    frozen = jax.tree.map(np.asarray, family.init(jax.random.key(0))[1])
    return family, params, frozen


def examples(n=4, key=0):
    x = jax.random.normal(jax.random.key(key), (n, 8, 8, 2))
    return {"x": x, "label": jnp.arange(n, dtype=jnp.int32) % 3}


def test_laws_of_time():
    """Breaks if a law is another one, or a phase takes the other's."""
    family = get_family(config_of(mle_time="uniform", pair_time="logit-normal"))
    n = 20_000
    t = np.sort(family.draw(jax.random.key(0), n, LAW)["t"])
    assert np.abs(t - (np.arange(n) + 0.5) / n).max() < 0.015  # Kolmogorov and Smirnov: 1.36 / sqrt(n) = 0.01
    log_sigma = np.log(flow.sigma_of(family.pair_draw(jax.random.key(1), n, LAW)["t"]))
    np.testing.assert_allclose((log_sigma.mean(), log_sigma.std()), LAW, atol=0.03)
    other = get_family(config_of(mle_time="logit-normal", pair_time="uniform"))
    assert np.array_equal(np.sort(other.pair_draw(jax.random.key(0), n, LAW)["t"]), t)


@pytest.mark.parametrize("weight", flow.WEIGHTS)
def test_ratios(case, weight):
    """r = w (|v_ref - u|^2 - |v - u|^2) by its definition, and the alarm has the same weight."""
    family, params, frozen = case
    family = dataclasses.replace(family, weight=weight)
    ref = jax.tree.map(lambda v: 1.1 * v, params)
    x, draws = examples(), family.pair_draw(jax.random.key(3), 4, LAW)
    s, s_ref = (family.score(p, frozen, x, draws) for p in (params, ref))
    r, nll, nll_ref = family.ratio(s, s_ref, x, draws), family.nll(s, x, draws), family.nll(s_ref, x, draws)
    np.testing.assert_allclose(r, nll_ref - nll, rtol=2e-4)
    t, sigma = draws["t"], flow.sigma_of(draws["t"])
    x_t = t[:, None, None, None] * x["x"] + (1 - t)[:, None, None, None] * draws["eps"]
    denoised = x_t + (1 - t)[:, None, None, None] * s
    factor = {"velocity": (1 - t) ** -2, "x": jnp.ones(4), "edm": (sigma**2 + 0.25) / (0.5 * sigma) ** 2}[weight]
    expected = factor * jnp.sum(jnp.square(denoised - x["x"]), axis=(1, 2, 3))
    np.testing.assert_allclose(nll, expected, rtol=1e-4)


def test_a_uniform_zero_is_finite(case):
    """Breaks if the one draw in sixteen million that is 0 stops a run."""
    family, params, frozen = case
    x, draws = examples(), {"t": jnp.array([0.0, 0.5, 0.9, 1.0]), "eps": jnp.ones((4, 8, 8, 2))}
    s = family.score(params, frozen, x, draws)
    assert np.isfinite(family.ratio(s, 1.1 * s, x, draws)).all() and np.isfinite(family.nll(s, x, draws)).all()


def test_labels_are_dropped_in_mle_only(case):
    family, params, frozen = case
    x, draws = examples(), family.draw(jax.random.key(3), 4, LAW)
    losses = {}
    for p in (0.0, 1.0):
        changed = dataclasses.replace(family, module=family.module.clone(class_dropout_prob=p))
        losses[p] = changed.mle_loss(params, frozen, x, draws, jax.random.key(0))
    none = {**x, "label": jnp.full((4,), 3, jnp.int32)}
    u = family.inputs(x, draws)[1]
    for p, given in ((0.0, x), (1.0, none)):
        expected = jnp.mean(jnp.square(family.score(params, frozen, given, draws) - u), axis=(1, 2, 3))
        np.testing.assert_allclose(losses[p], expected, rtol=1e-5)
    assert np.abs(losses[0.0] - losses[1.0]).min() > 0


def sampled(case, **sampler):
    family, params, frozen = case
    keys, labels = jax.random.split(jax.random.key(0), 4), jnp.array([0, 1, 2, 3])
    settings = family.settings(sampler)
    program = jax.jit(lambda p: family.sample((p, None), frozen, labels, family.latents(keys), keys, settings)["x"])
    return np.asarray(program(params)), settings


def test_samplers_agree(case):
    """Breaks if a solver solves another equation: the ODE in t, and through sigma = (1 - t) / t."""
    fine, settings = sampled(case, solver="flow_heun", num_steps=200)
    assert settings.nfe == 400 and settings.record() == {"solver": "flow_heun", "num_steps": 200, "cfg": 1.0}
    scale = np.abs(fine).max()
    for tolerance, given in [
        (0.02, dict(solver="euler", num_steps=200)),
        (0.01, dict(solver="heun", num_steps=60, sigma_max=2000.0)),
        (0.02, dict(solver="dpmv3", num_steps=60, sigma_max=2000.0)),
    ]:
        x, _ = sampled(case, **given)
        assert np.abs(x - fine).max() / scale < tolerance, given
    noisy, settings = sampled(case, solver="sde", num_steps=20)
    assert settings.nfe == 20 and np.isfinite(noisy).all() and np.abs(noisy - fine).max() / scale > 0.05


@pytest.mark.parametrize("solver", ["flow_heun", "heun"])
def test_guidance(case, solver):
    """Breaks if 0 or 1 guide, if guidance is not linear in the velocity, or fakes are guided."""
    family = case[0]
    plain, _ = sampled(case, solver=solver, num_steps=10)
    for none in (0.0, 1.0):
        assert np.array_equal(sampled(case, solver=solver, num_steps=10, cfg=none)[0], plain)
    guided, settings = sampled(case, solver=solver, num_steps=10, cfg=1.5)
    assert settings.nfe == 2 * sampled(case, solver=solver, num_steps=10)[1].nfe
    assert family.strength(settings) == 1.5 and family.fake_settings(settings).cfg == 1.0
    assert np.abs(guided - plain)[:3].max() > 1e-3
    np.testing.assert_allclose(guided[3], plain[3], atol=1e-5)  # without a label there is nothing to guide by


@pytest.mark.parametrize(
    "sampler, words",
    [
        (dict(solver="ode"), "solver is 'ode'; allowed: heun, dpmv3; or euler, flow_heun, sde"),
        (dict(solver="sde", num_steps=1), "num_steps: 1; allowed: 2 to 10,000 with sde"),
        (dict(solver="euler", num_steps=0), "num_steps: 0; allowed: 1 to"),
        (dict(cfg=-1.0), "config.sampler.cfg: -1.0; allowed: above 0"),
        (dict(cfg=float("nan")), "config.sampler.cfg: nan"),
        (dict(top_k=3), "config.sampler.top_k: 3; this model's sampler has no such setting"),
        (dict(solver="dpmv3", s_churn=3.0), "adds no noise"),
    ],
)
def test_what_cannot_be_sampled_with(case, sampler, words):
    with pytest.raises(UserError, match="config.sampler") as e:
        case[0].settings(sampler)
    assert words in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(arch="DiT"), "config.model.arch: 'DiT'; allowed for family sit: SiT"),
        (dict(weight="uniform"), "config.model.weight: 'uniform'; allowed: velocity, x, edm"),
        (dict(pair_time="normal"), "config.model.pair_time: 'normal'; allowed: logit-normal, uniform"),
        (dict(guidance_channels=3), "config.model.guidance_channels: 3; allowed: 0 to 2"),
        (dict(img_resolution=10), "patch_size is 4; allowed: divisors of input_size, 10"),
        (dict(width=3), "unknown key 'width' for SiT"),
    ],
)
def test_what_is_no_network(change, words):
    with pytest.raises(UserError, match="config.model") as e:
        get_family(config_of(**change))
    assert words in str(e.value) and "\n" not in str(e.value)


def test_some_channels_are_guided_by_flows_only():
    family = get_family(config_of(guidance_channels=1))
    assert family.settings(dict(solver="euler", cfg=1.5)).cfg == 1.5
    with pytest.raises(UserError, match="guidance_channels = 0: the others guide all channels"):
        family.settings(dict(solver="heun", cfg=1.5))


def test_files_keep_what_the_network_does_not_record(case, tmp_path):
    family, params, frozen = case
    family = get_family(config_of(weight="x", mle_time="logit-normal", levels=17))
    (tmp_path / "a.safetensors").write_bytes(safetensors.dumps(*family.export(params, frozen)))
    config = configs.base()
    with config.unlocked():
        from_released(config, convert.read(tmp_path / "a.safetensors"))
    again = get_family(config)
    assert (again.weight, again.mle_time, again.spec.levels) == ("x", "logit-normal", 17)
    assert again.module == family.module and config.sampler.solver == "sde"
