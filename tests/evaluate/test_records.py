"""Records of evaluations: names, the two older forms, what made a number."""

import subprocess

import pytest

from ddo_jax import __version__
from ddo_jax.evaluate import records

IN_RUN = {  # schema 1, before 2026-12: a line of a run's evals.jsonl
    "images": 38400,
    "phase": "rounds/001/a4_b0.2",
    "step": 300,
    "metric": "fd_x100",
    "fd_x100": 7.898,
    "fd_x100_test": 18.1,
    "accuracy": 0.99,
    "protocol": {
        "purpose": "select",
        "n_samples": 2048,
        "seeds": [1000000000, 1000002047],
        "time": "2026-11-20T10:00:00+00:00",
        "weights": "910147cc",
        "labels": "balanced by position",
        "ema": {"pretrain": "half-life 0.04 million images", "ddo": "none"},
        "quantised_to": "17 levels",
        "features": "digits classifier, 32 features 579ac7e9",
        "scale": 100.0,
        "references": {"train": "digits:train ad96de9e (1437 images)"},
        "precision": "highest",
        "commit": "abc",
        "jax": "0.10.2",
        "flax": "0.12.8",
        "device": "cpu",
        "sampler": {"solver": "var", "cfg": 1.0},
        "nfe": 35,
        "guidance": 1.0,
    },
}
OF_THE_COMMAND = {
    "what": "samples.npz",
    "metric": "fid5k",
    "fid5k": 3.5,
    "protocol": {
        "n_samples": 5000,
        "content": "04b9a5f4",
        "images": "npz:samples.npz",
        "labels": "as stored",
        "quantised_to": "uint8 as stored",
        "class_balance": {"verdict": "unknown"},
        "size": "32x32x3",
        "reference": "cifar10.npz 1234 (50000 images)",
        "features": {"inception": "FID-Inception 99"},
        "resize": {"inception": "TF1"},
        "is": "blocks of 5000",
        "commit": "abc",
    },
}


def test_a_line_of_an_older_run_is_read():
    """Breaks if an old workdir cannot be continued, or its numbers lose their protocol."""
    found = records.read(IN_RUN)
    assert (found.phase, found.step, found.images, found.score) == ("rounds/001/a4_b0.2", 300, 38400, 7.898)
    assert found.values == {"fd_x100": 7.898, "fd_x100_test": 18.1, "accuracy": 0.99}
    p = found.protocol
    assert (p.seeds, p.guidance, p.content) == ("1000000000-1000002047", {"cfg": 1.0}, "not recorded")
    assert p.features == {"main": "digits classifier, 32 features 579ac7e9"} and p.dtype is None
    assert records.read(found.record()) == found  # and from now on it is one of today's


def test_a_line_of_the_older_command_is_read():
    """Breaks if the command's evals.jsonl of yesterday is another language."""
    found = records.read(OF_THE_COMMAND)
    assert (found.phase, found.score) == ("samples.npz", 3.5)
    assert found.protocol.references == {"reference": "cifar10.npz 1234 (50000 images)"}
    assert found.protocol.metrics == {"is": "blocks of 5000"}
    assert records.read(found.record()) == found


@pytest.mark.parametrize("record", [{}, {"metric": "fid"}, {**IN_RUN, "schema": 99}, {**IN_RUN, "protocol": {}}, []])
def test_what_is_no_record(record):
    """Breaks if something else is taken for an evaluation, or one of a later version is misread."""
    with pytest.raises(ValueError, match="no record of an evaluation|later version"):
        records.read(record)


def test_rounds_go_and_come_back():
    """Breaks if best.json of a round is not what it was written from; older ones have no schema."""
    best = records.Round(2, True, 8.1, "a4_b0.2", records.read(IN_RUN))
    assert records.read_round(best.record()) == best
    old = {"round": 2, "improved": True, "start": 8.1, "candidate": "a4_b0.2", **IN_RUN}
    assert records.read_round(old) == best


def test_only_our_own_commit_is_recorded(tmp_path):
    """Breaks if the commit of whatever repository lies around the installed package is taken for ours."""
    around = tmp_path / "somebody"
    inside = around / "site-packages"
    (inside / "ddo_jax" / "core").mkdir(parents=True)
    (inside / "ddo_jax" / "core" / "ddo.py").write_text("")
    commit = ["-c", "user.name=a", "-c", "user.email=b", "commit", "-q", "--allow-empty", "-m", "x"]
    for line in (["init", "-q"], commit):
        subprocess.run(["git", *line], cwd=around, check=True)
    assert records.commit(inside) == f"ddo_jax {__version__}"
    assert records.commit(around) == f"ddo_jax {__version__}"  # its top, but not ours
