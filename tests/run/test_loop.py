"""The inner loop: resuming, stopping at the first bad number, its records."""

import dataclasses
import gzip
import json

import jax
import numpy as np
import pytest

from ddo_jax import convert, files, preemption
from ddo_jax.errors import UserError
from ddo_jax.evaluate.records import Evaluation, Protocol
from ddo_jax.run import candidates, jobs, loop, profile
from ddo_jax.store import snapshots
from tests.harness import random_variables


@pytest.fixture
def run(setup, tmp_path):
    """A function that prepares a phase of `setup` in a directory: run(name, total, **changes)."""

    own = dataclasses.replace(setup, workdir=setup.workdir.__class__(tmp_path))

    def make(name, total, lr=None):
        params = random_variables(setup.family.init)[0]
        c = setup.config.pretrain
        phase = candidates.phase(own, "pretrain", name, lambda: params, steps=total, hyper=candidates.hyper(c, lr=lr))
        return dataclasses.replace(phase, save_every=2), own

    return make


def leaves(state):
    return [np.asarray(x) for x in jax.tree.leaves(state)]


def final(phase, setup):
    with loop.Checkpoints(phase.directory / "checkpoints") as c:
        fresh = loop.state.new_state(phase.start(), phase.config)
        abstract = loop.sharding.abstract(setup.mesh, jax.eval_shape(lambda: fresh))
        return c.restore_latest(abstract)


class Stop(Exception):
    pass


def test_four_steps_are_two_and_two(run, monkeypatch):
    """Breaks if anything of the state, the data position or the noise is lost over a restart."""
    whole, setup = run("whole", 4)
    loop.train(whole, setup)
    halved, _ = run("halved", 4)

    def stop_after_three(self, done, totals, write=loop._Loop.write):
        if done == 3:
            raise Stop
        write(self, done, totals)

    with monkeypatch.context() as patch:
        patch.setattr(loop._Loop, "write", stop_after_three)
        with pytest.raises(Stop):
            loop.train(halved, setup)
    assert final(halved, setup)[1]["step"] == 2
    result = loop.train(halved, setup)
    assert result["steps"] == 4
    for a, b in zip(leaves(final(whole, setup)[0]), leaves(final(halved, setup)[0]), strict=True):
        np.testing.assert_array_equal(a, b)
    steps = [[r["step"] for r in files.read_jsonl(p.directory / "metrics.jsonl")] for p in (whole, halved)]
    assert steps[0] == steps[1] == [1, 2, 3, 4]


def averaging(run, name, total):
    """A phase that tracks two lengths and writes snapshots every other step, and the setup for it."""
    phase, setup = run(name, total)
    c = phase.config.copy_and_resolve_references()
    c.update(batch=1024, ema_stds=(0.05, 0.1))
    c.snapshot_every.steps = 2
    jitted = loop.step.make_step(loop.step.Training(setup.family, setup.mesh, c, "mle", warmup=0.0, total=1e6))
    phase = dataclasses.replace(phase, config=c, save_every=3)
    programs = dataclasses.replace(setup.programs, step_for=lambda *_: jitted)
    return phase, dataclasses.replace(setup, programs=programs)


