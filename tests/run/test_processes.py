"""Runs of several processes over loopback: equal to one process, stopped, killed, continued by more and by fewer.

Each test wants the machine for itself: `.ci/run` starts this file alone.
"""

import json
import shutil
import signal
import socket
import time

import numpy as np
import pytest

from tests.run import test_kill, test_search_jobs

pytestmark = pytest.mark.slow

# Rows that four devices divide, and less of everything: two processes on two cores wait for each other at every step.
SHORT = {"batch=50, report": "batch=52, report", "num=500": "num=208", "pool=2000": "pool=520"}
SHORT |= {"length.steps = 400": "length.steps = 80", "length.steps = 150": "length.steps = 60"}
SHORT |= {"eval_every.steps = 50": "eval_every.steps = 20", "eval_every.steps = 100": "eval_every.steps = 60"}
HEARTBEAT_S = 10
WAITING_S = 240


def config_file(folder, name: str, text: str = test_kill.CONFIG):
    for old, new in SHORT.items():
        assert old in text
        text = text.replace(old, new)
    (folder / name).write_text(text)
    return folder / name


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as s:
        return s.getsockname()[1]


def start(config, workdir, folder, *flags, number: int = 2, devices: int = 2) -> list:
    """So many processes of one run, each with so many devices."""
    port = free_port()
    hosts = [
        f"--coordinator=127.0.0.1:{port}",
        f"--num_processes={number}",
        f"--config.hosts.heartbeat_s={HEARTBEAT_S}",
    ]
    places = workdir if isinstance(workdir, list) else [workdir] * number
    counts = devices if isinstance(devices, list) else [devices] * number
    configs = config if isinstance(config, list) else [config] * number
    return [
        test_kill.start(configs[i], places[i], folder, *hosts, f"--process_id={i}", *flags, devices=counts[i])
        for i in range(number)
    ]


def finish(jobs: list) -> list[str]:
    return [test_kill.finish(job) for job in jobs]


def ended(jobs: list) -> tuple[list[int], list[str]]:
    """(exit codes, what they said)."""
    said = [job.communicate(timeout=WAITING_S)[1].decode() for job in jobs]
    return [job.returncode for job in jobs], said


def wait_for(jobs: list, moment) -> None:
    deadline = time.monotonic() + WAITING_S
    while not moment.exists():
        assert all(job.poll() is None for job in jobs) and time.monotonic() < deadline, moment
        time.sleep(0.005)


def scores(workdir) -> dict:
    """{(phase, step, seeds): score} of all evaluations of a run."""
    lines = [json.loads(line) for line in (workdir / "evals.jsonl").read_text().splitlines()]
    return {(e["phase"], e["step"], e["protocol"]["seeds"]): e[e["metric"]] for e in lines}


