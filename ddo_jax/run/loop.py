"""The inner loop: one phase (pretraining, a candidate, a control) from its start or checkpoint to its end."""

import contextlib
import dataclasses
import itertools
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath

from ddo_jax import config as configs
from ddo_jax import files, sharding
from ddo_jax.core import ddo
from ddo_jax.data.pipeline import batches
from ddo_jax.errors import UserError
from ddo_jax.evaluate.records import Evaluation
from ddo_jax.generate.sampler import NotFinite
from ddo_jax.report.pictures import png
from ddo_jax.run import jobs, record, reference_scores, state, step
from ddo_jax.run.prepare import Setup
from ddo_jax.run.scoring import evaluations
from ddo_jax.store import snapshots
from ddo_jax.store.checkpoint import Checkpoints


@dataclasses.dataclass(frozen=True)
class Partners:
    """What a phase of pairs needs beside data: the reference's parameters; where fakes come from (see
    `ddo_jax.run.fakes`); what the reference said, for all candidates of a round (`reference_scores.Kept`)."""

    ref: Any
    fakes: Callable
    kept: dict | None = None


@dataclasses.dataclass(frozen=True)
class Phase:
    """What distinguishes one phase from another.

    Attributes:
      name: relative directory, e.g. "rounds/001/a4_b0.2". directory: where it writes.
      section: "pretrain", "ddo" or "control". config: that part of the config.
      objective: "mle", "ddo" or "cca". hyper: its traced numbers.
      steps: of the phase. warmup: images. eval_every, save_every: steps or None.
      start: parameters it begins from. partners: None for "mle". source: opens what it reads in place of the data.
      seed: of data order and noise. select: which range of selection seeds its evaluations use.
    """

    name: str
    directory: epath.Path
    section: str
    config: Any
    objective: str
    hyper: step.Hyper
    steps: int
    warmup: float
    eval_every: int | None
    save_every: int | None
    start: Any
    partners: Partners | None = None
    source: Callable | None = None
    seed: int = 0
    select: int = 0


def summary(totals, images_per_s: float, lr: float) -> dict[str, float]:
    """The record of one logging interval, keys in groups, from the statistics its steps added up."""
    totals = {k: v for k, v in jax.device_get(totals).items() if v[-1] > 0}  # of no row: there is nothing to say
    means = {k: v[0] / v[1] for k, v in totals.items() if len(v) == 2}
    out = {"opt/grad_norm": means["grad_norm"], "opt/lr": lr, "perf/img_per_s": images_per_s}
    if "loss_mle" in means:
        out["loss/mle"] = means["loss_mle"]
    else:
        stats = ddo.summarize({k: v for k, v in totals.items() if k not in ("grad_norm", "nll_real")})
        out |= {"loss/real": stats.pop("loss_real"), "loss/fake": stats.pop("loss_fake")}
        out |= {"loss/nll_real": means["nll_real"], **{f"ddo/{k}": v for k, v in stats.items()}}
    return {k: float(v) for k, v in out.items()}


class Diverged(UserError):
    """A loss or gradient that is not finite; `evals` holds the evaluations before it."""

    evals: list[Evaluation] = []


def check_finite(scalars: dict[str, float], phase: str, first: int, last: int) -> None:
    """Stop before anything is overwritten: the newest checkpoint is older than `first`."""
    bad = [k for k, v in scalars.items() if not math.isfinite(v)]
    if bad:
        raise Diverged(
            f"{phase}: {bad[0]} is {scalars[bad[0]]} between steps {first} and {last}; no checkpoint was "
            "overwritten. Lower the learning rate or beta (in a new workdir), or check the data"
        )


def status(scalars: dict[str, float]) -> str:
    if "ddo/margin" in scalars:
        return f"margin {scalars['ddo/margin']:+.3f}  accuracy {scalars['ddo/accuracy']:.3f}"
    return f"loss {scalars['loss/mle']:.2f}" if "loss/mle" in scalars else ""


