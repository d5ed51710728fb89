"""DDO: the identities of its paper, then precision, extremes and behaviour under transformations."""

import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddo_jax.core.ddo import ddo_loss, ddo_stats, ddo_terms, diffusion_log_ratio, log_ratio, summarize

ALPHA, BETA = 4.0, 0.05


def mlp_logp(params, x):
    """Some likelihood with several parameters: x [B, 3] -> logp [B]."""
    hidden = jnp.tanh(jnp.sum(x[:, :, None] * params["w"][None], axis=1))
    return -jnp.sum((hidden - params["b"][None]) ** 2, axis=1)


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)
    return {
        "w": jnp.asarray(rng.normal(size=(3, 4)), jnp.float32),
        "b": jnp.asarray(rng.normal(size=4), jnp.float32),
    }


@pytest.fixture(scope="module")
def batches():
    rng = np.random.default_rng(1)
    return tuple(jnp.asarray(rng.normal(size=(n, 3)), jnp.float32) for n in (4, 6))


def loss_of(params, ref, real, fake, alpha=ALPHA, beta=BETA):
    r_real, r_fake = log_ratio(mlp_logp, params, ref, real), log_ratio(mlp_logp, params, ref, fake)
    return ddo_loss(r_real, r_fake, alpha=alpha, beta=beta)


# ---- at theta = ref ----


def test_at_the_reference_r_is_exactly_zero_and_the_loss_is_known(params, batches):
    real, fake = batches
    r = jax.jit(lambda p, ref: log_ratio(mlp_logp, p, ref, real))(params, params)
    assert r.dtype == jnp.float32
    np.testing.assert_array_equal(r, 0)
    loss, stats = loss_of(params, params, real, fake)
    np.testing.assert_allclose(loss, (1 + ALPHA) * np.log(2), rtol=1e-6)
    means = summarize(stats)
    assert means["accuracy"] == 0.5 and means["margin"] == 0  # ties count one half


def test_at_the_reference_the_gradient_has_its_closed_form(params, batches):
    real, fake = batches
    grads = jax.grad(lambda p: loss_of(p, params, real, fake)[0])(params)

    def closed_form(p):  # its gradient: -beta/2 E_data[grad logp] + alpha beta/2 E_ref[grad logp]
        return BETA / 2 * (ALPHA * jnp.mean(mlp_logp(p, fake)) - jnp.mean(mlp_logp(p, real)))

    expected = jax.grad(closed_form)(params)
    for name in params:
        assert np.abs(expected[name]).max() > 1e-3
        np.testing.assert_allclose(grads[name], expected[name], rtol=1e-5, atol=1e-7)


def test_gradient_with_respect_to_r_away_from_the_reference():
    r_real, r_fake = jnp.array([-3.0, 0.5, 20.0]), jnp.array([4.0, -7.0])
    grad = jax.grad(lambda a, b: ddo_loss(a, b, alpha=2.0, beta=0.3)[0], argnums=(0, 1))
    g_real, g_fake = grad(r_real, r_fake)
    np.testing.assert_allclose(g_real, -0.3 / (1 + np.exp(0.3 * np.array(r_real))) / 3, rtol=1e-5)
    np.testing.assert_allclose(g_fake, 2 * 0.3 / (1 + np.exp(-0.3 * np.array(r_fake))) / 2, rtol=1e-5)


def test_signs_data_up_fakes_down():
    better, _ = ddo_loss(jnp.array([1.0]), jnp.array([-1.0]), alpha=1.0, beta=1.0)
    worse, _ = ddo_loss(jnp.array([-1.0]), jnp.array([1.0]), alpha=1.0, beta=1.0)
    np.testing.assert_allclose([better, worse], 2 * np.log1p(np.exp([-1, 1])), rtol=1e-6)


