"""The whole job in little: what it leaves behind, run again, continued, judged."""

import dataclasses
import errno
import gc
import json
import math
import os
import types

import jax
import numpy as np
import pytest
from PIL import Image

import ddo_jax
from ddo_jax import files, sample, sharding
from ddo_jax.convert import __main__ as convert_command
from ddo_jax.errors import UserError
from ddo_jax.evaluate import __main__ as evaluate_command
from ddo_jax.evaluate import features
from ddo_jax.evaluate.records import Evaluation, Protocol, Round
from ddo_jax.plan import dry_run
from ddo_jax.run import checks, fakes, loop, main_job, rounds
from ddo_jax.run.checks import check_network
from ddo_jax.run.prepare import prepare
from ddo_jax.run.scoring import open_evaluator, scoring_inputs
from ddo_jax.store import checkpoint
from ddo_jax.store.checkpoint import restore_ema
from ddo_jax.store.workdir import check_inputs, open_workdir
from tests.harness import Quiet, exit_code, random_variables


@pytest.fixture(scope="module")
def done(tmp_path_factory, fitted):
    """A finished run of the micro config: (config, workdir)."""
    from tests.harness import micro_config

    workdir = tmp_path_factory.mktemp("run")
    (workdir / "features-digits.npz").write_bytes(fitted[1].read_bytes())
    config = micro_config()
    main_job.run(config, workdir)
    return config, workdir


def test_what_a_run_leaves_behind(done):
    """Breaks if a promised file, key or picture is missing, or a record has no protocol."""
    config, workdir = done
    for name in ("config.json", "metrics.jsonl", "evals.jsonl", "best/params.safetensors", "report/report.md"):
        assert (workdir / name).stat().st_size > 0, name
    for picture in ("samples", "curves", "ratios"):
        assert (workdir / "report" / f"{picture}.png").read_bytes()[:4] == b"\x89PNG"
    evals = files.read_jsonl(workdir / "evals.jsonl")
    protocol = {"seeds", "n_samples", "labels", "sampler", "nfe", "features", "references", "weights", "commit"}
    assert all(protocol <= e["protocol"].keys() and np.isfinite(e["fd_x100"]) for e in evals)
    systems = {e["phase"] for e in evals}
    assert {"start", "ddo", "control", "rounds/001", "rounds/001/a4_b0.1", "control/lr0.001"} <= systems
    keys = {k for r in files.read_jsonl(workdir / "metrics.jsonl") for k in r}
    assert {"ddo/margin", "ddo/accuracy", "loss/real", "loss/mle", "opt/grad_norm", "perf/img_per_s"} <= keys
    assert list((workdir / "rounds/001/a4_b0.1/samples").glob("*.png"))
    json.loads((workdir / "config.json").read_text(), parse_constant=pytest.fail)  # no NaN, no Infinity


def test_what_is_pruned(done):
    """Breaks if pools and losers fill the disk, or the best checkpoint is deleted with them."""
    _, workdir = done
    best = files.read_json(workdir / "rounds/001/best.json")
    kept = [str(p.relative_to(workdir)) for p in workdir.glob("rounds/001/*/checkpoints/*")]
    assert kept == ([f"rounds/001/{best['candidate']}/checkpoints/{best['step']}"] if best["improved"] else [])
    assert not list((workdir / "rounds/001/pool").glob("chunk-*"))


def test_the_same_command_again_does_nothing(done):
    """Breaks if a finished run trains, samples or judges again."""
    config, workdir = done
    results = [p for p in workdir.rglob("result.json")]
    before = {p: p.stat().st_mtime_ns for p in results}
    text = (workdir / "report" / "report.md").read_text()
    main_job.run(config, workdir)
    assert {p: p.stat().st_mtime_ns for p in results} == before and len(results) > 8
    assert (workdir / "report" / "report.md").read_text() == text


def test_other_config_is_refused(done):
    """Breaks if a workdir mixes two experiments; harmless keys may change."""
    config, workdir = done
    other = config.copy_and_resolve_references()
    other.log.every = 7
    open_workdir(other, workdir)
    other.ddo.lr = 0.5
    before = (workdir / "config.json").read_bytes()
    with pytest.raises(UserError, match=r"config.ddo.lr: 0.001 -> 0.5"):
        open_workdir(other, workdir)
    assert (workdir / "config.json").read_bytes() == before


