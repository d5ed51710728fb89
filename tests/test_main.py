"""The command line: one line, exit code 2, nothing written."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def command(*flags, cwd=ROOT, **environment):
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", **environment}
    line = [sys.executable, "-m", "ddo_jax.main", *flags]
    return subprocess.run(line, cwd=cwd, env=variables, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return str(tmp_path_factory.getbasetemp() / "tfds")


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--config.ddo.alhpa=3"], "'alhpa'. Did you mean \"alpha\""),
        (["--config.ddo.lr=abc"], "--config.ddo.lr=abc: could not convert"),
        (["--config.ddo.alpha=0"], "config.ddo.alpha: 0; allowed: finite numbers above 0"),
        (["--config=configs/nowhere.py"], "configs/nowhere.py"),
        (["--config=configs/digits.py:small"], "allowed: auto, neon, runlocal, unet"),
        (["--config.ddo.steps=None"], "unknown config key"),
        (["--config.seed=None"], "config.seed: None; allowed: a int"),
        (["--config.init=runs/nowhere"], "runs/nowhere: no such file"),
        (["digits"], "unexpected argument 'digits'"),
    ],
)
def test_mistakes_are_one_line(tmp_path, flags, words):
    """Breaks if a mistake of the user ends in a traceback, another exit code, or a file."""
    done = command(f"--workdir={tmp_path / 'w'}", *flags)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert words in done.stderr
    assert not (tmp_path / "w").exists()


def test_workdir_that_cannot_be_written(tmp_path, digits):
    """Breaks if hours pass before the run notices where it cannot write."""
    (tmp_path / "file").write_text("")
    done = command(f"--workdir={tmp_path / 'file' / 'w'}", TFDS_DATA_DIR=digits)
    assert done.returncode == 2 and done.stderr.startswith("error: workdir "), done.stderr
    assert done.stderr.count("\n") == 1


def test_workdir_of_another_config(tmp_path, digits):
    """Breaks if a run continues in the workdir of another one, or does not show the difference."""
    config = runpy.run_path(str(ROOT / "configs" / "digits.py"))["get_config"]("")
    config.ddo.lr = 0.5
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    done = command(f"--workdir={tmp_path}", TFDS_DATA_DIR=digits)
    assert done.returncode == 2 and done.stderr.startswith("error: workdir "), done.stderr
    assert done.stderr.count("\n") == 1 and "config.ddo.lr: 0.5 -> 0.0003" in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


def test_dry_run_from_anywhere(tmp_path, digits):
    """Breaks if --dry_run needs the checkout as current directory, writes, or leaves out a promised figure."""
    done = command("--dry_run", cwd=tmp_path, TFDS_DATA_DIR=digits)
    assert done.returncode == 0, done.stderr
    for words in ("ddo.beta = [0.2]", "64,864 parameters", "MFLOP", "memory", "disk", "3 rounds", "4096 fakes"):
        assert words in done.stdout, words
    assert list(tmp_path.iterdir()) == []


def test_none_unsets(tmp_path, digits):
    """Breaks if the unit of a duration cannot be changed by flags, or None becomes a word."""
    flags = ["--config=configs/digits.py:runlocal", "--config.ddo.length.steps=None", "--config.ddo.length.mimg=0.01"]
    done = command("--dry_run", *flags, "--config.eval.weights", "None", TFDS_DATA_DIR=digits)
    assert done.returncode == 0, done.stderr
    for words in ("ddo.length.steps = None", "ddo.length.mimg = 0.01", "eval.weights = None"):
        assert words in done.stdout, words


def test_home_and_names_that_cannot_be(tmp_path, digits):
    """Breaks if ~ makes a folder of that name, or a folder that loses checkpoints is found out after training."""
    home = {"HOME": str(tmp_path), "TFDS_DATA_DIR": digits}
    done = command("--workdir=~/new/a\\b/w", "--config=~/mine.py", cwd=tmp_path, **home)
    assert done.returncode == 2 and "error: --config: ~/mine.py: no such file" in done.stderr
    (tmp_path / "mine.py").write_text((ROOT / "configs" / "digits.py").read_text())
    done = command("--workdir=~/new/a\\b/w", "--config=~/mine.py:runlocal", cwd=tmp_path, **home)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1 and "a\\\\b/w" in done.stderr and "a backslash in the path" in done.stderr
    assert sorted(p.name for p in tmp_path.iterdir() if p.name[0] != ".") == ["mine.py"]