def test_the_reference_gets_no_gradient(params, batches):
    real, fake = batches
    other = jax.tree.map(lambda v: v + 0.1, params)
    for grad in jax.tree.leaves(jax.grad(lambda ref: loss_of(other, ref, real, fake)[0])(params)):
        np.testing.assert_array_equal(grad, 0)
    f, f_ref, f_hat = jnp.ones((2, 3)), 2 * jnp.ones((2, 3)), jnp.zeros((2, 3))
    grad_f, grad_ref = jax.grad(lambda *v: jnp.sum(diffusion_log_ratio(*v, f_hat)), argnums=(0, 1))(f, f_ref)
    np.testing.assert_array_equal(grad_ref, 0)
    np.testing.assert_array_equal(grad_f, -2)  # -2 (f - f_hat)


# ---- tabular optima (float64) ----

P = np.array([0.4, 0.3, 0.15, 0.1, 0.05])
R = np.array([0.1, 0.2, 0.3, 0.15, 0.25])


def tabular_loss(log_q, alpha, beta):
    """The loss over 5 states with exact expectations: rows are states, weights 5 times their share."""
    d = log_q - jnp.log(jnp.asarray(R))
    return ddo_loss(d, d, alpha=alpha, beta=beta, real_weight=jnp.asarray(5 * P), fake_weight=jnp.asarray(5 * R))[0]


@jax.jit
def descend_free(alpha, beta):
    """Newton on log q: the problem is convex and separable, so the diagonal of the Hessian is all of it."""
    grad = jax.grad(lambda log_q: tabular_loss(log_q, alpha, beta))

    def step(_, log_q):
        g, h = jax.jvp(grad, (log_q,), (jnp.ones_like(log_q),))
        return log_q - jnp.clip(g / h, -1.0, 1.0)

    return jax.lax.fori_loop(0, 60, step, jnp.log(jnp.asarray(R)))


@jax.jit
def descend_softmax(alpha, beta):
    grad = jax.grad(lambda logits: tabular_loss(jax.nn.log_softmax(logits), alpha, beta))
    return jax.lax.fori_loop(0, 20_000, lambda _, v: v - 2.0 * grad(v), jnp.log(jnp.asarray(R)))


@pytest.mark.parametrize("alpha, beta", [(1.0, 1.0), (2.5, 0.7), (0.6, 0.4)])
def test_free_tabular_optimum(alpha, beta):
    with jax.enable_x64(True):
        q = np.exp(descend_free(alpha, beta))
    np.testing.assert_allclose(q, R * (P / (alpha * R)) ** (1 / beta), rtol=1e-9)


@pytest.mark.parametrize("alpha, beta", [(1.0, 1.0), (2.5, 0.7)])
def test_softmax_stationarity(alpha, beta):
    with jax.enable_x64(True):
        q = np.asarray(jax.nn.softmax(descend_softmax(alpha, beta)))
    d = np.log(q) - np.log(R)
    h = P / (1 + np.exp(beta * d)) - alpha * R / (1 + np.exp(-beta * d))
    np.testing.assert_allclose(h, h.sum() * q, atol=1e-9)
    free = R * (P / (alpha * R)) ** (1 / beta)
    if alpha == beta == 1:  # the GAN case: p_theta = p_data
        np.testing.assert_allclose(q, P, rtol=1e-6)
    else:  # the normalised optimum is NOT the free one, normalised
        assert np.abs(q - free / free.sum()).max() > 1e-3


# ---- precision ----


def outputs(shape, seed=0):
    """(f, f_ref, f_hat) with outputs 1e-3 apart, as early in a round."""
    rng = np.random.default_rng(seed)
    f_hat, f = (rng.standard_normal(shape, np.float32) for _ in range(2))
    return f, f + np.float32(1e-3) * rng.standard_normal(shape, np.float32), f_hat


def test_factored_form_at_12288_pixels():
    f, f_ref, f_hat = outputs((32, 64, 64, 3))
    wide = [v.astype(np.float64) for v in (f, f_ref, f_hat)]
    exact = ((wide[1] - wide[2]) ** 2 - (wide[0] - wide[2]) ** 2).sum((1, 2, 3))
    factored = np.asarray(diffusion_log_ratio(*map(jnp.asarray, (f, f_ref, f_hat))), np.float64)
    f, f_ref, f_hat = map(jnp.asarray, (f, f_ref, f_hat))
    sums = jnp.sum((f_ref - f_hat) ** 2, axis=(1, 2, 3)) - jnp.sum((f - f_hat) ** 2, axis=(1, 2, 3))
    assert exact.std() > 0.1
    assert np.abs(factored - exact).max() < 1e-6
    assert np.abs(np.asarray(sums, np.float64) - exact).max() > 1e-4  # what the factored form is for


