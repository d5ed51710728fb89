"""Inception Score, precision/recall, KID, and the statistics of Frechet distances (specs/metrics.md 5, 10.4)."""

from pathlib import Path

import numpy as np
import pytest

from ddo_jax.core.stats import metrics
from ddo_jax.core.stats.frechet import frechet_distance, moments, sqrt_psd

with np.load(Path(__file__).parents[2] / "goldens" / "fid_math.npz") as f:
    FID = dict(f)
close = dict(rtol=1e-12, atol=1e-12)


# ----------------------------------------------------------------------------------------------------
# Inception Score

LOGITS = FID["is_logits"]


@pytest.mark.parametrize(
    "case, n, options",
    [("is10", 600, {"splits": 10}), ("is253_10", 253, {"splits": 10}), ("is250_fix100", 250, {"block": 100})],
)
def test_inception_score(case, n, options):
    score = metrics.inception_score(LOGITS[:n], **options)
    np.testing.assert_allclose(score.values, FID[f"{case}_scores"], **close)
    np.testing.assert_allclose(score.mean, FID[f"{case}_mean"], **close)
    if f"{case}_std" in FID:
        np.testing.assert_allclose(score.std, FID[f"{case}_std"], **close)


def test_inception_score_shuffled():
    order = np.random.RandomState(2020).permutation(600)
    np.testing.assert_array_equal(order[:16], FID["is_shuf2020_perm_head"])
    score = metrics.inception_score(LOGITS, splits=10, order=order)
    np.testing.assert_allclose([score.mean, score.std], [FID["is_shuf2020_mean"], FID["is_shuf2020_std"]], **close)
    by_class = np.argsort(LOGITS.argmax(axis=1), kind="stable")
    assert metrics.inception_score(LOGITS, splits=10, order=by_class).mean < 0.8 * score.mean  # it collapses


def test_inception_score_without_the_bias():
    logits = FID["is_feats"].astype(np.float64) @ FID["is_W"].astype(np.float64)
    without = metrics.inception_score(logits, splits=1).mean
    np.testing.assert_allclose(without, FID["is_nobias"], rtol=1e-10)
    biased = metrics.inception_score(logits + FID["is_bias"][None], splits=1).mean
    np.testing.assert_allclose(biased, FID["is_withbias"], rtol=1e-10)


def test_inception_score_limits():
    sure = np.where(np.eye(7, dtype=bool), 1e4, -1e4)  # probabilities that underflow to 0
    np.testing.assert_allclose(metrics.inception_score(sure, splits=1).mean, 7)
    np.testing.assert_allclose(metrics.inception_score(np.ones((9, 7)), block=4).values, [1, 1, 1])


# ----------------------------------------------------------------------------------------------------
# Precision and recall


@pytest.mark.parametrize("k", [3, 5])
@pytest.mark.parametrize("block, dtype", [(4096, np.float64), (37, np.float64), (3, np.float32)])
def test_precision_recall(k, block, dtype):
    real, fake = FID["pr_real"], FID["pr_fake"]
    rtol = 1e-12 if dtype == np.float64 else 1e-5
    for name, x in (("real", real), ("fake", fake)):
        radii = metrics.squared_radii(x, k, block=block, dtype=dtype)
        assert radii.dtype == dtype
        np.testing.assert_allclose(radii, FID[f"pr{k}_radii2_{name}"], rtol=rtol)
    result = metrics.precision_recall(real, fake, k=k, block=block, dtype=dtype)
    np.testing.assert_array_equal(result.fake_in, FID[f"pr{k}_fake_in"])
    np.testing.assert_array_equal(result.real_in, FID[f"pr{k}_real_in"])
    for name in ("precision", "recall", "density", "coverage"):
        np.testing.assert_allclose(getattr(result, name), FID[f"pr{k}_{name}"], rtol=1e-12, err_msg=name)


@pytest.mark.parametrize("block", [4096, 7])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_duplicates_count(block, dtype):
    """<= and not <; radii of 0 where an image is there more than k times."""
    result = metrics.precision_recall(FID["prdup_real"], FID["prdup_fake"], k=3, block=block, dtype=dtype)
    np.testing.assert_allclose(result[:2], [FID["prdup_precision"], FID["prdup_recall"]], rtol=1e-12)
    assert FID["prdup_precision_strict"] == 0
    if dtype == np.float64:  # in float32 a tie at a distance above 0 is broken by rounding, differently on every CPU
        assert result.density == 0


def test_duplicates_at_the_size_of_real_features():
    x = np.random.default_rng(0).uniform(0, 1, (40, 2048)).astype(np.float32)  # |x|^2 about 700
    for dtype in (np.float32, np.float64):
        d2 = metrics.squared_distances(x, x[::-1], dtype)
        exact = ((x[:, None].astype(np.float64) - x[None, ::-1]) ** 2).sum(axis=2)
        np.testing.assert_array_equal(d2 == 0, exact == 0)
        np.testing.assert_allclose(d2, exact, rtol=1e-5 if dtype == np.float32 else 1e-12)


