"""Self-play: pretraining, rounds of DDO, the control. Reads like the figure of a run in the README.

round n:  ref = best EMA parameters of round n-1
          fakes = pool sampled from ref once
          every (alpha, beta): params = ref, fresh optimizer, fresh EMA; keep the best checkpoint
          best of the round = lowest score over candidates and steps; not better than ref: keep ref
"""

import functools
import itertools
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from ddo_jax import files, sharding
from ddo_jax.data import pool as pools
from ddo_jax.data import sources
from ddo_jax.data.labels import present_classes
from ddo_jax.data.pipeline import batches
from ddo_jax.errors import UserError
from ddo_jax.evaluate import score
from ddo_jax.run import asked, classes, fakes, loop, record, search, state, step
from ddo_jax.run import config as configs
from ddo_jax.run.checkpoint import read_meta, restore_ema


class Setup(NamedTuple):
    """A prepared run (`prepare.prepare`): what its phases share, the samplers of images and of fakes, the start if
    it is not scratch."""

    config: Any
    workdir: epath.Path
    tools: loop.Tools
    sampler: Any
    fakes: Any
    init: Any = None


def phase(
    setup: Setup,
    section: str,
    name: str,
    start,
    *,
    total=None,
    objective="mle",
    lr=None,
    grid=(1.0, 1.0),
    noise=None,
    **rest,
) -> loop.Phase:
    """A phase of the config's section ("pretrain", "ddo", "control"). grid: (alpha, beta); noise: (P_mean, P_std)."""
    c, examples = setup.config[section], len(setup.tools.data)

    def steps(key):
        return configs.steps(c[key], c.batch, examples, f"{section}.{key}")

    return loop.Phase(
        name=name,
        directory=setup.workdir / name,
        section=section,
        config=c,
        objective=objective,
        hyper=step.Hyper(*map(float, (*grid, c.lr if lr is None else lr)), noise or noise_levels(c)),
        total=steps("length") if total is None else total,
        warmup=(steps("warmup") or 0) * c.batch,
        eval_every=steps("eval_every"),
        save_every=steps("save_every"),
        start=start,
        **rest,
    )


def noise_levels(c, number: int = 0) -> tuple[float, float]:
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


def divide(setup: Setup, tasks: list[search.Task]) -> list[dict]:
    """Do the tasks, together with other jobs on the same workdir."""
    c = setup.config
    return search.divide(tasks, c.lease_s, waiting=setup.tools.console.status, stall_s=c.stall_s)


def abstract_params(setup: Setup):
    shapes = jax.eval_shape(setup.tools.family.init, jax.random.key(0))[0]
    return sharding.abstract(setup.tools.mesh, shapes)


# -- the start --------------------------------------------------------------------------------------------


def pretrain(setup: Setup):
    """MLE from scratch; the EMA parameters at its end."""
    tools, seed = setup.tools, setup.config.seed

    def run():
        params, _ = jax.jit(tools.family.init)(state.derive(seed, "init"))
        return loop.train(phase(setup, "pretrain", "pretrain", params, seed=seed), tools)

    directory = setup.workdir / "pretrain"
    (result,) = divide(setup, [search.Task(directory, run)])
    return restore_ema(directory / "checkpoints", result["steps"], abstract_params(setup))


# -- one round --------------------------------------------------------------------------------------------


def make_pool(setup: Setup, directory: epath.Path, ref, index: int) -> dict:
    """Sample the fakes of a round chunk by chunk; whole chunks of an interrupted pool are kept."""
    family, tools, c = setup.tools.family, setup.tools, setup.config
    seeds = score.seed_range("pool", index, c.ddo.pool)
    labels, rule = classes.pool_labels(c, family, tools.data, len(seeds))
    size = c.eval.batch
    rows = [slice(i, i + size) for i in range(0, len(seeds), size)]
    recorded = pool_digests(directory, len(rows))
    digests = [pools.kept_digest(pools.chunk_path(directory, i), recorded[i], seeds[r]) for i, r in enumerate(rows)]
    missing = [i for i in range(len(rows)) if not sharding.agree(digests[i] is not None)]
    progress = record.Progress(f"rounds/{index + 1:03d}/pool", len(rows) - len(missing), len(rows))
    for done, i in enumerate(missing, len(rows) - len(missing) + 1):
        (chunk,) = setup.fakes(ref, tools.frozen, seeds[rows[i]], labels[rows[i]])
        digests[i] = pools.digest(chunk["image"], chunk["label"])
        if recorded[i] not in (None, digests[i]):
            raise UserError(
                f"{pools.chunk_path(directory, i)}: lost or damaged, and made again on this device it is another one; "
                f"put back a copy of it, or move {directory.parent} aside: the round is then played anew"
            )
        if jax.process_index() == 0:
            pools.write_chunk(directory, i, chunk["image"], chunk["label"], seeds[rows[i]])
        tools.console.status(progress.text(done), done=done == len(rows))
    return {
        "chunks": len(rows),
        "digests": digests,
        "num_classes": family.num_classes,
        "num": len(seeds),
        "seeds": [int(seeds[0]), int(seeds[-1])],
        "labels": rule,
        "sampler": family.fake_settings(family.settings(c.sampler))._asdict(),
    }