def assert_alike(a, b) -> None:
    """Equal up to the order of sums, which grows over a run."""
    one, other = scores(a), scores(b)
    assert one.keys() == other.keys() and len(one) >= 10
    np.testing.assert_allclose(list(one.values()), [other[key] for key in one], rtol=2e-2)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(folder, config, workdir of one process of four devices, of two processes of two)."""
    folder = tmp_path_factory.mktemp("processes")
    config = config_file(folder, "kill.py")
    test_kill.finish(test_kill.start(config, folder / "one", folder, devices=4))
    finish(start(config, folder / "two", folder))
    return folder, config, folder / "one", folder / "two"


def test_two_processes_are_one(whole):
    """Breaks if processes see other rows, seeds or fakes than one process, or decide differently."""
    assert_alike(*whole[2:])


def test_stopped_in_two_continued_by_one_and_by_four(whole):
    """Breaks if a signal to one process does not stop all at one step, or what they saved fits two only."""
    folder, config, one, two = whole
    stopped = folder / "stopped"
    jobs = start(config, stopped, folder)
    wait_for(jobs, stopped / "rounds/001/a4_b0.1/metrics.jsonl")
    jobs[1].send_signal(signal.SIGTERM)
    codes, said = ended(jobs)
    assert codes == [75, 75], said
    lines = [text.strip().splitlines()[-1] for text in said]
    assert lines[1].startswith("SIGTERM: ") and lines[0].startswith("another process was told to leave: ")
    assert lines[0].partition(": ")[2] == lines[1].partition(": ")[2] and " saved at step " in lines[0]
    assert lines[0].endswith("; the same command continues")
    assert not list(stopped.glob("rounds/**/claim.json"))
    shutil.copytree(stopped, folder / "by_four")
    test_kill.finish(test_kill.start(config, stopped, folder, devices=4))
    assert_alike(one, stopped)
    finish(start(config, folder / "by_four", folder, number=4, devices=1))
    assert_alike(two, folder / "by_four")


def test_one_is_killed(whole):
    """Breaks if the others hang when a process dies, or the run is not the same once it is started again."""
    folder, config, _, two = whole
    killed = folder / "killed"
    jobs = start(config, killed, folder)
    wait_for(jobs, killed / "rounds/001/pool/chunk-00005.npz")
    began = time.monotonic()
    jobs[1].kill()
    codes, said = ended(jobs)
    assert codes[1] == -signal.SIGKILL and codes[0] not in (0, 2, 75), said
    assert time.monotonic() - began < 6 * HEARTBEAT_S
    finish(start(config, killed, folder))
    assert (two / "best/params.safetensors").read_bytes() == (killed / "best/params.safetensors").read_bytes()


def test_fakes_as_training_goes(tmp_path):
    """Breaks if online fakes, kept scores of the reference or tokens depend on the number of processes."""
    name = "digits_var:runlocal"
    test_kill.finish(test_kill.start(name, tmp_path / "one", tmp_path, devices=4))
    finish(start(name, tmp_path / "two", tmp_path))
    assert_alike(tmp_path / "one", tmp_path / "two")


def test_a_search_of_two_jobs(whole):
    """Breaks if a job of two processes and a job of one do not divide a search, or decide differently together."""
    folder = whole[0]
    config = config_file(folder, "search.py", test_search_jobs.CONFIG.format(more=""))
    test_kill.finish(test_kill.start(config, folder / "alone", folder, devices=4))
    jobs = start(config, folder / "divided", folder)
    jobs.append(test_kill.start(config, folder / "divided", folder, devices=4))
    finish(jobs)
    one, divided = (test_search_jobs.record(folder / name) for name in ("alone", "divided"))
    assert one["tried"] == divided["tried"] and one["best"] == divided["best"]


def refused(jobs: list) -> str:
    """The line by which all processes refuse the run."""
    codes, said = ended(jobs)
    assert codes == [2] * len(jobs), said
    lines = {text.strip().splitlines()[-1] for text in said}
    assert len(lines) == 1, said
    return lines.pop()


def test_what_does_not_fit_together(whole):
    """Breaks if processes that cannot be one run start it, or one of them waits for ever."""
    folder, config, *_ = whole
    codes, said = ended(start(config, [folder / "a", folder / "b"], folder))
    assert codes == [2, 2], said
    for text, own in zip(said, "ab", strict=True):
        line = text.strip().splitlines()[-1]
        assert line.startswith(f"error: workdir {folder / own}: process 1 (") and "does not see what process 0" in line
    line = refused(start(config, folder / "c", folder, devices=[2, 1]))
    assert "process 1 has 1 devices, process 0 has 2" in line
    other = config_file(folder, "other.py", test_kill.CONFIG.replace("lr=2e-4", "lr=3e-4"))
    line = refused(start([config, other], folder / "d", folder))
    assert "config.ddo.lr: 0.0003 in process 1 (" in line and "0.0002 in process 0 (" in line
    assert not (folder / "d").exists()


def test_a_mistake_of_one_is_one_of_all(whole):
    """Breaks if a process whose data are missing leaves the others waiting."""
    folder, config, *_ = whole
    text = test_kill.CONFIG.replace('c.name = "kill"', 'c.name = "kill"\n    c.data.name = "folder:./images"')
    config = config_file(folder, "images.py", text)
    job = [f"--config.data.name=folder:{folder / 'nowhere'}"]
    codes, said = ended(start(config, folder / "e", folder, *job))
    assert codes == [2, 2] and all("nowhere" in text for text in said), said