def test_diffusion_ratio_sums_over_pixels():
    f, f_ref, f_hat = (jnp.asarray(v) for v in outputs((3, 4, 4, 2)))
    once = diffusion_log_ratio(f, f_ref, f_hat)
    twice = diffusion_log_ratio(*(jnp.concatenate([v, v], axis=1) for v in (f, f_ref, f_hat)))
    np.testing.assert_allclose(twice, 2 * once, rtol=1e-5)
    np.testing.assert_array_equal(diffusion_log_ratio(f, f, f_hat), 0)


def test_dtypes():
    low = [jnp.asarray(v, jnp.bfloat16) for v in outputs((3, 8))]
    r = diffusion_log_ratio(*low)
    assert r.dtype == jnp.float32
    np.testing.assert_array_equal(r, diffusion_log_ratio(*(v.astype(jnp.float32) for v in low)))
    bf16_logp = log_ratio(lambda mu, x: x * mu, jnp.bfloat16(2), jnp.bfloat16(1), jnp.ones(2, jnp.bfloat16))
    assert bf16_logp.dtype == jnp.float32
    with jax.enable_x64(True):
        wide = [jnp.asarray(v, jnp.float64) for v in outputs((3, 8))]
        r = diffusion_log_ratio(*wide)
        loss, _ = ddo_loss(r, r, alpha=jnp.float32(4.0), beta=0.05)
        assert r.dtype == loss.dtype == jnp.float64


def test_extreme_ratios_stay_finite():
    r = jnp.array([-1e4, -100.0, 0.0, 100.0, 1e4])
    value_and_grad = jax.value_and_grad(lambda a, b: ddo_loss(a, b, alpha=1.0, beta=1.0)[0], argnums=(0, 1))
    loss, grads = value_and_grad(r, r)
    np.testing.assert_allclose(loss, 2 * (1e4 + 100 + np.log(2)) / 5, rtol=1e-6)
    np.testing.assert_allclose(grads[0], -np.array([1, 1, 0.5, 0, 0]) / 5, atol=1e-7)
    np.testing.assert_allclose(grads[1], np.array([0, 0, 0.5, 1, 1]) / 5, atol=1e-7)
    # log(1 - sigmoid(z)) is what must not be written
    assert not np.isfinite(jnp.log(1 - jax.nn.sigmoid(r))).all()


# ---- transformations ----


def test_a_sweep_over_alpha_and_beta_does_not_recompile():
    traces = []

    @jax.jit
    def step(r_real, r_fake, alpha, beta):
        traces.append(None)
        return jax.grad(lambda a: ddo_loss(a, r_fake, alpha=alpha, beta=beta)[0])(r_real)

    r = jnp.array([0.3, -2.0])
    grads = [step(r, r, alpha, beta) for alpha, beta in [(1.0, 0.1), (4.0, 0.05), (6.0, 0.01)]]
    assert len(traces) == 1
    np.testing.assert_allclose(grads[1], -0.05 / (1 + np.exp(0.05 * np.array(r))) / 2, rtol=1e-5)


def test_vmap_over_alpha_and_over_examples():
    r_real, r_fake = jnp.array([0.3, -2.0, 1.0]), jnp.array([1.0, 0.1])
    alphas = jnp.array([0.5, 6.0])
    swept = jax.vmap(lambda a: ddo_loss(r_real, r_fake, alpha=a, beta=0.1)[0])(alphas)
    single = [ddo_loss(r_real, r_fake, alpha=float(a), beta=0.1)[0] for a in alphas]
    np.testing.assert_allclose(swept, jnp.stack(single), rtol=1e-6)
    f, f_ref, f_hat = (jnp.asarray(v) for v in outputs((4, 2, 3)))
    mapped = jax.vmap(lambda *v: diffusion_log_ratio(*v))(*(v[:, None] for v in (f, f_ref, f_hat)))
    np.testing.assert_allclose(mapped[:, 0], diffusion_log_ratio(f, f_ref, f_hat), rtol=1e-5, atol=1e-7)