def test_load_and_start_from_it(done, new_workdir):
    """Breaks if best/ is not what the rounds chose, or cannot be loaded or continued from."""
    config, workdir = done
    family, params, frozen = ddo_jax.load(str(workdir))
    best = files.read_json(workdir / "rounds/001/best.json")
    shapes = jax.eval_shape(lambda: params)
    where = (best["candidate"], best["step"])
    if best["improved"]:
        expected = restore_ema(workdir / "rounds/001" / where[0] / "checkpoints", where[1], shapes)
    else:
        expected = restore_ema(workdir / "pretrain/checkpoints", None, shapes)
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)
    config = config.copy_and_resolve_references()
    config.init = str(workdir)
    config.control.enabled = False
    second = new_workdir("second")
    main_job.run(config, second)
    paths = (workdir / "report/scores/ddo/result.json", second / "report/scores/start/result.json")
    scores = [[e["fd_x100"] for e in files.read_json(p)["evals"]] for p in paths]
    assert scores[0] == scores[1]


def test_any_metric_in_a_run(setup, micro, tmp_path):
    """Breaks if the report's metrics are not those of the config, or the selecting one is not the one that counts."""
    micro.eval.update(select="kid", metrics=("fid", "pr"))
    checks.check(micro)
    place = dataclasses.replace(setup.scorer, config=micro)
    scorer = dataclasses.replace(place, evaluator=open_evaluator(micro, setup.workdir, setup.family, setup.data))
    params = random_variables(setup.family.init)[0]
    selecting, _ = scorer(params, ("a", 1, 16), "select", 0)
    assert set(selecting.values) == {"kid", "kid_std", "accuracy"} and scorer.metric == selecting.metric == "kid"
    reported, images = scorer(params, ("a", 1, 16), "report", 0)
    assert {"kid", "fd_x100", "fd_x100_test", "precision0.048k", "recall0.048k"} <= set(reported.values)
    assert reported.metric == "kid" and len(images) == 10 and (reported.step, reported.images) == (1, 16)
    for key, value, words in (("select", "is", "fid, sfid, fd_dinov2, kid"), ("metrics", ("fix",), "fid, sfid, is")):
        micro.eval.update(select=None, metrics=())
        micro.eval.update({key: value})
        with pytest.raises(UserError, match=f"config.eval.{key}: .*allowed: {words}"):
            checks.check(micro)


def test_a_record_of_a_later_version_is_one_line(setup, new_workdir):
    """Breaks if an evaluation that cannot be read ends a run in a traceback."""
    workdir = new_workdir("later")
    own, ref, *_ = play(setup, workdir, lambda _, step: 3.0 - step)
    path = own.workdir / "rounds/001/start/result.json"
    files.write_sealed(path, files.read_sealed(path) | {"schema": 99})
    (own.workdir / "rounds/001/best.json").unlink()
    with pytest.raises(UserError, match="a record of this run: schema 99: written by a later version"):
        rounds.play_round(own, 0, ref)


class Judge:
    """A scorer whose scores are `scores(phase, step)`."""

    def __init__(self, scorer, scores):
        self.scorer, self.scores, self.metric = scorer, scores, scorer.metric

    def __call__(self, params, at, purpose, index):
        found, images = self.scorer(params, at, purpose, index)
        return dataclasses.replace(found, values=found.values | {"fd_x100": self.scores(*at[:2])}), images


