"""Resampling of square maps as fixed matrices: area averages and bicubic interpolation.

    y = M x M^T    for every channel,     M [out, in]

Both are those of the public VAR code (specs/var.md section 1), which `jax.image.resize` cannot reproduce: its cubic
uses another kernel and drops taps at the border, and it has no area average for ratios that are not whole. The matrices
are float64 and made on the host; cast them to the dtype of x and apply them at the highest matmul precision.
"""

import functools

import numpy as np
from jaxtyping import Float64

CUBIC = -0.75  # the a of the kernel; -0.5 is the other one in use


def _check(size_in: int, size_out: int) -> None:
    if min(size_in, size_out) < 1:
        raise ValueError(f"resampling from {size_in} to {size_out}: both sizes must be at least 1")


@functools.cache
def area_matrix(size_in: int, size_out: int) -> Float64[np.ndarray, "{size_out} {size_in}"]:
    """Averages over windows that cover the input and may overlap (adaptive average pooling).

        M[i, j] = 1/n_i   for floor(i in/out) <= j < ceil((i+1) in/out),   n_i of them;   else 0

    Args:
      size_in, size_out: sides, >= 1.

    Returns:
      float64 [size_out, size_in], read-only; rows sum to 1. The identity if the sizes are equal.

    Raises:
      ValueError: a size below 1.

    Example:
      >>> area_matrix(3, 2)
      array([[0.5, 0.5, 0. ],
             [0. , 0.5, 0.5]])

    Reference: specs/var.md section 1.
    """
    _check(size_in, size_out)
    m = np.zeros((size_out, size_in))
    for i in range(size_out):
        start, stop = i * size_in // size_out, -(-(i + 1) * size_in // size_out)
        m[i, start:stop] = 1 / (stop - start)
    m.setflags(write=False)  # one array for all callers
    return m


@functools.cache
def bicubic_matrix(size_in: int, size_out: int) -> Float64[np.ndarray, "{size_out} {size_in}"]:
    """Bicubic interpolation with a = -0.75: half-pixel centres, no antialiasing, indices clamped at the border.

        x_i = (i + 1/2) in/out - 1/2,   k = floor(x_i);   taps j = k-1 .. k+2 of weight w(|x_i - j|)
        w(d) = (a+2) d^3 - (a+3) d^2 + 1  for d <= 1,      a d^3 - 5a d^2 + 8a d - 4a  for 1 < d <= 2

    Weights of taps that are clamped to the same index add up.

    Args:
      size_in, size_out: sides, >= 1.

    Returns:
      float64 [size_out, size_in], read-only; rows sum to 1. The identity if the sizes are equal.

    Raises:
      ValueError: a size below 1.

    Example:
      >>> bicubic_matrix(2, 4)[:2]
      array([[ 1.10546875, -0.10546875],
             [ 0.7734375 ,  0.2265625 ]])

    Reference: specs/var.md section 1.
    """
    _check(size_in, size_out)
    a, m = CUBIC, np.zeros((size_out, size_in))
    x = (np.arange(size_out) + 0.5) * (size_in / size_out) - 0.5
    for tap in range(-1, 3):
        j = np.floor(x).astype(int) + tap
        d = np.abs(x - j)
        near = ((a + 2) * d - (a + 3)) * d**2 + 1
        far = ((d - 5) * d + 8) * d * a - 4 * a
        np.add.at(m, (np.arange(size_out), np.clip(j, 0, size_in - 1)), np.where(d <= 1, near, far))
    m.setflags(write=False)
    return m