def pool_task(setup: Setup, directory: epath.Path, ref, index: int) -> search.Task:
    """The pool of a round; chunks that were lost since it was finished are made again."""
    target = directory / "pool"

    def problem(result):
        return "" if search.result_of(directory / "tidy") else pools.problem(target, result)

    return search.Task(target, lambda: make_pool(setup, target, ref, index), problem)


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
    """One round from the reference `ref`; (its best parameters, its summary)."""
    name = f"rounds/{index + 1:03d}"
    directory = setup.workdir / name
    best = read_best(directory)
    if not sharding.agree(best is not None):
        best = _compete(setup, name, index, ref)
        if jax.process_index() == 0:
            files.write_sealed(directory / "best.json", best)
        sharding.agree(True)  # the other hosts wait until it is there
    if setup.config.keep == "best":
        divide(setup, [search.Task(directory / "tidy", lambda: tidy(directory, best))])
    if best["improved"]:
        ref = restore_ema(directory / best["candidate"] / "checkpoints", best["step"], abstract_params(setup))
    return ref, best


def read_best(directory: epath.Path) -> dict | None:
    """The summary of a finished round; None if there is none, or it is damaged: the results of its tasks are there."""
    try:
        return files.read_sealed(directory / "best.json")
    except files.Damaged as e:
        search.say(f"{e}: made again from the candidates' results")
        return None


def _compete(setup: Setup, name: str, index: int, ref) -> dict:
    """Fakes, the reference's own score, all candidates; the round's summary."""
    c, directory, tools = setup.config, setup.workdir / name, setup.tools
    tasks = [search.Task(directory / "start", lambda: tools.evaluate(ref, name, 0, "select", index)[0])]
    pooled = c.objective == "ddo" and c.ddo.pool > 0
    if pooled:
        tasks += [pool_task(setup, directory, ref, index)]
    start, *_ = divide(setup, tasks)

    first, anchor = anchors(tools.family, tools.mesh, ref)
    noise = noise_levels(c.ddo, index + 1)
    grid = list(itertools.product(c.ddo.alpha, c.ddo.beta))

    @functools.cache  # opened by a job that has a candidate to train, not by one that finds all of them done
    def pool():
        return pools.open_pool(directory / "pool")

    shared = partners(setup, anchor, index, pool, len(grid) > 1) if c.objective != "mle" else {}
    candidates = [
        phase(
            setup,
            "ddo",
            f"{name}/{candidate_name(alpha, beta, c.objective)}",
            first,
            objective=c.objective,
            grid=(alpha, beta),
            noise=noise,
            seed=c.seed + 1000 * (index + 1),
            select=index,
            **shared,
        )
        for alpha, beta in grid
    ]
    best = best_candidate(setup, candidates)

    def samples():
        return pool() if pooled else some_fakes(setup, ref, index, RATIOS)

    divide(setup, [search.Task(directory / "ratios", lambda: ratios(setup, directory, best, anchor, samples(), noise))])
    before, after = start[tools.metric], best[tools.metric]
    improved = after < before
    text = f"{tools.metric} {before:.3f} -> {after:.3f} ({best['candidate']}, step {best['step']})"
    tools.console.line(f"{name}: {text}{'' if improved else '; not better: the reference is kept'}")
    return {"round": index + 1, "improved": improved, "start": before, **best}


def partners(setup: Setup, ref, index: int, pool, keep: bool) -> dict:
    """What a phase needs beside data in round `index`: {"ref", "fakes", "kept"}; keep: there are several candidates."""
    c, tools = setup.config, setup.tools
    total = configs.steps(c.ddo.length, c.ddo.batch, len(tools.data), "ddo.length")
    if c.objective == "cca":
        made = fakes.wrong_labels
    elif c.ddo.pool:
        made = fakes.from_pool(tools.mesh, pool, c.ddo.batch, c.seed + 1000 * (index + 1) + 1)
    else:
        sample = functools.partial(setup.fakes, ref, tools.frozen)
        made = fakes.online(tools.mesh, sample, c.ddo.batch, total, index, keep)
    if tools.asks is None:
        return {"ref": ref, "fakes": made}
    kept = {"real": asked.Kept(len(tools.train)), "fake": asked.Kept(c.ddo.pool or total * c.ddo.batch)}
    return {"ref": ref, "fakes": made, "kept": kept}


