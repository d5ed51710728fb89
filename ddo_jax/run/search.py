"""config.ddo.search = "auto": a round finds its beta, for one alpha, instead of training a whole grid.

    probe      tens of steps whose beta follows the spread of r: where to look (later rounds: around the last best)
    start      three values around it to a first evaluation; more past an edge, as long as the best lies there
    halving    after it those stop that are behind the best by more than the 95 % interval, and all but two; after the
               next one all but the best

All candidates of an evaluation are scored on the same seeds: the interval is that of a paired difference. Every
training is a task of the workdir, and so is the record of the decisions, rounds/001/search/result.json.
"""

import functools
import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from ddo_jax import files, preemption, sharding
from ddo_jax.core import search
from ddo_jax.evaluate.records import Evaluation
from ddo_jax.run import jobs, loop, state, step
from ddo_jax.run.candidates import all_diverged, divide, lost, trained
from ddo_jax.run.prepare import Setup
from ddo_jax.run.scoring import evaluations

PROBE = 20  # steps after the warm-up; a third of the round at most
MOVES = 0.2  # share of the latest step in the probe's running spread
MOST = 7  # values of beta in one round
GO_ON = (2, 1)  # candidates at most, after the first evaluation and after the later ones
SATURATED = 8.0  # mean beta |r|: the sigmoid is flat, and the gradient that of a linear loss


class Candidate(NamedTuple):
    """A value of beta and its phase."""

    beta: float
    phase: loop.Phase

    @property
    def name(self) -> str:
        return self.phase.directory.name


def auto(setup: Setup, index: int, make: Callable[..., loop.Phase]) -> list[tuple[str, Evaluation]]:
    """A round's search: (name, evaluation) of every evaluation of all candidates.

    Args:
      index: of the round, from 0. make: (alpha, beta) -> the phase of a candidate; with a name, of another one.

    Raises:
      UserError: every candidate failed.
    """
    alpha, given = float(setup.config.ddo.alpha[0]), setup.config.ddo
    if len(given.alpha) * len(given.beta) > 1:
        told = f"alpha {given.alpha}, beta {given.beta}"
        setup.console.line(f"search: auto wins over the grid of {told}: alpha is {alpha:g}, beta is found")
    most = limit(setup, alpha)
    center, origin = start(setup, index, make, alpha, most)

    def candidate(beta: float) -> Candidate:
        return Candidate(beta, make((alpha, beta)))

    tried = [candidate(beta) for beta in search.around(center) if beta < most]
    one = tried[0].phase
    stops = search.stops(one.steps, one.eval_every, warmup_steps(one))
    scores = heat(setup, tried, stops[0])
    while len(tried) < MOST and (beta := search.beyond({c.beta: scores[c.name] for c in tried})) is not None:
        if beta >= most:
            break
        tried.append(candidate(beta))
        scores |= heat(setup, tried[-1:], stops[0])
    alive, halvings = tried, []
    for until, after in itertools.pairwise([*stops, None]):
        verdicts = search.judge({c.name: scores[c.name] for c in alive}, GO_ON[min(len(halvings), 1)])
        if not any(v.goes_on for v in verdicts.values()):
            raise all_diverged(alive[0].phase)
        told = {name: v._asdict() for name, v in verdicts.items()}
        halvings.append({"step": until, "scores": {name: scores[name].score for name in told}, "verdicts": told})
        say(setup, index, until, verdicts, scores)
        if after is None:
            break
        alive = [c for c in alive if verdicts[c.name].goes_on]
        scores = heat(setup, alive, after)
    found = finish(setup, tried, stops)
    record = {"alpha": alpha, "center": center, "origin": origin, "images": judged_images(found), "halvings": halvings}
    record |= {"tried": {c.name: c.beta for c in tried}, "best": best_beta(tried, found)}
    divide(setup, [jobs.Task(tried[0].phase.directory.parent / "search", lambda: record)])
    return found


def judged_images(found: list[tuple[str, Evaluation]]) -> int:
    """Images of one evaluation."""
    return found[0][1].protocol.n_samples


def best_beta(tried: list[Candidate], found: list[tuple[str, Evaluation]]) -> float:
    name, _ = loop.best_of(found, key=lambda pair: pair[1])
    return next(c.beta for c in tried if c.name == name)


def limit(setup: Setup, alpha: float) -> float:
    """What beta must stay below for this alpha to move anything at all; said where it binds."""
    exact = setup.family.spec.exact and not setup.config.ddo.reencode
    if not exact:
        return math.inf
    most = search.largest_beta(alpha)
    if most:
        setup.console.line(
            f"search: likelihoods and fakes are exact (ddo.reencode=False): beta below 2 (alpha - 1) / (alpha + 1) = "
            f"{most:.3g}, above it nothing moves"
        )
        return most
    setup.console.line(
        f"search: likelihoods and fakes are exact (ddo.reencode=False): with ddo.alpha {alpha:g} nothing moves but by "
        "chance; set it above 1"
    )
    return math.inf


# -- where to look ----------------------------------------------------------------------------------------


