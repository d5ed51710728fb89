"""Several jobs on one workdir divide the tasks of a run through files, nothing else.

A task is a directory; it is finished when its `result.json` exists and is whole, and taken while its `claim.json` is
alive: made by create-if-absent, renewed by a heartbeat while the task makes progress, taken over when the process is
gone from this host, or when the claim was not renewed for `lease_s` seconds. No two clocks are compared: a claim's age
is what this process has seen of it, or what the file system's own clock says.
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

from ddo_jax import files, preemption, sharding, stores
from ddo_jax.data.tree import warn
from ddo_jax.errors import UserError

JOB = uuid.uuid4().hex  # of this process: process ids are used again, also across a restart of a container
RESULT, CLAIM = "result.json", "claim.json"


class Task(NamedTuple):
    """A unit of work that one job does; what `run` returns becomes result.json, written last.

    Attributes:
      problem: (result) -> what is no longer there of what a finished task made, in words, or "": then it is done again.
    """

    directory: epath.Path
    run: Callable[[], dict]
    problem: Callable[[dict], str] = lambda result: ""


class Group(NamedTuple):
    """Tasks that one job does at once: how many at most, and by what: their tasks -> their results."""

    size: int
    run: Callable[[list[Task]], list[dict]]


class Lost(Exception):
    """Another job took this one's task over."""


# -- claims -----------------------------------------------------------------------------------------------


def _content() -> bytes:
    claim = {"job": JOB, "host": socket.gethostname(), "pid": os.getpid(), "time": time.time()}
    return json.dumps(claim).encode()


def _owner(content: bytes) -> dict:
    """What a claim says; {"job": None, ...} of one that cannot be read, which nobody renews."""
    try:
        claim = json.loads(content)
        job, host, pid = str(claim["job"]), str(claim["host"]), int(claim["pid"])
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return {"job": None, "host": None, "pid": None}
    return {"job": job, "host": host, "pid": pid}


class Watch:
    """What this process has seen of claims: since when each has been as it is, by its own steady clock."""

    def __init__(self):
        self._seen: dict[str, tuple[bytes, float]] = {}

    def unchanged_s(self, path: epath.Path, content: bytes) -> float:
        """Seconds for which the claim has not changed before this process's eyes."""
        name, now = os.fspath(path), time.monotonic()
        before, since = self._seen.get(name, (None, now))
        if content != before:
            since = now
        self._seen[name] = (content, since)
        return now - since


_WATCH = Watch()


def _age(path: epath.Path) -> float:
    """Seconds since a claim was written, by the file system's clock; 0 where it has none of its own."""
    if stores.is_remote(path):
        return 0.0
    with contextlib.suppress(OSError):
        return files.filesystem_time(path.parent) - os.stat(path).st_mtime
    return 0.0


def is_stale(path: epath.Path, content: bytes, lease_s: float) -> bool:
    """A claim of a process that is gone from this host, or of one anywhere that no longer renews it."""
    owner = _owner(content)
    if owner["job"] == JOB:
        return False
    if owner["host"] == socket.gethostname() and (owner["pid"] == os.getpid() or not files.is_running(owner["pid"])):
        return True
    return max(_WATCH.unchanged_s(path, content), _age(path)) > lease_s


def take(directory: epath.Path, lease_s: float) -> bool:
    """Claim a task, from a dead job if need be; False if another job is at it."""
    path = directory / CLAIM
    for _ in range(2):
        if files.create_exclusive(path, _content()):
            return True
        content = files.kept(path)
        if content is None:  # released or replaced this very moment
            continue
        if _owner(content)["job"] == JOB:
            return True
        if not is_stale(path, content, lease_s):
            return False
        files.remove_if(path, content, _of_one_job)
    return False


def _of_one_job(claim: bytes, other: bytes) -> bool:
    return _owner(claim)["job"] == _owner(other)["job"]


def _mine(path: epath.Path) -> bool:
    """Whether the claim is still this job's: a job that was stopped for longer than the lease may have lost it."""
    content = files.kept(path)
    return content is not None and _owner(content)["job"] == JOB


# -- progress ---------------------------------------------------------------------------------------------


class _Progress:
    """When the task of this process last went on, and whether it is another job's by now."""

    at, lost = time.monotonic(), False


def progress() -> None:
    """Tell the heartbeat that the task goes on: after a step, a batch of samples.

    Raises:
      Lost: another job took the task over while this one did not go on; nothing more may be written.
    """
    _Progress.at = time.monotonic()
    if _Progress.lost and jax.process_count() == 1:  # of several processes all would have to leave at once
        raise Lost


def reporting(sampler: Callable) -> Callable:
    """A sampler (`evaluate.score.make_sampler`) whose every batch is progress."""

    def run(*args, **kwargs):
        for record in sampler(*args, **kwargs):
            progress()
            yield record

    return run


