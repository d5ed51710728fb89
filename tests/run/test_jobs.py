"""Several jobs on one workdir: every task once, dead jobs replaced, living ones left alone."""

import errno
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from etils import epath

from ddo_jax import files, preemption
from ddo_jax.errors import UserError
from ddo_jax.run import jobs

ROOT = Path(__file__).parents[2]

JOB = """
import sys, time, pathlib
from etils import epath
from ddo_jax.run import jobs
root = epath.Path(sys.argv[1])
def task(i):
    def run():
        with open(root / "log", "a") as f:
            f.write(f"{i}\\n")
        time.sleep(0.1)
        return {"task": i}
    return jobs.Task(root / str(i), run)
results = jobs.divide([task(i) for i in range(6)], lease_s=60.0, poll_s=0.05)
assert [r["task"] for r in results] == list(range(6)), results
"""


def claim(directory: epath.Path, age: float = 0.0, **fields):
    """A claim, written `age` seconds ago by the file system's clock."""
    directory.mkdir(parents=True, exist_ok=True)
    content = {"job": "other", "host": "elsewhere", "pid": 1, "time": time.time(), **fields}
    (directory / "claim.json").write_text(json.dumps(content))
    os.utime(directory / "claim.json", (time.time() - age,) * 2)


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
    assert jobs.take(epath.Path(tmp_path), lease_s=1e9)


def test_reused_process_id_is_a_dead_job(tmp_path):
    """Breaks if a restarted container (same host, same pid) waits for itself."""
    claim(epath.Path(tmp_path), host=socket.gethostname(), pid=os.getpid())
    assert jobs.take(epath.Path(tmp_path), lease_s=1e9)


def test_living_jobs_are_left_alone(tmp_path):
    """Breaks if a job takes what another is at: one on this host, one elsewhere with a fresh claim."""
    claim(epath.Path(tmp_path / "here"), host=socket.gethostname(), pid=os.getppid())
    claim(epath.Path(tmp_path / "there"))
    assert not jobs.take(epath.Path(tmp_path / "here"), lease_s=60.0)
    assert not jobs.take(epath.Path(tmp_path / "there"), lease_s=60.0)


def test_expired_lease_is_taken_over(tmp_path):
    """Breaks if the work of a lost host is never done."""
    claim(epath.Path(tmp_path / "hung"), age=61, host=socket.gethostname(), pid=os.getppid())
    assert jobs.take(epath.Path(tmp_path / "hung"), lease_s=60.0)
    claim(epath.Path(tmp_path), age=61)
    assert jobs.take(epath.Path(tmp_path), lease_s=60.0)
    assert json.loads((tmp_path / "claim.json").read_text())["job"] == jobs.JOB


@pytest.mark.parametrize("ahead", [3600, -3600])
def test_the_clocks_of_two_hosts_are_not_compared(tmp_path, ahead, monkeypatch):
    """Breaks if a claim of a host whose clock is wrong is trusted for that long, or taken from a living job."""
    monkeypatch.setattr(jobs, "_WATCH", jobs.Watch())
    claim(epath.Path(tmp_path), time=time.time() + ahead)
    assert not jobs.take(epath.Path(tmp_path), lease_s=60.0)
    claim(epath.Path(tmp_path), age=-3600, time=time.time() + ahead)  # even the file system's own clock went back
    assert not jobs.take(epath.Path(tmp_path), lease_s=0.2)
    time.sleep(0.3)
    assert jobs.take(epath.Path(tmp_path), lease_s=0.2)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"job": 1}', b"\xff\xfe", b"[" * 100_000, b'{"pid": 1e999}'])
def test_a_claim_that_cannot_be_read_lapses(tmp_path, content, monkeypatch):
    """Breaks if a write that was cut off is waited for for ever, ends in a traceback, or is taken at once."""
    monkeypatch.setattr(jobs, "_WATCH", jobs.Watch())
    path = tmp_path / "claim.json"
    path.write_bytes(content)
    assert not jobs.take(epath.Path(tmp_path), lease_s=60.0)
    os.utime(path, (time.time() - 61,) * 2)
    assert jobs.take(epath.Path(tmp_path), lease_s=60.0)
    assert json.loads(path.read_text())["job"] == jobs.JOB


