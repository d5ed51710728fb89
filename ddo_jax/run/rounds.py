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

import jax
import numpy as np
from etils import epath

from ddo_jax import config as configs
from ddo_jax import files, sharding
from ddo_jax.data import pool as pools
from ddo_jax.data import sources
from ddo_jax.data.labels import balanced_labels, present_classes
from ddo_jax.data.pipeline import batches
from ddo_jax.errors import UserError
from ddo_jax.evaluate.records import Evaluation, Round, read_round
from ddo_jax.generate.seeds import seed_range
from ddo_jax.run import fakes, jobs, lines, loop, record, reference_scores, signal, state, step
from ddo_jax.run.prepare import Setup
from ddo_jax.run.scoring import evaluation, evaluations
from ddo_jax.store import classes
from ddo_jax.store.checkpoint import read_meta, restore_ema


@dataclasses.dataclass(frozen=True)
class Best:
    """The best evaluation of several candidates, and whose it is."""

    candidate: str
    evaluation: Evaluation


def phase(setup: Setup, section: str, name: str, start, **given) -> loop.Phase:
    """A phase of the config's section ("pretrain", "ddo", "control"), by default of MLE as the section says.

    Args:
      name: relative directory. start: parameters. given: fields of `loop.Phase` that differ.
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


def anchors(family, mesh, params):
    """(start of the target, reference) of a round from the best parameters of the last one, both projected.

    The step projects the target before every forward pass. The reference must be projected alike, or r is a constant
    below 0 at the start (specs/edm2.md section 8); after two projections a further one changes nothing, and the
    reference is the very projection of the start: r is 0 at step 0.
    """

    def both(params):
        start = family.project(family.project(params, "ddo"), "ddo")
        return start, family.project(start, "ddo")

    rule = sharding.tree_sharding(mesh, params)
    return jax.jit(both, out_shardings=(rule, rule))(params)


def divide(setup: Setup, tasks: list[jobs.Task]) -> list[dict]:
    """Do the tasks, together with other jobs on the same workdir."""
    config = setup.config
    return jobs.divide(tasks, config.lease_s, waiting=setup.console.status, stall_s=config.stall_s)


def abstract_params(setup: Setup):
    shapes = jax.eval_shape(setup.family.init, jax.random.key(0))[0]
    return sharding.abstract(setup.mesh, shapes)


# -- the start --------------------------------------------------------------------------------------------


def begin(setup: Setup):
    """What the rounds start from: trained from scratch, or given, and then adapted if the config says so."""
    if setup.init is None:
        return trained(setup, "pretrain", jax.jit(setup.family.init)(state.derive(setup.config.seed, "init"))[0])
    return trained(setup, "adapt", setup.init) if configs.is_set(setup.config.adapt.length) else setup.init


def trained(setup: Setup, section: str, start):
    """MLE of a section of the config; the EMA parameters at its end."""
    directory = setup.workdir / section

    def run():
        return loop.train(phase(setup, section, section, start, seed=setup.config.seed), setup)

    (result,) = divide(setup, [jobs.Task(directory, run)])
    return restore_ema(directory / "checkpoints", result["steps"], abstract_params(setup))


# -- one round --------------------------------------------------------------------------------------------


def make_pool(setup: Setup, directory: epath.Path, ref, index: int) -> dict:
    """Sample the fakes of a round chunk by chunk; whole chunks of an interrupted pool are kept."""
    family, config = setup.family, setup.config
    seeds = seed_range("pool", index, config.ddo.pool)
    labels, rule = classes.pool_labels(config, family, setup.data, len(seeds))
    size = config.eval.batch
    rows = [slice(i, i + size) for i in range(0, len(seeds), size)]
    recorded = pool_digests(directory, len(rows))
    digests = [pools.kept_digest(pools.chunk_path(directory, i), recorded[i], seeds[r]) for i, r in enumerate(rows)]
    missing = [i for i in range(len(rows)) if not sharding.agree(digests[i] is not None)]
    progress = record.Progress(f"rounds/{index + 1:03d}/pool", len(rows) - len(missing), len(rows))
    for done, i in enumerate(missing, len(rows) - len(missing) + 1):
        (chunk,) = setup.programs.fakes(ref, setup.frozen, seeds[rows[i]], labels[rows[i]])
        digests[i] = pools.digest(chunk["image"], chunk["label"])
        if recorded[i] not in (None, digests[i]):
            raise UserError(
                f"{pools.chunk_path(directory, i)}: lost or damaged, and made again on this device it is another one; "
                f"put back a copy of it, or move {directory.parent} aside: the round is then played anew"
            )
        if jax.process_index() == 0:
            pools.write_chunk(directory, i, chunk["image"], chunk["label"], seeds[rows[i]])
        setup.console.status(progress.text(done), done=done == len(rows))
    return {
        "chunks": len(rows),
        "digests": digests,
        "num_classes": family.spec.num_classes,
        "num": len(seeds),
        "seeds": [int(seeds[0]), int(seeds[-1])],
        "labels": rule,
        "sampler": family.fake_settings(family.settings(config.sampler)).record(),
    }


def pool_task(setup: Setup, directory: epath.Path, ref, index: int) -> jobs.Task:
    """The pool of a round; chunks that were lost since it was finished are made again."""
    target = directory / "pool"

    def problem(result):
        return "" if jobs.result_of(directory / "tidy") else pools.problem(target, result)

    return jobs.Task(target, lambda: make_pool(setup, target, ref, index), problem)


def pool_digests(directory: epath.Path, number: int) -> list[str | None]:
    """Those of a pool that was finished and then lost chunks; else `number` times None."""
    try:
        found = (files.read_sealed(directory / pools.MARKER) or {}).get("digests")
    except files.Damaged:
        found = None
    return found if isinstance(found, list) and len(found) == number else [None] * number


def candidate_name(alpha: float, beta: float, objective: str = "ddo") -> str:
    """
    >>> candidate_name(4.0, 0.05), candidate_name(50.0, 0.02, "cca"), candidate_name(4.0, 0.05, "mle")
    ('a4_b0.05', 'cca_a50_b0.02', 'mle')
    """
    if objective == "mle":
        return objective
    return f"{'' if objective == 'ddo' else f'{objective}_'}a{alpha:g}_b{beta:g}"


def play_round(setup: Setup, index: int, ref):
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
        ref = restore_ema(directory / found.candidate / "checkpoints", found.best.step, abstract_params(setup))
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


def _compete(setup: Setup, name: str, index: int, ref) -> Round:
    """Fakes, the reference's own score, all candidates, the points of a line; the round's summary."""
    config, directory = setup.config, setup.workdir / name

    def score_start():
        return setup.scorer(ref, (name, 0, 0), "select", index)[0].record()

    tasks = [jobs.Task(directory / "start", score_start)]
    pooled = configs.samples_fakes(config) and config.ddo.pool > 0
    if pooled:
        tasks += [pool_task(setup, directory, ref, index)]
    start, *_ = divide(setup, tasks)

    @functools.cache  # opened by a job that has a candidate to train, not by one that finds all of them done
    def pool():
        return pools.open_pool(directory / "pool")

    def samples(number: int = RATIOS):
        return pool() if pooled else some_fakes(setup, ref, index, number)

    anchor = anchors(setup.family, setup.mesh, ref)
    law = sigma_law(config.ddo, index + 1)
    if config.log.signal:
        divide(setup, [signal_task(setup, name, anchor[1], samples, law)])
    neon = configs.method_of(config) == "neon"
    found = (self_trained if neon else grid)(setup, name, index, (ref, *anchor), pool, law)
    best = Best(*loop.best_of(found, key=lambda pair: pair[1]))

    def measure():
        return ratios(setup, directory, best, (anchor[1], samples(), law))

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
    """Every (alpha, beta) trained from the reference, then the line through the best: all evaluations, and whose.

    Args:
      params: (the reference, and of `anchors`). pool: opens the fakes. law: of noise levels.
    """
    config, (ref, first, anchor) = setup.config, params
    method, cells = configs.method_of(config), list(itertools.product(config.ddo.alpha, config.ddo.beta))
    shared = partners(setup, anchor, index, pool, len(cells) > 1) if method != "mle" else None
    phases = [
        phase(
            setup,
            "ddo",
            f"{name}/{candidate_name(*cell, method)}",
            first,
            objective=method,
            hyper=hyper(config.ddo, grid=cell, law=law),
            seed=config.seed + 1000 * (index + 1),
            select=index,
            partners=shared,
        )
        for cell in cells
    ]
    found = candidates(setup, phases)
    if not config.ddo.line:
        return found
    best = Best(*loop.best_of(found, key=lambda pair: pair[1]))
    trained = (best.candidate, best.evaluation.step, best.evaluation.images)
    return found + points(setup, name, index, ref, trained, config.ddo.line)


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
        return "" if all(jobs.result_of(d) for d in of_it) else _lost(directory, result)

    divide(setup, [jobs.Task(directory, lambda: loop.train(fitted, setup), problem)])
    trained = ("neon", steps, steps * config.ddo.batch)
    return points(setup, name, index, ref, trained, [-w for w in config.neon.w])


def points(setup: Setup, name: str, index: int, ref, trained, weights) -> list[tuple[str, Evaluation]]:
    """Points of a line, scored (see `lines.tasks`)."""
    tasks = lines.tasks(setup, name, index, ref, trained, weights, _lost)
    return lines.found(tasks, divide(setup, tasks))


def signal_task(setup: Setup, name: str, ref, samples, law) -> jobs.Task:
    """What the first gradients of a round are, beside their noise (see `signal`)."""
    number = setup.config.log.signal * setup.config.ddo.batch // setup.config.ddo.accumulation
    return jobs.Task(setup.workdir / name / "signal", lambda: signal.measure(setup, name, ref, samples(number), law))


def partners(setup: Setup, ref, index: int, pool, keep: bool) -> loop.Partners:
    """What a phase needs beside data in round `index`; keep: there are several candidates."""
    config = setup.config
    steps = configs.steps(config.ddo.length, config.ddo.batch, len(setup.data), "ddo.length")
    if configs.method_of(config) == "cca":
        made = fakes.wrong_labels
    elif config.ddo.pool:
        made = fakes.from_pool(setup.mesh, pool, config.ddo.batch, config.seed + 1000 * (index + 1) + 1)
    else:
        sample = functools.partial(setup.programs.fakes, ref, setup.frozen)
        made = fakes.online(setup.mesh, sample, config.ddo.batch, steps, index, keep)
    if setup.programs.asks is None:
        return loop.Partners(ref, made)
    fake = reference_scores.Kept(config.ddo.pool or steps * config.ddo.batch)
    return loop.Partners(ref, made, {"real": reference_scores.Kept(len(setup.training_data)), "fake": fake})


def some_fakes(setup: Setup, ref, index: int, num: int):
    """The reference's own samples as a source, for rounds without a pool."""
    num_classes = setup.family.spec.num_classes
    seeds = seed_range("select", index, num)
    labels = balanced_labels(np.arange(num), num_classes, present_classes(setup.data.class_counts))
    parts = list(setup.programs.fakes(ref, setup.frozen, seeds, labels))
    images, labels = (np.concatenate([p[key] for p in parts]) for key in ("image", "label"))
    return sources.ArraySource("fakes", images, labels, num_classes)


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


def candidates(setup: Setup, phases: list[loop.Phase]) -> list[tuple[str, Evaluation]]:
    """Train all candidates; (name, evaluation) of every evaluation of all.

    One of several candidates may diverge: it is said, and the others go on.

    Raises:
      UserError: no candidate was evaluated.
    """

    def run(p):
        try:
            return loop.train(p, setup)
        except loop.Diverged as e:
            if len(phases) == 1:
                raise
            setup.console.line(f"{e}; the other candidates go on")
            return loop.result_of(p, e.evals) | {"failed": str(e)}

    tasks = [jobs.Task(p.directory, functools.partial(run, p), functools.partial(_lost, p.directory)) for p in phases]
    results = divide(setup, tasks)
    found = [(p.directory.name, e) for p, r in zip(phases, results, strict=True) for e in evaluations(r)]
    if loop.best_of([e for _, e in found]) is None:
        raise UserError(f"{phases[0].name} and all other candidates diverged; lower lr or beta in a new workdir")
    return found


def _lost(directory: epath.Path, result: dict) -> str:
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


def control(setup: Setup, start):
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
    return restore_ema(directory, best.evaluation.step, abstract_params(setup)), best
