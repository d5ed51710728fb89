"""10,000 damaged and hostile inputs through the functions of the commands (tests/fuzz.py)."""

import subprocess
import sys
from pathlib import Path

import pytest

GROUPS = ("nvidia,edm2", "torch-zip,torch-legacy,safetensors,references,image npz,image zip,image folder")
GROUPS += ("data zip,data folder,pool",)


@pytest.mark.slow
@pytest.mark.parametrize("kinds", GROUPS)
def test_ten_thousand_inputs(kinds):
    """Breaks if a file executes something, hangs, fills the memory, or ends in anything but one line."""
    command = [sys.executable, str(Path(__file__).parent / "fuzz.py"), "--count=10000", f"--kinds={kinds}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1500)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    for line in done.stdout.splitlines()[1:]:
        assert int(line[14:].split()[1]) > 0, f"the mutations leave nothing whole, so that they show little: {line}"


def test_what_is_wrong_is_seen(tmp_path):
    """Breaks if the harness would not notice a hang, an execution, another exception, or more than one line."""
    code = f"""
import os, sys, time, pathlib
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
import signal
from tests import fuzz
from ddo_jax.errors import UserError
fuzz.SECONDS = 0.2
sys.addaudithook(fuzz._hook)
signal.signal(signal.SIGALRM, fuzz._alarm)
def lines(path): raise UserError("one\\ntwo")
reads = dict(hang=lambda p: time.sleep(9), executed=lambda p: os.system("true"), Zero=lambda p: 1 / 0, lines=lines)
for name, read in reads.items():
    fuzz.KINDS[name] = (lambda r, f: f, read, 1)
    print(name, fuzz.attempt(name, 0, 0, pathlib.Path({str(tmp_path)!r})))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    lines = done.stdout.splitlines()
    wanted = ("hang hang", "executed executed", "Zero ZeroDivisionError", "lines not one line")
    assert len(lines) == 4 and all(map(str.startswith, lines, wanted)), done.stdout + done.stderr
