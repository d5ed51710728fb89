"""What a round, its search and the control are made of: phases with their hyper-parameters, trained as tasks."""

import functools
from collections.abc import Callable

from etils import epath

from ddo_jax import config as configs
from ddo_jax import files
from ddo_jax.errors import UserError
from ddo_jax.evaluate.records import Evaluation
from ddo_jax.run import jobs, loop, step
from ddo_jax.run.prepare import Setup
from ddo_jax.run.scoring import evaluations
from ddo_jax.store.checkpoint import read_meta


def phase(setup: Setup, section: str, name: str, start: Callable, **given) -> loop.Phase:
    """A phase of the config's section ("pretrain", "ddo", "control"), by default of MLE as the section says.

    Args:
      name: relative directory. start: makes its parameters. given: fields of `loop.Phase` that differ.
    """
    c, examples = setup.config[section], len(setup.data)

    def steps(key):
        return configs.steps(c[key], c.batch, examples, f"{section}.{key}")

    fields = dict(
        objective="mle",
        hyper=hyper(c),
        steps=given.get("steps") or steps("length"),
        warmup=(steps("warmup") or 0) * c.batch,
        eval_every=steps("eval_every"),
        save_every=steps("save_every"),
    )
    return loop.Phase(name, setup.workdir / name, section, c, start=start, **fields | given)


def hyper(c, *, grid=(1.0, 1.0), lr: float | None = None, law=None) -> step.Hyper:
    """The traced numbers of a phase. grid: (alpha, beta); lr, law: in place of the section's."""
    return step.Hyper(*map(float, (*grid, c.lr if lr is None else lr)), law or sigma_law(c))


def sigma_law(c, number: int = 0) -> tuple[float, float]:
    """(P_mean, P_std) of a phase; of round `number` (from 1 on) where the config changes P_std between rounds."""
    later = [p_std for first, p_std in c.get("p_std_from", ()) if number >= first]
    return float(c.p_mean), float(later[-1] if later else c.p_std)


def divide(setup: Setup, tasks: list[jobs.Task], group: jobs.Group | None = None) -> list[dict]:
    """Do the tasks, together with other jobs on the same workdir."""
    config = setup.config
    return jobs.divide(tasks, config.lease_s, waiting=setup.console.status, stall_s=config.stall_s, group=group)


def candidate_name(alpha: float, beta: float, objective: str = "ddo") -> str:
    """
    >>> candidate_name(4.0, 0.05), candidate_name(50.0, 0.02, "cca"), candidate_name(4.0, 0.05, "mle")
    ('a4_b0.05', 'cca_a50_b0.02', 'mle')
    """
    if objective == "mle":
        return objective
    return f"{'' if objective == 'ddo' else f'{objective}_'}a{alpha:g}_b{beta:g}"


def trained(setup: Setup, phases: list[loop.Phase], tasks: list[jobs.Task], until: int | None = None) -> list[dict]:
    """Train candidates, as many side by side as config.ddo.together says; who diverges is left behind, and it is said.

    Args:
      tasks: of the phases, in their order; what each is claimed by, their `run` is not used. until: a step.
    """
    phase_of = {task.directory: p for task, p in zip(tasks, phases, strict=True)}

    def run(group: list[jobs.Task]) -> list[dict]:
        results = loop.train_together([phase_of[task.directory] for task in group], setup, until)
        for result in results:
            if "failed" in result:
                setup.console.line(f"{result['failed']}; the other candidates go on")
        return results

    return divide(setup, tasks, jobs.Group(setup.config.ddo.together, run))


def candidates(setup: Setup, phases: list[loop.Phase]) -> list[tuple[str, Evaluation]]:
    """Train all candidates to their end; (name, evaluation) of every evaluation of all.

    Raises:
      UserError: no candidate was evaluated.
    """

    def task(p: loop.Phase) -> jobs.Task:
        return jobs.Task(p.directory, lambda: loop.train(p, setup), functools.partial(lost, p.directory))

    tasks = [task(p) for p in phases]
    results = divide(setup, tasks) if len(phases) == 1 else trained(setup, phases, tasks)
    found = [(p.directory.name, e) for p, r in zip(phases, results, strict=True) for e in evaluations(r)]
    if loop.best_of([e for _, e in found]) is None:
        raise all_diverged(phases[0])
    return found


def all_diverged(phase: loop.Phase) -> UserError:
    return UserError(f"{phase.name} and all other candidates diverged; lower lr or beta in a new workdir")


def lost(directory: epath.Path, result: dict) -> str:
    """Which checkpoint of a finished candidate is gone or damaged, in words; "" if its best is there.

    Of one that was not scored (Neon's), its last one is meant.
    """
    best = result.get("best")
    step = best["step"] if best else result["steps"] if not result.get("failed") else None
    if step is None or jobs.result_of(directory.parent / "tidy"):  # of a decided round losers were deleted
        return ""
    try:
        read_meta(directory / "checkpoints", step)
    except files.Damaged as e:
        return str(e)
    return ""
