"""Token log-likelihoods, VAR's sampling rules, DDO with dropped labels.

Sections are those of specs/var.md.
"""

import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddo_jax.core import ar, ddo
from ddo_jax.core.ar import ar_logp

GOLDENS = Path(os.environ.get("DDO_JAX_GOLDENS") or Path(__file__).parents[1] / "goldens")


def example():
    rng = np.random.default_rng(0)
    return rng.normal(size=(2, 5, 7)).astype(np.float32), rng.integers(0, 7, size=(2, 5))


def test_against_numpy():
    logits, tokens = example()
    p = np.exp(logits.astype(np.float64))
    p /= p.sum(-1, keepdims=True)
    expected = [sum(np.log(p[b, i, tokens[b, i]]) for i in range(5)) for b in range(2)]
    np.testing.assert_allclose(ar_logp(jnp.asarray(logits), jnp.asarray(tokens)), expected, rtol=1e-6)


def test_likelihoods_of_all_sequences_sum_to_one():
    logits = jnp.asarray(np.random.default_rng(1).normal(size=(1, 3, 2)), jnp.float32)
    tokens = jnp.asarray(np.indices((2, 2, 2)).reshape(3, 8).T)
    logp = ar_logp(jnp.broadcast_to(logits, (8, 3, 2)), tokens)
    np.testing.assert_allclose(jnp.exp(logp).sum(), 1, rtol=1e-6)


def test_bfloat16_is_summed_in_float32_and_large_logits_are_fine():
    logits, tokens = (jnp.asarray(v) for v in example())
    low = logits.astype(jnp.bfloat16)
    logp = ar_logp(low, tokens)
    assert logp.dtype == jnp.float32
    np.testing.assert_array_equal(logp, ar_logp(low.astype(jnp.float32), tokens))
    shifted = ar_logp(jnp.round(logits * 4) + 1e6, tokens)  # integers: exact in float32 also after the shift
    np.testing.assert_allclose(shifted, ar_logp(jnp.round(logits * 4), tokens), rtol=1e-6)


def test_gradient_is_one_hot_minus_softmax():
    logits, tokens = (jnp.asarray(v) for v in example())
    grad = jax.jit(jax.grad(lambda v: jnp.sum(ar_logp(v, tokens))))(logits)
    np.testing.assert_allclose(grad, jax.nn.one_hot(tokens, 7) - jax.nn.softmax(logits), atol=1e-6)


def test_a_token_outside_the_vocabulary_shows():
    logits, tokens = (jnp.asarray(v) for v in example())
    logp = jax.jit(ar_logp)(logits, tokens.at[0, 0].set(7))  # where values cannot be looked at
    assert np.isnan(logp[0]) and np.isfinite(logp[1])


# ----------------------------------------------------------------------------------------------------
# Sampling (specs/var.md section 7)

NETWORKS = ["var_small", "var_small2"]


@pytest.fixture(scope="module", params=NETWORKS)
def golden(request):
    with np.load(GOLDENS / f"{request.param}.npz") as f:
        kept = {k: f[k] for k in f.files if k.startswith(("filter/", "ddo/", "kv/", "config"))}
    return json.loads(str(kept["config"])), kept


def test_filter_goldens(golden):
    info, arrays = golden
    assert len(info["filter_cases"]) == 12
    for j, (top_k, top_p, key) in enumerate(info["filter_cases"]):
        np.testing.assert_array_equal(
            ar.filter_logits(jnp.asarray(arrays[key]), top_k, top_p), arrays[f"filter/{j}/out"]
        )


