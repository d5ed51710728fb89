"""Token log-likelihoods."""

import jax
import jax.numpy as jnp
import numpy as np

from ddo_jax.core.ar import ar_logp


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
    logp = ar_logp(logits, tokens.at[0, 0].set(7))
    assert np.isnan(logp[0]) and np.isfinite(logp[1])