@contextlib.contextmanager
def heartbeat(directories: list[epath.Path], lease_s: float, stall_s: float = 3600.0):
    """Renew claims from a thread: an evaluation or a compilation may take longer than the lease.

    Args:
      stall_s: without `progress` for so long, the claims are left to lapse: the device or a file system hangs.
    """
    over, paths = threading.Event(), [directory / CLAIM for directory in directories]
    _Progress.at, _Progress.lost = time.monotonic(), False

    def beat():
        while not over.wait(lease_s / 4):
            for path in paths:
                if not _mine(path) and (files.kept(path) is not None or not path.exists()):  # else a passing fault
                    _Progress.lost = True
                    return
                if time.monotonic() - _Progress.at <= stall_s:
                    with contextlib.suppress(OSError):  # tried again; on a full disk the task itself will say it
                        files.write_bytes(path, _content())

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        _Progress.lost = False  # what comes after is no part of the lost task


# -- tasks ------------------------------------------------------------------------------------------------


def say(text: str) -> None:
    """A warning of the first process, once: jobs that wait look again and again."""
    if jax.process_index() == 0:
        warn(text)


def result_of(directory: epath.Path) -> dict | None:
    """The result of a finished task; None if there is none, or (which is said) none that can be trusted.

    Raises:
      UserError: there is something else where the task's folder should be.
    """
    if directory.exists() and not directory.is_dir():
        raise UserError(f"{directory}: a file is where a folder of the run belongs; {AWAY}")
    try:
        return files.read_sealed(directory / RESULT)
    except files.Damaged as e:
        say(f"{e}: taken for unfinished")
        return None


def _finished(task: Task) -> dict | None:
    """`result_of`, if what it stands for is still there."""
    result = result_of(task.directory)
    problem = "" if result is None else task.problem(result)
    if problem:
        say(f"{problem}: made again")
    return None if problem else result


def _make(directory: epath.Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(
            f"{directory}: a file is where this folder of the run, or one above it, belongs; {AWAY}"
        ) from None


AWAY = "move it away: the same command continues"


def divide(
    tasks: list[Task],
    lease_s: float,
    poll_s: float = 5.0,
    waiting=lambda text: None,
    stall_s: float = 3600.0,
    group: Group | None = None,
) -> list[dict]:
    """Finish all tasks together with the other jobs on this workdir.

    Args:
      tasks: the same list in every job. lease_s, stall_s: see above. waiting: told when others hold what is left.
      group: how several are done at once; None: one after the other.

    Returns:
      The results, in the order of `tasks`.
    """
    lead, group = jax.process_index() == 0, group or Group(1, lambda tasks: [task.run() for task in tasks])
    results: dict[int, dict] = {}
    made: set[epath.Path] = set()
    while True:
        for i, task in enumerate(tasks):  # process 0 looks first: its decision is everybody's
            if i not in results and sharding.agree(lead and (found := _finished(task)) is not None):
                results[i] = found if lead else result_of(task.directory)
        if len(results) == len(tasks):
            return [results[i] for i in range(len(tasks))]
        worked = False
        left = open_tasks = [task for i, task in enumerate(tasks) if i not in results]
        while left:
            mine, left = _claimed(left, group.size, lead, lease_s)
            worked = worked or bool(mine)
            todo = [task for task in mine if not sharding.agree(lead and _finished(task) is not None)]
            if again := [task.directory for task in todo if task.directory in made]:
                raise UserError(f"{again[0]}: made, but it is not as it was written; check the disk")
            try:
                if todo and _perform(todo, group.run, lead, lease_s, stall_s, waiting):
                    made.update(task.directory for task in todo)
            finally:  # also of a job that is told to leave: another one goes on at once
                for task in mine:
                    if lead and _mine(task.directory / CLAIM):
                        (task.directory / CLAIM).unlink(missing_ok=True)
        if not worked:
            waiting(f"waiting for {len(open_tasks)} tasks of other jobs: {open_tasks[0].directory.name} ...")
            preemption.check()
            time.sleep(poll_s)


def _claimed(tasks: list[Task], size: int, lead: bool, lease_s: float) -> tuple[list[Task], list[Task]]:
    """(the first `size` tasks that this job could claim, those behind them)."""
    mine = []
    for i, task in enumerate(tasks, 1):
        if lead:
            _make(task.directory)
        if sharding.agree(lead and take(task.directory, lease_s)):
            mine.append(task)
            if len(mine) == size:
                return mine, tasks[i:]
    return mine, []


def _perform(tasks: list[Task], run: Callable, lead: bool, lease_s: float, stall_s: float, waiting) -> bool:
    """Whether this job did the tasks to their end."""
    try:
        with heartbeat([t.directory for t in tasks], lease_s, stall_s) if lead else contextlib.nullcontext():
            results = run(tasks)
    except Lost:
        name = tasks[0].directory.name
        waiting(f"{name}: this job showed no life for {lease_s:g} s, another has taken it over")
        return False
    for task, result in zip(tasks, results, strict=True):
        if lead and _mine(task.directory / CLAIM):  # else another job took over, and will write its own
            files.write_sealed(task.directory / RESULT, result)
    sharding.agree(True)  # the other processes wait until they are there
    return True
