"""Signals: the first one is heard by `check`, the second one ends the process; handlers are put back afterwards."""

import os
import signal
import subprocess
import sys

import pytest

from ddo_jax import cli, preemption


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_is_heard_at_the_next_check(signum, code, capfd):
    before = signal.getsignal(signum)
    with preemption.handled():
        preemption.check()
        os.kill(os.getpid(), signum)
        with pytest.raises(preemption.Preempted) as e:
            preemption.check()
    name = signal.Signals(signum).name
    assert e.value.code == code
    assert e.value.line == f"{name}: what was finished is kept; the same command continues"
    assert f"{name}: leaving at the next step; once more leaves at once" in capfd.readouterr().err
    assert signal.getsignal(signum) == before
    preemption.check()


def test_it_is_no_error_to_recover_from():
    assert not issubclass(preemption.Preempted, Exception)


def test_a_command_says_what_is_kept(capsys):
    with pytest.raises(SystemExit) as e, cli.leaving(), preemption.handled():
        os.kill(os.getpid(), signal.SIGTERM)
        raise preemption.Preempted("pretrain saved at step 7")
    assert e.value.code == 75
    assert capsys.readouterr().err == "SIGTERM: pretrain saved at step 7; the same command continues\n"


def test_a_second_signal_leaves_at_once():
    script = "import os, signal, time\nfrom ddo_jax import preemption\nwith preemption.handled():\n"
    script += "  for pause in (0, 0, 1.1): time.sleep(pause), os.kill(os.getpid(), signal.SIGTERM), print(pause)"
    done = subprocess.run(
        [sys.executable, "-uc", "import time\n" + script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 143 and done.stdout.split() == ["0", "0"], done.stderr
