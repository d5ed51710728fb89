"""The choice of beta in a round: where to look, and whom to stop. Pure functions; `run.search` does what they say.

What a good (alpha, beta) has in common on every plane measured here is the spread of the log-ratio that it lets grow
(docs/beta.md): along the ridge beta ~ alpha of any one problem std(r) stays the same, and

    beta std(r) / alpha  is  0.16 to 0.3      on five problems, diffusion and tokens, std(r) from 3 to 21 nats

So a short run whose beta follows its own std(r) finds the place, and three values around it, and further ones on the
side where the best of them lies at the edge, are enough.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

RIDGE = 0.2  # beta std(r) / alpha where the score is best


def balanced_beta(std: float, alpha: float) -> float:
    """The beta that belongs to a spread of the log-ratio.

        beta = 0.2 alpha / std(r),   at most alpha

    Args:
      std: of r, nats, over real and fake examples. alpha: weight of the fake term.

    Returns:
      beta > 0; alpha where r does not spread yet.

    Example:
      >>> balanced_beta(4.0, 2.0), balanced_beta(0.0, 2.0)
      (0.1, 2.0)
    """
    return alpha * min(1.0, RIDGE / std) if std > 0 else alpha


def largest_beta(alpha: float) -> float:
    """Below which DDO leaves the reference at all, if likelihoods and fakes are exact and the reference is converged.

        2 (alpha - 1) / (alpha + 1),   0 for alpha <= 1: nothing moves

    The curvature of the loss at the reference is F [(1 + alpha) beta^2 / 4 - (alpha - 1) beta / 2], with F the Fisher
    information; the gradient is 0 (specs/ddo.md section 10).

    Example:
      >>> largest_beta(3.0), largest_beta(1.0)
      (1.0, 0.0)
    """
    return 2 * max(alpha - 1, 0.0) / (alpha + 1)


def stops(steps: int, every: int, warmup: int) -> list[int]:
    """Steps after which a search compares its candidates, and the end of the round.

    The first evaluation behind a sixth of the round and behind the warm-up, which counts up to a third of the round
    (some last longer than the round), and the one at twice as many steps.

    Args:
      steps: of the round. every: between evaluations. warmup: steps.

    Example:
      >>> stops(300, 100, 50), stops(98, 4, 25), stops(10, 20, 0), stops(2930, 488, 19531)
      ([100, 200, 300], [28, 56, 98], [10], [976, 1952, 2930])
    """
    first = every * math.ceil(max(steps / 6, min(warmup, steps // 3), 1) / every)
    return [step for step in (first, 2 * first) if step < steps] + [steps]


def rounded(beta: float) -> float:
    """To two digits: a name and a config can hold it.

    >>> rounded(0.07594)
    0.076
    """
    return float(f"{beta:.2g}")


def around(beta: float, factor: float = 2.0) -> tuple[float, float, float]:
    """Three values, the largest first.

    >>> around(0.1)
    (0.2, 0.1, 0.05)
    """
    return rounded(beta * factor), rounded(beta), rounded(beta / factor)


class Scored(NamedTuple):
    """A candidate's score (lower is better) and its influence by block of images; empty: there are no intervals."""

    score: float
    influence: Sequence[float] = ()


def half_interval(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Half of the 95 % interval of the difference of two scores on images of the same seeds.

        t std(a_k - b_k) / sqrt(K)

    Args:
      a, b: influence of each of K equal blocks of images on the two scores: to first order, score = const + mean.

    Returns:
      The half width; None of no blocks.

    Example:
      >>> half_interval([1.0] * 8 + [2.0] * 8, [0.0] * 8 + [1.0] * 8), half_interval([], [])
      (0.0, None)
    """
    if len(a) < 2 or len(a) != len(b):
        return None
    d, k = np.subtract(a, b), len(a)
    return float(_student(k - 1) * d.std(ddof=1) / math.sqrt(k))


def _student(degrees: int, z: float = 1.959964) -> float:
    """The 97.5 % quantile of Student's t, by its expansion in the normal one: within 0.3 % from 8 degrees on.

    >>> round(_student(63), 3), round(_student(10), 3)
    (1.998, 2.225)
    """
    return z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)


def beyond(candidates: Mapping[float, Scored], factor: float = 2.0) -> float | None:
    """The next value to try: past the edge where the best of those tried so far lies; None if it lies inside.

    A larger beta only slows a round down: past the upper edge one goes only if the best is better than the next by more
    than the 95 % interval, or candidates failed, which too small a beta does.

    Args:
      candidates: {beta: score}; not finite: it failed.

    Example:
      >>> beyond({0.2: Scored(9.0), 0.1: Scored(8.0), 0.05: Scored(7.5)})
      0.025
      >>> beyond({0.2: Scored(9.0), 0.1: Scored(8.0), 0.05: Scored(8.5)})
    """
    good = {beta: c for beta, c in candidates.items() if math.isfinite(c.score)}
    if not good:
        return rounded(max(candidates) * factor)
    best = min(good, key=lambda beta: good[beta].score)
    if best == min(candidates):
        return rounded(best / factor)
    if best < max(candidates):
        return None
    if len(good) == 1:
        return rounded(best * factor)
    after = max(beta for beta in good if beta != best)
    within = half_interval(good[after].influence, good[best].influence)
    plain = within is not None and good[after].score - good[best].score > within
    return rounded(best * factor) if plain else None


class Verdict(NamedTuple):
    """Whether a candidate goes on.

    Attributes:
      goes_on: or stops. behind: its score less the best one. within: half of the 95 % interval of that; None: unknown.
      why: in words.
    """

    goes_on: bool
    behind: float
    within: float | None
    why: str


def judge(candidates: Mapping[str, Scored], most: int) -> dict[str, Verdict]:
    """Who goes on after an evaluation of all at the same step, on the same seeds.

    The best does; of the others those whose 95 % interval of the paired difference has 0 in it, `most` in all.

    Args:
      candidates: {name: score}. Not finite: it failed, and stops.

    Example:
      >>> found = judge({"a": Scored(8.0), "b": Scored(9.0), "c": Scored(math.nan)}, most=2)
      >>> [(name, v.goes_on, v.why) for name, v in found.items()]
      [('a', True, 'best'), ('b', False, 'behind; no interval'), ('c', False, 'failed')]
    """
    order = sorted((n for n, c in candidates.items() if math.isfinite(c.score)), key=lambda n: candidates[n].score)
    found, going = {}, 0
    for rank, name in enumerate(order, 1):
        own, best = candidates[name], candidates[order[0]]
        behind = own.score - best.score
        within = half_interval(own.influence, best.influence) if rank > 1 else 0.0
        if rank == 1:
            why, goes_on = "best", True
        elif within is None:
            why, goes_on = "behind; no interval", False
        elif behind > within:
            why, goes_on = "behind by more than the interval", False
        else:
            goes_on = going < most
            why = "as good within the interval" + ("" if goes_on else f", but {most} at most may go on")
        going += goes_on
        found[name] = Verdict(goes_on, behind, within, why)
    failed = {n: Verdict(False, math.nan, None, "failed") for n in candidates if n not in found}
    return {name: {**found, **failed}[name] for name in candidates}