def test_snapshots_and_lengths_survive_a_restart(run, monkeypatch):
    """Breaks if an EMA length, or a snapshot after the last checkpoint, is lost or changed over a restart."""
    whole, setup = averaging(run, "whole", 5)
    loop.train(whole, setup)
    halved, _ = averaging(run, "halved", 5)

    def stop_before_the_end(self, done, totals, write=loop._Loop.write):
        if done == 5:
            raise Stop
        write(self, done, totals)

    def files_of(phase):
        return {p.name: p.read_bytes() for p in (phase.directory / "snapshots").iterdir()}

    with monkeypatch.context() as patch:
        patch.setattr(loop._Loop, "write", stop_before_the_end)
        with pytest.raises(Stop):
            loop.train(halved, setup)
    assert final(halved, setup)[1]["step"] == 3 and len(files_of(halved)) == 4
    for path in (halved.directory / "snapshots").glob("*-0000004-*"):  # of step 4, after the checkpoint
        path.write_bytes(b"torn")
    loop.train(halved, setup)
    states = [final(phase, setup)[0] for phase in (whole, halved)]
    assert list(states[0]["emas"]) == ["0.100"]
    for a, b in zip(*map(leaves, states), strict=True):
        np.testing.assert_array_equal(a, b)
    assert files_of(whole) == files_of(halved)
    found = snapshots.find(str(whole.directory))
    assert [(s.images, s.std) for s in found] == [(n * 1024, std) for n in (2, 4, 5) for std in (0.05, 0.1)]
    for snapshot, ema in zip(found[-2:], (states[0]["ema"], states[0]["emas"]["0.100"]), strict=True):
        arrays, _ = setup.family.export(jax.tree.map(np.asarray, ema), setup.frozen)
        stored = convert.read(snapshot.path).state_dict
        for name, array in arrays.items():
            np.testing.assert_array_equal(stored[name], np.asarray(array).astype(np.float16), err_msg=name)


def test_snapshots_come_before_the_checkpoint(run, monkeypatch):
    """Breaks if a job killed between the two resumes after a snapshot that was never written."""
    phase, setup = averaging(run, "order", 2)

    def fail(*_):
        raise Stop

    monkeypatch.setattr(loop.snapshots, "write", fail)
    with pytest.raises(Stop):
        loop.train(phase, setup)
    assert list((phase.directory / "checkpoints").iterdir()) == []


def test_not_a_number_stops_the_run(run):
    """Breaks if a diverged run goes on, or overwrites its last good checkpoint."""
    good, setup = run("nan", 2)
    loop.train(good, setup)
    diverging, _ = run("nan", 6, lr=float("inf"))
    task = jobs.Task(diverging.directory, lambda: loop.train(diverging, setup))
    with pytest.raises(UserError, match=r"nan: .* (nan|inf) between steps \d and \d; no checkpoint was overwritten"):
        jobs.divide([task], lease_s=60.0)
    assert not (diverging.directory / "result.json").exists()
    state, meta = final(good, setup)
    assert meta["step"] == 2 and all(np.isfinite(x).all() for x in leaves(state))


def test_best_of():
    """Breaks if the last, the largest or a NaN wins."""
    about = Protocol(n_samples=2, content="", size="", quantised_to="")
    scores = ((1, 3.0), (2, 1.0), (3, float("nan")), (4, 1.0), (5, 2.0))
    evals = [Evaluation("fd", {"fd": v}, about, step=s) for s, v in scores]
    assert loop.best_of(evals).step == 2
    assert loop.best_of([]) is None


def leaving_at(monkeypatch, step):
    """A signal that is heard after so many steps."""
    asked = []

    def reached():
        asked.append(None)
        return len(asked) == step

    monkeypatch.setattr(preemption, "reached", reached)


@pytest.mark.parametrize("step", [1, 2, 3])
def test_left_at_a_step_and_continued(run, monkeypatch, step):
    """Breaks if a run that was told to leave loses a step, or repeats one."""
    whole, setup = run("whole", 4)
    loop.train(whole, setup)
    stopped, _ = run("stopped", 4)
    with monkeypatch.context() as patch:
        leaving_at(patch, step)
        with pytest.raises(preemption.Preempted, match=f"^stopped saved at step {step}$"):
            loop.train(stopped, setup)
    assert final(stopped, setup)[1]["step"] == step
    assert loop.train(stopped, setup)["steps"] == 4
    for a, b in zip(leaves(final(whole, setup)[0]), leaves(final(stopped, setup)[0]), strict=True):
        np.testing.assert_array_equal(a, b)


