"""The training steps: identities at the reference, accumulation, recompilation, EMA, pairing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddo_jax import sharding
from ddo_jax.core import ddo
from ddo_jax.run import state, step
from tests.harness import random_variables


def build(setup, objective, **changes):
    """(step, fresh state, inputs but for key and hyper) of a phase; `changes` go into its config."""
    c = setup.config["ddo" if objective == "ddo" else "pretrain"].copy_and_resolve_references()
    c.update(changes)
    training = step.Training(setup.family, setup.mesh, c, objective, warmup=0.0, total=1e6)
    params, _ = random_variables(setup.family.init, seed=1)
    fresh = sharding.place(setup.mesh, state.new_state(params, c))
    record = {k: np.asarray(v) for k, v in setup.data.read(np.arange(2 * c.batch)).items()}
    real, fake = ({k: v[part] for k, v in record.items()} for part in (slice(None, c.batch), slice(c.batch, None)))
    partners = dict(fake=fake, ref=params) if objective == "ddo" else dict(fake=None)

    def inputs(key, hyper):
        return step.Inputs(setup.frozen, real, key=key, hyper=hyper, **partners)

    return step.make_step(training), fresh, inputs


def hyper(alpha=4.0, beta=0.2, lr=1e-3, law=(-0.4, 1.2)):
    return step.Hyper(alpha, beta, lr, law)


def zero(setup, objective):
    return sharding.replicate(setup.mesh, step.zero_totals(setup.family, objective))


def test_first_step_is_at_the_reference(setup):
    """Breaks if anything random or imprecise stands between target and reference, or a term is mis-weighted."""
    jitted, fresh, inputs = build(setup, "ddo")
    _, totals = jitted(fresh, zero(setup, "ddo"), inputs(jax.random.key(0), hyper(alpha=3.0)))
    stats = ddo.summarize({k: v for k, v in totals.items() if k not in ("grad_norm", "nll_real")})
    assert stats["r_real_std"] == 0 and stats["r_fake_std"] == 0 and stats["accuracy"] == 0.5
    np.testing.assert_allclose([stats["loss_real"], stats["loss_fake"]], [np.log(2), 3 * np.log(2)], rtol=1e-6)


@pytest.mark.parametrize("objective", ["ddo", "mle"])
def test_accumulation_changes_memory_only(setup, objective):
    """Breaks if micro-batches are weighted wrongly, draw their own noise, or lose their partners."""
    results = []
    for parts in (1, 2, 4):
        # eps as large as the gradients: Adam's first step would hide a wrong scale
        jitted, fresh, inputs = build(setup, objective, accumulation=parts, eps=1.0)
        after, totals = jitted(fresh, zero(setup, objective), inputs(jax.random.key(0), hyper(lr=1.0)))
        results.append((after, {k: v for k, v in totals.items()}))
    for a, *others in zip(*map(jax.tree.leaves, results), strict=True):
        for b in others:
            np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-5)


def test_a_search_compiles_once(setup):
    """Breaks if alpha, beta, lr or the noise levels become static, or the first call's types differ from later."""
    jitted, current, inputs = build(setup, "ddo")
    totals = zero(setup, "ddo")
    for values in (hyper(), hyper(alpha=6.0), hyper(beta=0.01), hyper(lr=1e-5), hyper(law=(-1.0, 2.0))):
        current, totals = jitted(current, totals, inputs(jax.random.key(0), values))
    jitted(current, zero(setup, "ddo"), inputs(jax.random.key(1), hyper()))
    assert jitted._cache_size() == 1