@pytest.mark.parametrize("links", [True, False])
def test_a_claim_is_whole_on_every_file_system(tmp_path, links, monkeypatch):
    """Breaks if a file system without hard links shows a claim before its content, lets two in, or keeps a lock."""
    path = epath.Path(tmp_path) / "claim.json"
    if not links:

        def refused(*_):
            raise OSError(errno.EPERM, "Operation not permitted")

        monkeypatch.setattr(os, "link", refused)
    assert files.create_exclusive(path, b"one") and not files.create_exclusive(path, b"two")
    assert path.read_bytes() == b"one" and [p.name for p in tmp_path.iterdir()] == ["claim.json"]
    path.unlink()
    (tmp_path / ".claim.json.lock").mkdir()  # of a job that was killed just there
    if not links:
        assert not files.create_exclusive(path, b"three")
        os.utime(tmp_path / ".claim.json.lock", (0, 0))
        assert not files.create_exclusive(path, b"three")
    assert files.create_exclusive(path, b"three")


def test_a_task_that_does_not_go_on_lapses(tmp_path):
    """Breaks if the heartbeat of a hung job keeps all others waiting for ever, or the late one writes a result."""
    texts = []
    task = epath.Path(tmp_path / "t")

    def run():
        other = {"job": "fast", "host": "elsewhere", "pid": 1}
        deadline = time.monotonic() + 30
        while time.time() - os.stat(task / "claim.json").st_mtime < 0.5:  # it lapses
            assert time.monotonic() < deadline
            time.sleep(0.02)
        (task / "claim.json").write_text(json.dumps(other))
        files.write_sealed(task / "result.json", {"by": "fast"})
        while not jobs._Progress.lost:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        jobs.progress()
        raise AssertionError("goes on")

    assert jobs.divide([jobs.Task(task, run)], 0.4, 0.05, texts.append, stall_s=0.3) == [{"by": "fast"}]
    assert "another has taken it over" in texts[0]
    jobs.progress()  # what comes after goes on
    assert json.loads((task / "claim.json").read_text())["job"] == "fast"


def test_progress_keeps_a_claim(tmp_path):
    """Breaks if a task that goes on loses its claim to the limit for those that do not."""
    task = epath.Path(tmp_path / "t")

    def run():
        for _ in range(20):
            time.sleep(0.05)
            jobs.progress()
        return {"done": time.time() - os.stat(task / "claim.json").st_mtime}

    (result,) = jobs.divide([jobs.Task(task, run)], 0.4, stall_s=0.3)
    assert result["done"] < 0.4


@pytest.mark.parametrize("content", ["", "{", "[]", '{"value": 2, "checksum": "0"}', "[" * 100_000])
def test_a_damaged_result_is_made_again(tmp_path, content, capsys):
    """Breaks if a torn or changed result ends in a traceback, or is believed."""
    task = jobs.Task(epath.Path(tmp_path / "t"), lambda: {"value": 1})
    jobs.divide([task], 60.0)
    good = (tmp_path / "t" / "result.json").read_text()
    (tmp_path / "t" / "result.json").write_text(content)
    assert jobs.divide([task], 60.0) == [{"value": 1}]
    assert "t/result.json: " in capsys.readouterr().err and (tmp_path / "t" / "result.json").read_text() == good
    (tmp_path / "t" / "result.json").write_text(good.replace('"value": 1', '"value": 7'))
    assert jobs.divide([task], 60.0) == [{"value": 1}]


def test_what_a_task_made_is_looked_at(tmp_path, capsys):
    """Breaks if a finished task whose files are gone counts as done, or one that never comes right is done for ever."""
    path = tmp_path / "made"

    def run():
        path.write_text("x")
        return {"value": 1}

    task = jobs.Task(epath.Path(tmp_path / "t"), run, lambda _: "" if path.exists() else f"{path} is missing")
    jobs.divide([task], 60.0)
    path.unlink()
    jobs.divide([task], 60.0)
    assert path.exists() and f"{path} is missing: made again" in capsys.readouterr().err
    with pytest.raises(UserError, match="not as it was written"):
        jobs.divide([jobs.Task(epath.Path(tmp_path / "u"), run, lambda _: "wrong")], 60.0)


