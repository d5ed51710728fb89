"""A run whose files were damaged: the same command ends as if nothing had been, says so, or says one line."""

import json
import shutil

import numpy as np
import pytest

from ddo_jax import files
from ddo_jax.data import tree
from ddo_jax.errors import UserError
from ddo_jax.run import main_job
from tests.harness import micro_config


@pytest.fixture(scope="module")
def finished(tmp_path_factory, fitted):
    """(config, workdir of a finished run that kept everything)."""
    workdir = tmp_path_factory.mktemp("finished")
    shutil.copy(fitted[1], workdir)
    config = micro_config()
    config.keep = "all"
    main_job.run(config, workdir)
    return config, workdir


UNDECIDED = ("rounds/001/best.json", "rounds/001/ratios", "rounds/001/a4_b0.2", "control", "report", "best")


@pytest.fixture
def workdir(finished, tmp_path):
    """A copy of it to damage; and the function that takes it back to the middle of its round."""
    copy = tmp_path / "w"
    shutil.copytree(finished[1], copy)
    tree.warn.cache_clear()
    return copy


def back(workdir):
    for name in UNDECIDED:
        path = workdir / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def result(workdir):
    """What a run decided: candidate and step, weights, every score."""
    best = json.loads((workdir / "rounds/001/best.json").read_text())
    evals = files.read_jsonl(workdir / "evals.jsonl")
    scores = sorted((e["phase"], e["step"], str(e["protocol"]["seeds"]), e["fd_x100"]) for e in evals)
    return best["candidate"], best["step"], (workdir / "best/params.safetensors").read_bytes(), scores


def damaged(data: bytes, how: str) -> bytes | None:
    at = next((i for i in range(len(data) // 2, len(data)) if chr(data[i]).isdigit()), len(data) // 2)
    digit = b"7" if data[at : at + 1] != b"7" else b"3"
    return {"gone": None, "empty": b"", "half": data[: len(data) // 2], "digit": data[:at] + digit + data[at + 1 :]}[
        how
    ]


def damage(path, how: str) -> None:
    data = damaged(path.read_bytes(), how)
    path.unlink() if data is None else path.write_bytes(data)


MADE_AGAIN = [
    ("rounds/001/start/result.json", "digit"),
    pytest.param(*("rounds/001/a4_b0.1/result.json", "digit"), marks=pytest.mark.slow),
    pytest.param(*("rounds/001/pool/result.json", "half"), marks=pytest.mark.slow),
    ("rounds/001/pool/chunk-00001.npz", "gone"),
    ("features-digits.npz", "half"),
    ("pretrain/result.json", "empty"),
    pytest.param(*("pretrain/metrics.jsonl", "digit"), marks=pytest.mark.slow),
]


@pytest.mark.parametrize("name, how", MADE_AGAIN)
def test_in_the_middle_of_a_round(finished, workdir, name, how, capsys):
    """Breaks if a changed score, a lost chunk or a torn record changes what the round decides, or stops it."""
    back(workdir)
    damage(workdir / name, how)
    main_job.run(finished[0], workdir)
    assert result(workdir) == result(finished[1])
    if not name.endswith(".jsonl"):
        assert f"{workdir / name}" in capsys.readouterr().err


def test_exchanged_chunks(finished, workdir, capsys):
    """Breaks if rows of fakes stand at each other's places."""
    back(workdir)
    a, b = (workdir / f"rounds/001/pool/chunk-0000{i}.npz" for i in range(2))
    first, second = a.read_bytes(), b.read_bytes()
    a.write_bytes(second), b.write_bytes(first)
    main_job.run(finished[0], workdir)
    assert result(workdir) == result(finished[1]) and "does not match its digest" in capsys.readouterr().err


def test_another_feature_network(finished, workdir, capsys):
    """Breaks if candidates of one round are judged by two networks."""
    back(workdir)
    path = workdir / "features-digits.npz"
    with np.load(path) as arrays:
        np.savez(path, **{k: v * 1.01 for k, v in arrays.items()})
    main_job.run(finished[0], workdir)
    assert result(workdir) == result(finished[1])
    assert "not the network that this run is judged by: made again" in capsys.readouterr().err


FINISHED = [
    ("best/params.safetensors", "gone"),
    ("best/params.safetensors", "digit"),
    ("best/checkpoints/0/meta/metadata", "half"),
    ("best/config.json", "digit"),
    ("rounds/001/best.json", "digit"),
    ("report/scores/ddo/result.json", "empty"),
    ("classes.json", "half"),
    ("report/report.md", "gone"),
]


@pytest.mark.parametrize("name, how", FINISHED)
def test_of_a_finished_run(finished, workdir, name, how):
    """Breaks if the report is printed over a result that is gone, or a record's other digit is believed."""
    damage(workdir / name, how)
    main_job.run(finished[0], workdir)
    assert result(workdir) == result(finished[1])
    assert (workdir / name).stat().st_size > 0


LINES = [
    ("config.json", "digit", "config.json: its content does not match its checksum; put back a copy"),
    ("config.json", "half", "config.json: not JSON .*; put back a copy"),
    ("inputs.json", "digit", "inputs.json: its content does not match its checksum; put back a copy"),
    ("inputs.json", "empty", "inputs.json: empty; put back a copy"),
    ("pretrain/checkpoints/3/meta/metadata", "digit", "pretrain/checkpoints/3: .*once .*pretrain and what came of it"),
]


@pytest.mark.parametrize("name, how, words", LINES)
def test_what_cannot_be_made_again_is_one_line(finished, workdir, name, how, words):
    """Breaks if it is a traceback, or the file and the mend are not named."""
    damage(workdir / name, how)
    with pytest.raises(UserError, match=words) as e:
        main_job.run(finished[0], workdir)
    assert "\n" not in str(e.value)


def test_a_lost_result_of_a_decided_round_is_said(finished, workdir, capsys):
    """Breaks if lines leave evals.jsonl without a word."""
    damage(workdir / "rounds/001/a4_b0.2/result.json", "gone")
    main_job.run(finished[0], workdir)
    assert "a4_b0.2: its result is lost" in capsys.readouterr().err
    assert len(result(workdir)[3]) < len(result(finished[1])[3])


def test_what_killed_writers_left_is_removed(finished, workdir):
    """Breaks if temporary files of a killed job, a chunk of a pool perhaps, stay for ever."""
    back(workdir)
    left = workdir / "rounds/001/pool" / f".chunk-00007.npz.{files.host_id()}-{2**22 + 1}-{'0' * 16}.tmp"
    left.write_bytes(b"x")
    main_job.run(finished[0], workdir)
    assert not left.exists() and not list(workdir.rglob("*.tmp"))


def test_a_workdir_of_an_older_version(finished, workdir, capsys):
    """Breaks if records without checksums, pools without digests or checkpoints without a score do not continue."""
    back(workdir)
    records = [*workdir.rglob("*.json"), *workdir.rglob("checkpoints/*/meta/metadata")]
    for path in records:
        value = json.loads(path.read_text())
        if isinstance(value, dict):
            new = ("checksum", "score", "seeds", "features", *(["digests"] if path.parent.name == "pool" else []))
            path.write_text(json.dumps({k: v for k, v in value.items() if k not in new}, indent=1))
    for path in workdir.rglob("chunk-*.npz"):
        with np.load(path) as arrays:
            np.savez(path, images=arrays["images"], labels=arrays["labels"])
    main_job.run(finished[0], workdir)
    assert result(workdir) == result(finished[1]) and "warning" not in capsys.readouterr().err
