"""Power-function EMA: averages whose length grows with training, and their reconstruction afterwards.

    EMA(t) = integral_0^t p(tau) theta(tau) dtau,        p(tau) = (gamma+1) tau^gamma / t^(gamma+1)

Its length is given as std, the standard deviation of p as a fraction of t. A few averages of fixed std, stored
now and then, combine linearly into any other std. Times are in images; everything but `power_beta` is float64
on the host.

Reference: Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models",
arXiv 2312.02696, section 3 and appendix C.
"""

import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Float64, ScalarLike

Numbers = ScalarLike | Sequence | np.ndarray

MAX_STD = math.sqrt(1 / 12)  # gamma = 0: the plain mean over all of training


def gamma_to_std(gamma: float | int) -> float:
    """Relative standard deviation of the profile of exponent gamma.

        std = sqrt((gamma+1) / ((gamma+2)^2 (gamma+3)))

    Args:
      gamma: exponent, > -1.

    Returns:
      std, a Python float.

    Example:
      >>> round(gamma_to_std(6.94), 4)
      0.1

    Reference: arXiv 2312.02696, appendix C.1.
    """
    return math.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)))


def std_to_gamma(std: float | int) -> float:
    """Exponent of the profile of a relative standard deviation; the inverse of `gamma_to_std`.

        largest real root of gamma^3 + 7 gamma^2 + (16 - s) gamma + (12 - s) = 0,     s = std^-2

    Args:
      std: 0 < std < 0.2886 (there gamma is 0: the plain mean); 0.05 or 0.1 in EDM2.

    Returns:
      gamma > 0, a Python float.

    Raises:
      ValueError: std outside its range.

    Example:
      >>> round(std_to_gamma(0.05), 4)
      16.9722

    Reference: arXiv 2312.02696, appendix C.1.
    """
    if not 0 < std < MAX_STD:
        raise ValueError(f"EMA std is {std}: it must be between 0 and {MAX_STD:.4f}")
    s = float(std) ** -2
    return float(np.max(np.roots([1, 7, 16 - s, 12 - s]).real))


def beta(t: Numbers, delta: Numbers, std: float) -> Float64[np.ndarray, "..."]:
    """Decay of one EMA step, in float64 on the host.

        beta = (1 - delta / t)^(gamma+1)

    Args:
      t: images consumed AFTER this step, >= delta.
      delta: images of this step, > 0.
      std: EMA length.

    Returns:
      beta in [0, 1), 0 at the first step (t = delta), broadcast shape of t and delta.

    Example:
      >>> print(beta(t=2048, delta=1024, std=0.2).round(4))
      0.141

    Reference: arXiv 2312.02696, equation 127.
    """
    share = np.asarray(delta, np.float64) / np.asarray(t, np.float64)
    return np.asarray((1 - share) ** (std_to_gamma(std) + 1))


def power_beta(seen: ScalarLike, batch: ScalarLike, std: float) -> Float32[Array, ""]:
    """`beta` inside a compiled step, with the arguments of `ema.half_life_beta`.

        beta = (seen / (seen + batch))^(gamma+1)

    Args:
      seen: images consumed BEFORE this step, >= 0. Python number or traced scalar.
      batch: images of this step, > 0.
      std: EMA length, a Python number.

    Returns:
      beta in [0, 1), float32 scalar, for `ema.ema_update`. At seen = 0 it is 0: the start leaves no trace.

    Numerics:
      exp((gamma+1) log1p(-batch / t)): 1 - beta keeps its digits when the batch is a small part of t.

    Example:
      >>> print(power_beta(0, batch=512, std=0.05))
      0.0

    Reference: arXiv 2312.02696, equation 127.
    """
    seen, batch = (jnp.asarray(v, jnp.float32) for v in (seen, batch))
    return jnp.exp((std_to_gamma(std) + 1) * jnp.log1p(-batch / (seen + batch)))


