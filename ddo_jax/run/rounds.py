"""Self-play: pretraining, rounds of DDO, the control. Reads like the figure of a run in the README.

round n:  ref = best EMA parameters of round n-1
          fakes = pool sampled from ref once
          every (alpha, beta): params = ref, fresh optimizer, fresh EMA; keep the best checkpoint
          (method neon: MLE on the fakes alone, then steps away from what that gives)
          best of the round = lowest score over candidates and steps; not better than ref: keep ref
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable

import jax
import numpy as np
from etils import epath

from ddo_jax import config as configs
from ddo_jax import files, sharding
from ddo_jax.data import pool as pools
from ddo_jax.data.pipeline import batches
from ddo_jax.evaluate.records import Evaluation, Round, read_round
from ddo_jax.run import fakes, jobs, lines, loop, reference_scores, search, signal, state
from ddo_jax.run.candidates import candidate_name, candidates, divide, hyper, lost, phase, sigma_law
from ddo_jax.run.prepare import Setup, abstract_params
from ddo_jax.run.scoring import evaluation
from ddo_jax.store.checkpoint import restore_ema


@dataclasses.dataclass(frozen=True)
class Best:
    """The best evaluation of several candidates, and whose it is."""

    candidate: str
    evaluation: Evaluation


def anchors(family, mesh, ref: Callable) -> tuple[Callable, Callable]:
    """What makes (the start of the target, the reference) of a round from the best parameters of the last one.

    The step projects the target before every forward pass. The reference must be projected alike, or r is a constant
    below 0 at the start (specs/edm2.md section 8); after two projections a further one changes nothing, and the
    reference is the very projection of the start: r is 0 at step 0.
    """

    @jax.jit
    def project(params):
        rule = sharding.tree_sharding(mesh, params)
        return jax.lax.with_sharding_constraint(family.project(params, "ddo"), rule)

    def start():
        return project(project(ref()))

    return start, lambda: project(start())


# -- the start --------------------------------------------------------------------------------------------


def begin(setup: Setup) -> sharding.Parked:
    """What the rounds start from: trained from scratch, or given, and then adapted if the config says so."""
    if setup.init is not None:
        return trained(setup, "adapt", setup.init) if configs.is_set(setup.config.adapt.length) else setup.init
    return trained(setup, "pretrain", lambda: jax.jit(setup.family.init)(state.derive(setup.config.seed, "init"))[0])


def trained(setup: Setup, section: str, start: Callable) -> sharding.Parked:
    """MLE of a section of the config; the EMA parameters at its end."""
    directory = setup.workdir / section

    def run():
        return loop.train(phase(setup, section, section, start, seed=setup.config.seed), setup)

    (result,) = divide(setup, [jobs.Task(directory, run)])
    return sharding.Parked(restore_ema(directory / "checkpoints", result["steps"], abstract_params(setup)))


# -- one round --------------------------------------------------------------------------------------------


def play_round(setup: Setup, index: int, ref: sharding.Parked) -> tuple[sharding.Parked, Round]:
    """One round from the reference `ref`; (its best parameters, `Round`)."""
    name = f"rounds/{index + 1:03d}"
    directory = setup.workdir / name
    found = read_best(directory)
    if not sharding.agree(found is not None):
        found = _compete(setup, name, index, ref)
        if jax.process_index() == 0:
            files.write_sealed(directory / "best.json", found.record())
        sharding.agree(True)  # the other hosts wait until it is there
    if setup.config.keep == "best":
        divide(setup, [jobs.Task(directory / "tidy", lambda: tidy(directory, found))])
    if found.improved:
        checkpoints = directory / found.candidate / "checkpoints"
        ref = sharding.Parked(restore_ema(checkpoints, found.best.step, abstract_params(setup)))
    return ref, found


def read_best(directory: epath.Path) -> Round | None:
    """The summary of a finished round; None if there is none, or it is damaged: the results of its tasks are there."""
    try:
        found = files.read_sealed(directory / "best.json")
        return None if found is None else read_round(found)
    except (files.Damaged, ValueError, KeyError) as e:
        text = str(e) if isinstance(e, files.Damaged) else f"{directory / 'best.json'}: no summary of a round"
        jobs.say(f"{text}: made again from the candidates' results")
        return None


def _compete(setup: Setup, name: str, index: int, ref: sharding.Parked) -> Round:
    """Fakes, the reference's own score, all candidates, the points of a line; the round's summary."""
    config, directory = setup.config, setup.workdir / name

    def score_start():
        return setup.scorer(ref(), (name, 0, 0), "select", index)[0].record()

    tasks = [jobs.Task(directory / "start", score_start)]
    pooled = configs.samples_fakes(config) and config.ddo.pool > 0
    if pooled:
        tasks += [fakes.pool_task(setup, directory, ref, index)]
    start, *_ = divide(setup, tasks)

    @functools.cache  # opened by a job that has a candidate to train, not by one that finds all of them done
    def pool():
        return pools.open_pool(directory / "pool")

    def samples(number: int = RATIOS):
        return pool() if pooled else fakes.some_fakes(setup, ref, index, number)

    first, reference = anchors(setup.family, setup.mesh, ref)
    anchor = reference()
    law = sigma_law(config.ddo, index + 1)
    if config.log.signal:
        divide(setup, [signal_task(setup, name, anchor, samples, law)])
    method = configs.method_of(config)
    play = self_trained if method == "neon" else grid
    found = play(setup, name, index, (ref, first, anchor), pool, law)
    best = Best(*loop.best_of(found, key=lambda pair: pair[1]))

    def measure():
        return ratios(setup, directory, best, (anchor, samples(), law))

    divide(setup, [jobs.Task(directory / "ratios", measure)])
    before, after = evaluation(start).score, best.evaluation.score
    improved = before is None or after < before
    which = f"{best.candidate}, step {best.evaluation.step}"
    text = f"{which}; nothing is scored: its last checkpoint is taken"
    if before is not None:
        text = f"{best.evaluation.metric} {before:.3f} -> {after:.3f} ({which})"
    setup.console.line(f"{name}: {text}{'' if improved else '; not better: the reference is kept'}")
    return Round(index + 1, improved, before, best.candidate, best.evaluation)


def grid(setup: Setup, name: str, index: int, params, pool, law) -> list[tuple[str, Evaluation]]:
    """Every (alpha, beta) trained from the reference, or those that a search asks for, then the line through the best:
    all evaluations, and whose.

    Args:
      params: (the last round's best, what makes the target's start, the reference). pool: opens the fakes.
      law: of noise levels.
    """
    config, (ref, first, anchor) = setup.config, params
    method, cells = configs.method_of(config), list(itertools.product(config.ddo.alpha, config.ddo.beta))
    searching = config.ddo.search == "auto"
    shared = partners(setup, anchor, index, pool, searching or len(cells) > 1) if method != "mle" else None

    def make(cell: tuple[float, float], called: str = "") -> loop.Phase:
        return phase(
            setup,
            "ddo",
            f"{name}/{called or candidate_name(*cell, method)}",
            first,
            objective=method,
            hyper=hyper(config.ddo, grid=cell, law=law),
            seed=config.seed + 1000 * (index + 1),
            select=index,
            partners=shared,
        )

    found = search.auto(setup, index, make) if searching else candidates(setup, [make(cell) for cell in cells])
    if not config.ddo.line:
        return found
    best = Best(*loop.best_of(found, key=lambda pair: pair[1]))
    trained = (best.candidate, best.evaluation.step, best.evaluation.images)
    return found + lines.points(setup, name, index, ref, trained, config.ddo.line)


def self_trained(setup: Setup, name: str, index: int, params, pool, law) -> list[tuple[str, Evaluation]]:
    """Neon: MLE on the fakes alone, which is not scored, then steps away from it (specs/ddo.md section 8)."""
    config, (ref, first, _) = setup.config, params
    fitted = phase(
        setup,
        "ddo",
        f"{name}/neon",
        first,
        hyper=hyper(config.ddo, law=law),
        seed=config.seed + 1000 * (index + 1),
        eval_every=None,
        source=pool,
    )
    directory, steps = fitted.directory, fitted.steps
    of_it = [directory.parent / lines.called(-w) for w in config.neon.w]

    def problem(result):
        return "" if all(jobs.result_of(d) for d in of_it) else lost(directory, result)

    divide(setup, [jobs.Task(directory, lambda: loop.train(fitted, setup), problem)])
    trained = ("neon", steps, steps * config.ddo.batch)
    return lines.points(setup, name, index, ref, trained, [-w for w in config.neon.w])


def signal_task(setup: Setup, name: str, ref, samples, law) -> jobs.Task:
    """What the first gradients of a round are, beside their noise (see `signal`)."""
    number = setup.config.log.signal * setup.config.ddo.batch // setup.config.ddo.accumulation
    return jobs.Task(setup.workdir / name / "signal", lambda: signal.measure(setup, name, ref, samples(number), law))


def partners(setup: Setup, ref, index: int, pool, keep: bool) -> loop.Partners:
    """What a phase needs beside data in round `index`; keep: there are several candidates."""
    config = setup.config
    steps = configs.steps(config.ddo.length, config.ddo.batch, len(setup.data), "ddo.length")
    number = configs.fakes_of_a_step(config.ddo)
    if configs.method_of(config) == "cca":
        made = fakes.wrong_labels
    elif config.ddo.pool:
        made = fakes.from_pool(setup.mesh, pool, number, config.seed + 1000 * (index + 1) + 1)
    else:
        sample = functools.partial(setup.programs.fakes, ref, setup.frozen)
        made = fakes.online(setup.mesh, sample, number, steps, index, keep)
    if setup.programs.asks is None:
        return loop.Partners(ref, made)
    fake = reference_scores.Kept(config.ddo.pool or steps * number)
    return loop.Partners(ref, made, {"real": reference_scores.Kept(len(setup.training_data)), "fake": fake})


RATIOS = 1024  # log-ratios of each kind in the report's histogram


def ratios(setup: Setup, directory: epath.Path, best: Best, against, num: int = RATIOS) -> dict:
    """Log-ratios of real and fake images under the round's best parameters, for the report's histogram.

    Args:
      against: (the reference's parameters, the source of fakes, (P_mean, P_std)) of the round.
    """
    ref, samples, law = against
    config, step_ = setup.config, best.evaluation.step
    params = restore_ema(directory / best.candidate / "checkpoints", step_, abstract_params(setup))
    found, batch = {}, config.ddo.batch // config.ddo.accumulation
    for name, source in (("real", setup.training_data), ("fake", samples)):
        reader = batches(source, batch, config.seed, host=(jax.process_index(), jax.process_count()))
        keys = jax.random.split(state.derive(config.seed, "ratios"), -(-num // batch))
        records = (sharding.put_batch(setup.mesh, next(reader)) for _ in keys)
        measure = functools.partial(setup.programs.ratio, params, ref, setup.frozen)
        parts = [measure(r, key, law) for r, key in zip(records, keys, strict=True)]
        found[name] = np.concatenate([sharding.to_host(r) for r in parts])[:num].tolist()
    return {"candidate": best.candidate, "step": step_, **found}


def tidy(directory: epath.Path, found: Round) -> dict:
    """Delete the pool and all checkpoints of a finished round but its best; snapshots of averages stay."""
    removed = []
    if jax.process_index() == 0:
        kept = directory / found.candidate / "checkpoints" / str(found.best.step) if found.improved else None
        for candidate in (d for d in directory.iterdir() if (d / "checkpoints").exists()):
            removed += [d for d in (candidate / "checkpoints").iterdir() if d != kept]
        removed += files.matching(directory / "pool", "chunk-*.npz")
        for path in removed:
            path.rmtree() if path.is_dir() else path.unlink()
    return {"removed": len(removed)}


# -- the control ------------------------------------------------------------------------------------------


def control(setup: Setup, start: sharding.Parked):
    """Continued MLE from the same start: (best parameters over learning rates and steps, `Best`)."""
    config = setup.config
    ddo_steps = configs.steps(config.ddo.length, config.ddo.batch, len(setup.data), "ddo.length")
    steps = config.control.factor * config.ddo.rounds * ddo_steps
    found = candidates(
        setup,
        [
            phase(
                setup,
                "control",
                f"control/lr{lr:g}",
                start,
                steps=steps,
                hyper=hyper(config.control, lr=lr),
                seed=config.seed + 500,
            )
            for lr in config.control.lrs
        ],
    )
    best = Best(*loop.best_of(found, key=lambda pair: pair[1]))
    directory = setup.workdir / "control" / best.candidate / "checkpoints"
    return sharding.Parked(restore_ema(directory, best.evaluation.step, abstract_params(setup))), best
