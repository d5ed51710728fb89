"""Several jobs on one workdir: every task once, dead jobs replaced, living ones left alone."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

from etils import epath

from ddo_jax.run import search

ROOT = Path(__file__).parents[2]

JOB = """
import sys, time, pathlib
from etils import epath
from ddo_jax.run import search
root = epath.Path(sys.argv[1])
def task(i):
    def run():
        with open(root / "log", "a") as f:
            f.write(f"{i}\\n")
        time.sleep(0.1)
        return {"task": i}
    return search.Task(root / str(i), run)
results = search.divide([task(i) for i in range(6)], lease_s=60.0, poll_s=0.05)
assert [r["task"] for r in results] == list(range(6)), results
"""


def claim(directory: epath.Path, **fields):
    directory.mkdir(parents=True, exist_ok=True)
    content = {"job": "other", "host": "elsewhere", "pid": 1, "time": time.time(), **fields}
    (directory / "claim.json").write_text(json.dumps(content))


def test_two_jobs_do_every_task_once(tmp_path):
    """Breaks if a claim is not exclusive, or a job does not wait for the other's results."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", JOB, str(tmp_path)]
    jobs = [subprocess.Popen(command, env=environment, stderr=subprocess.PIPE) for _ in range(2)]
    for job in jobs:
        assert job.wait(timeout=120) == 0, job.stderr.read().decode()
        job.stderr.close()
    assert sorted((tmp_path / "log").read_text().split()) == list("012345")


def test_dead_job_of_this_host_is_replaced(tmp_path):
    """Breaks if a run does not continue at once after its own kill -9."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    claim(epath.Path(tmp_path), host=socket.gethostname(), pid=child.pid)
    assert search.take(epath.Path(tmp_path), lease_s=1e9)


def test_reused_process_id_is_a_dead_job(tmp_path):
    """Breaks if a restarted container (same host, same pid) waits for itself."""
    claim(epath.Path(tmp_path), host=socket.gethostname(), pid=os.getpid())
    assert search.take(epath.Path(tmp_path), lease_s=1e9)


def test_living_jobs_are_left_alone(tmp_path):
    """Breaks if a job takes what another is at: one on this host, one elsewhere with a fresh claim."""
    claim(epath.Path(tmp_path / "here"), host=socket.gethostname(), pid=os.getppid())
    claim(epath.Path(tmp_path / "there"))
    assert not search.take(epath.Path(tmp_path / "here"), lease_s=60.0)
    assert not search.take(epath.Path(tmp_path / "there"), lease_s=60.0)


def test_expired_lease_is_taken_over(tmp_path):
    """Breaks if the work of a lost host is never done."""
    claim(epath.Path(tmp_path / "hung"), host=socket.gethostname(), pid=os.getppid(), time=time.time() - 61)
    assert search.take(epath.Path(tmp_path / "hung"), lease_s=60.0)
    claim(epath.Path(tmp_path), time=time.time() - 61)
    assert search.take(epath.Path(tmp_path), lease_s=60.0)
    assert json.loads((tmp_path / "claim.json").read_text())["job"] == search.JOB


def test_two_jobs_find_one_dead_claim(tmp_path):
    """Breaks if the slower of two jobs that saw a dead claim takes away the claim of the faster one."""
    claim(epath.Path(tmp_path), job="faster")
    search._remove(epath.Path(tmp_path) / "claim.json", {"job": "dead"})
    assert json.loads((tmp_path / "claim.json").read_text())["job"] == "faster"
    search._remove(epath.Path(tmp_path) / "claim.json", {"job": "faster"})
    assert list(tmp_path.iterdir()) == []


def test_torn_claim_is_nobodys(tmp_path):
    """Breaks if a claim that cannot be read ends in a traceback, or is taken for the job's own."""
    (tmp_path / "claim.json").write_text("{")
    assert not search.take(epath.Path(tmp_path), lease_s=60.0)


def test_finished_tasks_are_not_done_again(tmp_path):
    """Breaks if a result is ignored, or the claim is left behind."""
    runs = []

    def run():
        runs.append(1)
        return {"value": 1}

    task = search.Task(epath.Path(tmp_path / "t"), run)
    assert search.divide([task], lease_s=60.0) == search.divide([task], lease_s=60.0) == [{"value": 1}]
    assert len(runs) == 1 and not (tmp_path / "t" / "claim.json").exists()


def test_heartbeat_keeps_a_claim_alive(tmp_path):
    """Breaks if an evaluation longer than the lease is taken over while its job lives."""
    claim(epath.Path(tmp_path), job=search.JOB, time=0.0)
    with search.heartbeat(epath.Path(tmp_path), lease_s=0.2):
        deadline = time.monotonic() + 10
        while json.loads((tmp_path / "claim.json").read_text())["time"] == 0.0 and time.monotonic() < deadline:
            time.sleep(0.01)
    assert time.time() - json.loads((tmp_path / "claim.json").read_text())["time"] < 60
