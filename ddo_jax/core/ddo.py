"""Direct Discriminative Optimization: a likelihood-based generator trained as its own GAN discriminator.

    r(x) = log p_theta(x) - log p_ref(x)                              # one number per example, [B]
    L = -E_data[ log sigmoid(beta r) ] - alpha E_ref[ log sigmoid(-beta r) ]

The frozen reference p_ref is where theta starts and where the fakes come from. Everything returns one number
per example; the only average is the one in `ddo_loss`.

Reference: Zheng et al. 2025, "Direct Discriminative Optimization", arXiv 2503.01103.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree, ScalarLike, Shaped

# (sum, count) or (sum, sum of squares, count): add leaf by leaf over devices and steps, then `summarize`.
Stats = dict[str, tuple[Any, ...]]


def _at_least_float32(v: Float[Array, "..."]) -> Float[Array, "..."]:
    # NumPy's rule: under JAX's strict promotion jnp.promote_types refuses to say.
    return v.astype(np.promote_types(v.dtype, np.float32))


def log_ratio(logp_fn: Callable[..., Any], params: PyTree, ref_params: PyTree, *args: Any) -> Float[Array, "b"]:
    """Log-likelihood ratio of target and reference, for any likelihood.

        r = log p_theta(x) - log p_ref(x)

    Args:
      logp_fn: `logp_fn(params, *args) -> logp [B]` in nats, summed (never averaged) over pixels or tokens.
        Whatever is random in it must come in through `args`, so that both calls see the same draw.
      params: parameters of the target, differentiated.
      ref_params: parameters of the reference, under stop_gradient.
      *args: passed to both calls.

    Returns:
      r [B] in nats, float32 (float64 if logp is).

    Numerics:
      Exactly 0 at params == ref_params on a CPU. The subtraction loses the digits that two large logp share:
      for a diffusion network use `diffusion_log_ratio`, which does not subtract sums.

    Example:
      >>> import jax.numpy as jnp
      >>> logp = lambda mu, x: -0.5 * (x - mu) ** 2
      >>> print(log_ratio(logp, jnp.float32(1.0), jnp.float32(0.0), jnp.array([0.0, 2.0])))
      [-0.5  1.5]

    Reference: arXiv 2503.01103, section 3.
    """
    logp = _at_least_float32(logp_fn(params, *args))
    logp_ref = _at_least_float32(logp_fn(jax.lax.stop_gradient(ref_params), *args))
    return logp - logp_ref


def diffusion_log_ratio(
    f: Float[Array, "b *dims"], f_ref: Float[Array, "b *dims"], f_hat: Float[Array, "b *dims"]
) -> Float[Array, "b"]:
    """One-evaluation estimate of the log-likelihood ratio of two diffusion networks.

        r = ||f_ref - f_hat||^2 - ||f - f_hat||^2  =  sum (f_ref - f) * (f_ref + f - 2 f_hat)

    Args:
      f: raw output F of the target network (not the denoised image), [B, ...].
      f_ref: the same of the reference, at the same input; under stop_gradient.
      f_hat: the regression target of F, from `edm_inputs`, [B, ...].

    Returns:
      r [B] in nats: the SUM over all axes but the first, as alpha and beta assume: twice the pixels, twice r.

    Numerics:
      float32 whatever the inputs (float64 if they all are). The factored right-hand side never subtracts two
      large sums: with outputs 1e-3 apart at 12,288 pixels its error is 1e-7, that of the left form 2e-3.

    Example:
      >>> import jax.numpy as jnp
      >>> f_hat, f_ref = jnp.zeros((1, 2)), jnp.array([[3.0, 4.0]])
      >>> print(diffusion_log_ratio(f_hat, f_ref, f_hat))  # a perfect target: 3^2 + 4^2
      [25.]

    Reference: arXiv 2503.01103, section 3; the F form: arXiv 2206.00364, appendix B.6.
    """
    f, f_ref, f_hat = (_at_least_float32(v) for v in (f, jax.lax.stop_gradient(f_ref), f_hat))
    return jnp.sum((f_ref - f) * (f_ref + f - 2 * f_hat), axis=tuple(range(1, f.ndim)))


def ddo_terms(
    r_real: Float[Array, "b_real"],
    r_fake: Float[Array, "b_fake"],
    *,
    alpha: ScalarLike,
    beta: ScalarLike,
) -> tuple[Float[Array, "b_real"], Float[Array, "b_fake"]]:
    """The two DDO terms, one number per example.

        real = -log sigmoid(beta r_real)          fake = -alpha log sigmoid(-beta r_fake)

    Args:
      r_real: log-ratios of data, [B_real], nats.
      r_fake: log-ratios of samples of the reference, [B_fake], nats.
      alpha: weight of the fake term, >= 0. Python number or traced scalar.
      beta: scale of r, > 0, about 1 / std(r). Python number or traced scalar.

    Returns:
      (real [B_real], fake [B_fake]), both >= 0, float32 (float64 if r is).

    Numerics:
      log_sigmoid(-z), never log(1 - sigmoid(z)): value and gradient stay finite for every finite r.

    Example:
      >>> import jax.numpy as jnp
      >>> real, fake = ddo_terms(jnp.zeros(1), jnp.zeros(2), alpha=4.0, beta=0.05)
      >>> print(real, fake)  # log 2 and 4 log 2
      [0.6931472] [2.7725887 2.7725887]

    Reference: arXiv 2503.01103, section 3.
    """
    r_real, r_fake = _at_least_float32(r_real), _at_least_float32(r_fake)
    alpha, beta_fake = jnp.asarray(alpha, r_fake.dtype), jnp.asarray(beta, r_fake.dtype)
    real = -jax.nn.log_sigmoid(jnp.asarray(beta, r_real.dtype) * r_real)
    fake = -alpha * jax.nn.log_sigmoid(-beta_fake * r_fake)
    return real, fake


def ddo_loss(
    r_real: Float[Array, "b_real"],
    r_fake: Float[Array, "b_fake"],
    *,
    alpha: ScalarLike,
    beta: ScalarLike,
    real_weight: Shaped[Array, "b_real"] | None = None,
    fake_weight: Shaped[Array, "b_fake"] | None = None,
) -> tuple[Float[Array, ""], Stats]:
    """The DDO loss of a batch, and what to log beside it.

        L = mean_i( real_weight_i * real_i ) + mean_j( fake_weight_j * fake_j )

    Args:
      r_real: log-ratios of data, [B_real], nats.
      r_fake: log-ratios of samples of the reference, [B_fake], nats; B_fake need not equal B_real.
      alpha: weight of the fake term, >= 0. Python number or traced scalar.
      beta: scale of r, > 0. Python number or traced scalar.
      real_weight: [B_real], or None for ones.
      fake_weight: [B_fake], or None for ones.

    Returns:
      (L, stats): a scalar, and `ddo_stats` plus "loss_real" and "loss_fake" as (sum, count); for `summarize`.
      The two loss terms hold the weights and alpha: their means add up to L. The r statistics are unweighted.

    Numerics:
      Each term is a mean over ALL its rows: a row of weight 0 counts in the denominator, so the scale of the
      gradient does not depend on how many labels were dropped. At theta = ref L == (1 + alpha) log 2.

    Example:
      >>> import jax.numpy as jnp
      >>> loss, stats = ddo_loss(jnp.zeros(4), jnp.zeros(4), alpha=4.0, beta=0.05)
      >>> print(f"{loss:.4f} {5 * jnp.log(2):.4f} {summarize(stats)['accuracy']}")
      3.4657 3.4657 0.5

    Reference: arXiv 2503.01103, section 3.
    """
    real, fake = ddo_terms(r_real, r_fake, alpha=alpha, beta=beta)
    if real_weight is not None:
        real = real * real_weight.astype(real.dtype)
    if fake_weight is not None:
        fake = fake * fake_weight.astype(fake.dtype)
    stats = ddo_stats(r_real, r_fake, beta=beta)
    stats |= {"loss_real": _sum_count(real), "loss_fake": _sum_count(fake)}
    return jnp.mean(real) + jnp.mean(fake), stats


def ddo_stats(r_real: Float[Array, "b_real"], r_fake: Float[Array, "b_fake"], *, beta: ScalarLike) -> Stats:
    """Additive statistics of the discriminator.

        r_real, r_fake: (sum r, sum r^2, count)      saturation: (sum beta |r| over both, count)
        acc_real: (sum [r > 0], count)               acc_fake: (sum [r < 0], count); a tie is one half

    Args:
      r_real: log-ratios of data, [B_real], nats.
      r_fake: log-ratios of samples of the reference, [B_fake], nats.
      beta: scale of r, > 0. Python number or traced scalar.

    Returns:
      dict of tuples of scalars. Tuples of several batches, devices or steps add up leaf by leaf
      (`jax.tree.map(operator.add, a, b)`, or `psum`); `summarize` turns the total into means.

    Numerics:
      No gradient flows through. A non-finite r makes its statistics non-finite: it is seen, not hidden.

    Example:
      >>> import jax.numpy as jnp
      >>> stats = ddo_stats(jnp.array([2.0, 0.0]), jnp.array([-1.0]), beta=0.5)
      >>> print({k: [float(x) for x in v] for k, v in stats.items() if k != "r_fake"})
      {'r_real': [2.0, 4.0, 2.0], 'acc_real': [1.5, 2.0], 'acc_fake': [1.0, 1.0], 'saturation': [1.5, 3.0]}
    """
    r_real, r_fake = (_at_least_float32(jax.lax.stop_gradient(r)) for r in (r_real, r_fake))
    r = jnp.concatenate([r_real, r_fake])
    real_sum, real_count = _sum_count(r_real)
    fake_sum, fake_count = _sum_count(r_fake)
    return {
        "r_real": (real_sum, jnp.sum(r_real**2), real_count),
        "r_fake": (fake_sum, jnp.sum(r_fake**2), fake_count),
        "acc_real": _sum_count(0.5 + 0.5 * jnp.sign(r_real)),
        "acc_fake": _sum_count(0.5 - 0.5 * jnp.sign(r_fake)),
        "saturation": _sum_count(jnp.asarray(beta, r.dtype) * jnp.abs(r)),
    }


def summarize(stats: Stats) -> dict[str, Any]:
    """Means from the sums of `ddo_stats` or `ddo_loss`, after any adding up.

        margin = mean(r_real) - mean(r_fake)        accuracy = (mean(acc_real) + mean(acc_fake)) / 2
        std = sqrt( max( mean(r^2) - mean(r)^2, 0 ) )

    Args:
      stats: from `ddo_loss` (or `ddo_stats`, then without the two losses), one batch or a sum of many.

    Returns:
      dict of scalars: r_real_mean, r_real_std, r_fake_mean, r_fake_std, margin (all nats), accuracy in
      [0, 1], saturation = mean beta |r|, loss_real, loss_fake (its alpha included).

    Numerics:
      The std is of the population, from sums: in float32 it is good while |mean| < 100 std. Jit-able.

    Example:
      >>> import jax.numpy as jnp
      >>> stats = ddo_stats(jnp.array([1.0, 3.0]), jnp.array([-1.0]), beta=1.0)
      >>> means = summarize(stats)
      >>> print(means["margin"], means["r_real_std"], means["accuracy"])
      3.0 1.0 1.0
    """
    out: dict[str, Any] = {}
    for side in ("r_real", "r_fake"):
        total, squares, count = stats[side]
        mean = total / count
        out[f"{side}_mean"] = mean
        out[f"{side}_std"] = jnp.sqrt(jnp.maximum(squares / count - mean * mean, 0))
    mean_of = {name: entry[0] / entry[1] for name, entry in stats.items() if len(entry) == 2}
    out["margin"] = out["r_real_mean"] - out["r_fake_mean"]
    out["accuracy"] = 0.5 * (mean_of.pop("acc_real") + mean_of.pop("acc_fake"))
    return out | mean_of


def _sum_count(v: Float[Array, "b"]) -> tuple[Float[Array, ""], Float[Array, ""]]:
    return jnp.sum(v), jnp.asarray(v.size, v.dtype)