def test_an_evaluation_that_was_left_is_made(run, monkeypatch):
    """Breaks if a signal during an evaluation loses its score, which selects, or the steps before it."""
    whole, setup = run("whole", 4)
    stopped, _ = run("stopped", 4)
    whole, stopped = (dataclasses.replace(phase, eval_every=2) for phase in (whole, stopped))
    wanted = loop.train(whole, setup)
    with monkeypatch.context() as patch:
        patch.setattr(preemption, "reached", lambda: False)

        def left(*_, **__):
            raise preemption.Preempted

        with pytest.raises(preemption.Preempted, match="^stopped saved at step 2$"):
            loop.train(stopped, dataclasses.replace(setup, scorer=left))
    step, meta = final(stopped, setup)[1]["step"], final(stopped, setup)[1]
    assert (step, meta["unscored"], meta["evals"]) == (2, True, [])
    found = loop.train(stopped, setup)
    assert [(e["step"], e["fd_x100"]) for e in found["evals"]] == [(e["step"], e["fd_x100"]) for e in wanted["evals"]]
    assert "unscored" not in final(stopped, setup)[1]


def test_nothing_that_is_not_finite_is_saved_on_the_way_out(run, monkeypatch):
    """Breaks if leaving overwrites the last good checkpoint by one that is not a number."""
    phase, setup = run("nan", 4, lr=float("inf"))
    quiet = dataclasses.replace(setup, config=setup.config.copy_and_resolve_references())
    quiet.config.log.every = 100
    phase = dataclasses.replace(phase, save_every=None)
    leaving_at(monkeypatch, 3)
    with pytest.raises(preemption.Preempted, match="nan kept at step 0"):
        loop.train(phase, quiet)
    assert final(phase, setup) is None


def test_a_checkpoint_after_so_many_minutes(run, monkeypatch):
    """Breaks if a run without evaluations keeps nothing for hours; or saves at steps that split a record of its log."""
    phase, setup = run("timed", 4)
    timed = dataclasses.replace(setup, config=setup.config.copy_and_resolve_references())
    timed.config.update(save_minutes=1e-6)
    timed.config.log.every = 3
    saved = []
    monkeypatch.setattr(loop._Loop, "keep", lambda self, done, *_, **__: saved.append(done))
    loop.train(dataclasses.replace(phase, save_every=None), timed)
    assert saved == [3, 4]
    timed.config.save_minutes = 0.0
    saved.clear()
    loop.train(dataclasses.replace(phase, save_every=None), timed)
    assert saved == [4]


def test_steps_are_traced(run, tmp_path):
    """Breaks if the trace of --profile_steps is not written, is empty, or does not name its steps."""
    phase, setup = run("traced", 4)
    said = []
    traced = profile.Profile((2, 3), "pretrain", str(tmp_path / "profile"), said.append)
    loop.train(phase, dataclasses.replace(setup, profile=traced))
    assert said == [f"trace of steps 2 to 3: {tmp_path / 'profile'}"]
    (path,) = (tmp_path / "profile").glob("**/perfetto_trace.json.gz")
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    assert {e["args"]["step_num"] for e in events if e.get("name") == "step"} == {"2", "3"}
    assert list((tmp_path / "profile").glob("**/*.xplane.pb"))


def test_a_phase_shorter_than_its_trace(run, tmp_path):
    """Breaks if the trace of a short phase goes on over all that follows."""
    phase, setup = run("short", 3)
    said = []
    loop.train(
        phase, dataclasses.replace(setup, profile=profile.Profile((2, 9), "pretrain", str(tmp_path), said.append))
    )
    assert said == [f"trace of steps 2 to 3: {tmp_path}"]


@pytest.mark.parametrize("text", ["20", "30-20", "0-3", "a-b", "1-2-3", ""])
def test_steps_that_are_none(text, tmp_path, setup):
    with pytest.raises(UserError, match="^--profile_steps: .*allowed: FIRST-LAST"):
        profile.of_flag(text, setup.config, tmp_path, print)
    with pytest.raises(UserError, match="allowed: a local --workdir"):
        profile.of_flag("1-2", setup.config, "gs://bucket/run", print)