def test_every_command_reads_what_a_run_exports(done, tmp_path, capsys):
    """Breaks if best/params.safetensors is refused by a command, or is another network than best/."""
    _, workdir = done
    exported = str(workdir / "best" / "params.safetensors")
    images = []
    for what, out in ((exported, "a.npz"), (str(workdir), "b.npz")):
        sample.main([f"--checkpoint={what}", f"--out={tmp_path / out}", "--seeds=0-3", "--num_steps=2", "--batch=4"])
        with np.load(tmp_path / out) as made:
            images.append(made["arr_0"])
    np.testing.assert_array_equal(*images)
    assert exit_code(convert_command.main, [exported, str(tmp_path / "c.safetensors")]) == 0
    family, params, frozen = ddo_jax.load(exported)
    assert family.spec == ddo_jax.load(str(workdir)).family.spec
    flags = ["--network=digits", "--ref=digits", "--seeds=0-9", "--batch=10", "--num_steps=2"]
    evaluate_command.main([f"--checkpoint={exported}", f"--out={tmp_path / 'e.jsonl'}", *flags])
    (record,) = files.read_jsonl(tmp_path / "e.jsonl")
    assert record["protocol"]["sampler"]["num_steps"] == 2 and record["accuracy"] >= 0


def parked(setup):
    """Random parameters as a round takes them."""
    return sharding.Parked(sharding.place(setup.mesh, random_variables(setup.family.init)[0]))


def play(setup, workdir, scores, **changes):
    """One round in `workdir` whose evaluations are `scores(phase, step)`: (setup, start, after, `Round`)."""
    config = setup.config.copy_and_resolve_references()
    config.update(changes)
    place = dict(config=config, workdir=setup.workdir.__class__(workdir))
    own = dataclasses.replace(setup, scorer=Judge(setup.scorer, scores), **place)
    ref = parked(setup)
    return own, ref, *rounds.play_round(own, 0, ref)


def test_nothing_of_the_parameters_size_lies_beside_the_step(setup, new_workdir, monkeypatch):
    """Breaks if the start of the run or of the round, or the last best, keeps memory of the devices in a DDO step."""
    whole = jax.tree.map(np.asarray, jax.jit(setup.family.init)(jax.random.key(0))[0])
    shape, seen = max((x.shape for x in jax.tree.leaves(whole)), key=math.prod), []
    alike = sum(x.shape == shape for x in jax.tree.leaves(whole))
    gc.collect()
    before = sum(x.shape == shape for x in jax.live_arrays())

    def advance(self, done, *args):
        gc.collect()
        if done == 1:  # later Orbax may still be writing what it copied
            seen.append(sum(x.shape == shape for x in jax.live_arrays()) - before)
        return own(self, done, *args)

    own = loop._Loop.advance
    monkeypatch.setattr(loop._Loop, "advance", advance)
    play(setup, new_workdir("copies"), lambda _, step: float(step))
    # Parameters, their average, two moments; the reference. On a CPU what is parked is a view, and so one more.
    assert seen == [6 * alike, 6 * alike]


def test_a_worse_candidate_keeps_the_reference(setup, new_workdir):
    """Breaks if a round ends with its last or best candidate although the reference was better."""
    own, ref, after, summary = play(setup, new_workdir("worse"), lambda _, step: 1.0 if step == 0 else 2.0 + step)
    assert not summary.improved and after is ref
    assert any("reference is kept" in line for line in setup.console.lines)
    assert not list(own.workdir.glob("rounds/001/*/checkpoints/*"))


def test_a_tie_keeps_the_reference(setup, new_workdir):
    """Breaks if a candidate that is no better takes the reference's place."""
    _, ref, after, summary = play(setup, new_workdir("tie"), lambda *_: 1.0)
    assert not summary.improved and after is ref


def test_noise_levels_change_with_their_round(setup, tmp_path, monkeypatch):
    """Breaks if a new P_std comes one round late, or early."""
    seen = []

    def stop(setup, candidates):
        seen.append({c.hyper.sigma_law for c in candidates})
        raise InterruptedError

    config = setup.config.copy_and_resolve_references()
    config.ddo.update(p_mean=-0.4, p_std=1.2, p_std_from=((2, 3.0), (4, 4.0)), pool=0)
    place = dict(config=config, workdir=setup.workdir.__class__(tmp_path))
    own = dataclasses.replace(setup, scorer=Judge(setup.scorer, lambda *_: 1.0), **place)
    monkeypatch.setattr(rounds, "candidates", stop)
    ref = parked(setup)
    for index in range(4):
        with pytest.raises(InterruptedError):
            rounds.play_round(own, index, ref)
    assert seen == [{(-0.4, 1.2)}, {(-0.4, 3.0)}, {(-0.4, 3.0)}, {(-0.4, 4.0)}]


