"""Exact log-likelihood of an autoregressive model over discrete tokens."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


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
      A token >= V gives NaN, which shows; a negative one counts from the end, which does not.

    Example:
      >>> import jax.numpy as jnp
      >>> print(ar_logp(jnp.zeros((1, 3, 4)), jnp.zeros((1, 3), jnp.int32)))  # 3 log(1/4)
      [-4.158883]

    Reference: arXiv 2503.01103, section 3 (DDO on VAR, arXiv 2404.02905).
    """
    logits = logits.astype(np.promote_types(logits.dtype, np.float32))
    logp = jnp.take_along_axis(jax.nn.log_softmax(logits, axis=-1), tokens[..., None], axis=-1)
    return jnp.sum(logp[..., 0], axis=-1)