# ---- means, weights, statistics ----


def test_terms_and_means_of_unequal_batches():
    r_real, r_fake = jnp.array([1.0, -2.0, 3.0]), jnp.array([0.5, -4.0])
    real, fake = ddo_terms(r_real, r_fake, alpha=ALPHA, beta=0.5)
    np.testing.assert_allclose(real, np.log1p(np.exp(-0.5 * np.array(r_real))), rtol=1e-5)
    np.testing.assert_allclose(fake, ALPHA * np.log1p(np.exp(0.5 * np.array(r_fake))), rtol=1e-5)
    loss, _ = ddo_loss(r_real, r_fake, alpha=ALPHA, beta=0.5)
    np.testing.assert_allclose(loss, real.sum() / 3 + fake.sum() / 2, rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bool_, jnp.int32])
def test_a_row_of_weight_zero_still_counts(dtype):
    r_real, r_fake = jnp.array([1.0, -2.0]), jnp.array([0.5, -4.0, 2.0])
    real, fake = ddo_terms(r_real, r_fake, alpha=2.0, beta=0.5)
    loss, stats = ddo_loss(
        r_real,
        r_fake,
        alpha=2.0,
        beta=0.5,
        real_weight=jnp.array([0, 1], dtype),
        fake_weight=jnp.array([1, 0, 1], dtype),
    )
    np.testing.assert_allclose(loss, real[1] / 2 + (fake[0] + fake[2]) / 3, rtol=1e-6)
    means = summarize(stats)
    np.testing.assert_allclose(means["loss_real"] + means["loss_fake"], loss, rtol=1e-6)


def test_summary_against_numpy():
    r_real, r_fake = np.array([2.0, 0.0, -1.0, 7.0]), np.array([-1.0, 3.0, -5.0])
    _, stats = ddo_loss(jnp.float32(r_real), jnp.float32(r_fake), alpha=ALPHA, beta=0.5)
    expected = {
        "r_real_mean": 2.0,
        "r_real_std": r_real.std(),
        "r_fake_mean": -1.0,
        "r_fake_std": r_fake.std(),
        "margin": 3.0,
        "accuracy": (2.5 / 4 + 2 / 3) / 2,
        "saturation": 0.5 * (10 + 9) / 7,
        "loss_real": np.log1p(np.exp(-0.5 * r_real)).mean(),
        "loss_fake": ALPHA * np.log1p(np.exp(0.5 * r_fake)).mean(),
    }
    means = summarize(stats)
    assert set(means) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(means[name], value, rtol=1e-5, err_msg=name)
    assert set(summarize(ddo_stats(jnp.float32(r_real), jnp.float32(r_fake), beta=0.5))) == set(expected) - {
        "loss_real",
        "loss_fake",
    }


def test_statistics_of_parts_add_up():
    rng = np.random.default_rng(2)
    r_real, r_fake = (jnp.asarray(3 * rng.normal(size=n), jnp.float32) for n in (8, 12))
    _, whole = ddo_loss(r_real, r_fake, alpha=ALPHA, beta=BETA)
    parts = [  # of unequal sizes: averages of averages would be wrong
        ddo_loss(r_real[a], r_fake[b], alpha=ALPHA, beta=BETA)[1]
        for a, b in [(slice(0, 3), slice(0, 10)), (slice(3, 8), slice(10, 12))]
    ]
    total = summarize(jax.tree.map(operator.add, *parts))
    on_host = summarize(jax.tree.map(operator.add, *jax.device_get(parts)))
    for name, value in summarize(whole).items():
        np.testing.assert_allclose(total[name], value, rtol=1e-5, err_msg=name)
        np.testing.assert_allclose(on_host[name], value, rtol=1e-5, err_msg=name)


def test_a_non_finite_ratio_is_seen():
    _, stats = ddo_loss(jnp.array([jnp.nan, 1.0]), jnp.ones(2), alpha=1.0, beta=1.0)
    assert np.isnan(summarize(stats)["r_real_mean"]) and np.isnan(summarize(stats)["accuracy"])
