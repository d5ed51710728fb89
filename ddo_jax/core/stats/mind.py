"""MIND: the distance of two sets of features by their projections onto random directions. Needs few images.

NumPy on the host: projections and their order in float32, sums in float64; directions come from a seed.

Reference: "MIND", arXiv 2605.06797; specs/ddo.md section 9.
"""

import numpy as np
from jaxtyping import Float32, Float64, Int
from numpy.typing import ArrayLike

from ddo_jax.core.stats.metrics import _pair

DIRECTIONS, SEED = 1024, 0


def unit_directions(d: int, number: int = DIRECTIONS, seed: int = SEED) -> Float32[np.ndarray, "m d"]:
    """Directions uniform on the sphere, float32 [number, d].

    Args:
      d: length of the features. number: of directions. seed: of NumPy's default generator.

    Example:
      >>> unit_directions(3, 2).shape, bool(abs((unit_directions(3, 2) ** 2).sum(1) - 1).max() < 1e-6)
      ((2, 3), True)
    """
    drawn = np.random.default_rng(seed).standard_normal((number, d))
    return (drawn / np.linalg.norm(drawn, axis=1, keepdims=True)).astype(np.float32)


def coupling(n: int, m: int) -> tuple[Int[np.ndarray, "k"], Int[np.ndarray, "k"], Float64[np.ndarray, "k"]]:
    """How the quantile functions of n and of m sorted numbers lie on each other.

    Args:
      n, m: sizes of two sets.

    Returns:
      (i, j, share): on a `share` of [0, 1] the i-th number of the first set meets the j-th of the second; shares add up
      to 1. Of equal sizes i = j.

    Example:
      >>> print(*coupling(2, 3))
      [0 0 1 1] [0 1 1 2] [0.33333333 0.16666667 0.16666667 0.33333333]
    """
    edges = np.union1d(np.arange(1, n + 1, dtype=np.int64) * m, np.arange(1, m + 1, dtype=np.int64) * n)
    share = np.diff(edges, prepend=0) / (n * m)
    return (edges - 1) // m, (edges - 1) // n, share


def mind(real: ArrayLike, fake: ArrayLike, *, directions: int = DIRECTIONS, seed: int = SEED, chunk: int = 64) -> float:
    """Sliced squared Monge (2-Wasserstein) distance of two sets of features.

        3 d  mean_u integral_0^1 ( Q_real,u(q) - Q_fake,u(q) )^2 dq      Q_u: quantiles of <x, u>, |u| = 1, d = features

    Args:
      real: [N, d]. fake: [M, d]; of equal sizes the integral is the mean over the sorted projections.
      directions, seed: of `unit_directions`. chunk: directions at a time: changes memory and rounding only.

    Returns:
      The distance, >= 0. A translation by delta costs (on average over directions) delta^2 / d before the factor, 3
      delta^2 with it; the factor 3 d is that of public re-implementations.

    Raises:
      ValueError: no rows, lengths that differ, values that are not finite.

    Numerics:
      Both sets are shifted by the mean of `real` before they are projected in float32. Finite sets are apart even if
      they come from one distribution: compare equal sizes only.

    Example:
      >>> import numpy as np
      >>> x = np.arange(6.0).reshape(3, 2)
      >>> mind(x, x[::-1]), round(mind(np.zeros((4, 1)), np.full((3, 1), 2.0)), 6)
      (0.0, 12.0)

    Reference: arXiv 2605.06797; specs/ddo.md section 9.
    """
    sets = _pair(real, fake, ("real", "fake"), 1)
    d, center = sets[0].shape[1], sets[0].mean(0, dtype=np.float64)
    centered = [(x - center).astype(np.float32) for x in sets]
    along, total = unit_directions(d, directions, seed), 0.0
    i, j, share = coupling(*map(len, sets))
    for k in range(0, directions, chunk):
        a, b = (np.sort(along[k : k + chunk] @ x.T, axis=1).astype(np.float64) for x in centered)
        total += float(np.sum(np.square(a[:, i] - b[:, j]) @ share))
    return 3 * d * total / directions
