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
from ddo_jax import files, preemption, sharding
from ddo_jax.core import ddo
from ddo_jax.data.pipeline import batches
from ddo_jax.errors import UserError
from ddo_jax.evaluate.records import Evaluation
from ddo_jax.generate.sampler import NotFinite
from ddo_jax.report.pictures import png
from ddo_jax.run import jobs, record, reference_scores, state, step
from ddo_jax.run.prepare import Setup, abstract_params
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
      start: makes the parameters it begins from. partners: None for "mle".
      source: opens what it reads in place of the data.
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
    start: Callable[[], Any]
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
    """A loss, gradient or sample that is not finite."""


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


def train(phase: Phase, setup: Setup, until: int | None = None) -> dict:
    """Run a phase to its end, or until a step, from its newest good checkpoint if it has one.

    Returns:
      {"steps", "images", "evals": records of evaluations, "best": one of them or None}.

    Raises:
      Diverged: a loss, gradient or sample is not finite.
    """
    (loop,) = _run([phase], setup, until)
    if loop.failed is not None:
        raise loop.failed
    return loop.result()


def train_together(phases: list[Phase], setup: Setup, until: int | None = None) -> list[dict]:
    """Candidates of a round side by side: they see the same pairs at the same draws, so that data, fakes and what the
    reference says of them are made once a step. Numbers do not depend on who is beside whom.

    Returns:
      What `train` returns, of each; with "failed", in words, of those that diverged: the others go on.
    """
    loops = _run(phases, setup, until)
    return [loop.result() | ({} if loop.failed is None else {"failed": str(loop.failed)}) for loop in loops]


def _run(phases: list[Phase], setup: Setup, until: int | None) -> list["_Loop"]:
    """The loops of phases that differ in their hyper-parameters only, at their end."""
    until = phases[0].steps if until is None else until
    with contextlib.ExitStack() as stack:
        loops = [_opened(stack, phase, setup, until) for phase in phases]
        first = min(loop.first for loop in loops)
        data = feed(phases[0], setup, first)
        try:
            for loop in loops:
                loop.score_late()
            for done in range(first + 1, until + 1):
                if not (going := [loop for loop in loops if loop.failed is None]):
                    break
                setup.profile.before(phases[0].section, done)
                with jax.profiler.StepTraceAnnotation("step", step_num=done):
                    real, fake, s_ref = next(data)
                    for loop in going:
                        if loop.first < done:  # else its checkpoint is ahead of the others'
                            loop.advance(done, real, fake, s_ref)
                setup.profile.after(done, [loop.state for loop in going])
                preemption.check()
        except preemption.Preempted:
            kept = [loop.leave() for loop in loops]
            raise preemption.Preempted(", ".join(text for text in kept if text)) from None
        setup.profile.stop(until, [loop.state for loop in loops])  # of a phase that is shorter
        for loop in loops:
            loop.finish()
    return loops


def _opened(stack: contextlib.ExitStack, phase: Phase, setup: Setup, until: int) -> "_Loop":
    """A phase at its newest checkpoint."""

    def new(params):
        return state.new_state(params, phase.config)

    checkpoints = stack.enter_context(Checkpoints(phase.directory / "checkpoints", alone=True))
    shapes = sharding.abstract(setup.mesh, jax.eval_shape(new, abstract_params(setup)))
    current, meta = checkpoints.restore_latest(shapes) or (None, {"evals": [], "step": 0})
    current = sharding.place(setup.mesh, new(phase.start())) if current is None else current
    loop = _Loop(phase, setup, checkpoints, current, meta, until)
    stack.enter_context(contextlib.closing(loop.log))
    return loop


def feed(phase: Phase, setup: Setup, first: int):
    """(real, fake, s_ref) of every step from `first` on, on the devices.

    s_ref is what the reference said of the pairs; None where the step asks it itself.
    """
    order = dict(start=first, host=(jax.process_index(), jax.process_count()))
    own, key = phase.source is None, step_key(phase, setup)
    data, flip = (setup.training_data, setup.config.data.flip) if own else (phase.source(), False)
    reals = batches(data, phase.config.batch, phase.seed, flip=flip, with_index=True, **order)
    pair = None if phase.partners is None else phase.partners.fakes(first)
    asks = None if pair is None else _asking(phase, setup, key)
    for k in itertools.count(first):
        real = next(reals)
        rows = real.pop("index", None)
        real = sharding.put_batch(setup.mesh, real)
        if own and setup.programs.tokens is not None:
            real = setup.programs.tokens(setup.frozen, real)
        fake, fake_rows = (None, None) if pair is None else pair(k, real)
        both = {"real": real, "fake": fake}, {"real": rows, "fake": fake_rows}
        yield real, fake, None if asks is None else asks(k, *both)


def step_key(phase: Phase, setup: Setup):
    """Of the phase's steps."""
    return sharding.replicate(setup.mesh, state.derive(phase.seed, "step"))


def _asking(phase: Phase, setup: Setup, key):
    """(step, records, rows) -> s_ref, or None: exact scores are asked once and kept; others outside the step only
    where several candidates share the answer."""
    if setup.programs.asks is not None:
        return reference_scores.ReferenceScores(setup.programs.asks, setup.mesh, setup.frozen, phase, key)
    if setup.programs.refer is None:
        return None
    ref, law = phase.partners.ref, phase.hyper.sigma_law

    def asks(k, records, rows):
        return setup.programs.refer(ref, setup.frozen, records["real"], records["fake"], (key, k, law))

    return asks


