"""Self-play for people with a loop of their own: what a run of this project does, without files, devices or configs."""

from collections.abc import Callable, Iterable
from typing import Any

from jaxtyping import PyTree


def self_play(
    params: PyTree,
    *,
    rounds: int,
    fakes: Callable[[PyTree, int], Any],
    train: Callable[[PyTree, Any, int], Iterable[PyTree]],
    score: Callable[[PyTree], float],
) -> tuple[PyTree, list[dict[str, Any]]]:
    """Rounds of DDO; each starts from, and draws its fakes from, the best parameters so far.

        ref = best of the rounds before;   pool = fakes(ref);   best = argmin score over ref and what train yields

    Args:
      params: the pretrained parameters. rounds: how many, >= 1.
      fakes: `fakes(ref, n) -> pool`, samples of the reference for round n = 1, 2, ...; what `train` takes.
      train: `train(ref, pool, n) -> parameters`, yielded where they shall be scored: early and often, as a round
        overshoots. It starts at ref with a fresh optimizer; averages of the parameters score best.
      score: `score(params) -> float`, lower is better, on samples of its own.

    Returns:
      (the best parameters, a record a round: "round", "start": its reference's score, "scores": of all that was
      yielded, "improved"). A score that is not a number never wins, and a round without a better one keeps ref.

    Raises:
      ValueError: no rounds, or a start whose score is no number: nothing could be compared with it.

    Example:
      >>> fakes, train = lambda ref, n: None, lambda ref, pool, n: [ref - 1.0, ref - 2.0, ref - 9.0]
      >>> best, history = self_play(3.0, rounds=2, fakes=fakes, train=train, score=lambda params: abs(params))
      >>> print(best, [r["improved"] for r in history], history[1]["scores"])
      0.0 [True, True] [0.0, 1.0, 8.0]

    Reference: arXiv 2503.01103, section 3 and algorithm 1.
    """
    best = float(score(params))
    if rounds < 1 or best != best:
        raise ValueError(f"rounds is {rounds}, score of the start {best}; allowed: 1 or more rounds, a number")
    history: list[dict[str, Any]] = []
    for n in range(1, rounds + 1):
        ref, start, scores = params, best, []
        for candidate in train(ref, fakes(ref, n), n):
            scores.append(float(score(candidate)))
            if scores[-1] < best:
                params, best = candidate, scores[-1]
        history.append({"round": n, "start": start, "scores": scores, "improved": best < start})
    return params, history