def start(setup: Setup, index: int, make, alpha: float, most: float) -> tuple[float, str]:
    """(beta to look around, where it comes from)."""
    rounds = setup.workdir / "rounds"
    before = jobs.result_of(rounds / f"{index:03d}" / "search") if index else None
    if before is not None:
        return before["best"], f"best of round {index}"
    directory = rounds / f"{index + 1:03d}" / "probe"
    (found,) = divide(setup, [jobs.Task(directory, lambda: probe(setup, make((alpha, alpha), "probe"), alpha))])
    if found["beta"] is None:
        beta = float(setup.config.ddo.beta[0])
        setup.console.line(f"search: the probe diverged at step {found['length']}; around config.ddo.beta {beta:g}")
        return min(beta, most / 4), "config.ddo.beta: the probe diverged"
    grown = f"after {found['length']} steps std(r) is {found['std']:.3g} nats"
    setup.console.line(f"search: {grown}: around beta {found['beta']:g}")
    return min(found["beta"], most / 4), "probe"


def probe(setup: Setup, phase: loop.Phase, alpha: float) -> dict:
    """A short run whose beta follows the spread of r (`core.search.balanced_beta`); its parameters are not kept."""
    steps = max(1, min(phase.steps // 3, warmup_steps(phase) + PROBE))
    advance = setup.programs.step_for(phase.objective, phase.section, phase.warmup, phase.steps)
    current = sharding.place(setup.mesh, state.new_state(phase.start(), phase.config))
    key, data = loop.step_key(phase, setup), loop.feed(phase, setup, 0)
    zero = sharding.replicate(setup.mesh, step.zero_totals(setup.family, phase.objective))
    spread, history = 0.0, []
    for k in range(steps):
        real, fake, s_ref = next(data)
        beta = search.balanced_beta(spread, alpha)
        given = phase.hyper._replace(beta=beta)
        ref = phase.partners.ref if s_ref is None else None
        inputs = step.Inputs(setup.frozen, real, fake, key, given, ref, s_ref)
        current, totals = advance(current, jax.tree.map(lambda x: x.copy(), zero), inputs)
        jobs.progress()
        preemption.check()
        latest = spread_of(totals)
        if not math.isfinite(latest):
            return {"beta": None, "length": k + 1, "history": history}
        spread = latest if k == 0 else (1 - MOVES) * spread + MOVES * latest
        history.append([round(spread, 4), search.rounded(beta)])
    found = search.rounded(search.balanced_beta(spread, alpha))
    return {"beta": found, "std": spread, "length": steps, "history": history}


def warmup_steps(phase: loop.Phase) -> int:
    return math.ceil(phase.warmup / phase.config.batch)


def spread_of(totals) -> float:
    """std(r) about the means of real and of fake examples, nats, of one step's statistics."""
    sides = [jax.device_get(totals[side]) for side in ("r_real", "r_fake")]
    variances = [squares / n - (total / n) ** 2 for total, squares, n in sides]
    return math.sqrt(max(sum(map(float, variances)) / 2, 0.0)) if np.isfinite(variances).all() else math.nan


# -- heats ------------------------------------------------------------------------------------------------


def heat(setup: Setup, candidates: list[Candidate], until: int) -> dict[str, search.Scored]:
    """Train candidates on to a step, with other jobs; their scores there, not a number of those that failed."""
    phases = [c.phase for c in candidates]
    tasks = [jobs.Task(p.directory / f"until-{until:08d}", dict) for p in phases]
    results = trained(setup, phases, tasks, until)
    for c in candidates:
        logged = [line for line in files.read_jsonl(c.phase.directory / "metrics.jsonl") if "ddo/saturation" in line]
        if logged and (found := logged[-1]["ddo/saturation"]) > SATURATED:
            setup.console.line(f"{c.phase.name}: mean beta |r| is {found:.1f} at step {until}: the loss is saturated")
    return {c.name: scored(setup, c.name, result, until) for c, result in zip(candidates, results, strict=True)}


def scored(setup: Setup, name: str, result: dict, until: int) -> search.Scored:
    """The evaluation of a candidate at a step."""
    last = [e for e in evaluations(result) if e.step == until]
    if "failed" in result or not last:
        return search.Scored(math.nan)
    return search.Scored(last[0].score, last[0].influence)


def say(setup: Setup, index: int, until: int, verdicts: dict[str, search.Verdict], scores: dict) -> None:
    """A line for those that stop."""
    for name, v in verdicts.items():
        if not v.goes_on:
            within = "" if v.within is None else f" ± {v.within:.2f}"
            text = v.why if math.isnan(v.behind) else f"{v.behind:.2f}{within} behind ({v.why})"
            setup.console.line(f"rounds/{index + 1:03d}/{name} stops at step {until}: {text}")


def finish(setup: Setup, tried: list[Candidate], stops: list[int]) -> list[tuple[str, Evaluation]]:
    """Every candidate's result.json, from the last of its heats; a best checkpoint that is lost is trained again."""

    def last(c: Candidate) -> dict:
        found = [jobs.result_of(c.phase.directory / f"until-{until:08d}") for until in stops]
        return [result for result in found if result is not None][-1]

    def make(c: Candidate) -> dict:
        result = last(c)
        if "failed" in result or not lost(c.phase.directory, result):
            return result
        return loop.train(c.phase, setup, result["steps"])

    tasks = [
        jobs.Task(c.phase.directory, functools.partial(make, c), functools.partial(lost, c.phase.directory))
        for c in tried
    ]
    results = divide(setup, tasks)
    return [(c.name, e) for c, result in zip(tried, results, strict=True) for e in evaluations(result)]