def test_the_best_step_of_the_best_candidate_wins(setup, new_workdir):
    """Breaks if the round takes the last step, the first candidate, or deletes what it chose; keep=all deletes none."""
    found = {("rounds/001/a4_b0.2", 1): 1.0}
    scores = {}
    for keep in ("best", "all"):
        workdir = new_workdir(keep)
        own, ref, after, summary = play(setup, workdir, lambda *at: found.get(at, 3.0), keep=keep)
        assert (summary.improved, summary.candidate, summary.best.step) == (True, "a4_b0.2", 1)
        kept = sorted(str(p.relative_to(workdir)) for p in workdir.glob("rounds/001/*/checkpoints/*"))
        best = "rounds/001/a4_b0.2/checkpoints/1"
        assert kept == [best] if keep == "best" else len(kept) == 4 and best in kept
        assert bool(list((workdir / "rounds/001/pool").glob("chunk-*"))) == (keep == "all")
        assert any(np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (ref(), after())), strict=True))
        scores[keep] = checkpoint.weights_digest(after())
    assert scores["best"] == scores["all"]  # and the second time: a run is a function of its config
    assert checkpoint.weights_digest(rounds.play_round(own, 0, ref)[0]()) == scores["all"]  # from the files


def test_interrupted_pruning_is_finished(setup, new_workdir):
    """Breaks if a kill between best.json and the end of the pruning leaves pool and losers for ever."""
    own, ref, *_ = play(setup, new_workdir("killed"), lambda _, step: float(step), keep="all")
    own.config.keep = "best"
    rounds.play_round(own, 0, ref)
    assert not list((own.workdir / "rounds/001/pool").glob("chunk-*"))
    assert not list(own.workdir.glob("rounds/001/*/checkpoints/*"))


def test_one_diverging_candidate_does_not_end_the_round(setup, new_workdir, monkeypatch):
    """Breaks if one alpha, beta of a grid takes the others down, or wins."""
    write = loop._Loop.write

    def diverging(self, done, totals):
        if self.phase.directory.name == "a4_b0.1":
            raise loop.Diverged("rounds/001/a4_b0.1: loss/real is nan between steps 1 and 2")
        return write(self, done, totals)

    monkeypatch.setattr(loop._Loop, "write", diverging)
    *_, summary = play(setup, new_workdir("diverging"), lambda _, step: 3.0 - step)
    assert summary.candidate == "a4_b0.2"
    assert any("the other candidates go on" in line for line in setup.console.lines)


def test_random_crops_reach_the_run(micro, tmp_path, monkeypatch):
    """Breaks if training data or held-out images are opened without the config's crop, or a plan is."""
    for i, size in enumerate([(9, 20), (14, 8), (30, 30)]):
        path = tmp_path / "raw" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, (i, 0, 0)).save(path)
    micro.data.update(name=str(tmp_path / "raw"), split="train[:2]", holdout="train[2:]", crop="var")
    micro.model.update(img_channels=3, label_dim=0, levels=256)
    micro.eval.network = "inception"
    monkeypatch.setattr(features, "check", lambda *args: None)  # its weights are not at hand
    data = checks.check(micro).data
    assert (data.name, len(data), data.image_shape) == ("folder:raw:train[:2], var 8", 2, (8, 8, 3))
    assert dry_run.at_hand(micro, check_network(micro)[0])["data"][0].startswith(data.name)
    run = types.SimpleNamespace(config=micro, data=data)
    distance = main_job.yardstick(run)["held-out images"].nearest
    assert distance == pytest.approx(8 * 2 / 255)  # of 64 pixels of red 2 to the nearest, red 1
    micro.data.crop = ""
    with pytest.raises(UserError, match="takes .8, 8, 3., but folder:raw:train.:2. has .20, 9, 3."):
        checks.check(micro)


def test_other_inputs_are_refused(tmp_path):
    """Breaks if a workdir continues on other data, or from other weights, under the same names."""
    workdir = rounds.epath.Path(tmp_path)
    check_inputs(workdir, {"data": "a", "start": "scratch"})
    check_inputs(workdir, {"data": "a", "start": "scratch"})
    with pytest.raises(UserError, match="other inputs .data: a -> b.;"):
        check_inputs(workdir, {"data": "b", "start": "scratch"})


