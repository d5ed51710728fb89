"""Evaluation metrics beside the Frechet distance: Inception Score, precision/recall, KID, and the care that a
Frechet distance needs: bias at N, extrapolation, confidence interval, class balance.

NumPy on the host, float64 unless an argument says otherwise; random choices come from a seed argument. Sections
refer to specs/metrics.md.
"""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float64, Int
from numpy.typing import ArrayLike, DTypeLike


class Spread(NamedTuple):
    """Mean and population standard deviation of a metric over splits or subsets, and its values."""

    mean: float
    std: float
    values: Float64[np.ndarray, "s"]


def _spread(values: ArrayLike) -> Spread:
    found = np.asarray(values, np.float64)
    return Spread(float(found.mean()), float(found.std()), found)


def _rows(value: ArrayLike, name: str, least: int = 1) -> np.ndarray:
    """[N, D], not converted: 50,000 x 2048 in float64 would be 0.8 GB."""
    array = np.asarray(value)
    if array.ndim != 2 or len(array) < least:
        raise ValueError(f"{name} has shape {array.shape}: it must be [N, D] with N >= {least}")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} holds a non-finite value")
    return array


def _pair(a: ArrayLike, b: ArrayLike, names: tuple[str, str], least: int) -> tuple[np.ndarray, np.ndarray]:
    a, b = _rows(a, names[0], least), _rows(b, names[1], least)
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"{names[1]} has features of length {b.shape[1]}, {names[0]} of {a.shape[1]}")
    return a, b


def _slices(n: int, block: int) -> list[slice]:
    return [slice(i, min(i + block, n)) for i in range(0, n, block)]


# ----------------------------------------------------------------------------------------------------
# Inception Score


