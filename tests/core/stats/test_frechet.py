"""Frechet distance against exact values (nuclear norm, 60-digit arithmetic) and the reference's."""

import zlib
from functools import reduce
from pathlib import Path

import numpy as np
import pytest

from ddo_jax.core.stats.frechet import (
    finalize,
    frechet_distance,
    frechet_from_features,
    merge,
    moments,
    moments_of,
    sqrt_psd,
)

GOLDENS = Path(__file__).parents[2] / "goldens"
FID = np.load(GOLDENS / "fid_math.npz")


def gaussians(case, golden=FID):
    return [golden[f"{case}{key}"] for key in ("mu_a", "sigma_a", "mu_b", "sigma_b")]


def test_basic():
    a, b = FID["basic_a"], FID["basic_b"]
    for mine, golden in zip((*moments(a), *moments(b)), gaussians("basic_"), strict=True):
        np.testing.assert_allclose(mine, golden, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(frechet_distance(*gaussians("basic_")), FID["basic_fd"], rtol=1e-10)
    np.testing.assert_allclose(frechet_from_features(a, b), FID["basic_fd"], rtol=1e-10)
    assert abs(FID["basic_fd"] - FID["basic_fd_ddof0"]) > 1e-3  # the N - 1 matters


@pytest.mark.parametrize("case, tolerance", [("lowrank", 1e-6), ("illcond", 2e-6)])
def test_hard_cases(case, tolerance):
    mu1, sigma1, mu2, sigma2 = gaussians(f"{case}_")
    expected = float(FID[f"{case}_fd"])
    assert abs(frechet_distance(mu1, sigma1, mu2, sigma2) - expected) < tolerance
    assert abs(frechet_distance(mu2, sigma2, mu1, sigma1) - expected) < tolerance  # symmetric
    cached = frechet_distance(mu1, sigma1, mu2, sigma2, root1=sqrt_psd(sigma1))
    assert abs(cached - expected) < tolerance


def test_rank_deficient_features():
    value = frechet_from_features(FID["lowrank_a"], FID["lowrank_b"])
    assert abs(value - float(FID["lowrank_fd"])) < 1e-9


def wide_features(name, n, d, factor):
    """Golden rule of specs/metrics.md 10.1: the top 24 bits of a guaranteed bit stream, scaled per column."""
    seed = int(FID["wide_salt"]) * 2**32 + zlib.crc32(name.encode("ascii"))
    u = (np.random.PCG64(seed).random_raw(n * d) >> np.uint64(40)).astype(np.float64) / 2**24
    scale = 0.2 + 1 / (1 + np.arange(d) / 64)
    return (u.reshape(n, d) * scale * factor).astype(np.float32)  # in this order, for the last bit


def test_2048_dimensions():
    n_a, n_b, d = (int(v) for v in FID["wide_shape"])
    a, b = wide_features("wide_a", n_a, d, 1.0), wide_features("wide_b", n_b, d, 1.1)
    assert [zlib.crc32(v.tobytes()) for v in (a, b)] == FID["wide_crc32"].tolist()
    np.testing.assert_allclose(frechet_from_features(a, b), FID["wide_fd"], rtol=1e-9)


def test_streaming_survives_a_large_mean():
    x = FID["offset_x"]  # mean 20, std down to 0.02
    chunks = np.split(x, [1, 500, 513, 2999])
    mu, sigma = finalize(reduce(merge, map(moments_of, chunks)))
    np.testing.assert_allclose(mu, FID["offset_mu"], rtol=1e-12)
    np.testing.assert_allclose(sigma, FID["offset_sigma"], rtol=1e-9, atol=1e-12)
    naive = np.diag(x.T @ x) / len(x) - np.diag(np.outer(x.mean(0), x.mean(0)))  # float32, uncentred
    assert np.abs(naive / np.diag(FID["offset_sigma"]) - 1).max() > 0.1


def test_merge_is_associative_and_commutative():
    rng = np.random.default_rng(0)
    a, b, c = (moments_of(rng.normal(size=(n, 3)) + n) for n in (2, 5, 9))
    for other in (merge(a, merge(b, c)), merge(c, merge(b, a))):
        for x, y in zip(merge(merge(a, b), c), other, strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-12)


def test_edm_reference_value():
    golden = np.load(GOLDENS / "edm_units.npz")
    a, b = golden["fid/feat_a"], golden["fid/feat_b"]
    for mine, theirs in zip((*moments(a), *moments(b)), gaussians("fid/", golden), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(frechet_distance(*gaussians("fid/", golden)), golden["fid/value"], rtol=1e-8)


def test_identities():
    mu1, sigma1, mu2, sigma2 = gaussians("basic_")
    assert abs(frechet_distance(mu1, sigma1, mu1, sigma1)) < 1e-10 * np.trace(sigma1)
    q, _ = np.linalg.qr(np.random.default_rng(0).normal(size=sigma1.shape))
    rotated = frechet_distance(q @ mu1, q @ sigma1 @ q.T, q @ mu2, q @ sigma2 @ q.T)
    np.testing.assert_allclose(rotated, FID["basic_fd"], rtol=1e-9)
    scaled = frechet_distance(3 * mu1, 9 * sigma1, 3 * mu2, 9 * sigma2)
    np.testing.assert_allclose(scaled, 9 * FID["basic_fd"], rtol=1e-9)
    root = sqrt_psd(sigma1)
    np.testing.assert_allclose(root @ root, sigma1, atol=1e-12)
    np.testing.assert_array_equal(sqrt_psd(-np.eye(2)), 0)  # clipped


def test_bad_inputs_are_named():
    mu, sigma = np.zeros(3), np.eye(3)
    nan = np.full((3, 3), np.nan)
    cases = {
        "sigma2 holds a non-finite value": lambda: frechet_distance(mu, sigma, mu, nan),
        "mu2 holds a non-finite value": lambda: frechet_distance(mu, sigma, mu + np.inf, sigma),
        "mu2 has length 2, mu1 has 3": lambda: frechet_distance(mu, sigma, mu[:2], sigma),
        r"mu1 has shape \(3, 3\): it must be \[D\]": lambda: frechet_distance(sigma, sigma, mu, sigma),
        r"sigma1 has shape \(2, 2\): it must be \(3, 3\)": lambda: frechet_distance(mu, np.eye(2), mu, sigma),
        r"root1 has shape \(3, 2\)": lambda: frechet_distance(mu, sigma, mu, sigma, root1=sigma[:, :2]),
        "batch holds a non-finite value": lambda: moments_of(nan),
        r"batch has shape \(0, 3\)": lambda: moments_of(nan[:0]),
        r"sigma has shape \(3,\)": lambda: sqrt_psd(mu),
        "n is 1: a covariance needs at least 2": lambda: moments(sigma[:1]),
        r"a has shape \(1, 3\): .* N >= 2": lambda: frechet_from_features(sigma[:1], sigma),
        "b has features of length 2, a of 3": lambda: frechet_from_features(sigma, sigma[:, :2]),
        "cannot merge features of length 3 with 2": lambda: merge(moments_of(sigma), moments_of(sigma[:, :2])),
    }
    for message, call in cases.items():
        with pytest.raises(ValueError, match=message):
            call()
