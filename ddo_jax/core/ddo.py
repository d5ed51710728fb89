"""Direct Discriminative Optimization: a likelihood-based generator trained as its own GAN discriminator.

    r(x) = log p_theta(x) - log p_ref(x)                              # one number per example, [B]
    L = -E_data[ log sigmoid(beta r) ] - alpha E_ref[ log sigmoid(-beta r) ]

The frozen reference p_ref is where theta starts and where the fakes come from. Everything returns one number
per example; the only average is the one in `ddo_loss`.

The argument. A GAN's discriminator d tells data from samples of p_ref; its best one has the logit log p_data / p_ref.
So take d = sigmoid(beta r), a discriminator whose parameters are those of the generator: training it IS training
p_theta, and no second network, no gradient through a sampler and no change to sampling is needed. At beta = alpha = 1
the optimum is p_theta = p_data. With beta alone it is

    p_theta  proportional to  p_ref^(1 - 1/beta) p_data^(1/beta)

(beta r = log p_data / p_ref): a beta below 1 asks for MORE than the data, an extrapolation from p_ref beyond p_data,
and alpha shifts the logit by -log alpha, which a normalised p_theta cannot follow everywhere. So the loss is not run
to its end: a round is short, is stopped at its best, and starts again from there.

Diffusion has no log p. The ELBO puts -E_sigma,eps[ w ||F - F_hat||^2 ] in its place, so that r is an expectation, too;
-log sigmoid is convex, so by Jensen the mean of the loss over single draws bounds the loss of the mean from above, and
ONE draw of (sigma, eps) is an unbiased estimate of that bound. The same draw must serve all four evaluations, target
and reference on real and fake row i: the noise that they share cancels in r, which is why r is exactly 0 at the start
and small after it, and why `pair_objective` takes the draws as an argument.

Reference: Zheng et al. 2025, "Direct Discriminative Optimization", arXiv 2503.01103.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree, ScalarLike, Shaped

from ddo_jax.core import door

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

    Raises:
      ValueError: logp_fn does not give [B].

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
    logp = _rows("logp_fn(params, ...)", logp_fn(params, *args))
    logp_ref = _rows("logp_fn(ref_params, ...)", logp_fn(jax.lax.stop_gradient(ref_params), *args))
    door.alike(logp=logp, logp_ref=logp_ref)
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

    Raises:
      ValueError: shapes that differ, integers, no rows.

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
    named = {"f": f, "f_ref": f_ref, "f_hat": f_hat}
    named = {name: door.floats(name, v) for name, v in named.items()}
    door.alike(**named)
    f, f_ref, f_hat = map(_at_least_float32, named.values())
    f_ref = jax.lax.stop_gradient(f_ref)
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
      beta: scale of r, > 0, about 0.2 alpha / std(r). Python number or traced scalar.

    Returns:
      (real [B_real], fake [B_fake]), both >= 0, float32 (float64 if r is).

    Raises:
      ValueError: r that is not [B], integers, no rows.

    Numerics:
      log_sigmoid(-z), never log(1 - sigmoid(z)): value and gradient stay finite for every finite r.

    Example:
      >>> import jax.numpy as jnp
      >>> real, fake = ddo_terms(jnp.zeros(1), jnp.zeros(2), alpha=4.0, beta=0.05)
      >>> print(real, fake)  # log 2 and 4 log 2
      [0.6931472] [2.7725887 2.7725887]

    Reference: arXiv 2503.01103, section 3.
    """
    r_real, r_fake = _rows("r_real", r_real), _rows("r_fake", r_fake)
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

    Raises:
      ValueError: r that is not [B], integers, no rows; a weight of another shape than its r.

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
        real = real * _weights("real_weight", real_weight, real)
    if fake_weight is not None:
        fake = fake * _weights("fake_weight", fake_weight, fake)
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
    r_real, r_fake = (jax.lax.stop_gradient(_rows(n, r)) for n, r in (("r_real", r_real), ("r_fake", r_fake)))
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
      [0, 1], saturation = mean beta abs(r), loss_real, loss_fake (its alpha included).

    Numerics:
      The std is of the population, from sums: in float32 it is good while abs(mean) < 100 std. Jit-able.

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


class Pair(NamedTuple):
    """B real and F fake examples, and the draws that row i of both shares; mostly F = B.

    Attributes:
      real, fake: pytrees of arrays [B, ...] and [F, ...]. draws: all randomness of one evaluation, a pytree of
        [max(B, F), ...]: real example i and fake i have row i.
      s_ref: what the reference said, (of real, of fake), where that is known; else None.
    """

    real: Any
    fake: Any
    draws: Any
    s_ref: Any = None

    def sizes(self) -> tuple[int, int]:
        """(B, F)."""
        real, fake = (jax.tree.leaves(x)[0].shape[0] for x in (self.real, self.fake))
        return real, fake

    def draws_of_each(self) -> tuple[Any, Any]:
        """(of real, of fake)."""
        real, fake = (jax.tree.map(lambda x, n=n: x[:n], self.draws) for n in self.sizes())
        return real, fake


