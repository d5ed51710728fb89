"""A straight line through two parameter trees: Neon's merge, and the line search of a round.

    theta(w) = (1 - w) ref + w theta          w = 0: the reference, w = 1: what was trained from it

Beyond 1 it extrapolates; a negative w steps away from what was trained. Neon trains theta_s on the reference's own
samples and goes the other way: (1 + w) ref - w theta_s is theta(-w).

Reference: Alemohammad et al., "Neon: Negative Extrapolation from Self-Training", arXiv 2510.03597.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree


def along(ref: PyTree, theta: PyTree, w: Any) -> PyTree:
    """The point of the line at w.

        (1 - w) ref + w theta

    Args:
      ref, theta: parameters of one structure, floating. w: Python number or traced scalar.

    Returns:
      Parameters of the same structure and dtypes; exactly ref at w = 0, exactly theta at w = 1.

    Raises:
      ValueError: trees of two structures.

    Example:
      >>> import jax.numpy as jnp
      >>> ref, theta = {"w": jnp.array([1.0])}, {"w": jnp.array([3.0])}
      >>> print(*(along(ref, theta, w)["w"] for w in (0.0, 1.0, 2.0, -0.5)))
      [1.] [3.] [5.] [0.]
    """
    return jax.tree.map(lambda a, b: jnp.asarray(1 - w, a.dtype) * a + jnp.asarray(w, b.dtype) * b, ref, theta)