def inner_products(t_a: Numbers, std_a: Numbers, t_b: Numbers, std_b: Numbers) -> Float64[np.ndarray, "a b"]:
    """Overlaps of EMA profiles.

        <p_a, p_b> = (gamma_a+1)(gamma_b+1) / (gamma_a+gamma_b+1) (t_min / t_max)^gamma / t_max

    with t_min, t_max the smaller and larger of t_a, t_b, and gamma that of the profile that ends later.

    Args:
      t_a, std_a: ends in images, > 0, and lengths of the first profiles, [A] each or scalars.
      t_b, std_b: the same of the second profiles, [B] each or scalars.

    Returns:
      [A, B] float64, in 1 / images.

    Example:
      >>> print(inner_products([1.0], [0.1], [1.0, 2.0], [0.1, 0.1]).round(4))
      [[4.2354 0.0173]]

    Reference: arXiv 2312.02696, appendix C.2, equation 136.
    """
    (t_a, gamma_a), (t_b, gamma_b) = _profiles(t_a, std_a), _profiles(t_b, std_b)
    t_a, gamma_a, t_b, gamma_b = t_a[:, None], gamma_a[:, None], t_b[None, :], gamma_b[None, :]
    t_max, later = np.maximum(t_a, t_b), np.where(t_a > t_b, gamma_a, gamma_b)
    height = (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1)
    return height * (np.minimum(t_a, t_b) / t_max) ** later / t_max


def posthoc_coefficients(
    t: Numbers, std: Numbers, t_out: float | int, std_out: Numbers
) -> Float64[np.ndarray, "snapshots out"]:
    """Weights with which stored averages sum to averages of other lengths.

        minimise  integral (sum_i x_i p_i - p_out)^2,  i.e.  A x = b;   then x / sum(x)

    Args:
      t, std: end in images and EMA length of each snapshot, [N]. Those outside 0 < t <= t_out get weight 0.
      t_out: end of the wanted averages; one of t.
      std_out: wanted lengths, [M] or a scalar.

    Returns:
      [N, M] float64, every column of sum 1: W_out[m] = sum_i x[i, m] W_i.

    Raises:
      ValueError: t_out is not one of t, or a length is out of range.

    Example:
      >>> print(posthoc_coefficients([1024, 2048, 2048], [0.1, 0.1, 0.05], t_out=2048, std_out=0.1).T.round(6) + 0)
      [[0. 1. 0.]]

    Reference: arXiv 2312.02696, appendix C.2.
    """
    t, std = np.broadcast_arrays(np.atleast_1d(np.asarray(t, np.float64)), np.asarray(std, np.float64))
    if t_out <= 0 or not np.any(t == t_out):
        raise ValueError(f"no snapshot at {t_out} images; there are {', '.join(f'{v:.0f}' for v in np.unique(t))}")
    use = (t > 0) & (t <= t_out)
    gram = inner_products(t[use], std[use], t[use], std[use])
    x = np.linalg.solve(gram, inner_products(t[use], std[use], t_out, std_out))
    out = np.zeros((len(t), x.shape[1]))
    out[use] = x / x.sum(axis=0)
    return out


def response(std: float, length: int, t: float | int) -> Float64[np.ndarray, "length"]:
    """Share of each of the steps 0..length-1 in an average that ends at step t; for plots.

        (tau / t)^gamma (gamma+1) / t   for tau <= t, else 0;   divided by the sum

    Args:
      std: EMA length.
      length: number of steps.
      t: last step of the average, > 0.

    Returns:
      [length] float64 of sum 1.

    Example:
      >>> print(response(0.2, length=4, t=2).round(3))
      [0.   0.22 0.78 0.  ]

    Reference: arXiv 2312.02696, section 3.1.
    """
    tau, gamma = np.arange(length, dtype=np.float64), std_to_gamma(std)
    share = np.where(tau <= t, (tau / t) ** gamma * (gamma + 1) / t, 0)
    return share / share.sum()


def snapshot_images(kimg: Numbers) -> np.ndarray:
    """Images of a snapshot from the thousands in its file name: snapshots are at multiples of 1024 images.

        images = ceil(1000 kimg / 1024) 1024

    Args:
      kimg: integer or array of integers, as in edm2-img64-s-1073741-0.075.pkl.

    Returns:
      Integer array of the shape of kimg.

    Example:
      >>> print(snapshot_images(1073741))
      1073741824
    """
    return np.asarray((np.asarray(kimg, np.int64) * 1000 + 1023) // 1024 * 1024)


def _profiles(t: Numbers, std: Numbers) -> tuple[np.ndarray, np.ndarray]:
    """Ends and exponents, [N] float64 each."""
    t, std = np.broadcast_arrays(np.atleast_1d(np.asarray(t, np.float64)), np.asarray(std, np.float64))
    if std.ndim == 1 and t.shape == std.shape:
        return t, np.array([std_to_gamma(s) for s in std])
    raise ValueError(f"ends and lengths of profiles have shape {t.shape}; expected one axis")