def train(phase: Phase, setup: Setup) -> dict:
    """Run a phase to its end, from its newest good checkpoint if it has one.

    Returns:
      {"steps", "images", "evals": records of evaluations, "best": one of them or None}.
    """
    c, mesh = phase.config, setup.mesh
    tx = state.optimizer(c)

    def fresh():
        return sharding.place(mesh, state.new_state(phase.start, tx, c.ema_stds))

    with Checkpoints(phase.directory / "checkpoints", alone=True) as checkpoints:
        shapes = sharding.abstract(mesh, jax.eval_shape(fresh))
        restored, meta = checkpoints.restore_latest(shapes) or (None, {"evals": [], "step": 0})
        loop = _Loop(phase, setup, checkpoints, meta["step"], evaluations(meta))
        with contextlib.closing(loop.log):
            try:
                return loop.run(fresh() if restored is None else restored)
            except Diverged as e:
                e.evals = loop.evals
                raise


class _Loop:
    """The loop's moving parts: position, history, log, console."""

    def __init__(self, phase: Phase, setup: Setup, checkpoints: Checkpoints, first: int, evals: list[Evaluation]):
        self.phase, self.setup, self.checkpoints, self.evals = phase, setup, checkpoints, evals
        self.first = self.logged = first
        main = jax.process_index() == 0
        self.log = record.PhaseLog(phase.directory, first, setup.config.log.tensorboard, main)
        self.progress = record.Progress(phase.name, first, phase.steps)
        self.began, self.text = time.monotonic(), ""
        c = phase.config
        name = f"{phase.section}.snapshot_every"
        self.snapshot_every = configs.steps(c.snapshot_every, c.batch, len(setup.data), name)

    # -- data ---------------------------------------------------------------------------------------------

    def data(self, key):
        """(real, fake, s_ref) of every step from the resume position on, on the devices; key: of the steps."""
        phase, setup = self.phase, self.setup
        order = dict(start=self.first, host=(jax.process_index(), jax.process_count()))
        own = phase.source is None
        data, flip = (setup.training_data, setup.config.data.flip) if own else (phase.source(), False)
        reals = batches(data, phase.config.batch, phase.seed, flip=flip, with_index=True, **order)
        pair = None if phase.partners is None else phase.partners.fakes(self.first)
        asks = None
        if setup.programs.asks is not None and pair is not None:
            asks = reference_scores.ReferenceScores(setup.programs.asks, setup.mesh, setup.frozen, phase, key)
        for k in itertools.count(self.first):
            real = next(reals)
            rows = real.pop("index", None)
            real = sharding.put_batch(setup.mesh, real)
            if own and setup.programs.tokens is not None:
                real = setup.programs.tokens(setup.frozen, real)
            fake, fake_rows = (None, None) if pair is None else pair(k, real)
            both = {"real": real, "fake": fake}, {"real": rows, "fake": fake_rows}
            yield real, fake, None if asks is None else asks(k, *both)

    # -- the loop -----------------------------------------------------------------------------------------

    def run(self, training_state) -> dict:
        phase, setup = self.phase, self.setup
        key = sharding.replicate(setup.mesh, state.derive(phase.seed, "step"))
        advance = setup.programs.step_for(phase.objective, phase.section, phase.warmup, phase.steps)
        data, totals = self.data(key), self.zero()
        ref = phase.partners.ref if phase.partners is not None and setup.programs.asks is None else None
        for done in range(self.first + 1, phase.steps + 1):
            real, fake, s_ref = next(data)
            inputs = step.Inputs(setup.frozen, real, fake, key, phase.hyper, ref, s_ref)
            training_state, totals = advance(training_state, totals, inputs)
            jobs.progress()
            evaluate = self.due(done, phase.eval_every)
            save = evaluate or self.due(done, phase.save_every) or done == phase.steps
            snapshot = self.due(done, self.snapshot_every)
            if save or snapshot or self.due(done, setup.config.log.every):
                self.write(done, totals)
                totals = self.zero()
            if snapshot:  # before the checkpoint: a job that is killed here makes it again
                self.snapshot(done, training_state)
            if save:
                self.save(done, training_state, evaluate)
        setup.console.status(self.progress.text(phase.steps, self.text), done=True)
        return result_of(phase, self.evals)

    def zero(self):
        """Fresh totals, committed to the mesh like the step's outputs: its second call must not compile again."""
        return sharding.replicate(self.setup.mesh, step.zero_totals(self.setup.family, self.phase.objective))

    def due(self, done: int, every: int | None) -> bool:
        return every is not None and (done % every == 0 or done == self.phase.steps)

    def write(self, done: int, totals) -> None:
        """Log the interval since the last call; stop if anything in it was not finite."""
        c, steps = self.phase.config, done - self.logged
        seen, images = (
            (done - 1.0) * c.batch,
            dict(warmup=self.phase.warmup, total=self.phase.steps * c.batch),
        )
        lr = step.learning_rate(c, seen, lr=self.phase.hyper.lr, **images)
        rate = steps * c.batch / (time.monotonic() - self.began)
        scalars = summary(totals, rate, float(lr))
        check_finite(scalars, self.phase.name, self.logged + 1, done)
        self.log.write({"phase": self.phase.name, "step": done, "images": done * c.batch, **scalars})
        self.text = status(scalars) + "".join(self.text.partition("  |")[1:])
        self.setup.console.status(self.progress.text(done, self.text))
        self.logged, self.began = done, time.monotonic()

    def snapshot(self, done: int, training_state) -> None:
        phase, setup = self.phase, self.setup
        averages = state.averages(training_state, phase.config.ema_stds)
        directory, images = phase.directory / "snapshots", done * phase.config.batch
        snapshots.write(directory, setup.family, setup.frozen, averages, images)
        self.began = time.monotonic()

    def save(self, done: int, training_state, evaluate: bool) -> None:
        phase, setup, score = self.phase, self.setup, None
        if evaluate:
            try:
                place = (phase.name, done, done * phase.config.batch)
                found, images = setup.scorer(training_state["ema"], place, "select", phase.select)
            except NotFinite as e:  # weights can grow until they overflow in the sampler before the loss does
                raise Diverged(f"{phase.name}, step {done}: {e}; no checkpoint was overwritten") from None
            if jax.process_index() == 0:
                directory = phase.directory / "samples"
                directory.mkdir(exist_ok=True)
                files.write_bytes(directory / f"{done:08d}.png", png(images, setup.family.spec.levels))
            score = found.score
            self.evals.append(found)
            if score is not None:
                self.log.write({"phase": phase.name, "step": done, f"eval/{found.metric}": score})
                self.text = f"{self.text.partition('  |')[0]}  | {found.metric} {score:.3f}"
        meta = {"step": done, "evals": [e.record() for e in self.evals]}
        self.checkpoints.save(done, training_state, meta, score)
        self.began = time.monotonic()


def result_of(phase: Phase, evals: list[Evaluation]) -> dict:
    """What result.json of a phase says."""
    best = best_of(evals)
    return {
        "steps": phase.steps,
        "images": phase.steps * phase.config.batch,
        "evals": [e.record() for e in evals],
        "best": None if best is None else best.record(),
    }


def best_of(found: list, key: Callable[[Any], Evaluation] = lambda found: found) -> Any:
    """Of evaluations, or of what `key` takes them from: the lowest score, the earliest of equals; the last one where
    nothing is scored; None where no score is finite."""
    if found and key(found[-1]).score is None:
        return found[-1]
    finite = [x for x in found if np.isfinite(key(x).score)]
    return min(finite, key=lambda x: key(x).score, default=None)
