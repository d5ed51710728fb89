"""Checks at the door of the public functions: ranks, equal shapes, dtypes. Shapes only, so they cost nothing under jit.

What they let in is a JAX array, or a tracer: lists become arrays, and NumPy's float64 becomes float32 where JAX has no
float64 (without the warning that the conversion would cause).
"""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array


def array(name: str, v: Any) -> Array:
    """An array of whatever a caller holds.

    Raises:
      ValueError: nothing that is one.

    Example:
      >>> array("r", [1.0, 2.0]).dtype, array("r", np.ones(2)).dtype
      (dtype('float32'), dtype('float32'))
    """
    if isinstance(v, jax.Array):
        return v
    try:
        v = np.asarray(v)
        if v.dtype == np.float64 and not jax.config.read("jax_enable_x64"):
            v = v.astype(np.float32)
        return jnp.asarray(v)
    except (TypeError, ValueError):
        raise ValueError(f"{name} is a {type(v).__name__}: it must be an array") from None


def floats(name: str, v: Any, rank: int | None = None, rows: bool = True) -> Array:
    """A floating array.

    Args:
      rank: its number of axes, or None. rows: the first axis is a batch, which must hold something.

    Raises:
      ValueError: integers or booleans, another rank, no batch or an empty one.

    Example:
      >>> floats("r_real", [[1.0]], rank=1)
      Traceback (most recent call last):
        ...
      ValueError: r_real has shape (1, 1): it must be [B]
    """
    v = array(name, v)
    if not jnp.issubdtype(v.dtype, jnp.floating):
        raise ValueError(f"{name} is {v.dtype}: it must be floating numbers")
    return ranked(name, v, rank, rows)


def ranked(name: str, v: Array, rank: int | None, rows: bool = True) -> Array:
    """The array itself.

    Raises:
      ValueError: another rank, no batch or an empty one.
    """
    try:
        if rank is not None:
            chex.assert_rank(v, rank)
    except AssertionError:
        axes = ["B", *"LV"][:rank] if rank else []
        raise ValueError(f"{name} has shape {v.shape}: it must be [{', '.join(axes)}]") from None
    if rows and (v.ndim == 0 or v.shape[0] == 0):
        raise ValueError(f"{name} has shape {v.shape}: its first axis must be a batch of at least one row")
    return v


def alike(**arrays: Array) -> None:
    """All of one shape: a broadcast would be silent.

    Raises:
      ValueError: names two that differ.

    Example:
      >>> alike(f=jnp.ones((2, 8)), f_hat=jnp.ones(8))
      Traceback (most recent call last):
        ...
      ValueError: f_hat has shape (8,), f has (2, 8): they must be equal
    """
    first, *others = arrays
    for name in others:
        try:
            chex.assert_equal_shape([arrays[first], arrays[name]])
        except AssertionError:
            raise ValueError(
                f"{name} has shape {arrays[name].shape}, {first} has {arrays[first].shape}: they must be equal"
            ) from None


def same_batch(**arrays: Array) -> None:
    """All of as many rows.

    Raises:
      ValueError: names two that differ.
    """
    first, *others = arrays
    for name in others:
        if arrays[name].shape[:1] != arrays[first].shape[:1]:
            raise ValueError(
                f"{name} has shape {arrays[name].shape}, {first} has {arrays[first].shape}: rows must be as many"
            )


def codes(name: str, v: Any, rank: int, most: int) -> Array:
    """Integers in [0, most); their values are looked at where they are known, not under jit.

    Raises:
      ValueError: no integers, another rank, or one out of range.
    """
    v = ranked(name, array(name, v), rank)
    if not jnp.issubdtype(v.dtype, jnp.integer):
        raise ValueError(f"{name} is {v.dtype}: it must be integers in [0, {most})")
    if not isinstance(v, jax.core.Tracer):
        known = np.asarray(v)  # NumPy: under a trace jnp.min of a constant would be a tracer
        least, greatest = int(known.min()), int(known.max())
        if least < 0 or greatest >= most:
            raise ValueError(f"{name} is {least if least < 0 else greatest} somewhere: it must be in [0, {most})")
    return v
