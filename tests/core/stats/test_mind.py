"""MIND against definitions and closed forms."""

import numpy as np
import pytest

from ddo_jax.core.stats import mind


def naive(x, y, directions, seed):
    """In float64, one direction at a time, the quantile functions on a fine common grid."""
    u = np.random.default_rng(seed).standard_normal((directions, x.shape[1]))
    u /= np.linalg.norm(u, axis=1, keepdims=True)
    grid = (np.arange(len(x) * len(y)) + 0.5) / (len(x) * len(y))
    values = []
    for d in u:
        a, b = np.sort(x @ d), np.sort(y @ d)
        difference = a[(grid * len(a)).astype(int)] - b[(grid * len(b)).astype(int)]
        values.append(np.mean(difference**2))
    return 3 * x.shape[1] * np.mean(values)


@pytest.mark.parametrize("n, m", [(12, 12), (12, 8), (7, 12), (1, 5)])
def test_against_the_definition(n, m):
    rng = np.random.default_rng(1)
    x, y = rng.standard_normal((n, 5)) + 3, 2 * rng.standard_normal((m, 5))
    found = mind.mind(x, y, directions=50, seed=3, chunk=7)
    np.testing.assert_allclose(found, naive(x, y, 50, 3), rtol=1e-5)
    np.testing.assert_allclose(found, mind.mind(x, y, directions=50, seed=3, chunk=50), rtol=1e-5)


def test_two_gaussians_in_one_dimension():
    """(mu - mu')^2 + (sigma - sigma')^2, times 3 d = 3."""
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((200_000, 1)), 1.0 + 2.0 * rng.standard_normal((150_000, 1))
    np.testing.assert_allclose(mind.mind(x, y, directions=2), 3 * (1.0**2 + 1.0**2), rtol=0.02)


def test_a_translation_costs_its_square():
    """delta^2 / d a direction on average; exactly the mean of <delta, u>^2 over the directions drawn."""
    rng = np.random.default_rng(0)
    x, delta = rng.standard_normal((100, 16)), np.linspace(-1, 1, 16)
    u = mind.unit_directions(16, 4000, 5).astype(np.float64)
    found = mind.mind(x, x + delta, directions=4000, seed=5)
    np.testing.assert_allclose(found, 3 * 16 * np.mean((u @ delta) ** 2), rtol=1e-4)
    np.testing.assert_allclose(found, 3 * np.sum(delta**2), rtol=0.05)


def test_repeated_rows_are_the_same_set():
    x = np.random.default_rng(0).standard_normal((30, 4))
    assert mind.mind(x, np.repeat(x, 3, axis=0), directions=20) < 1e-10


def test_far_from_the_origin():
    """Breaks if the common mean is projected too: float32 would lose the difference."""
    x = np.random.default_rng(0).standard_normal((200, 3))
    near, far = mind.mind(x, 1.1 * x, directions=30), mind.mind(x + 1e5, 1.1 * x + 1e5, directions=30)
    np.testing.assert_allclose(near, far, rtol=1e-3)


@pytest.mark.parametrize(
    "x, y, words",
    [
        (np.zeros((0, 2)), np.zeros((3, 2)), "real has shape"),
        (np.zeros((3, 2)), np.zeros((3, 4)), "fake has features of length 4, real of 2"),
        (np.zeros((3, 2)), np.full((3, 2), np.nan), "fake holds a non-finite value"),
    ],
)
def test_refused(x, y, words):
    with pytest.raises(ValueError, match=words):
        mind.mind(x, y)
