"""The decisions of a search against the bootstrap, against the theory's Gaussian, and at their edges."""

import math

import numpy as np
import pytest

from ddo_jax.core import search
from ddo_jax.core.stats.metrics import bootstrap_difference


def test_interval_against_the_bootstrap():
    """Breaks if blocks, which are all that a record keeps, give another interval than the images themselves."""
    rng = np.random.default_rng(0)
    common = rng.standard_normal(2048)
    a, b = (common + 0.2 * rng.standard_normal(2048) for _ in range(2))
    blocks = [x.reshape(64, -1).mean(1).tolist() for x in (a, b)]
    exact = bootstrap_difference(0.0, a, b, paired=True)
    assert math.isclose(search.half_interval(*blocks), (exact.high - exact.low) / 2, rel_tol=0.2)
    unpaired = bootstrap_difference(0.0, a, b, paired=False)
    assert search.half_interval(*blocks) < (unpaired.high - unpaired.low) / 4  # equal seeds sharpen it


def test_interval_covers():
    """Breaks if a difference that is not there is outside the interval more often than in one of twenty."""
    rng = np.random.default_rng(1)
    outside = 0
    for _ in range(1000):
        a, b = rng.standard_normal((2, 16)).tolist()
        outside += abs(np.mean(a) - np.mean(b)) > search.half_interval(a, b)
    assert 30 <= outside <= 75


def scored(score, influence=()):
    return search.Scored(score, influence)


def test_judge_keeps_the_best_and_what_may_be_as_good():
    """Breaks if chance stops a candidate, or more go on than may."""
    noise = np.random.default_rng(2).standard_normal(64)
    near, far = scored(8.1, list(noise)), scored(9.9, list(noise))
    best, other = scored(8.0, list(np.zeros(64))), scored(8.2, list(-noise))
    found = search.judge({"far": far, "near": near, "best": best, "other": other}, most=2)
    assert list(found) == ["far", "near", "best", "other"]
    assert [name for name, v in found.items() if v.goes_on] == ["near", "best"]
    assert found["far"].why == "behind by more than the interval" and found["far"].behind == pytest.approx(1.9)
    assert found["other"].why == "as good within the interval, but 2 at most may go on"
    alone = search.judge({"near": near, "best": best}, most=1)
    assert [v.goes_on for v in alone.values()] == [False, True]


def test_nobody_goes_on_where_all_failed():
    assert not any(v.goes_on for v in search.judge({"a": scored(math.nan), "b": scored(math.inf)}, 2).values())


@pytest.mark.parametrize(
    "scores, expected",
    [
        ({0.2: 3.0, 0.1: 2.0, 0.05: 4.0}, None),  # inside
        ({0.2: 1.0, 0.1: 2.0, 0.05: 4.0}, None),  # may be chance: no interval
        ({0.2: 3.0, 0.1: 2.0, 0.05: 1.0}, 0.025),
        ({0.2: 3.0, 0.1: 2.0, 0.05: math.nan}, None),  # the edge is where they fail
        ({0.2: math.nan, 0.1: math.nan, 0.05: math.nan}, 0.4),  # too small, all of them
        ({0.2: 1.0, 0.1: math.nan, 0.05: math.nan}, 0.4),
    ],
)
def test_beyond_an_edge(scores, expected):
    """Breaks if a search stops at an edge, or walks on where everything diverges."""
    assert search.beyond({beta: scored(score) for beta, score in scores.items()}) == expected


@pytest.mark.parametrize("behind, expected", [(0.1, None), (2.0, 0.4)])
def test_upwards_only_if_it_is_plain(behind, expected):
    """Breaks if a search walks along the plateau of large betas, where nothing moves and chance has the say."""
    noise = np.random.default_rng(3).standard_normal(64).tolist()
    found = {0.2: scored(8.0, [0.0] * 64), 0.1: scored(8.0 + behind, noise), 0.05: scored(9.0, noise)}
    assert search.beyond(found) == expected


def test_curvature_of_the_bound():
    """Breaks if the bound is not where the curvature of the loss at an exact optimum changes its sign."""
    for alpha in (1.5, 4.0, 50.0):
        beta = search.largest_beta(alpha)
        curvature = [(1 + alpha) * b**2 / 4 - (alpha - 1) * b / 2 for b in (0.99 * beta, 1.01 * beta)]
        assert curvature[0] < 0 < curvature[1]
