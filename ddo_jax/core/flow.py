"""Flow matching on straight paths: what a velocity network is fed, what it must answer, how it becomes a denoiser.

    x_t = t x + (1 - t) eps,   u = x - eps            # t = 0 is noise, t = 1 is data
    D(z; sigma) = x_t + (1 - t) v(x_t, t),   x_t = t z,   t = 1 / (1 + sigma)

x_t / t = x + sigma eps with sigma = (1 - t) / t, so what takes a denoiser takes a flow. Code that counts time the other
way (t = 0 is data, u = eps - x) is the same with t -> 1 - t and v -> -v.

Reference: Lipman et al. 2023, arXiv 2210.02747; Ma et al. 2024, arXiv 2401.08740; specs/sit.md sections 1 and 4.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, ScalarLike

from ddo_jax.core import door, predictions
from ddo_jax.core.edm import expand

WEIGHTS = ("velocity", "x", "edm")


def time_of(sigma: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """t = 1 / (1 + sigma), for sigma >= 0.

    >>> import jax.numpy as jnp
    >>> print(time_of(jnp.array([0.0, 1.0, 3.0])))
    [1.   0.5  0.25]
    """
    return 1 / (1 + door.floats("sigma", sigma, rows=False))


def sigma_of(t: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """sigma = (1 - t) / t, for 0 < t <= 1.

    >>> import jax.numpy as jnp
    >>> print(sigma_of(jnp.array([1.0, 0.5, 0.25])))
    [0. 1. 3.]
    """
    t = door.floats("t", t, rows=False)
    return (1 - t) / t


def flow_inputs(
    x: Float[Array, "b *dims"], t: Float[Array, "b"], eps: Float[Array, "b *dims"]
) -> tuple[Float[Array, "b *dims"], Float[Array, "b *dims"]]:
    """Input and regression target of a velocity network.

        x_t = t x + (1 - t) eps          u = x - eps

    Args:
      x: data, [B, ...]. t: [B], in [0, 1]. eps: unit normal noise, [B, ...]. In DDO row i of (t, eps) serves the real
        and the fake of pair i.

    Returns:
      (x_t, u), each [B, ...], in the dtype of x, but at least float32.

    Raises:
      ValueError: shapes that do not fit, integers, no rows.

    Example:
      >>> import jax.numpy as jnp
      >>> x_t, u = flow_inputs(jnp.ones((1, 1)), jnp.array([0.75]), -jnp.ones((1, 1)))
      >>> print(x_t, u)
      [[0.5]] [[2.]]
    """
    x, t, eps = door.floats("x", x), door.floats("t", t, rank=1), door.floats("eps", eps)
    door.alike(x=x, eps=eps)
    door.same_batch(x=x, t=t)
    dtype = np.promote_types(x.dtype, np.float32)
    x, t, eps = x.astype(dtype), expand(t.astype(dtype), x.ndim), eps.astype(dtype)
    return t * x + (1 - t) * eps, x - eps


def flow_denoised(
    v: Float[Array, "b *dims"], x_t: Float[Array, "b *dims"], t: Float[Array, "b"]
) -> Float[Array, "b *dims"]:
    """The data that a velocity stands for: D = x_t + (1 - t) v.

    Args:
      v: the network's answer at (x_t, t), [B, ...]. x_t: [B, ...]. t: [B].

    Returns:
      D [B, ...] in the dtype of x_t, but at least float32.

    >>> import jax.numpy as jnp
    >>> print(flow_denoised(2 * jnp.ones((1, 1)), jnp.full((1, 1), 0.5), jnp.array([0.75])))
    [[1.]]
    """
    v, x_t, t = door.floats("v", v), door.floats("x_t", x_t), door.floats("t", t, rank=1)
    door.alike(v=v, x_t=x_t)
    door.same_batch(v=v, t=t)
    dtype = np.promote_types(x_t.dtype, np.float32)
    return x_t.astype(dtype) + (1 - expand(t.astype(dtype), v.ndim)) * v.astype(dtype)


def flow_weight(kind: str, t: Float[Array, "*s"], sigma_data: ScalarLike) -> Float[Array, "*s"]:
    """Weight of the squared error of a velocity in the log-ratio, for `predictions.prediction_log_ratio`.

        velocity: 1        x: (1 - t)^2, the error of the denoised data        edm: lambda(sigma) (1 - t)^2

    Args:
      kind: one of them. "velocity" lets single rows with t near 1 have a large say; "edm" is what an EDM network gives.
      t: any shape, in (0, 1]. sigma_data: standard deviation of the data, > 0; read by "edm".

    Returns:
      w >= 0, shape and dtype of t, at least float32.

    Raises:
      ValueError: another kind.

    Example:
      >>> import jax.numpy as jnp
      >>> t = jnp.array([0.5])
      >>> print(*(flow_weight(kind, t, sigma_data=0.5) for kind in WEIGHTS))
      [1.] [0.25] [1.25]
    """
    if kind not in WEIGHTS:
        raise ValueError(f"kind is {kind!r}; allowed: {', '.join(WEIGHTS)}")
    t = door.floats("t", t, rows=False)
    t = t.astype(np.promote_types(t.dtype, np.float32))
    if kind == "edm":
        return predictions.prediction_weight("velocity", sigma_of(t), sigma_data)
    return jnp.ones_like(t) if kind == "velocity" else (1 - t) ** 2
