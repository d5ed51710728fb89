"""The line search of a round: points on the line from its reference through what was trained, each of them scored.

    ref + w (theta - ref)        method neon: theta was trained on the fakes alone, and w is -neon.w

Every point is a task like a candidate: claimed, resumed, its parameters kept as a checkpoint.
"""

import functools

import jax
from etils import epath

from ddo_jax import sharding
from ddo_jax.core import line
from ddo_jax.run import jobs
from ddo_jax.run.candidates import divide, lost
from ddo_jax.run.prepare import Setup, abstract_params
from ddo_jax.run.scoring import evaluations
from ddo_jax.store.checkpoint import keep_ema, restore_ema


def called(w: float) -> str:
    """Directory of a point.

    >>> called(0.5), called(-1.0)
    ('w0.5', 'w-1')
    """
    return f"w{w:g}"


def merger(setup: Setup, shapes):
    """Jitted (ref, theta, w) -> the point at w, projected, as its ends are (of EDM2, where a length of weights means
    nothing)."""

    def at(ref, theta, w):
        ends = (setup.family.project(params, "ddo") for params in (ref, theta))
        return setup.family.project(line.along(*ends, w), "ddo")

    return jax.jit(at, out_shardings=sharding.tree_sharding(setup.mesh, shapes))


def points(setup: Setup, name: str, index: int, ref: sharding.Parked, trained: tuple[str, int, int], weights) -> list:
    """(name, evaluation) of points of a line, each a task.

    Args:
      name: of the round, "rounds/001"; index: from 0. ref: its reference.
      trained: (candidate, step, images) of the checkpoint that the line goes through. weights: of the points.
    """
    directory = setup.workdir / name
    candidate, step, images = trained
    shapes = abstract_params(setup)
    merge = merger(setup, shapes)

    @functools.cache  # restored by a job that has a point to score, once
    def theta():
        return restore_ema(directory / candidate / "checkpoints", step, shapes)

    def score(w: float, own: epath.Path) -> dict:
        params = merge(ref(), theta(), w)
        found, _ = setup.scorer(params, (f"{name}/{called(w)}", step, images), "select", index)
        record = found.record()
        keep_ema(own / "checkpoints", step, params, {"step": step, "evals": [record]}, found.score)
        return {"w": w, "through": candidate, "evals": [record], "best": record}

    def task(w: float) -> jobs.Task:
        own = directory / called(w)
        return jobs.Task(own, lambda: score(w, own), functools.partial(lost, own))

    tasks = [task(float(w)) for w in weights]
    results = divide(setup, tasks)
    return [(t.directory.name, e) for t, result in zip(tasks, results, strict=True) for e in evaluations(result)]
