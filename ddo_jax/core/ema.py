"""Exponential moving average of parameters, its length counted in images rather than steps."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, PyTree, ScalarLike

from ddo_jax.core import door

AnyArray = Array | np.ndarray


def half_life_beta(
    seen: ScalarLike, batch: ScalarLike, half_life: ScalarLike, rampup_ratio: ScalarLike | None = None
) -> Float32[Array, ""]:
    """Decay of one EMA step, from a half-life in images.

        hl = min(half_life, rampup_ratio * seen)          # without rampup_ratio: hl = half_life
        beta = 0.5 ^ (batch / max(hl, 1e-8))

    Args:
      seen: images consumed BEFORE this step, >= 0. Python number or traced scalar.
      batch: images of this step, > 0.
      half_life: images after which a parameter's share has halved, >= 0; 0 gives beta 0: no averaging.
      rampup_ratio: None (fine-tuning) or the largest half-life as a fraction of seen (0.05 when training from
        scratch); beta is 0 at the first step, so that the random start leaves no trace.

    Returns:
      beta in [0, 1), float32 scalar, for `ema_update`.

    Example:
      >>> print(half_life_beta(0, batch=512, half_life=512), half_life_beta(0, 512, 512, rampup_ratio=0.05))
      0.5 0.0

    Reference: arXiv 2206.00364, appendix F.2.
    """
    seen, batch, hl = (jnp.asarray(v, jnp.float32) for v in (seen, batch, half_life))
    if rampup_ratio is not None:
        hl = jnp.minimum(hl, jnp.asarray(rampup_ratio, jnp.float32) * seen)
    return jnp.exp2(-batch / jnp.maximum(hl, 1e-8))


def ema_update(
    ema: PyTree[Float[AnyArray, "..."]], params: PyTree[Float[AnyArray, "..."]], beta: ScalarLike
) -> PyTree[Float[Array, "..."]]:
    """One step of the moving average.

        ema <- params + beta (ema - params)

    Args:
      ema: the average so far, any pytree of float arrays.
      params: the new parameters, same structure and shapes.
      beta: decay in [0, 1]. Python number or traced scalar.

    Returns:
      The new average, in the structure and the dtypes of ema (keep it in float32 when params are bfloat16).

    Example:
      >>> import jax.numpy as jnp
      >>> print(ema_update({"w": jnp.ones(2)}, {"w": jnp.zeros(2)}, beta=0.75))
      {'w': Array([0.75, 0.75], dtype=float32)}
    """

    def update(e: Any, p: Any) -> Array:
        door.alike(ema=e, params=p)
        p = p.astype(e.dtype)
        return p + jnp.asarray(beta, e.dtype) * (e - p)

    return jax.tree.map(update, ema, params)


def decay_to_half_life(decay: float | int, batch: int) -> float:
    """Half-life in images of an EMA that is given as a decay per step.

        half_life = batch * ln(1/2) / ln(decay)

    Args:
      decay: share of the old average kept at each step, in [0, 1), e.g. 0.9999.
      batch: images per step, > 0.

    Returns:
      Half-life in images, a Python float; `half_life_beta` turns it back into decay.

    Raises:
      ValueError: decay outside [0, 1).

    Example:
      >>> round(decay_to_half_life(0.9999, batch=128))
      887184
    """
    if not 0 <= decay < 1:
        raise ValueError(f"decay is {decay}: it must be in [0, 1)")
    return batch * math.log(0.5) / math.log(decay) if decay else 0.0