def test_identical_sets_are_perfect():
    result = metrics.precision_recall(FID["pr_real"], FID["pr_real"])
    assert result[:2] == (1, 1) and result.coverage == 1


# ----------------------------------------------------------------------------------------------------
# Kernel Inception Distance


@pytest.mark.parametrize("block", [4096, 33])
def test_mmd2(block):
    x, y = FID["pr_real"][:200], FID["pr_fake"][:200]
    np.testing.assert_allclose(metrics.mmd2(x, y, block=block), FID["kid_full200"], rtol=1e-12)
    np.testing.assert_allclose(metrics.mmd2(y, x, block=block), FID["kid_full200"], rtol=1e-12)


def test_mmd2_of_unequal_sizes_is_unbiased():
    x, y = (np.random.default_rng(seed).normal(size=(n, 3)) for seed, n in ((0, 7), (1, 11)))

    def kernel(a, b):
        return (a @ b.T / 3 + 1) ** 3

    def within(a):
        return kernel(a, a)[~np.eye(len(a), dtype=bool)].mean()

    np.testing.assert_allclose(metrics.mmd2(x, y), within(x) + within(y) - 2 * kernel(x, y).mean(), rtol=1e-12)


def test_kid():
    result = metrics.kid(FID["pr_real"], FID["pr_fake"], subsets=10, size=50)
    np.testing.assert_allclose(result.values, FID["kid_subset_values"], rtol=1e-11)
    np.testing.assert_allclose([result.mean, result.std], [FID["kid_subset_mean"], FID["kid_subset_std"]], rtol=1e-11)


# ----------------------------------------------------------------------------------------------------
# Frechet distances with care


def test_frechet_infinity():
    x, mu, sigma = FID["fidinf_x"], FID["fidinf_mu_ref"], FID["fidinf_sigma_ref"]
    distances = [frechet_distance(mu, sigma, *moments(x[:n])) for n in FID["fidinf_N"]]
    np.testing.assert_allclose(distances, FID["fidinf_fd"], rtol=1e-9)
    line = metrics.frechet_infinity(FID["fidinf_N"], distances)
    np.testing.assert_allclose(line, [FID["fidinf_intercept"], FID["fidinf_slope"]], rtol=1e-9)


def spectrum(d):
    return 1 / (1 + np.arange(d) / 8)


def draw(rng, n, d, scale=1.0, shift=0.0):
    return rng.normal(size=(n, d)) * np.sqrt(spectrum(d))[None] * scale + shift


def test_frechet_bias_is_what_samples_show():
    rng, d, n = np.random.default_rng(0), 24, 1500
    sigma = np.diag(spectrum(d))
    root = sqrt_psd(sigma)
    distances = [frechet_distance(np.zeros(d), sigma, *moments(draw(rng, n, d)), root1=root) for _ in range(200)]
    np.testing.assert_allclose(np.mean(distances), metrics.frechet_bias(sigma) / n, rtol=0.02)
    q, _ = np.linalg.qr(rng.normal(size=(d, d)))
    np.testing.assert_allclose(metrics.frechet_bias(q @ sigma @ q.T), metrics.frechet_bias(sigma), rtol=1e-10)
    deficient = np.diag([2.0, 0, 0])
    np.testing.assert_allclose(metrics.frechet_bias(deficient), 3)  # of the one direction that varies


def influence(x, mu_ref, root):
    return metrics.frechet_influence(x, *moments(x), mu_ref, root, block=64)


def test_frechet_influence_is_the_derivative():
    """Against the distance with the weight of one image changed, N-normalised covariance."""
    rng, d, n, h = np.random.default_rng(1), 5, 200, 1e-5
    x, sigma = draw(rng, n, d, 1.3, 0.2), np.diag(spectrum(d))
    mine = influence(x, np.zeros(d), sqrt_psd(sigma))
    assert abs(mine.mean()) < np.abs(mine).mean() * 5 / n
    for i in (0, 17, 199):

        def distance(step, i=i):
            w = np.full(n, (1 - step) / n)
            w[i] += step
            mu = w @ x
            centred = x - mu[None]
            cov = (centred * w[:, None]).T @ centred * n / (n - 1)
            return frechet_distance(np.zeros(d), sigma, mu, cov)

        slope = (distance(h) - distance(-h)) / (2 * h)
        assert abs(slope - mine[i]) < 1e-3 + 0.02 * np.abs(mine).mean()  # 1 / N of difference: n / (n - 1)