def some_fakes(setup: Setup, ref, index: int, num: int):
    """The reference's own samples as a source, for rounds without a pool."""
    family = setup.tools.family
    seeds = score.seed_range("select", index, num)
    labels = score.balanced(seeds, family.num_classes, present_classes(setup.tools.data.class_counts))
    parts = list(setup.fakes(ref, setup.tools.frozen, seeds, labels))
    images, labels = (np.concatenate([p[key] for p in parts]) for key in ("image", "label"))
    return sources.ArraySource("fakes", images, labels, family.num_classes)


RATIOS = 1024  # log-ratios of each kind in the report's histogram


def ratios(setup: Setup, directory: epath.Path, best: dict, ref, samples, noise, num: int = RATIOS) -> dict:
    """Log-ratios of real and fake images under the round's best parameters, for the report's histogram."""
    tools, c = setup.tools, setup.config
    params = restore_ema(directory / best["candidate"] / "checkpoints", best["step"], abstract_params(setup))
    found, batch = {}, c.ddo.batch // c.ddo.accumulation
    for name, source in (("real", tools.train), ("fake", samples)):
        reader = batches(source, batch, c.seed, host=jax.process_index(), hosts=jax.process_count())
        keys = jax.random.split(state.derive(c.seed, "ratios"), -(-num // batch))
        records = (sharding.put_batch(tools.mesh, next(reader)) for _ in keys)
        parts = [tools.ratio(params, ref, tools.frozen, r, key, noise) for r, key in zip(records, keys, strict=True)]
        found[name] = np.concatenate([sharding.to_host(r) for r in parts])[:num].tolist()
    return {"candidate": best["candidate"], "step": best["step"], **found}


def best_candidate(setup: Setup, candidates: list[loop.Phase]) -> dict:
    """Train all candidates; the best evaluation of all, with the candidate's name.

    One of several candidates may diverge: it is said, and the others go on.

    Raises:
      UserError: no candidate was evaluated.
    """

    def run(p):
        try:
            return loop.train(p, setup.tools)
        except loop.Diverged as e:
            if len(candidates) == 1:
                raise
            setup.tools.console.line(f"{e}; the other candidates go on")
            return {"steps": p.total, "images": p.total * p.config.batch, "evals": e.evals, "failed": str(e)}

    tasks = [search.Task(p.directory, functools.partial(run, p), functools.partial(_lost, p)) for p in candidates]
    results = divide(setup, tasks)
    if not any(r["evals"] for r in results):
        raise UserError(f"{candidates[0].name} and all other candidates diverged; lower lr or beta in a new workdir")
    evals = [{"candidate": p.directory.name, **e} for p, r in zip(candidates, results, strict=True) for e in r["evals"]]
    return loop.best_of(evals, setup.tools.metric)


def _lost(phase: loop.Phase, result: dict) -> str:
    """Which checkpoint of a finished candidate is gone or damaged, in words; "" if its best is there."""
    best = result.get("best")
    if best is None or search.result_of(phase.directory.parent / "tidy"):  # of a decided round losers were deleted
        return ""
    try:
        read_meta(phase.directory / "checkpoints", best["step"])
    except files.Damaged as e:
        return str(e)
    return ""


def tidy(directory: epath.Path, best: dict) -> dict:
    """Delete the pool and all checkpoints of a finished round but its best; snapshots of averages stay."""
    removed = []
    if jax.process_index() == 0:
        kept = directory / best["candidate"] / "checkpoints" / str(best["step"]) if best["improved"] else None
        for candidate in (d for d in directory.iterdir() if (d / "checkpoints").exists()):
            removed += [d for d in (candidate / "checkpoints").iterdir() if d != kept]
        removed += files.matching(directory / "pool", "chunk-*.npz")
        for path in removed:
            path.rmtree() if path.is_dir() else path.unlink()
    return {"removed": len(removed)}


# -- the control ------------------------------------------------------------------------------------------


def control(setup: Setup, start):
    """Continued MLE from the same start: (best parameters over learning rates and steps, summary)."""
    c = setup.config
    ddo_steps = configs.steps(c.ddo.length, c.ddo.batch, len(setup.tools.data), "ddo.length")
    total = c.control.factor * c.ddo.rounds * ddo_steps
    best = best_candidate(
        setup,
        [
            phase(setup, "control", f"control/lr{lr:g}", start, total=total, lr=lr, seed=c.seed + 500)
            for lr in c.control.lrs
        ],
    )
    directory = setup.workdir / "control" / best["candidate"] / "checkpoints"
    return restore_ema(directory, best["step"], abstract_params(setup)), best