def inception_score(
    logits: ArrayLike, *, splits: int | None = None, block: int | None = None, order: ArrayLike | None = None
) -> Spread:
    """Inception Score of classifier outputs.

        IS_S = exp( mean_{n in S} sum_c p_nc (log p_nc - log mean_{m in S} p_mc) ),   IS = mean over splits S

    Args:
      logits: [N, C], of FID-Inception those WITHOUT the bias (section 2).
      splits: this many parts with bounds i N // splits (NVIDIA: 10). Exclusive with `block`.
      block: consecutive parts of this many rows, a shorter last one counts as much (OpenAI: 5000).
      order: int [N], rows to take instead of file order. Class-sorted samples must be shuffled: each split
        would hold a part of the classes and the score collapses. torch-fidelity's is
        `np.random.RandomState(2020).permutation(N)`.

    Raises:
      ValueError: not [N, C], non-finite, both or neither of splits and block, or more splits than rows.

    Example:
      >>> round(inception_score([[50.0, 0.0], [0.0, 50.0]], splits=1).mean, 6)  # two sure, different classes
      2.0

    Reference: Salimans et al. 2016, arXiv 1606.03498.
    """
    logits = _rows(logits, "logits")
    n = len(logits)
    if (splits is None) == (block is None):
        raise ValueError("exactly one of splits and block must be given")
    if not 1 <= (splits or block or 0) or (splits or 1) > n:
        raise ValueError(f"splits is {splits}, block is {block}: from 1 to the {n} rows")
    rows = np.arange(n) if order is None else np.asarray(order)
    if splits is not None:
        bounds = [i * n // splits for i in range(splits + 1)]
    else:
        bounds = [*range(0, n, block or n), n]
    return _spread([_score(logits[rows[i:j]]) for i, j in zip(bounds[:-1], bounds[1:], strict=True)])


def _score(logits: np.ndarray) -> float:
    x = logits.astype(np.float64)
    x -= x.max(axis=1, keepdims=True)
    log_p = x - np.log(np.exp(x).sum(axis=1, keepdims=True))
    p = np.exp(log_p)
    marginal = p.mean(axis=0)
    log_marginal = np.log(np.where(marginal > 0, marginal, 1))  # 0 log 0 = 0
    return float(np.exp((p * (log_p - log_marginal[None])).sum(axis=1).mean()))


# ----------------------------------------------------------------------------------------------------
# Precision and recall


class PrecisionRecall(NamedTuple):
    """Precision, recall (<=), density, coverage (<), and which fake and real rows lie in the other manifold."""

    precision: float
    recall: float
    density: float
    coverage: float
    fake_in: Bool[np.ndarray, "n_fake"]
    real_in: Bool[np.ndarray, "n_real"]


def squared_distances(a: np.ndarray, b: np.ndarray, dtype: DTypeLike = np.float64) -> Float[np.ndarray, "n m"]:
    """Squared Euclidean distances of all pairs of rows.

        d^2 = |a|^2 - 2 a.b + |b|^2, 0 where it is below the rounding error of this very sum

    Args:
      a, b: [N, D], [M, D]. dtype: of the result [N, M]; float32 halves time and memory.

    Numerics:
      A row and its duplicate have distance exactly 0, which <= and < tell apart. The rounding error is taken
      as 32 eps (|a|^2 + |b|^2).

    Example:
      >>> squared_distances(np.array([[0.0, 0.0]]), np.array([[3.0, 4.0], [0.0, 0.0]]))
      array([[25.,  0.]])
    """
    a, b = np.asarray(a, dtype), np.asarray(b, dtype)
    norms = (a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1)[None]
    d2 = a @ b.T
    d2 *= -2
    d2 += norms
    norms *= 32 * np.finfo(dtype).eps
    d2[d2 <= norms] = 0
    return d2


def squared_radii(
    features: ArrayLike, k: int = 3, *, block: int = 4096, dtype: DTypeLike = np.float64
) -> Float[np.ndarray, "n"]:
    """Squared distance of every row to its k-th nearest other row.

        r_i^2 = the (k + 1)-smallest of |x_i - x_j|^2 over all j, the zero to itself included

    Args:
      features: [N, D], N > k. k: 3 by habit. block: rows and columns of distances held at once.
      dtype: of the distances and of the result [N].

    Raises:
      ValueError: not [N, D], N <= k, or non-finite.

    Example:
      >>> squared_radii([[0.0], [1.0], [3.0]], k=1)
      array([1., 1., 4.])
    """
    x = _rows(features, "features", k + 1)
    radii = np.empty(len(x), dtype)
    for rows in _slices(len(x), block):
        best = np.full((rows.stop - rows.start, 0), np.inf, dtype)
        for columns in _slices(len(x), block):
            best = np.concatenate([best, squared_distances(x[rows], x[columns], dtype)], axis=1)
            best = np.partition(best, k, axis=1)[:, : k + 1] if best.shape[1] > k else best
        radii[rows] = best[:, k]
    return radii


def precision_recall(
    real: ArrayLike, fake: ArrayLike, *, k: int = 3, block: int = 4096, dtype: DTypeLike = np.float64
) -> PrecisionRecall:
    """Improved precision and recall, and density and coverage, of two sets of features.

        precision = share of fakes f with |f - real_i|^2 <= r_i^2 for at least one real i
        recall    = share of reals r with |r - fake_j|^2 <= r_j^2 for at least one fake j
        density   = mean_f #{i: |f - real_i| < r_i} / k
        coverage  = share of reals whose nearest fake is closer than r_i

    Args:
      real: [N, D], by habit the 10,000 images of the reference file. fake: [M, D]; both more than k rows.
      k: radii r are `squared_radii(..., k)`, each within its own set. block, dtype: as there.

    Raises:
      ValueError: not [N, D], too few rows, feature lengths that differ, or non-finite.

    Numerics:
      Never more than a few block x block arrays. OpenAI's tool works in float16 and reports 0.001 more
      precision and 0.0025 more recall on the same samples (section 5.5).

    Example:
      >>> precision_recall([[0.0], [1.0]], [[0.5], [9.0]], k=1)[:2]  # the fakes' balls are huge
      (0.5, 1.0)

    References: Kynkaanniemi et al. 2019, arXiv 1904.06991; Naeem et al. 2020, arXiv 2002.09797.
    """
    real, fake = _pair(real, fake, ("real", "fake"), k + 1)
    r_real, r_fake = (squared_radii(x, k, block=block, dtype=dtype) for x in (real, fake))
    fake_in, real_in = np.zeros(len(fake), bool), np.zeros(len(real), bool)
    balls, nearest = 0, np.full(len(real), np.inf, dtype)
    for i in _slices(len(real), block):
        for j in _slices(len(fake), block):
            d2 = squared_distances(real[i], fake[j], dtype)
            fake_in[j] |= (d2 <= r_real[i, None]).any(axis=0)
            real_in[i] |= (d2 <= r_fake[None, j]).any(axis=1)
            balls += int((d2 < r_real[i, None]).sum())
            nearest[i] = np.minimum(nearest[i], d2.min(axis=1))
    precision, recall, coverage = (float(x.mean()) for x in (fake_in, real_in, nearest < r_real))
    return PrecisionRecall(precision, recall, balls / (k * len(fake)), coverage, fake_in, real_in)


# ----------------------------------------------------------------------------------------------------
# Kernel Inception Distance


def _kernel_sum(x: np.ndarray, y: np.ndarray, block: int) -> float:
    """sum_ij (x_i . y_j / D + 1)^3."""
    total = 0.0
    for i in _slices(len(x), block):
        a = x[i].astype(np.float64)
        for j in _slices(len(y), block):
            total += float(((a @ y[j].astype(np.float64).T / x.shape[1] + 1) ** 3).sum())
    return total


def mmd2(x: ArrayLike, y: ArrayLike, *, block: int = 4096) -> float:
    """Unbiased squared maximum mean discrepancy with the kernel k(a, b) = (a.b / D + 1)^3.

        sum_{i!=j} k(x_i, x_j) / (m (m - 1)) + sum_{i!=j} k(y_i, y_j) / (n (n - 1)) - 2 sum_ij k(x_i, y_j) / (m n)

    Args:
      x: [m, D]. y: [n, D]. Both at least 2 rows; all of them are used. block: rows at once.

    Returns:
      MMD^2; may be negative.

    Raises:
      ValueError: not [N, D], fewer than 2 rows, feature lengths that differ, or non-finite.

    Example:
      >>> mmd2([[0.0], [0.0]], [[1.0], [1.0]])  # 1 + 8 - 2
      7.0

    Reference: Binkowski et al. 2018, arXiv 1801.01401.
    """
    x, y = _pair(x, y, ("x", "y"), 2)
    within = 0.0
    for a in (x, y):
        norms = np.einsum("nd,nd->n", a, a, dtype=np.float64) / a.shape[1]
        within += (_kernel_sum(a, a, block) - float(((norms + 1) ** 3).sum())) / (len(a) * (len(a) - 1))
    return within - 2 * _kernel_sum(x, y, block) / (len(x) * len(y))


def kid(real: ArrayLike, fake: ArrayLike, *, subsets: int = 100, size: int = 1000, seed: int = 2020) -> Spread:
    """Kernel Inception Distance: `mmd2` over random subsets (not multiplied by 1000).

    Args:
      real: [N, D]. fake: [M, D].
      subsets: how many. size: rows of each, without replacement, at most N and M. seed: of the choice;
        the defaults and the order (fake before real) are torch-fidelity's.

    Raises:
      ValueError: as `mmd2`; or size is below 2 or more than there are.

    Example:
      >>> kid([[0.0], [0.0]], [[1.0], [1.0]], subsets=3, size=2).mean
      7.0
    """
    if size < 2 or subsets < 1:
        raise ValueError(f"size is {size}, subsets is {subsets}: at least 2 and 1")
    real, fake = _pair(real, fake, ("real", "fake"), size)
    rng = np.random.RandomState(seed)
    values = []
    for _ in range(subsets):
        j = rng.choice(len(fake), size, replace=False)
        i = rng.choice(len(real), size, replace=False)
        values.append(mmd2(real[i], fake[j]))
    return _spread(values)


# ----------------------------------------------------------------------------------------------------
# Frechet distances with care


def frechet_bias(sigma: ArrayLike) -> float:
    """c of the bias c / N of a Frechet distance of N samples with the reference's own distribution.

        c = tr sigma + 1/2 sum_ij lambda_i lambda_j (1 + delta_ij) / (lambda_i + lambda_j)

    Args:
      sigma: covariance [D, D] of the features; lambda are its eigenvalues. On ImageNet-256 c is about 3.85e4:
        a perfect model scores 0.77 at N = 50,000.

    Raises:
      ValueError: not [D, D], or non-finite.

    Numerics:
      Second order, for Gaussian features; pairs of eigenvalues that are 0 count nothing. Needs a sigma of
      full rank, so of many more than D samples.

    Example (section 5.7):
      >>> frechet_bias([[2.0]])  # 2 + 1/2 . 2 . 2 . 2 / 4
      3.0
    """
    sigma = _rows(sigma, "sigma").astype(np.float64)
    if sigma.shape[0] != sigma.shape[1]:
        raise ValueError(f"sigma has shape {sigma.shape}: it must be [D, D]")
    w = np.linalg.eigvalsh((sigma + sigma.T) / 2)
    w = np.where(w > np.finfo(np.float64).eps * len(w) * abs(w).max(), w, 0)
    total = w[:, None] + w[None]
    ratio = np.divide(w[:, None] * w[None], total, out=np.zeros_like(total), where=total > 0)
    return float(w.sum() + (ratio.sum() + np.trace(ratio)) / 2)


def frechet_infinity(sizes: ArrayLike, distances: ArrayLike) -> tuple[float, float]:
    """Extrapolation of Frechet distances of N samples to infinitely many: FID_inf.

        d^2(N) = intercept + slope / N,   least squares over the given N

    Args:
      sizes: int [P], at least two different N (dgm-eval: 15 from 5,000 to 50,000).
      distances: [P], d^2 of random subsets of these sizes.

    Returns:
      (intercept, slope): FID_inf, and what `frechet_bias` estimates.

    Raises:
      ValueError: shapes that differ, fewer than two different sizes, or non-finite.

    Example:
      >>> [round(v, 6) for v in frechet_infinity([100, 200], [3.0, 2.0])]
      [1.0, 200.0]

    Reference: Chong and Forsyth 2020, arXiv 1911.07023.
    """
    x, y = 1 / np.asarray(sizes, np.float64), np.asarray(distances, np.float64)
    if x.ndim != 1 or x.shape != y.shape or len(np.unique(x)) < 2:
        raise ValueError(f"sizes {x.shape} and distances {y.shape}: one list each, of two different sizes at least")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("sizes or distances hold a non-finite value")
    dx = x - x.mean()
    slope = float((dx * y).sum() / (dx**2).sum())
    return float(y.mean() - slope * x.mean()), slope


def frechet_influence(
    features: ArrayLike, mu: ArrayLike, sigma: ArrayLike, mu_ref: ArrayLike, root_ref: ArrayLike, *, block: int = 4096
) -> Float64[np.ndarray, "n"]:
    """How much each image moves its set's Frechet distance: the derivative by its weight, times N.

        T = R (R sigma R)^{-1/2} R,   A = I - T,   c = x - mu
        influence(x) = 2 c.(mu - mu_ref) + c^T A c - tr(A sigma)

    R is the root of the reference's covariance, T the optimal transport from the set to the reference.

    Args:
      features: [N, D] of the set, or any part of it. mu [D], sigma [D, D]: of the whole set.
      mu_ref [D]: of the reference. root_ref [D, D]: `frechet.sqrt_psd` of its covariance. block: rows at once.

    Returns:
      [N], of mean 0 over the set up to 1 / N.

    Raises:
      ValueError: not [N, D], non-finite, or feature lengths that differ.

    Numerics:
      One symmetric eigenproblem, as much as one distance; eigenvalues below 1e-12 of the largest count as 0.

    Example:
      >>> frechet_influence([[-1.0], [1.0]], [0.0], [[4.0]], [1.0], [[1.0]])  # 2 c (0 - 1) + (1 - 1/2)(c^2 - 4)
      array([ 0.5, -3.5])

    Reference: infinitesimal jackknife, Efron and Stein 1981; derivative of the Bures distance, arXiv 1805.07594.
    """
    x, root, mu = _rows(features, "features"), _rows(root_ref, "root_ref"), np.asarray(mu, np.float64)
    if not len(mu) == len(root) == x.shape[1]:
        raise ValueError(f"features of length {x.shape[1]}, mu of {len(mu)}, root_ref of {len(root)}: must agree")
    sigma = np.asarray(sigma, np.float64)
    product = root @ sigma @ root
    w, v = np.linalg.eigh((product + product.T) / 2)
    inverse_root = np.where(w > 1e-12 * w.max(), 1 / np.sqrt(np.maximum(w, np.finfo(np.float64).tiny)), 0)
    a = np.eye(len(mu)) - root @ (v * inverse_root[None]) @ v.T @ root
    gradient = 2 * (mu - np.asarray(mu_ref, np.float64))
    out = np.empty(len(x))
    for rows in _slices(len(x), block):
        c = x[rows].astype(np.float64) - mu[None]
        out[rows] = c @ gradient + np.einsum("nd,nd->n", c @ a, c)
    return out - np.einsum("ij,ji->", a, sigma)


class Interval(NamedTuple):
    """A difference, its bootstrap standard deviation and the bounds of its confidence interval."""

    difference: float
    std: float
    low: float
    high: float


def bootstrap_difference(
    difference: float,
    influence_a: ArrayLike,
    influence_b: ArrayLike,
    *,
    paired: bool,
    resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Confidence interval for d^2(a) - d^2(b) over the choice of images, both against one reference.

        difference + mean influence_a of resampled rows - mean influence_b of resampled rows

    The distance is linear in the weights of the images up to 1 / N, so only its derivative is resampled: no
    covariance is formed again. Recomputing it would double the bias c / N in each resample and overstate the
    deviation by more (Efron 1979, and section 5.7 for the bias).

    Args:
      difference: d^2(a) - d^2(b), of equal N as the bias depends on it.
      influence_a, influence_b: [N], of `frechet_influence`.
      paired: row i of both came from the same seed and label; resampled together, which narrows the interval.
      resamples, level, seed: of the bootstrap.

    Returns:
      Interval; the two differ if 0 is outside [low, high].

    Raises:
      ValueError: not [N], non-finite, empty, or paired with different N.

    Example:
      >>> interval = bootstrap_difference(1.0, [0.5, -0.5], [0.5, -0.5], paired=True)  # the same images
      >>> interval.low, interval.high
      (1.0, 1.0)

    """
    a, b = (_rows(np.asarray(v, np.float64)[..., None], "an influence")[:, 0] for v in (influence_a, influence_b))
    if paired and len(a) != len(b):
        raise ValueError(f"paired, but of {len(a)} and {len(b)} images")
    parts = [a - b] if paired else [a, -b]
    rng, shifts = np.random.default_rng(seed), np.zeros(resamples)
    for part in parts:
        part = part - part.mean()
        shifts += [part[rng.integers(0, len(part), len(part))].mean() for _ in range(resamples)]
    low, high = np.quantile(shifts, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(difference), float(shifts.std()), float(difference + low), float(difference + high))


# ----------------------------------------------------------------------------------------------------
# Labels


class ClassBalance(NamedTuple):
    """Images per class, their deviation from uniform random labels in sigmas, and a word for it."""

    counts: Int[np.ndarray, "k"]
    sigmas: float
    verdict: str


def class_balance(labels: ArrayLike, num_classes: int, *, limit: float = 4.0) -> ClassBalance:
    """Are the labels of a generated set balanced, uniformly random, or neither?

        chi2 = sum_k (n_k - N/K)^2 / (N/K),   f = K - 1
        sigmas = ((chi2 / f)^{1/3} - 1 + 2 / (9 f)) / sqrt(2 / (9 f))

    Args:
      labels: int [N] in [0, K). num_classes: K. limit: of sigmas for "random".

    Returns:
      ClassBalance with verdict "balanced" (counts differ by one at most), "random" (as even as independent
      uniform labels, or more) or "unbalanced": a distance then compares class frequencies, not images.

    Raises:
      ValueError: no labels, or one out of range.

    Example:
      >>> class_balance([0, 1, 2, 0], 3).verdict, class_balance([0] * 99 + [1], 2).verdict
      ('balanced', 'unbalanced')

    Reference: Wilson and Hilferty 1931, for the normal approximation of chi2.
    """
    labels = np.asarray(labels)
    if (
        labels.dtype.kind not in "iu"
        or labels.ndim != 1
        or not len(labels)
        or labels.min() < 0
        or labels.max() >= num_classes
    ):
        raise ValueError(f"labels are {labels.dtype} {labels.shape}: integers [N] in 0..{num_classes - 1}, N >= 1")
    counts = np.bincount(labels, minlength=num_classes)
    mean, f = len(labels) / num_classes, max(num_classes - 1, 1)
    chi2, scale = float(((counts - mean) ** 2).sum()) / mean, 2 / (9 * f)
    sigmas = (math.cbrt(chi2 / f) - 1 + scale) / math.sqrt(scale)
    if counts.max() - counts.min() <= 1:
        return ClassBalance(counts, sigmas, "balanced")
    return ClassBalance(counts, sigmas, "random" if sigmas <= limit else "unbalanced")
