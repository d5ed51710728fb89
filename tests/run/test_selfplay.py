"""The whole job in little: what it leaves behind, run again, continued, judged."""

import dataclasses
import json

import jax
import numpy as np
import pytest

import ddo_jax
from ddo_jax import files
from ddo_jax.errors import UserError
from ddo_jax.run import prepare, rounds, selfplay
from ddo_jax.run.checkpoint import restore_ema


@pytest.fixture(scope="module")
def done(tmp_path_factory, fitted):
    """A finished run of the micro config: (config, workdir)."""
    from .conftest import micro_config

    workdir = tmp_path_factory.mktemp("run")
    (workdir / "features-digits.npz").write_bytes(fitted[1].read_bytes())
    config = micro_config()
    selfplay.run(config, workdir)
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
    assert not (workdir / "rounds/001/pool").exists()


def test_the_same_command_again_does_nothing(done):
    """Breaks if a finished run trains, samples or judges again."""
    config, workdir = done
    results = [p for p in workdir.rglob("result.json")]
    before = {p: p.stat().st_mtime_ns for p in results}
    text = (workdir / "report" / "report.md").read_text()
    selfplay.run(config, workdir)
    assert {p: p.stat().st_mtime_ns for p in results} == before and len(results) > 8
    assert (workdir / "report" / "report.md").read_text() == text


def test_other_config_is_refused(done):
    """Breaks if a workdir mixes two experiments; harmless keys may change."""
    config, workdir = done
    other = config.copy_and_resolve_references()
    other.log.every = 7
    prepare.open_workdir(other, workdir)
    other.ddo.lr = 0.5
    before = (workdir / "config.json").read_bytes()
    with pytest.raises(UserError, match=r"config.ddo.lr: 0.001 -> 0.5"):
        prepare.open_workdir(other, workdir)
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
    selfplay.run(config, second)
    paths = (workdir / "report/scores/ddo/result.json", second / "report/scores/start/result.json")
    scores = [[e["fd_x100"] for e in files.read_json(p)["evals"]] for p in paths]
    assert scores[0] == scores[1]


def test_a_worse_candidate_keeps_the_reference(setup, new_workdir):
    """Breaks if a round ends with its last or best candidate although the reference was better."""
    own = setup._replace(workdir=setup.workdir.__class__(new_workdir("worse")))
    evaluate = setup.tools.evaluate

    def flattering(params, phase, step, purpose, index):
        record, images = evaluate(params, phase, step, purpose, index)
        return {**record, "fd_x100": 1.0 if step == 0 else 2.0 + step}, images

    own = own._replace(tools=dataclasses.replace(setup.tools, evaluate=flattering))
    ref = jax.tree.map(np.asarray, setup.tools.family.init(jax.random.key(0))[0])
    after, summary = rounds.play_round(own, 0, ref)
    assert not summary["improved"] and after is ref
    assert any("reference is kept" in line for line in setup.tools.console.lines)