def test_ema_follows_its_formula(setup):
    """Breaks if the EMA lags by a step, takes the old parameters, or the half-life is not in images."""
    jitted, current, inputs = build(setup, "mle", ema_mimg=32e-6)
    expected = jax.tree.map(np.asarray, current["ema"])
    totals = zero(setup, "mle")
    beta = 0.5 ** (setup.config.pretrain.batch / 32)
    for _ in range(3):
        current, totals = jitted(current, totals, inputs(jax.random.key(0), hyper(lr=1e-2)))
        params = jax.tree.map(np.asarray, current["params"])
        expected = jax.tree.map(lambda e, p: p + beta * (e - p), expected, params)
    for a, b in zip(*map(jax.tree.leaves, (expected, current["ema"])), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


# exponents of the profiles (specs/edm2.md section 9), not by our own function
GAMMAS = {0.05: 16.9721986, 0.1: 6.93720394, 0.2: 1.82621378}


@pytest.mark.parametrize("stds", [(0.1,), (0.2, 0.05, 0.1)])
def test_power_function_emas_follow_their_formula(setup, stds):
    """Breaks if lengths are swapped or lost, one lags by a step, or t is not the images since the phase began."""
    jitted, current, inputs = build(setup, "mle", ema_stds=stds)
    assert ("emas" in current) == (len(stds) > 1)
    batch, totals = setup.config.pretrain.batch, zero(setup, "mle")
    start = jax.tree.map(lambda x: np.asarray(x, np.float64), current["params"])
    expected = dict.fromkeys(stds, start)
    for i in range(5):
        current, totals = jitted(current, totals, inputs(jax.random.key(0), hyper(lr=1e-2)))
        params = jax.tree.map(lambda x: np.asarray(x, np.float64), current["params"])
        for std in stds:
            t = (i + 1) * batch
            beta = (1 - batch / t) ** (GAMMAS[std] + 1)
            expected[std] = jax.tree.map(lambda e, p, b=beta: e + (1 - b) * (p - e), expected[std], params)
        if i == 0:  # the start leaves no trace
            jax.tree.map(np.testing.assert_array_equal, current["ema"], current["params"])
    found = [current["ema"], *(current["emas"][f"{std:.3f}"] for std in stds[1:])]
    assert set(current.get("emas", {})) == {f"{std:.3f}" for std in stds[1:]}
    for ema, std in zip(found, stds, strict=True):
        for a, b in zip(*map(jax.tree.leaves, (ema, expected[std])), strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-7)
    assert jitted._cache_size() == 1


def test_without_lengths_the_state_is_as_ever(setup):
    """Breaks if checkpoints of runs without `ema_stds` get another structure, so that old ones do not fit."""
    _, current, _ = build(setup, "mle")
    assert set(current) == {"params", "ema", "opt", "step"}


def test_noise_differs_from_step_to_step(setup):
    """Breaks if the key of a step does not depend on the step."""
    jitted, current, inputs = build(setup, "mle")
    seen = []
    for _ in range(2):
        current, totals = jitted(current, zero(setup, "mle"), inputs(jax.random.key(0), hyper(lr=0.0)))
        seen.append(float(totals["loss_mle"][0]))
    assert seen[0] != seen[1]


def test_a_pair_shares_its_draws(setup):
    """Breaks if real and fake row i get other (sigma, eps)."""
    family = setup.family
    draws = family.draw(jax.random.key(0), 3, (-0.4, 1.2))
    doubled = ddo.interleave(draws, draws)
    for name, value in draws.items():
        rows = np.asarray(doubled[name]).reshape(3, 2, *value.shape[1:])
        np.testing.assert_array_equal(rows[:, 0], rows[:, 1])
        np.testing.assert_array_equal(rows[:, 0], value)
    real, fake = jnp.arange(3), jnp.arange(10, 13)
    np.testing.assert_array_equal(ddo.interleave(real, fake), [0, 10, 1, 11, 2, 12])


def test_learning_rate_of_every_schedule(setup):
    """Breaks if the schedule named in the config is not the one that runs."""
    c = setup.config.ddo.copy_and_resolve_references()
    found = {}
    for schedule in ("constant", "cosine", "inverse_sqrt"):
        c.update(schedule=schedule, final_lr=0.1, t_ref=100.0)
        at = [step.learning_rate(c, seen, lr=1.0, warmup=10.0, total=400.0) for seen in (0.0, 5.0, 400.0)]
        found[schedule] = [round(float(x), 3) for x in at]
    assert found == {"constant": [0, 0.5, 1], "cosine": [0, 0.5, 0.1], "inverse_sqrt": [0, 0.5, 0.5]}


@pytest.mark.parametrize("num_real, num_fake", [(6, 6), (8, 2), (2, 8), (6, 4), (3, 5)])
def test_sides_of_unequal_size(num_real, num_fake):
    """Breaks if fewer or more fakes mix up rows, or an example does not have the draws of its own number."""
    real, fake = jnp.arange(num_real), 100 + jnp.arange(num_fake)
    both = ddo.interleave({"x": real}, {"x": fake})["x"]
    assert sorted(both.tolist()) == [*range(num_real), *range(100, 100 + num_fake)]
    for a, b in zip(ddo.apart(both, num_real, num_fake), (real, fake), strict=True):
        np.testing.assert_array_equal(a, b)
    draws = jnp.arange(max(num_real, num_fake)) * 1000.0
    seen = {}

    def loss(r_real, r_fake, s):
        seen.update(real=r_real, fake=r_fake, s=s)
        return jnp.mean(r_real) + jnp.mean(r_fake), {}

    pair = ddo.Pair(real.astype(jnp.float32), fake.astype(jnp.float32), draws)
    ddo.pair_objective(lambda p, x, d: p * x + d, lambda s, s_ref, x, d: s - s_ref, loss, 2.0, 0.0, pair)
    np.testing.assert_array_equal(seen["real"], 2.0 * real)
    np.testing.assert_array_equal(seen["s"][1], 2.0 * fake + 1000.0 * jnp.arange(num_fake))
    known = pair._replace(s_ref=(jnp.zeros(num_real), jnp.zeros(num_fake)))
    ddo.pair_objective(lambda p, x, d: p * x, lambda s, s_ref, x, d: s - s_ref, loss, 2.0, 0.0, known)
    np.testing.assert_array_equal(seen["fake"], 2.0 * fake)
