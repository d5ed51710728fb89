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

from ddo_jax import files, sharding
from ddo_jax.core import ddo
from ddo_jax.data.pipeline import batches
from ddo_jax.errors import UserError
from ddo_jax.evaluate.score import NotFinite
from ddo_jax.run import asked, record, search, snapshots, state, step
from ddo_jax.run import config as configs
from ddo_jax.run.checkpoint import Checkpoints
from ddo_jax.run.images import png


@dataclasses.dataclass(frozen=True)
class Phase:
    """What distinguishes one phase from another.

    Attributes:
      name: relative directory, e.g. "rounds/001/a4_b0.2". directory: where it writes.
      section: "pretrain", "ddo" or "control". config: that part of the config.
      objective: "mle", "ddo" or "cca". hyper: its traced numbers.
      total: steps. warmup: images. eval_every, save_every: steps or None.
      start: parameters it begins from. ref: the reference's parameters; fakes: see `ddo_jax.run.fakes`; kept: what
        the reference said, for all candidates of a round (see `asked.Asked`); none of them for "mle".
      seed: of data order and noise. select: which range of selection seeds its evaluations use.
    """

    name: str
    directory: epath.Path
    section: str
    config: Any
    objective: str
    hyper: step.Hyper
    total: int
    warmup: float
    eval_every: int | None
    save_every: int | None
    start: Any
    ref: Any = None
    fakes: Any = None
    kept: Any = None
    seed: int = 0
    select: int = 0


@dataclasses.dataclass(frozen=True)
class Tools:
    """What all phases of a run share.

    Attributes:
      family, frozen, mesh: of the run. data: source of real images; flip: mirror half of them.
      train: what training reads: data, or its tokens. tokens: jitted (frozen, record of pixels) -> record of tokens,
        where training has to make them; or None.
      step_for: (phase) -> its jitted step, compiled once per kind.
      asks: `asked.Programs`, or None: the step asks the reference itself.
      ratio: jitted (params, ref, frozen, record, key, noise) -> r [B].
      evaluate: (params, phase name, step, purpose, index) -> the record of one scored set of samples, with
        its protocol, and its first images. metric: the record's key that selects (lower is better).
      levels: grey levels of the images. log: config.log.
    """

    family: Any
    frozen: Any
    mesh: Any
    data: Any
    flip: bool
    train: Any
    tokens: Callable[..., dict] | None
    step_for: Callable[[Phase], Callable]
    asks: asked.Programs | None
    ratio: Callable[..., jax.Array]
    evaluate: Callable[..., tuple[dict, np.ndarray]]
    levels: int
    metric: str
    log: Any
    console: record.Console


def summary(totals, images_per_s: float, lr: float) -> dict[str, float]:
    """The record of one logging interval, keys in groups, from the statistics its steps added up."""
    totals = jax.device_get(totals)
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

    evals: list[dict] = []


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


def train(phase: Phase, tools: Tools) -> dict:
    """Run a phase to its end, from its newest good checkpoint if it has one.

    Returns:
      {"steps", "images", "evals": records of `Tools.evaluate`, "best": one of them or None}.
    """
    c, mesh = phase.config, tools.mesh
    tx = state.optimizer(c)

    def fresh():
        return sharding.place(mesh, state.new_state(phase.start, tx, c.ema_stds))

    with Checkpoints(phase.directory / "checkpoints", alone=True) as checkpoints:
        shapes = sharding.abstract(mesh, jax.eval_shape(fresh))
        restored, meta = checkpoints.restore_latest(shapes) or (None, {"evals": [], "step": 0})
        loop = _Loop(phase, tools, checkpoints, meta["evals"], meta["step"])
        with contextlib.closing(loop.log):
            try:
                return loop.run(fresh() if restored is None else restored)
            except Diverged as e:
                e.evals = loop.evals
                raise


