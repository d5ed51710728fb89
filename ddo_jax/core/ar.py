"""Autoregressive models over discrete tokens: exact log-likelihoods, VAR's sampling rules, DDO with dropped labels.

Section numbers refer to specs/var.md. B rows, L tokens, V codes; everything here is pure, noise comes in as an
argument, and what is computed per token does not look at the other tokens.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, ScalarLike

from ddo_jax.core import ddo, door

DROPPED_ROW_LOSSES = ("posonly", "nll", "posonly_w1")


def ar_logp(logits: Float[Array, "b l v"], tokens: Int[Array, "b l"]) -> Float[Array, "b"]:
    """Log-likelihood of token sequences under teacher-forced logits.

        logp = sum_l log softmax(logits_l)[token_l]

    Args:
      logits: [B, L, V], unnormalised; row l was computed without a look at token l. Any float dtype.
      tokens: [B, L] integers in [0, V).

    Returns:
      logp [B] <= 0 in nats, the SUM over the L tokens.

    Numerics:
      log_softmax and the sum run in float32 whatever the logits (float64 if they are).
      Under jit tokens are not looked at: one >= V gives NaN, which shows; a negative one counts from the end, which
      does not.

    Example:
      >>> import jax.numpy as jnp
      >>> print(ar_logp(jnp.zeros((1, 3, 4)), jnp.zeros((1, 3), jnp.int32)))  # 3 log(1/4)
      [-4.158883]

    Reference: arXiv 2503.01103, section 3 (DDO on VAR, arXiv 2404.02905).
    """
    logits = _at_least_float32(door.floats("logits", logits, rank=3))
    tokens = door.codes("tokens", tokens, 2, logits.shape[-1])
    door.alike(**{"logits without V": logits[..., 0], "tokens": tokens})
    logp = jnp.take_along_axis(jax.nn.log_softmax(logits, axis=-1), tokens[..., None], axis=-1)
    return jnp.sum(logp[..., 0], axis=-1)


# ----------------------------------------------------------------------------------------------------
# Sampling (section 7)


def progress(s: int, scales: int) -> float:
    """How far scale s is from the coarsest (0) to the finest (1).

        rho = s / (scales - 1)

    Args:
      s: scale, from 0. scales: how many there are; one alone has rho = 0.

    Example:
      >>> progress(3, 10)
      0.3333333333333333

    Reference: specs/var.md section 7.
    """
    return s / max(scales - 1, 1)


def guidance(
    logits_cond: Float[Array, "*dims"], logits_uncond: Float[Array, "*dims"], t: ScalarLike
) -> Float[Array, "*dims"]:
    """Classifier-free guidance of logits.

        (1 + t) logits_cond - t logits_uncond,   t = cfg rho: the coarsest scale is never guided

    Args:
      logits_cond: given the label, any shape. logits_uncond: without label, the same shape.
      t: strength; 0 gives logits_cond.

    Returns:
      Logits of the same shape; float32 whatever the inputs (float64 if they are).

    Example:
      >>> import jax.numpy as jnp
      >>> print(guidance(jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0]), 0.5))
      [ 1.5 -0.5]

    Reference: specs/var.md section 7.
    """
    cond, uncond = (
        door.floats("logits_cond", logits_cond, rows=False),
        door.floats("logits_uncond", logits_uncond, rows=False),
    )
    door.alike(logits_cond=cond, logits_uncond=uncond)
    cond, uncond = _at_least_float32(cond), _at_least_float32(uncond)
    t = jnp.asarray(t, cond.dtype)
    return (1 + t) * cond - t * uncond


def filter_logits(logits: Float[Array, "*dims v"], top_k: int, top_p: float | int) -> Float[Array, "*dims v"]:
    """Remove unlikely codes: -inf for all but the top_k largest, then for the least likely of 1 - top_p in total.

    Args:
      logits: [..., V].
      top_k: logits strictly below the k-th largest are removed (ties with it stay); 0, or V and more: none.
      top_p: in ascending order of what top_k left, those whose cumulative probability is <= 1 - top_p are removed,
        never the largest; 0: none. Equal logits stay or go together.

    Returns:
      Logits [..., V]; float32 whatever the input (float64 if it is).

    Raises:
      ValueError: top_k < 0, or top_p outside [0, 1].

    Example:
      >>> import jax.numpy as jnp
      >>> logits = jnp.log(jnp.array([0.4, 0.3, 0.2, 0.1]))
      >>> print(jnp.exp(filter_logits(logits, 0, 0.6)).round(3), jnp.exp(filter_logits(logits, 1, 0)).round(3))
      [0.4 0.3 0.  0. ] [0.4 0.  0.  0. ]

    Reference: specs/var.md section 7.
    """
    if top_k < 0 or not 0 <= top_p <= 1:
        raise ValueError(f"top_k is {top_k}, top_p is {top_p}; allowed: top_k >= 0 and 0 <= top_p <= 1")
    logits = _at_least_float32(door.floats("logits", logits))
    size = logits.shape[-1]
    top_k = top_k if top_k < size else 0
    if not top_k and not top_p:
        return logits
    ascending = jnp.sort(logits, axis=-1)
    if top_k:
        lowest = ascending[..., size - top_k, None]
        ascending = jnp.where(ascending < lowest, -jnp.inf, ascending)
    if top_p:
        kept = jnp.cumsum(jax.nn.softmax(ascending, axis=-1), axis=-1) > 1 - top_p
        lowest = jnp.min(jnp.where(kept, ascending, ascending[..., -1:]), axis=-1, keepdims=True)
    return jnp.where(logits < lowest, -jnp.inf, logits)


def draw(logits: Float[Array, "*dims v"], gumbel: Float[Array, "*dims v"]) -> Int[Array, "*dims"]:
    """One code of softmax(logits) for each row: argmax(logits + gumbel).

    Args:
      logits: [..., V], -inf for what cannot be drawn. gumbel: standard Gumbel noise -log(-log u), the same shape.

    Returns:
      int32 [...], in [0, V).

    Example:
      >>> import jax.numpy as jnp
      >>> print(draw(jnp.array([[1.0, 0.0], [-jnp.inf, 0.0]]), jnp.array([[0.5, 2.0], [9.0, 0.0]])))
      [1 1]
    """
    logits, gumbel = door.floats("logits", logits), door.floats("gumbel", gumbel)
    door.alike(logits=logits, gumbel=gumbel)
    return jnp.argmax(logits + gumbel, axis=-1).astype(jnp.int32)


def smooth_probs(
    logits: Float[Array, "*dims v"], gumbel: Float[Array, "*dims v"], rho: float | int
) -> Float[Array, "*dims v"]:
    """Soft codes of VAR's `more_smooth`, sharper at finer scales.

        softmax( (logits (1 + rho) + gumbel) / tau ),   tau = max(0.27 (1 - 0.95 rho), 0.005)

    Args:
      logits: filtered, [..., V]. gumbel: standard Gumbel noise, the same shape. rho: `progress`, in [0, 1].

    Returns:
      Probabilities [..., V], to be multiplied with the codebook.

    Example:
      >>> import jax.numpy as jnp
      >>> print(smooth_probs(jnp.array([0.0, 0.27]), jnp.zeros(2), 0.0))  # tau = 0.27: 1 / (1 + e), e / (1 + e)
      [0.26894143 0.7310586 ]

    Reference: specs/var.md section 7.
    """
    logits, gumbel = door.floats("logits", logits), door.floats("gumbel", gumbel)
    door.alike(logits=logits, gumbel=gumbel)
    tau = max(0.27 * (1 - 0.95 * rho), 0.005)
    return jax.nn.softmax((logits * (1 + rho) + gumbel) / tau, axis=-1)


# ----------------------------------------------------------------------------------------------------
# DDO with dropped labels, CCA (section 8)


def dropped_row_weights(
    dropped: Bool[Array, "b"], *, alpha: ScalarLike, dropped_row_loss: str
) -> tuple[Float[Array, "b"], Float[Array, "b"]]:
    """Weights of `ddo.ddo_loss` for rows of which some lost their label.

        real_weight = w / max(alpha, 1),  w = 1 if kept, else max(alpha, 1) (posonly, nll) or 1 (posonly_w1)
        fake_weight = 1 / max(alpha, 1) if kept, else 0

    Args:
      dropped: [B], whether row i, real and fake, was computed without its label.
      alpha: weight of the fake term (which `ddo.ddo_loss` applies), >= 0. Python number or traced scalar.
      dropped_row_loss: how a dropped real row counts; "posonly", "nll" or "posonly_w1". See `var_ddo_loss`.

    Returns:
      (real_weight [B], fake_weight [B]), float32.

    Raises:
      ValueError: another dropped_row_loss.

    Example:
      >>> import jax.numpy as jnp
      >>> dropped = jnp.array([False, True])
      >>> print(*dropped_row_weights(dropped, alpha=50.0, dropped_row_loss="posonly"))
      [0.02 1.  ] [0.02 0.  ]

    Reference: specs/var.md section 8; which of the three the authors used is not certain.
    """
    _check_choice(dropped_row_loss)
    dropped = _flags("dropped", dropped)
    kept = 1 / jnp.maximum(jnp.asarray(alpha, jnp.float32), 1)
    return jnp.where(dropped, kept if dropped_row_loss == "posonly_w1" else 1, kept), jnp.where(dropped, 0, kept)


def var_ddo_terms(
    r_real: Float[Array, "b"],
    r_fake: Float[Array, "f"],
    token_nll: Float[Array, "b"],
    dropped: Bool[Array, "b"],
    *,
    beta: ScalarLike,
    dropped_row_loss: str,
) -> tuple[Float[Array, "b"], Float[Array, "f"]]:
    """The DDO terms of a batch in which some labels were dropped, without weights.

        R_i = -log sigmoid(beta r_real_i);  of a dropped row with "nll"  R_i = token_nll_i
        F_i = -log sigmoid(-beta r_fake_i)

    Args:
      r_real, r_fake, token_nll, dropped, beta, dropped_row_loss: as `var_ddo_loss`.

    Returns:
      (R [B], F [F]), both >= 0, float32 (float64 if r is).

    Raises:
      ValueError: another dropped_row_loss.

    Example:
      >>> import jax.numpy as jnp
      >>> r, token_nll, dropped = jnp.zeros(2), jnp.full(2, 3.0), jnp.array([False, True])
      >>> print(*var_ddo_terms(r, r, token_nll, dropped, beta=0.02, dropped_row_loss="nll"))
      [0.6931472 3.       ] [0.6931472 0.6931472]

    Reference: specs/var.md section 8.
    """
    _check_choice(dropped_row_loss)
    dropped, token_nll = _flags("dropped", dropped), door.floats("token_nll", token_nll, rank=1)
    real, fake = ddo.ddo_terms(r_real, r_fake, alpha=1.0, beta=beta)
    door.alike(r_real=real, token_nll=token_nll, dropped=dropped)
    if dropped_row_loss == "nll":
        real = jnp.where(dropped, token_nll.astype(real.dtype), real)
    return real, fake


def var_ddo_loss(
    r_real: Float[Array, "b"],
    r_fake: Float[Array, "f"],
    token_nll: Float[Array, "b"],
    dropped: Bool[Array, "b"],
    *,
    dropped_fake: Bool[Array, "f"] | None = None,
    alpha: ScalarLike,
    beta: ScalarLike,
    dropped_row_loss: str,
) -> tuple[Float[Array, ""], ddo.Stats]:
    """The DDO loss of a batch in which some labels were dropped, and what to log beside it.

        L = mean_i( real_weight_i R_i ) + mean_i( fake_weight_i alpha F_i )

    with R and F of `var_ddo_terms` and the weights of `dropped_row_weights`. A dropped row has no fake term: the
    unconditional model, which guidance pushes away from, stays trained by maximum likelihood. "posonly" and "nll"
    are two ways to do so; "posonly_w1" weighs those rows like the others.

    Args:
      r_real: log-ratios of data, [B], nats, summed over tokens. r_fake: of samples of the reference, [F].
      token_nll: -log p / L of the data under the model that is trained, nats a token, [B]; used by "nll" only.
      dropped: [B]; of real rows. dropped_fake: [F]; of fakes, None: row i of both has the same fate.
      alpha: >= 0. beta: > 0. Python numbers or traced scalars.
      dropped_row_loss: "posonly", "nll" or "posonly_w1".

    Returns:
      (L, stats) as `ddo.ddo_loss`: loss_real and loss_fake hold all weights and add up to L.

    Raises:
      ValueError: another dropped_row_loss.

    Numerics:
      Both means are over ALL rows, dropped ones included. With r = 0 and no row dropped L == (1 + alpha) log 2 /
      max(alpha, 1).

    Example:
      >>> import jax.numpy as jnp
      >>> r, dropped = jnp.zeros(4), jnp.zeros(4, bool)
      >>> how = dict(alpha=50.0, beta=0.02, dropped_row_loss="posonly")
      >>> print(f"{var_ddo_loss(r, r, r, dropped, **how)[0]:.4f} {51 * jnp.log(2) / 50:.4f}")
      0.7070 0.7070

    Reference: specs/var.md section 8; arXiv 2503.01103.
    """
    real, fake = var_ddo_terms(r_real, r_fake, token_nll, dropped, beta=beta, dropped_row_loss=dropped_row_loss)
    dropped_fake = dropped if dropped_fake is None else dropped_fake
    (real_weight, _), (_, fake_weight) = (
        dropped_row_weights(d, alpha=alpha, dropped_row_loss=dropped_row_loss) for d in (dropped, dropped_fake)
    )
    door.alike(r_fake=fake, dropped_fake=fake_weight)
    real = real_weight.astype(real.dtype) * real
    fake = fake_weight.astype(fake.dtype) * jnp.asarray(alpha, fake.dtype) * fake
    losses = {"loss_real": real, "loss_fake": fake}
    stats = ddo.ddo_stats(r_real, r_fake, beta=beta)
    stats |= {name: (jnp.sum(v), jnp.asarray(v.size, v.dtype)) for name, v in losses.items()}
    return jnp.mean(real) + jnp.mean(fake), stats


def cca_loss(
    r_matched: Float[Array, "b"],
    r_rolled: Float[Array, "b"],
    positive: Bool[Array, "b"],
    *,
    lam: ScalarLike,
    beta: ScalarLike,
) -> tuple[Float[Array, ""], ddo.Stats]:
    """Condition contrastive alignment, the baseline that takes wrong labels for fakes, and what to log beside it.

        L = ( mean_i -log sigmoid(beta r_matched_i) + mean_i w_i (-log sigmoid(c_i beta r_rolled_i)) ) / max(lam, 1)
        c_i = 1, w_i = 1 where positive;  else c_i = -1, w_i = lam

    Args:
      r_matched: log-ratios of data under their own labels, [B], nats. r_rolled: of the same data under wrong labels,
        each row having that of the next one; rows without label have none in both.
      positive: [B], rows whose "wrong" label is no mismatch: without label, or the next row is of the same class.
      lam: weight of the mismatched rows, >= 0. beta: > 0. Python numbers or traced scalars.

    Returns:
      (L, stats) as `ddo.ddo_loss`, "real" being matched and "fake" rolled labels; float32 (float64 if r is).

    Example:
      >>> import jax.numpy as jnp
      >>> r = jnp.zeros(2)
      >>> print(f"{cca_loss(r, r, jnp.zeros(2, bool), lam=50.0, beta=0.02)[0]:.4f} {51 * jnp.log(2) / 50:.4f}")
      0.7070 0.7070

    Reference: specs/var.md section 8, end; arXiv 2410.09347.
    """
    stats = ddo.ddo_stats(r_matched, r_rolled, beta=beta)
    r_matched, r_rolled = (_at_least_float32(door.array("r", r)) for r in (r_matched, r_rolled))
    positive = _flags("positive", positive)
    door.alike(r_matched=r_matched, r_rolled=r_rolled, positive=positive)
    lam, beta = (jnp.asarray(v, r_rolled.dtype) for v in (lam, beta))
    matched = -jax.nn.log_sigmoid(beta * r_matched) / jnp.maximum(lam, 1)
    rolled = -jax.nn.log_sigmoid(beta * jnp.where(positive, r_rolled, -r_rolled)) / jnp.maximum(lam, 1)
    rolled = jnp.where(positive, rolled, lam * rolled)
    losses = {"loss_real": matched, "loss_fake": rolled}
    stats |= {name: (jnp.sum(v), jnp.asarray(v.size, v.dtype)) for name, v in losses.items()}
    return jnp.mean(matched) + jnp.mean(rolled), stats


def _flags(name: str, v: Any) -> Bool[Array, "b"]:
    v = door.ranked(name, door.array(name, v), 1)
    if v.dtype != jnp.bool_:
        raise ValueError(f"{name} is {v.dtype}: it must be booleans")
    return v


def _check_choice(dropped_row_loss: str) -> None:
    if dropped_row_loss not in DROPPED_ROW_LOSSES:
        raise ValueError(f"dropped_row_loss is {dropped_row_loss!r}; allowed: {', '.join(DROPPED_ROW_LOSSES)}")


def _at_least_float32(v: Float[Array, "..."]) -> Float[Array, "..."]:
    return v.astype(np.promote_types(v.dtype, np.float32))  # NumPy's rule: jnp.promote_types refuses to say