@pytest.mark.parametrize("where", ["t", "."])
def test_a_file_in_place_of_a_folder(tmp_path, where):
    """Breaks if it ends in a traceback."""
    path = tmp_path / "task"
    path.write_text("")
    with pytest.raises(UserError, match="a file is where"):
        jobs.divide([jobs.Task(epath.Path(path / where) if where == "t" else epath.Path(path), dict)], 60.0)


def test_two_jobs_find_one_dead_claim(tmp_path):
    """Breaks if the slower of two jobs that saw a dead claim takes away the claim of the faster one."""
    claim(epath.Path(tmp_path), job="faster")
    path, dead = epath.Path(tmp_path) / "claim.json", b'{"job": "dead", "host": "h", "pid": 1}'
    files.remove_if(path, dead, jobs._of_one_job)
    assert json.loads((tmp_path / "claim.json").read_text())["job"] == "faster"
    files.remove_if(path, dead.replace(b"dead", b"faster"), jobs._of_one_job)
    assert list(tmp_path.iterdir()) == []


def test_finished_tasks_are_not_done_again(tmp_path):
    """Breaks if a result is ignored, or the claim is left behind."""
    runs = []

    def run():
        runs.append(1)
        return {"value": 1}

    task = jobs.Task(epath.Path(tmp_path / "t"), run)
    assert jobs.divide([task], lease_s=60.0) == jobs.divide([task], lease_s=60.0) == [{"value": 1}]
    assert len(runs) == 1 and not (tmp_path / "t" / "claim.json").exists()


def test_heartbeat_keeps_a_claim_alive(tmp_path):
    """Breaks if an evaluation longer than the lease is taken over while its job lives."""
    claim(epath.Path(tmp_path), job=jobs.JOB, time=0.0)
    with jobs.heartbeat([epath.Path(tmp_path)], lease_s=0.2):
        deadline = time.monotonic() + 10
        while json.loads((tmp_path / "claim.json").read_text())["time"] == 0.0 and time.monotonic() < deadline:
            time.sleep(0.01)
    assert time.time() - json.loads((tmp_path / "claim.json").read_text())["time"] < 60


def test_tasks_at_once(tmp_path):
    """Breaks if a group holds fewer or more tasks than it may, takes one that another job has, or mixes up results."""
    tasks = [jobs.Task(epath.Path(tmp_path / name), dict) for name in "abcde"]
    (tmp_path / "b").mkdir()
    claim(tasks[1].directory, job="another", pid=1, time=time.time())
    seen = []

    def run(group):
        seen.append([t.directory.name for t in group])
        if len(seen) == 2:  # the other job ends
            (tmp_path / "b/claim.json").unlink()
        assert all((t.directory / "claim.json").exists() for t in group)
        return [{"name": t.directory.name} for t in group]

    results = jobs.divide(tasks, lease_s=600.0, poll_s=0.01, group=jobs.Group(3, run))
    assert seen == [["a", "c", "d"], ["e"], ["b"]]
    assert [r["name"] for r in results] == list("abcde") and not list(tmp_path.glob("*/claim.json"))


def test_a_group_that_fails_leaves_no_result(tmp_path):
    """Breaks if one task of a group is taken for done though the group was not."""
    tasks = [jobs.Task(epath.Path(tmp_path / name), dict) for name in "ab"]

    def run(group):
        raise UserError("no")

    with pytest.raises(UserError, match="no"):
        jobs.divide(tasks, lease_s=600.0, group=jobs.Group(2, run))
    assert not list(tmp_path.glob("*/result.json"))


def test_a_job_that_leaves_releases_its_tasks(tmp_path, monkeypatch):
    """Breaks if another job waits for the lease of one that left in order, or a waiting job cannot be stopped."""

    def leave():
        raise preemption.Preempted

    with pytest.raises(preemption.Preempted):
        jobs.divide([jobs.Task(epath.Path(tmp_path) / "a", leave)], 600.0)
    assert not (tmp_path / "a/claim.json").exists() and not (tmp_path / "a/result.json").exists()
    claim(epath.Path(tmp_path) / "b")
    monkeypatch.setattr(preemption, "reached", lambda: True)
    with pytest.raises(preemption.Preempted):
        jobs.divide([jobs.Task(epath.Path(tmp_path) / "b", dict)], 600.0)