def test_filter_keeps_ties_with_the_kth_and_never_loses_the_largest():
    logits = jnp.array([[2.0, 1.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    kept = np.isfinite(ar.filter_logits(logits, 2, 0.0))
    np.testing.assert_array_equal(kept, [[1, 1, 1, 0], [1, 1, 1, 1]])
    np.testing.assert_array_equal(np.isfinite(ar.filter_logits(logits, 0, 1e-9))[0], [1, 0, 0, 0])
    np.testing.assert_array_equal(ar.filter_logits(logits, 0, 0), logits)
    np.testing.assert_array_equal(ar.filter_logits(logits, 900, 0), logits)  # more than there are
    low = ar.filter_logits(logits.astype(jnp.bfloat16), 1, 0.5)
    assert low.dtype == jnp.float32


def test_top_p_acts_on_what_top_k_left():
    logits = jnp.log(jnp.array([0.4, 0.3, 0.2, 0.1]))
    # of all, 0.6 needs two codes; of the two likeliest (4/7, 3/7) 0.5 needs one, 0.6 two
    np.testing.assert_array_equal(np.isfinite(ar.filter_logits(logits, 0, 0.5)), [1, 1, 0, 0])
    np.testing.assert_array_equal(np.isfinite(ar.filter_logits(logits, 2, 0.5)), [1, 0, 0, 0])
    np.testing.assert_array_equal(np.isfinite(ar.filter_logits(logits, 2, 0.6)), [1, 1, 0, 0])


@pytest.mark.parametrize("top_k, top_p", [(-1, 0.5), (0, -0.1), (0, 1.5)])
def test_impossible_filters_are_refused(top_k, top_p):
    with pytest.raises(ValueError, match=f"top_k is {top_k}, top_p is {top_p}; allowed: "):
        ar.filter_logits(jnp.zeros(3), top_k, top_p)


def test_guidance():
    cond, uncond = jnp.array([1.0, -2.0]), jnp.array([0.5, 3.0])
    np.testing.assert_array_equal(ar.guidance(cond, uncond, 0.0), cond)
    np.testing.assert_allclose(ar.guidance(cond, uncond, 1.5), [1.75, -9.5])
    assert ar.guidance(cond.astype(jnp.bfloat16), uncond.astype(jnp.bfloat16), 4).dtype == jnp.float32
    assert [ar.progress(s, 5) for s in range(5)] == [0, 0.25, 0.5, 0.75, 1] and ar.progress(0, 1) == 0


def test_draws_have_the_probabilities_of_softmax():
    p = np.array([0.5, 0.3, 0.2, 0.0], np.float32)
    logits = jnp.broadcast_to(jnp.log(p), (20_000, 4))
    seen = np.bincount(ar.draw(logits, jax.random.gumbel(jax.random.key(0), (20_000, 4))), minlength=4) / 20_000
    np.testing.assert_allclose(seen, p, atol=0.015)  # 4 standard errors
    assert seen[3] == 0


def test_smooth_probs():
    logits, noise = jnp.array([1.0, 0.0, -jnp.inf]), jnp.array([0.1, 1.4, 2.0])
    for rho, tau in [(0.0, 0.27), (0.5, 0.14175), (1.0, 0.0135)]:
        odds = np.exp(((1 + rho) - 1.3) / tau)
        expected = [odds / (1 + odds), 1 / (1 + odds), 0]
        np.testing.assert_allclose(ar.smooth_probs(logits, noise, rho), expected, atol=1e-6)


# ----------------------------------------------------------------------------------------------------
# DDO with dropped labels, CCA (section 8)


def test_ddo_goldens(golden):
    """From the reference's likelihoods to its terms and losses; tests/parity has those likelihoods and gradients."""
    info, arrays = golden
    assert {c["variant"] for c in info["ddo_cases"]} == set(ar.DROPPED_ROW_LOSSES) and len(info["ddo_cases"]) == 10
    for case in info["ddo_cases"]:
        real, fake, ref_real, ref_fake = (
            jnp.asarray(arrays[case["logp"] + k]) for k in ("logp_real", "logp_fake", "ref_logp_real", "ref_logp_fake")
        )
        dropped = jnp.asarray(arrays["ddo/dropped"] & case["drop_applied"])
        args = real - ref_real, fake - ref_fake, -real / info["L"], dropped
        how = {"beta": case["beta"], "dropped_row_loss": case["variant"]}
        at, tolerance = f"ddo/{case['name']}/", {"rtol": 1e-5, "atol": 1e-5}
        terms = ar.var_ddo_terms(*args, **how)
        np.testing.assert_allclose(terms[0], arrays[f"{at}real_term"], **tolerance)
        np.testing.assert_allclose(terms[1], arrays[f"{at}fake_term"], **tolerance)
        loss, stats = ar.var_ddo_loss(*args, alpha=case["alpha"], **how)
        np.testing.assert_allclose(loss, arrays[f"{at}loss"], **tolerance)
        means = ddo.summarize(stats)
        np.testing.assert_allclose(means["loss_real"] + means["loss_fake"], loss, rtol=1e-6)
        real_weight, _ = ar.dropped_row_weights(dropped, alpha=case["alpha"], dropped_row_loss=case["variant"])
        if case["drop_applied"]:
            expected = case["w_dropped"] / max(case["alpha"], 1)
            np.testing.assert_allclose(real_weight[np.asarray(dropped)], expected, rtol=1e-6)


def rows(n=6):
    rng = np.random.default_rng(3)
    r_real, r_fake, logp = (jnp.asarray(rng.normal(0, 20, n), jnp.float32) for _ in range(3))
    return r_real, r_fake, logp - 300, jnp.asarray([False, True] * (n // 2))


@pytest.mark.parametrize("variant", ar.DROPPED_ROW_LOSSES)
def test_without_dropped_rows_it_is_ddo_over_max_alpha_1(variant):
    r_real, r_fake, logp, _ = rows()
    none = jnp.zeros(6, bool)
    for alpha in (0.5, 50.0):
        how = {"alpha": alpha, "beta": 0.02}
        loss, stats = ar.var_ddo_loss(r_real, r_fake, -logp / 680, none, **how, dropped_row_loss=variant)
        expected, others = ddo.ddo_loss(r_real, r_fake, **how)
        np.testing.assert_allclose(loss, expected / max(alpha, 1), rtol=1e-6)
        assert stats.keys() == others.keys()


def test_dropped_rows_train_by_likelihood_alone():
    """Gradients of the loss by r: of a dropped row only the real one's counts, whichever way."""
    r_real, r_fake, logp, dropped = rows()
    how = {"alpha": 50.0, "beta": 0.02}

    def gradients(variant):
        def loss(r_real, r_fake, logp):
            return ar.var_ddo_loss(r_real, r_fake, -logp / 680, dropped, dropped_row_loss=variant, **how)[0]

        return [np.asarray(g) for g in jax.grad(loss, argnums=(0, 1, 2))(r_real, r_fake, logp)]

    out = np.asarray(dropped)
    sigmoid = 1 / (1 + np.exp(-0.02 * np.asarray(r_real, np.float64)))
    for variant in ar.DROPPED_ROW_LOSSES:
        real, fake, logp_gradient = gradients(variant)
        assert (fake[out] == 0).all() and (fake[~out] > 0).all()
        np.testing.assert_allclose(real[~out], (-0.02 * (1 - sigmoid) / 50 / 6)[~out], rtol=1e-5)
        if variant == "nll":
            assert (real[out] == 0).all()
            np.testing.assert_allclose(logp_gradient, np.where(out, -1 / 680 / 6, 0), rtol=1e-6)
        else:
            weight = 1 / 50 if variant == "posonly_w1" else 1
            np.testing.assert_allclose(real[out], (-0.02 * (1 - sigmoid) * weight / 6)[out], rtol=1e-5)
            assert not logp_gradient.any()


def test_alpha_is_traced_and_an_unknown_variant_is_refused():
    r_real, r_fake, logp, dropped = rows()
    loss = jax.jit(
        lambda alpha: ar.var_ddo_loss(
            r_real, r_fake, logp, dropped, alpha=alpha, beta=0.02, dropped_row_loss="posonly"
        )[0]
    )
    for alpha in (0.5, 20.0):
        how = {"alpha": alpha, "beta": 0.02, "dropped_row_loss": "posonly"}
        np.testing.assert_allclose(loss(alpha), ar.var_ddo_loss(r_real, r_fake, logp, dropped, **how)[0], rtol=1e-6)
    assert loss._cache_size() == 1
    for f in (ar.var_ddo_terms, ar.dropped_row_weights):
        how = {"beta": 0.02} if f is ar.var_ddo_terms else {"alpha": 1.0}
        args = (r_real, r_fake, logp, dropped) if f is ar.var_ddo_terms else (dropped,)
        with pytest.raises(ValueError, match="dropped_row_loss is 'mle'; allowed: posonly, nll, posonly_w1"):
            f(*args, dropped_row_loss="mle", **how)


def test_cca():
    """Against the formula, row by row; no public numbers exist."""
    positive = jnp.array([True, False, True, False, True])
    r = np.random.default_rng(0).normal(0, 30, (2, 5)).astype(np.float32)
    for lam in (0.5, 50.0):
        expected = [np.log1p(np.exp(-0.02 * v)) for v in r[0].astype(float)]
        for v, same in zip(r[1].astype(float), np.asarray(positive), strict=True):
            expected.append(np.log1p(np.exp(-0.02 * v)) if same else lam * np.log1p(np.exp(0.02 * v)))
        loss, _ = ar.cca_loss(jnp.asarray(r[0]), jnp.asarray(r[1]), positive, lam=lam, beta=0.02)
        np.testing.assert_allclose(loss, sum(expected) / 5 / max(lam, 1), rtol=1e-6)