class _Loop:
    """The loop's moving parts: position, history, log, console."""

    def __init__(self, phase, tools, checkpoints, evals: list[dict], first: int):
        self.phase, self.tools, self.checkpoints, self.evals = phase, tools, checkpoints, evals
        self.first = self.logged = first
        main = jax.process_index() == 0
        self.log = record.PhaseLog(phase.directory, first, tools.log.tensorboard, main)
        self.progress = record.Progress(phase.name, first, phase.total)
        self.began, self.text = time.monotonic(), ""
        c = phase.config
        self.snapshot_every = configs.steps(
            c.snapshot_every, c.batch, len(tools.data), f"{phase.section}.snapshot_every"
        )

    # -- data ---------------------------------------------------------------------------------------------

    def data(self, key):
        """(real, fake, s_ref) of every step from the resume position on, on the devices; key: of the steps."""
        phase, tools = self.phase, self.tools
        hosts = dict(start=self.first, host=jax.process_index(), hosts=jax.process_count())
        reals = batches(tools.train, phase.config.batch, phase.seed, flip=tools.flip, with_index=True, **hosts)
        pair = None if phase.fakes is None else phase.fakes(self.first)
        asks = None
        if tools.asks is not None and pair is not None:
            asks = asked.Asked(tools.asks, tools.mesh, tools.frozen, phase, key, phase.kept)
        for k in itertools.count(self.first):
            real = next(reals)
            rows = real.pop("index", None)
            real = sharding.put_batch(tools.mesh, real)
            if tools.tokens is not None:
                real = tools.tokens(tools.frozen, real)
            fake, fake_rows = (None, None) if pair is None else pair(k, real)
            both = {"real": real, "fake": fake}, {"real": rows, "fake": fake_rows}
            yield real, fake, None if asks is None else asks(k, *both)

    # -- the loop -----------------------------------------------------------------------------------------

    def run(self, training_state) -> dict:
        phase, tools = self.phase, self.tools
        key = sharding.replicate(tools.mesh, state.derive(phase.seed, "step"))
        advance, data, totals = tools.step_for(phase), self.data(key), self.zero()
        ref = phase.ref if tools.asks is None else None
        for done in range(self.first + 1, phase.total + 1):
            real, fake, s_ref = next(data)
            training_state, totals = advance(
                training_state, totals, ref, tools.frozen, real, fake, key, phase.hyper, s_ref
            )
            search.progress()
            evaluate = self.due(done, phase.eval_every)
            save = evaluate or self.due(done, phase.save_every) or done == phase.total
            snapshot = self.due(done, self.snapshot_every)
            if save or snapshot or self.due(done, tools.log.every):
                self.write(done, totals)
                totals = self.zero()
            if snapshot:  # before the checkpoint: a job that is killed here makes it again
                self.snapshot(done, training_state)
            if save:
                self.save(done, training_state, evaluate)
        tools.console.status(self.progress.text(phase.total, self.text), done=True)
        images = phase.total * phase.config.batch
        return {
            "steps": phase.total,
            "images": images,
            "evals": self.evals,
            "best": best_of(self.evals, tools.metric),
        }

    def zero(self):
        """Fresh totals, committed to the mesh like the step's outputs: its second call must not compile again."""
        return sharding.replicate(self.tools.mesh, step.zero_totals(self.phase.objective))

    def due(self, done: int, every: int | None) -> bool:
        return every is not None and (done % every == 0 or done == self.phase.total)

    def write(self, done: int, totals) -> None:
        """Log the interval since the last call; stop if anything in it was not finite."""
        c, steps = self.phase.config, done - self.logged
        seen, images = (
            (done - 1.0) * c.batch,
            dict(warmup=self.phase.warmup, total=self.phase.total * c.batch),
        )
        lr = step.learning_rate(c, seen, lr=self.phase.hyper.lr, **images)
        rate = steps * c.batch / (time.monotonic() - self.began)
        scalars = summary(totals, rate, float(lr))
        check_finite(scalars, self.phase.name, self.logged + 1, done)
        self.log.write({"phase": self.phase.name, "step": done, "images": done * c.batch, **scalars})
        self.text = status(scalars) + "".join(self.text.partition("  |")[1:])
        self.tools.console.status(self.progress.text(done, self.text))
        self.logged, self.began = done, time.monotonic()

    def snapshot(self, done: int, training_state) -> None:
        phase, tools = self.phase, self.tools
        averages = state.averages(training_state, phase.config.ema_stds)
        directory, images = phase.directory / "snapshots", done * phase.config.batch
        snapshots.write(directory, tools.family, tools.frozen, averages, images)
        self.began = time.monotonic()

    def save(self, done: int, training_state, evaluate: bool) -> None:
        phase, tools, score = self.phase, self.tools, None
        if evaluate:
            try:
                found, images = tools.evaluate(training_state["ema"], phase.name, done, "select", phase.select)
            except NotFinite as e:  # weights can grow until they overflow in the sampler before the loss does
                raise Diverged(f"{phase.name}, step {done}: {e}; no checkpoint was overwritten") from None
            if jax.process_index() == 0:
                directory = phase.directory / "samples"
                directory.mkdir(exist_ok=True)
                files.write_bytes(directory / f"{done:08d}.png", png(images, tools.levels))
            score = found[tools.metric]
            self.evals.append({"images": done * phase.config.batch, **found})
            self.log.write({"phase": phase.name, "step": done, f"eval/{tools.metric}": score})
            self.text = f"{self.text.partition('  |')[0]}  | {tools.metric} {score:.3f}"
        self.checkpoints.save(done, training_state, {"step": done, "evals": self.evals}, score)
        self.began = time.monotonic()


def best_of(evals: list[dict], metric: str) -> dict | None:
    """The evaluation with the lowest `metric`; the earliest of equals."""
    finite = [e for e in evals if np.isfinite(e[metric])]
    return min(finite, key=lambda e: e[metric], default=None)