def interleave(real: Any, fake: Any) -> Any:
    """Rows real_0, fake_0, real_1, ...: one forward pass for both, and no row changes its device.

    Args:
      real, fake: pytrees of one structure, of arrays [B, ...] and [F, ...]. Of unequal numbers B : F = b : f, b real
        rows are followed by f fake ones.

    Returns:
      The same pytree of [B + F, ...]; `apart` takes it apart.

    Example:
      >>> import jax.numpy as jnp
      >>> print(interleave(jnp.array([1, 2]), jnp.array([-1, -2])), interleave(jnp.arange(4), jnp.array([-1, -2])))
      [ 1 -1  2 -2] [ 0  1 -1  2  3 -2]
    """

    def mixed(x: Any, y: Any) -> Any:
        groups = math.gcd(len(x), len(y))
        rows = jnp.concatenate([v.reshape(groups, -1, *v.shape[1:]) for v in (x, y)], axis=1)
        return rows.reshape(-1, *x.shape[1:])

    return jax.tree.map(mixed, real, fake)


def apart(rows: Any, num_real: int, num_fake: int) -> tuple[Any, Any]:
    """The inverse of `interleave`: (of real [B, ...], of fake [F, ...]).

    Args:
      rows: pytree of arrays [B + F, ...]. num_real, num_fake: B and F.

    Example:
      >>> import jax.numpy as jnp
      >>> print(*apart(jnp.array([0, 1, -1, 2, 3, -2]), 4, 2))
      [0 1 2 3] [-1 -2]
    """
    groups = math.gcd(num_real, num_fake)
    each = num_real // groups

    def side(x: Any, part: slice) -> Any:
        return x.reshape(groups, -1, *x.shape[1:])[:, part].reshape(-1, *x.shape[1:])

    real, fake = (jax.tree.map(lambda x, p=p: side(x, p), rows) for p in (slice(each), slice(each, None)))
    return real, fake


def pair_objective(
    score: Callable[..., Any],
    ratio: Callable[..., Any],
    loss: Callable[..., Any],
    params: PyTree,
    ref_params: PyTree,
    pair: Pair,
) -> tuple[Float[Array, ""], Stats]:
    """The algorithm: a batch of pairs to loss and statistics, for any model.

        s = score(theta; x, draws),   s_ref = score(ref; x, draws),   r = ratio(s, s_ref; x, draws)
        for x in real, fake with the same draws in row i;       loss(r_real, r_fake, (s_real, s_fake))

    Args:
      score: `score(params, examples [n,...], draws [n,...]) -> s`, a pytree of [n, ...]: a network's raw output F, or
        the exact log p [n]. Deterministic: all randomness comes in through draws.
      ratio: `ratio(s, s_ref, examples, draws) -> r [n]`, nats: `diffusion_log_ratio`, or the difference.
      loss: `loss(r_real [B], r_fake [F], (s_real, s_fake)) -> (scalar, stats)`: `ddo_loss` with its alpha and beta.
      params: of the target, differentiated.
      ref_params: of the reference, under stop_gradient; not used with pair.s_ref.
      pair: see `Pair`. Real and fake rows go through the network in one pass.

    Returns:
      What `loss` returns.

    Example:
      >>> import jax.numpy as jnp
      >>> score = lambda mu, x, draws: -0.5 * (x - mu) ** 2  # log p of a Gaussian
      >>> ratio = lambda s, s_ref, x, draws: s - s_ref
      >>> loss = lambda r_real, r_fake, s: ddo_loss(r_real, r_fake, alpha=1.0, beta=1.0)
      >>> pair = Pair(real=jnp.array([1.0]), fake=jnp.array([-1.0]), draws=jnp.zeros(1))
      >>> value, stats = pair_objective(score, ratio, loss, jnp.float32(1.0), jnp.float32(0.0), pair)
      >>> print(summarize(stats)["margin"])  # r = mu x - mu^2 / 2
      2.0

    Reference: arXiv 2503.01103, section 3, algorithm 1.
    """
    sizes = pair.sizes()
    examples, draws = interleave(pair.real, pair.fake), interleave(*pair.draws_of_each())
    with jax.named_scope("target"):
        s = score(params, examples, draws)
    with jax.named_scope("reference"):
        s_ref = score(ref_params, examples, draws) if pair.s_ref is None else interleave(*pair.s_ref)
    r = _rows("ratio(...)", ratio(s, jax.lax.stop_gradient(s_ref), examples, draws))
    return loss(*apart(r, *sizes), apart(s, *sizes))


def _rows(name: str, v: Any) -> Float[Array, "b"]:
    """One floating number a row, at least float32."""
    return _at_least_float32(door.floats(name, v, rank=1))


def _weights(name: str, v: Any, like: Float[Array, "b"]) -> Float[Array, "b"]:
    """Numbers or booleans, one a row."""
    v = door.array(name, v)
    door.alike(**{"its term": like, name: v})
    return v.astype(like.dtype)


def _sum_count(v: Float[Array, "b"]) -> tuple[Float[Array, ""], Float[Array, ""]]:
    return jnp.sum(v), jnp.asarray(v.size, v.dtype)