class _Loop:
    """One phase on its way: position, state, history, log, console."""

    def __init__(self, phase: Phase, setup: Setup, checkpoints: Checkpoints, training_state, meta: dict, until: int):
        self.phase, self.setup, self.checkpoints = phase, setup, checkpoints
        self.state, self.evals, self.until = training_state, evaluations(meta), until
        self.first = self.logged = self.done = self.saved = meta["step"]
        self.unscored, self.saved_at = meta.get("unscored", False), time.monotonic()
        self.failed: Diverged | None = None
        main = jax.process_index() == 0
        self.log = record.PhaseLog(phase.directory, self.first, setup.config.log.tensorboard, main)
        self.progress = record.Progress(phase.name, self.first, phase.steps)
        self.began, self.text = time.monotonic(), ""
        c = phase.config
        name = f"{phase.section}.snapshot_every"
        self.snapshot_every = configs.steps(c.snapshot_every, c.batch, len(setup.data), name)
        self.key = step_key(phase, setup)
        self.step = setup.programs.step_for(phase.objective, phase.section, phase.warmup, phase.steps)
        self.totals = self.zero()

    def advance(self, done: int, real, fake, s_ref) -> None:
        """Step `done`, counted from 1, and what is due after it. A phase that diverges is `failed` from then on."""
        phase, setup = self.phase, self.setup
        ref = None if phase.partners is None or s_ref is not None else phase.partners.ref
        inputs = step.Inputs(setup.frozen, real, fake, self.key, phase.hyper, ref, s_ref)
        self.state, self.totals = self.step(self.state, self.totals, inputs)
        self.done = done
        jobs.progress()
        evaluate = self.due(done, phase.eval_every)
        save = evaluate or self.due(done, phase.save_every) or done in (phase.steps, self.until) or self.overdue(done)
        snapshot = self.due(done, self.snapshot_every)
        try:
            if save or snapshot or self.due(done, setup.config.log.every):
                self.write(done, self.totals)
                self.totals = self.zero()
            if snapshot:  # before the checkpoint: a job that is killed here makes it again
                self.snapshot(done, self.state)
            if save:
                self.save(done, self.state, evaluate)
        except Diverged as e:
            self.failed = e

    def finish(self) -> None:
        if self.failed is None:
            self.setup.console.status(self.progress.text(self.done, self.text), done=True)

    def result(self) -> dict:
        """What result.json of the phase says."""
        best = best_of(self.evals)
        return {
            "steps": self.done,
            "images": self.done * self.phase.config.batch,
            "evals": [e.record() for e in self.evals],
            "best": None if best is None else best.record(),
        }

    def zero(self):
        """Fresh totals, committed to the mesh like the step's outputs: its second call must not compile again."""
        return sharding.replicate(self.setup.mesh, step.zero_totals(self.setup.family, self.phase.objective))

    def due(self, done: int, every: int | None) -> bool:
        return every is not None and (done % every == 0 or done == self.phase.steps)

    def overdue(self, done: int) -> bool:
        """Whether the last checkpoint is older than config.save_minutes, by the first process's clock. At the steps of
        the log only, so that its intervals are the same whenever a run is stopped."""
        minutes = self.setup.config.save_minutes
        if not minutes or not self.due(done, self.setup.config.log.every):
            return False
        return sharding.agree(time.monotonic() - self.saved_at > 60 * minutes)

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
                found, images = setup.scorer(state.result(training_state), place, "select", phase.select)
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
        self.keep(done, training_state, score)

    def keep(self, done: int, training_state, score: float | None = None, **more) -> None:
        """A checkpoint."""
        self.log.flush()
        meta = {"step": done, "evals": [e.record() for e in self.evals], **more}
        self.checkpoints.save(done, training_state, meta, score)
        self.saved, self.saved_at = done, time.monotonic()
        self.began = time.monotonic()

    def leave(self) -> str:
        """A checkpoint on the way out, in words. An evaluation that was due is made when the phase is continued."""
        if self.failed is not None:
            return ""
        try:
            if self.done > self.saved:
                if self.done > self.logged:
                    self.write(self.done, self.totals)
                self.keep(self.done, self.state, unscored=self.due(self.done, self.phase.eval_every))
        except Diverged:
            return f"{self.phase.name} kept at step {self.saved}"
        return f"{self.phase.name} saved at step {self.done}"

    def score_late(self) -> None:
        """The evaluation that `leave` put off."""
        if self.unscored:
            try:
                self.save(self.done, self.state, True)
            except Diverged as e:
                self.failed = e


def best_of(found: list, key: Callable[[Any], Evaluation] = lambda found: found) -> Any:
    """Of evaluations, or of what `key` takes them from: the lowest score, the earliest of equals; the last one where
    nothing is scored; None where no score is finite."""
    if found and key(found[-1]).score is None:
        return found[-1]
    finite = [x for x in found if np.isfinite(key(x).score)]
    return min(finite, key=lambda x: key(x).score, default=None)
