"""The accelerator script in little: every line at once, nothing that stops the rest."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def script(out, *flags):
    command = [sys.executable, "-m", "benchmarks.accelerator", f"--out={out}", *flags]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    return done, [json.loads(line) for line in (out / "accelerator.jsonl").read_text().splitlines()]


def test_arithmetic(tmp_path):
    """Breaks if a check's numbers are lost."""
    done, lines = script(tmp_path, "--minutes=4", "--only=arithmetic")
    assert done.returncode == 0, done.stderr
    assert lines[0]["check"] == "arithmetic" and lines[0]["dot_highest"]["like"] == "float32"
    assert lines[1]["result"] == "exit 0"


def test_a_check_without_time_is_named(tmp_path):
    """Breaks if what was left out looks as if it had never been asked for."""
    _, lines = script(tmp_path, "--minutes=0", "--only=digits")
    assert lines == [{"check": "digits", "result": "NOT RUN: no time left"}]


@pytest.mark.slow
def test_every_timed_check_in_little(tmp_path):
    """Breaks if a check's command line is not one, or its numbers do not come."""
    _, lines = script(tmp_path, "--minutes=9", "--only=parity,edm,edm2,var,sit")
    ended = {line["check"]: line["result"] for line in lines if "result" in line}
    assert ended == dict.fromkeys(("parity", "edm", "edm2", "var", "sit"), "exit 0")
    assert {"accelerator/edm2_in64/ddo", "edm/sample", "var_step/digits_var", "sit/half"} <= {
        line.get("benchmark") for line in lines
    }


def test_unknown_check_is_one_line(tmp_path):
    """Breaks if a misspelt check is skipped."""
    command = [sys.executable, "-m", "benchmarks.accelerator", "--only=arithmetics"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "arithmetics; allowed: arithmetic, parity" in done.stderr