def test_inputs_that_were_not_recorded(tmp_path):
    """Breaks if a workdir of an older version, which knew fewer inputs, does not continue, or never learns them."""
    workdir = rounds.epath.Path(tmp_path)
    check_inputs(workdir, {"data": "a"})
    check_inputs(workdir, {"data": "a", "features": "1f"})
    with pytest.raises(UserError, match="features: 1f -> 2e"):
        check_inputs(workdir, {"data": "a", "features": "2e"})


def test_moved_inputs_continue(tmp_path, micro):
    """Breaks if data or weights at another path with equal content are refused, or other content is not."""
    for name, content in (("a", b"one"), ("b", b"one"), ("c", b"two")):
        (tmp_path / f"{name}.npz").write_bytes(content)
    workdir = tmp_path / "run"

    def go(name, data):
        micro.eval.update(network="inception", weights=f"{tmp_path}/{name}.npz", reference=f"{tmp_path}/{name}.npz")
        micro.data.name = f"folder:{tmp_path}/{name}"
        inputs = {"data": data, "start": "scratch", **scoring_inputs(micro)}
        check_inputs(open_workdir(micro, workdir, inputs), inputs)

    go("a", "1f")
    go("b", "1f")
    assert json.loads((workdir / "config.json").read_text())["eval"]["weights"] == f"{tmp_path}/b.npz"
    with pytest.raises(UserError, match=r"config.data.name: folder:.*/b -> folder:.*/a .content 1f -> 2e."):
        go("a", "2e")
    with pytest.raises(UserError, match=r"config.eval.weights: .*b.npz -> .*c.npz .content inception \w+ -> inception"):
        go("c", "1f")
    micro.init = "elsewhere"
    with pytest.raises(UserError, match="config.init: scratch -> elsewhere"):
        open_workdir(micro, workdir, {"data": "1f", "start": "3d"})


def test_tidy_leaves_neighbours_alone(tmp_path):
    """Breaks if a workdir `r?` deletes the pool of `r1`."""
    for name in ("r?", "r1", "r[1]"):
        (tmp_path / name / "pool").mkdir(parents=True)
        (tmp_path / name / "pool" / "chunk-00000.npz").write_text("x")
    about = Protocol(n_samples=2, content="", size="", quantised_to="")
    best = Round(1, False, 1.0, "c", Evaluation("fd", {"fd": 2.0}, about, step=1))
    for name in ("r?", "r[1]"):
        assert rounds.tidy(rounds.epath.Path(tmp_path / name), best) == {"removed": 1}
    assert [p.parents[1].name for p in tmp_path.rglob("chunk*")] == ["r1"]


def test_a_full_disk_is_said_and_the_run_continues(setup, tmp_path, monkeypatch):
    """Breaks if a disk that fills up while the pool is written loses whole chunks, leaves torn ones, or is no line."""
    directory, replace, moved = rounds.epath.Path(tmp_path), os.replace, []
    ref = parked(setup)

    def second_is_full(source, target):
        if moved:
            raise OSError(errno.ENOSPC, "No space left on device")
        moved.append(target)
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", second_is_full)
        with pytest.raises(UserError, match="no space left on the disk; kept"), files.full_disk("kept"):
            fakes.make_pool(setup, directory, ref, 0)
    (first,) = tmp_path.iterdir()
    before = first.stat().st_mtime_ns
    assert fakes.make_pool(setup, directory, ref, 0)["chunks"] == 2
    assert len(list(tmp_path.iterdir())) == 2 and first.stat().st_mtime_ns == before


def test_the_digits_network_is_one_in_every_run(setup, micro, tmp_path):
    """Breaks if a run without a held-out split fits the digits' network on fewer images, and judges by another one."""
    micro.data.holdout = ""
    made = prepare(micro, tmp_path, Quiet())
    digests = [next(iter(s.scorer.evaluator.networks.values())).digest for s in (setup, made)]
    assert digests[0] == digests[1]
