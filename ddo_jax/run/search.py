"""Several jobs on one workdir divide the tasks of a run through files, nothing else.

A task is a directory; it is finished when its `result.json` exists, and taken while its `claim.json` is
alive: made by create-if-absent, renewed by a heartbeat while the process lives, taken over when the process is
gone from this host, or has shown no life for `lease_s` seconds.
"""

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from typing import NamedTuple

import jax
from etils import epath

from ddo_jax import files, sharding

JOB = uuid.uuid4().hex  # of this process: process ids are used again, also across a restart of a container


class Task(NamedTuple):
    """A unit of work that one job does; what `run` returns becomes result.json, written last."""

    directory: epath.Path
    run: Callable[[], dict]


def _content() -> bytes:
    claim = {"job": JOB, "host": socket.gethostname(), "pid": os.getpid(), "time": time.time()}
    return json.dumps(claim).encode()


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def is_stale(claim: dict, lease_s: float) -> bool:
    """A claim of a process that is gone from this host, or of one anywhere that no longer renews it."""
    if claim["job"] == JOB:
        return False
    gone = claim["pid"] == os.getpid() or not _alive(claim["pid"])
    return (claim["host"] == socket.gethostname() and gone) or time.time() - claim["time"] > lease_s


def take(directory: epath.Path, lease_s: float) -> bool:
    """Claim a task, from a dead job if need be; False if another job is at it."""
    path = directory / "claim.json"
    for _ in range(2):
        if files.create_exclusive(path, _content()):
            return True
        try:
            claim = files.read_json(path)
        except ValueError:
            claim = None
        if claim is None:  # released or replaced this very moment
            continue
        if claim["job"] == JOB:
            return True
        if not is_stale(claim, lease_s):
            return False
        _remove(path, claim)
    return False


def _remove(path: epath.Path, stale: dict) -> None:
    """Take a dead claim away; several jobs may see it, and one of them may have put its own there since."""
    aside = path.with_name(f".claim.{JOB}")
    try:
        path.rename(aside)  # of one file, only one job succeeds
    except OSError:
        return
    moved = aside.read_bytes()
    if json.loads(moved)["job"] != stale["job"]:
        files.create_exclusive(path, moved)  # alive: give it back
    aside.unlink()


def divide(tasks: list[Task], lease_s: float, poll_s: float = 5.0, waiting=lambda text: None) -> list[dict]:
    """Finish all tasks together with the other jobs on this workdir.

    Args:
      tasks: the same list in every job. lease_s: see above. waiting: told when others hold what is left.

    Returns:
      The results, in the order of `tasks`.
    """
    lead = jax.process_index() == 0
    while True:
        open_tasks = [t for t in tasks if not sharding.agree((t.directory / "result.json").exists())]
        if not open_tasks:
            return [files.read_json(t.directory / "result.json") for t in tasks]
        worked = False
        for task in open_tasks:
            if lead:
                task.directory.mkdir(parents=True, exist_ok=True)
            if not sharding.agree(lead and take(task.directory, lease_s)):
                continue
            if not sharding.agree((task.directory / "result.json").exists()):
                _perform(task, lead, lease_s)
            if lead and _mine(task.directory / "claim.json"):
                (task.directory / "claim.json").unlink(missing_ok=True)
            worked = True
        if not worked:
            waiting(f"waiting for {len(open_tasks)} tasks of other jobs: {open_tasks[0].directory.name} ...")
            time.sleep(poll_s)


def _mine(path: epath.Path) -> bool:
    """Whether the claim is still this job's: a job that was stopped for longer than the lease may have lost it."""
    claim = files.read_json(path)
    return claim is not None and claim["job"] == JOB


@contextlib.contextmanager
def heartbeat(directory: epath.Path, lease_s: float):
    """Renew the claim from a thread: an evaluation or a compilation may take longer than the lease."""
    over = threading.Event()

    def beat():
        while not over.wait(lease_s / 4) and _mine(directory / "claim.json"):
            files.write_bytes(directory / "claim.json", _content())

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _perform(task: Task, lead: bool, lease_s: float) -> None:
    with heartbeat(task.directory, lease_s) if lead else contextlib.nullcontext():
        result = task.run()
    if lead and _mine(task.directory / "claim.json"):  # else another job took over, and will write its own
        files.write_json(task.directory / "result.json", result)
