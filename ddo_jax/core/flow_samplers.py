"""Samplers of flows, from noise at t = 0 to data at t = 1: Euler and Heun on equal intervals, and the SDE.

    ODE    x' = v(x, t)
    SDE    x' = v + w s + sqrt(2 w) xi',   s = (t v - x) / (1 - t) the score,   w = 1 - t:   v + w s = (1 + t) v - x

Reference: Ma et al. 2024, arXiv 2401.08740; specs/sit.md section 3.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ddo_jax.core import door

SOLVERS = ("euler", "flow_heun", "sde")
LAST = 0.96  # where the SDE's noise ends; the rest is one step without


class FlowSettings(NamedTuple):
    """Hashable, so it can be a static argument of jit.

    Attributes:
      solver: of `SOLVERS`. num_steps: n >= 1; of the SDE n >= 2, the last of which adds no noise.

    Example:
      >>> FlowSettings("flow_heun", 25).nfe
      50
    """

    solver: str = "flow_heun"
    num_steps: int = 25

    @property
    def nfe(self) -> int:
        """Network evaluations of one sample."""
        return self.num_steps * (2 if self.solver == "flow_heun" else 1)

    def record(self) -> dict[str, Any]:
        """For protocols."""
        return {"solver": self.solver, "num_steps": self.num_steps}


def flow_guided(v: Array, v_none: Array, scale: Any, channels: int) -> Array:
    """Classifier-free guidance of a velocity: v_none + scale (v - v_none) on the first channels, v on the others.

    Args:
      v, v_none: with and without label, [B, ..., C]. scale: 1 is none; may be traced. channels: 3 in the released
        program whatever C is, C in later ones.

    >>> import jax.numpy as jnp
    >>> print(flow_guided(jnp.ones((1, 2)), jnp.zeros((1, 2)), 1.5, channels=1))
    [[1.5 1. ]]
    """
    guided = v_none + jnp.asarray(scale, v.dtype) * (v - v_none)
    return jnp.concatenate([guided[..., :channels], v[..., channels:]], axis=-1)


def flow_sample(
    velocity: Callable[..., Any],
    latents: Float[Array, "b *dims"],
    settings: FlowSettings,
    noise: Callable[..., Any] | None = None,
) -> Float[Array, "b *dims"]:
    """Samples from unit normal latents.

    Args:
      velocity: `velocity(x [B, ...], t [B]) -> v [B, ...]`. latents: unit normal, [B, ...], float32 or float64: the
        dtype the state keeps. settings: static.
      noise: `noise(i) -> [B, ...]`, unit normal for step i = 0 ... n - 2 of the SDE; not called without.

    Returns:
      x [B, ...], shape and dtype of latents.

    Raises:
      ValueError: another solver, too few steps, or the SDE without noise.

    Example:
      >>> import jax.numpy as jnp
      >>> velocity = lambda x, t: (0.5 - x) / (1 - t[:, None])         # all data sit at 0.5
      >>> print(flow_sample(velocity, jnp.ones((1, 2)), FlowSettings("euler", 4)))
      [[0.5 0.5]]
    """
    latents = door.floats("latents", latents)
    n, dtype = settings.num_steps, latents.dtype
    if settings.solver not in SOLVERS:
        raise ValueError(f"solver is {settings.solver!r}; allowed: {', '.join(SOLVERS)}")
    stochastic = settings.solver == "sde"
    if n < 1 + stochastic:
        raise ValueError(f"num_steps is {n}; allowed: {1 + stochastic} or more with {settings.solver}")
    if stochastic and noise is None:
        raise ValueError("noise is None: the SDE needs noise(i) -> [B, ...]")

    def at(x: Array, t: Any) -> Array:
        return velocity(x, jnp.full((len(x),), t, dtype)).astype(dtype)

    def ode(x: Array, row: Any) -> tuple[Array, None]:
        t, t_next = row
        v = at(x, t)
        if settings.solver == "flow_heun":
            v = (v + at(x + (t_next - t) * v, t_next)) / 2
        return x + (t_next - t) * v, None

    def drift(x: Array, t: Any) -> Array:
        return (1 + t) * at(x, t) - x

    def sde(x: Array, row: Any) -> tuple[Array, None]:
        i, t, dt, std = row
        xi = noise(i).astype(dtype) if noise is not None else 0
        return x + dt * drift(x, t) + std * xi, None

    if not stochastic:
        grid = np.linspace(0, 1, n + 1).astype(dtype)
        return jax.lax.scan(ode, latents, (grid[:-1], grid[1:]))[0]
    times = np.linspace(0, LAST, n)
    dt = np.diff(times)
    rows = (times[:-1], dt, np.sqrt(2 * (1 - times[:-1]) * dt))
    x, _ = jax.lax.scan(sde, latents, (np.arange(n - 1, dtype=np.int32), *(v.astype(dtype) for v in rows)))
    return x + np.asarray(1 - LAST, dtype) * drift(x, np.asarray(LAST, dtype))