def test_bootstrap_deviation_is_that_of_independent_draws():
    """Two models, 120 independent pairs of sets: their real spread, and the one that a single pair tells."""
    rng, d, n = np.random.default_rng(2), 16, 600
    sigma, zero = np.diag(spectrum(d)), np.zeros(d)
    root = sqrt_psd(sigma)

    def one():
        a, b = draw(rng, n, d, 1.2, 0.1), draw(rng, n, d, 1.1, 0.2)
        return a, b, *(frechet_distance(zero, sigma, *moments(x), root1=root) for x in (a, b))

    draws = [one() for _ in range(120)]
    differences = np.array([fa - fb for *_, fa, fb in draws])
    covered, deviations = 0, []
    for (a, b, *_), difference in zip(draws, differences, strict=True):
        parts = [influence(x, zero, root) for x in (a, b)]
        interval = metrics.bootstrap_difference(difference, *parts, paired=False, resamples=300)
        covered += interval.low <= differences.mean() <= interval.high
        deviations.append(interval.std)
    assert 0.9 < np.mean(deviations) / differences.std() < 1.3
    assert 0.88 < covered / len(draws) <= 1


def test_pairing_narrows_the_interval():
    rng, d = np.random.default_rng(3), 8
    a = draw(rng, 500, d, 1.3)
    b = a + 0.01 * rng.normal(size=a.shape)  # the same seeds, a slightly different model
    root = sqrt_psd(np.diag(spectrum(d)))
    parts = [influence(x, np.zeros(d), root) for x in (a, b)]
    paired, unpaired = (metrics.bootstrap_difference(0.5, *parts, paired=p, resamples=500) for p in (True, False))
    assert paired.std < 0.1 * unpaired.std
    assert paired.low < 0.5 < paired.high and paired.difference == 0.5
    again = metrics.bootstrap_difference(0.5, *parts, paired=True, resamples=500)
    assert again == paired  # the seed is an argument


def test_rank_deficient_influence_is_finite():
    x = np.random.default_rng(4).normal(size=(6, 20))
    assert np.isfinite(influence(x, np.zeros(20), np.eye(20))).all()


# ----------------------------------------------------------------------------------------------------
# Labels


def test_class_balance():
    rng = np.random.default_rng(0)
    balanced = metrics.class_balance(np.arange(5000) % 1000, 1000)
    assert balanced.verdict == "balanced" and balanced.counts.tolist() == [5] * 1000
    assert metrics.class_balance(np.arange(5003) % 1000, 1000).verdict == "balanced"
    uniform = [metrics.class_balance(rng.integers(0, 1000, 50_000), 1000) for _ in range(100)]
    assert {u.verdict for u in uniform} == {"random"}
    sigmas = np.array([u.sigmas for u in uniform])
    assert abs(sigmas.mean()) < 0.3 and 0.8 < sigmas.std() < 1.2  # a standard normal
    missing = rng.integers(0, 995, 50_000)
    assert metrics.class_balance(missing, 1000).verdict == "unbalanced"
    assert metrics.class_balance(np.zeros(10, np.int32), 1).verdict == "balanced"  # an unconditional model


# ----------------------------------------------------------------------------------------------------


def test_bad_inputs_are_named():
    x, nan = np.zeros((5, 3)), np.full((5, 3), np.nan)
    bootstrap, eye = metrics.bootstrap_difference, np.eye(3)
    cases = {
        r"logits has shape \(5,\): it must be \[N, D\]": lambda: metrics.inception_score(x[:, 0], splits=1),
        "logits holds a non-finite value": lambda: metrics.inception_score(nan, splits=1),
        "exactly one of splits and block": lambda: metrics.inception_score(x),
        "splits is 6, block is None: from 1 to the 5 rows": lambda: metrics.inception_score(x, splits=6),
        "splits is None, block is -1": lambda: metrics.inception_score(x, block=-1),
        r"real has shape \(5, 3\): .* N >= 6": lambda: metrics.precision_recall(x, x, k=5),
        "fake has features of length 2, real of 3": lambda: metrics.precision_recall(x, x[:, :2]),
        "features holds a non-finite value": lambda: metrics.squared_radii(nan),
        r"y has shape \(1, 3\): .* N >= 2": lambda: metrics.mmd2(x, x[:1]),
        r"real has shape \(5, 3\): .* N >= 9": lambda: metrics.kid(x, x, size=9),
        "size is 1, subsets is 100: at least 2 and 1": lambda: metrics.kid(x, x, size=1),
        r"sigma has shape \(5, 3\): it must be \[D, D\]": lambda: metrics.frechet_bias(x),
        "of two different sizes at least": lambda: metrics.frechet_infinity([5, 5], [1.0, 2.0]),
        "sizes or distances hold a non-finite value": lambda: metrics.frechet_infinity([5, 6], [1.0, np.nan]),
        "of length 3, mu of 2": lambda: metrics.frechet_influence(x, x[0, :2], eye, x[0], eye),
        "paired, but of 5 and 4 images": lambda: bootstrap(0.0, x[:, 0], x[:4, 0], paired=True),
        "an influence holds a non-finite value": lambda: bootstrap(0.0, nan[:, 0], x[:, 0], paired=True),
        r"labels are int64 \(1,\): integers \[N\] in 0..2": lambda: metrics.class_balance([3], 3),
        "labels are float64": lambda: metrics.class_balance([0.0], 3),
    }
    for message, call in cases.items():
        with pytest.raises(ValueError, match=message):
            call()
