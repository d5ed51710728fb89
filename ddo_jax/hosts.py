"""Several processes of one run: how they find one another, that they are alike, what one of them found wrong.

Slurm, GKE, Cloud TPU and MPI are detected by JAX. Plain hosts name a coordinator, HOST:PORT of process 0; there the
processes meet before JAX starts its own service at the same port, because what JAX finds wrong ends a process in C++,
without an exception: a host that is missing, a port that is taken, another version.
"""

import contextlib
import json
import platform
import socket
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from ddo_jax.errors import UserError, one_line

POLL_S = 0.2  # between two attempts to connect
GUEST_S = 5.0  # a connection that has said nothing for so long is no process of a run
SAYS = {"process_id", "num_processes", "host", "about"}  # what a process says of itself
MOST_BYTES = 2**20  # of what a process says of itself
T = TypeVar("T")
WAYS = "--coordinator=HOST:PORT --num_processes=N --process_id=I, or a launcher that JAX knows (Slurm, GKE, TPU, MPI)"


class Hosts(NamedTuple):
    """Where the processes of a run meet.

    Attributes:
      coordinator: HOST:PORT of process 0. process_id: of this one, below num_processes.
      local_device: the one GPU of this process where several share a host; None: all that there are.
    """

    coordinator: str
    num_processes: int
    process_id: int
    local_device: int | None = None


# -- what is given ----------------------------------------------------------------------------------------


def given(flags: Mapping[str, Any], environ: Mapping[str, str]) -> Hosts | None:
    """Of flags, else of the environment; None where neither says it: then JAX looks for a cluster.

    Args:
      flags: coordinator, num_processes, process_id, each maybe None. environ: JAX_COORDINATOR_ADDRESS,
        JAX_NUM_PROCESSES and JAX_PROCESS_ID, or torchrun's MASTER_ADDR, MASTER_PORT, WORLD_SIZE, RANK.

    Raises:
      UserError: a part is missing, or is no such value.

    >>> given({}, {"MASTER_ADDR": "a", "MASTER_PORT": "29500", "WORLD_SIZE": "2", "RANK": "1"})
    Hosts(coordinator='a:29500', num_processes=2, process_id=1, local_device=None)
    """
    keys = ("coordinator", "num_processes", "process_id")
    found = {key: flags.get(key) for key in keys}
    names = {key: f"--{key}" for key in keys}
    for of_environment in (_of_jax, _of_torchrun):
        if None in found.values():
            for key, (name, value) in of_environment(environ).items():
                if found[key] is None and value is not None:
                    found[key], names[key] = value, name
    told = any(flags.get(key) is not None for key in keys)
    missing = [f"--{key}" for key in keys if found[key] is None]
    if missing and told:
        raise UserError(f"{missing[0]}: unset; allowed with {names[_first(found)]}: {WAYS}")
    if missing:
        return None
    port = str(found["coordinator"]).rpartition(":")[2]
    if ":" not in str(found["coordinator"]) or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise UserError(f"{names['coordinator']}: {found['coordinator']!r}; allowed: HOST:PORT, as in 10.0.0.1:29500")
    number, own = (_whole(names[key], found[key]) for key in keys[1:])
    if number < 1:
        raise UserError(f"{names['num_processes']}: {number}; allowed: 1 or more")
    if not 0 <= own < number:
        raise UserError(f"{names['process_id']}: {own}; allowed: 0 to {number - 1}, {names['num_processes']} - 1")
    return Hosts(str(found["coordinator"]), number, own, _local_device(environ, names["process_id"]))


def _first(found: dict) -> str:
    return next(key for key, value in found.items() if value is not None)


def _of_jax(environ: Mapping[str, str]) -> dict[str, tuple[str, str | None]]:
    names = {"coordinator": "JAX_COORDINATOR_ADDRESS", "num_processes": "JAX_NUM_PROCESSES"}
    names["process_id"] = "JAX_PROCESS_ID"
    return {key: (name, environ.get(name) or None) for key, name in names.items()}


def _of_torchrun(environ: Mapping[str, str]) -> dict[str, tuple[str, str | None]]:
    address, port = environ.get("MASTER_ADDR"), environ.get("MASTER_PORT")
    return {
        "coordinator": ("MASTER_ADDR:MASTER_PORT", f"{address}:{port}" if address and port else None),
        "num_processes": ("WORLD_SIZE", environ.get("WORLD_SIZE") or None),
        "process_id": ("RANK", environ.get("RANK") or None),
    }


def _local_device(environ: Mapping[str, str], source: str) -> int | None:
    """torchrun starts a process for each GPU of a host."""
    if source != "RANK" or _whole("LOCAL_WORLD_SIZE", environ.get("LOCAL_WORLD_SIZE") or 1) == 1:
        return None
    return _whole("LOCAL_RANK", environ.get("LOCAL_RANK"))


def _whole(name: str, value) -> int:
    try:
        return int(value)
    except (TypeError, ValueError):
        raise UserError(f"{name}: {value!r}; allowed: a whole number") from None


# -- the start --------------------------------------------------------------------------------------------


def start(hosts: Hosts | None, about: dict[str, Any], *, start_s: float, heartbeat_s: float) -> None:
    """Start JAX's distributed runtime on all processes, or refuse on all of them.

    Args:
      hosts: of `given`. about: what must be the same in every process, {name: value}; versions are added.
      start_s: how long processes wait for one another. heartbeat_s: without a sign of life for so long a process is
        given up, and the others are ended.

    Raises:
      UserError: no launcher is known; a process did not come; they differ, and both are named.
    """
    about = {**versions(), **about}
    waits = dict(initialization_timeout=round(start_s), heartbeat_timeout_seconds=round(heartbeat_s))
    waits["shutdown_timeout_seconds"] = round(heartbeat_s)
    if hosts is None:
        try:
            jax.distributed.initialize(**waits)
        except (ValueError, RuntimeError) as e:
            raise UserError(f"--distributed: JAX found no cluster here ({one_line(e)}); allowed: {WAYS}") from None
    else:
        meet(hosts, about, start_s)
        jax.distributed.initialize(*hosts[:3], local_device_ids=hosts.local_device, **waits)
    _check_devices()
    if hosts is None:
        told = [json.loads(text) for text in gathered(json.dumps(_introduction(about, jax.process_index())))]
        if problem := difference(told):
            raise UserError(problem)


def versions() -> dict[str, str]:
    """Of what decides the numbers of a run; "?" of what runs without being installed."""
    found = {"Python": platform.python_version()}
    for name in ("ddo_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "?"
    return found


def _introduction(about: dict, process_id: int) -> dict:
    plain = json.loads(json.dumps(about, default=str))
    return {"process_id": process_id, "host": socket.gethostname(), "about": plain}


def difference(told: list[dict]) -> str:
    """What is not alike, in one line that names both processes; "" if nothing.

    Args:
      told: introductions, of process 0 first.

    >>> a = {"process_id": 0, "host": "a", "about": {"jax": "0.10.2"}}
    >>> difference([a, {"process_id": 1, "host": "b", "about": {"jax": "0.11.0"}}])
    'jax: 0.11.0 in process 1 (b), 0.10.2 in process 0 (a); all processes of a run must be alike'
    """
    first = told[0]
    for other in told[1:]:
        here, there = first["about"], other["about"]
        keys = [key for key in dict.fromkeys([*here, *there]) if here.get(key) != there.get(key)]
        if keys:
            shown = [
                f"{key}: {there.get(key, 'absent')} in process {other['process_id']} ({other['host']}), "
                f"{here.get(key, 'absent')} in process 0 ({first['host']})"
                for key in keys[:3]
            ]
            more = f"; and {len(keys) - 3} more" if len(keys) > 3 else ""
            return f"{'; '.join(shown)}{more}; all processes of a run must be alike"
    return ""


def _check_devices() -> None:
    """Every process must have as many devices, for each holds an equal share of every batch."""
    owners = [d.process_index for d in jax.devices()]
    counts = [owners.count(i) for i in range(jax.process_count())]
    other = next((i for i, n in enumerate(counts) if n != counts[0]), None)
    if other is not None:
        raise UserError(
            f"process {other} has {counts[other]} devices, process 0 has {counts[0]}; all processes of a run must "
            "have as many"
        )


# -- where plain hosts meet -------------------------------------------------------------------------------


def meet(hosts: Hosts, about: dict[str, Any], start_s: float) -> None:
    """Wait until every process is there, each tells process 0 what it is, and all hear what came of it.

    Raises:
      UserError: the coordinator does not answer; its port is taken; a process did not come; they differ.
    """
    own = _introduction(about, hosts.process_id) | {"num_processes": hosts.num_processes}
    deadline = time.monotonic() + start_s
    problem = (_host if hosts.process_id == 0 else _visit)(hosts, own, deadline, start_s)
    if problem:
        raise UserError(problem)


def _host(hosts: Hosts, own: dict, deadline: float, start_s: float) -> str:
    """Process 0: hear all, tell all what is wrong, or "" if nothing is."""
    port = int(hosts.coordinator.rpartition(":")[2])
    try:
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        server = socket.create_server(("", port), family=family, dualstack_ipv6=both, backlog=hosts.num_processes)
    except OSError as e:
        return f"--coordinator: port {port} cannot be used here: {e.strerror or e}; allowed: a free one, of process 0"
    guests: list[tuple[socket.socket, dict]] = []
    problem = ""
    with server, contextlib.ExitStack() as stack:
        while not problem and len(guests) < hosts.num_processes - 1:
            server.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                guest, _ = server.accept()
            except TimeoutError:
                missing = [
                    str(i) for i in range(1, hosts.num_processes) if i not in [g["process_id"] for _, g in guests]
                ]
                problem = (
                    f"process {', '.join(missing)} of {hosts.num_processes} did not come to {hosts.coordinator} within "
                    f"{start_s:g} s; start it with the same --coordinator and --num_processes"
                )
                break
            stack.enter_context(guest)
            guest.settimeout(GUEST_S)
            if (told := _heard(guest, SAYS)) is None:  # of no process of a run
                continue
            problem = _unfit(hosts, own, [other for _, other in guests], told)
            guests.append((guest, told))
        problem = problem or difference([own, *sorted((told for _, told in guests), key=lambda g: g["process_id"])])
        for guest, _ in guests:
            _tell(guest, {"problem": problem})
        for guest, _ in guests:  # they hang up first: else the port would stay busy for JAX
            with contextlib.suppress(OSError):
                guest.recv(1)
    return problem


def _unfit(hosts: Hosts, own: dict, others: list[dict], told: dict) -> str:
    """Why this process cannot be one of the run, or ""."""
    i, number = told["process_id"], told["num_processes"]
    if number != hosts.num_processes:
        return (
            f"--num_processes: {number} in process {i} ({told['host']}), {hosts.num_processes} in process 0 "
            f"({own['host']}); all processes of a run must be alike"
        )
    twin = next((other for other in others if other["process_id"] == i), None)
    return (
        "" if twin is None else f"--process_id: {i} on {told['host']} and on {twin['host']}; every process has its own"
    )


def _visit(hosts: Hosts, own: dict, deadline: float, start_s: float) -> str:
    """Any other process: introduce oneself to process 0 and hear what is wrong."""
    name, _, port = hosts.coordinator.rpartition(":")
    reason = "no answer"
    while (left := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection((name.strip("[]"), int(port)), timeout=left) as server:
                _tell(server, own)
                answer = _heard(server, {"problem"})
                if answer is None:
                    raise OSError("it answers, but not as process 0 of such a run")
                return answer["problem"]
        except OSError as e:  # not there yet, a name that is not known yet, closed by an earlier run
            reason = e.strerror or str(e)
            time.sleep(POLL_S)
    return (
        f"--coordinator: {hosts.coordinator} did not answer process {hosts.process_id} within {start_s:g} s "
        f"({reason}); allowed: HOST:PORT of process 0, which must be running; --config.hosts.start_s waits longer"
    )


def _tell(peer: socket.socket, value: dict) -> None:
    with contextlib.suppress(OSError):  # it has left: it said so itself
        peer.sendall(json.dumps(value).encode() + b"\n")


def _heard(peer: socket.socket, keys: set[str]) -> dict | None:
    """One line of JSON with these keys; None if it is none, or nothing comes."""
    with contextlib.suppress(OSError, ValueError, RecursionError), peer.makefile("rb") as lines:
        told = json.loads(lines.readline(MOST_BYTES))
        if isinstance(told, dict) and keys <= told.keys():
            return told
    return None


# -- on the way -------------------------------------------------------------------------------------------


def gathered(text: str) -> list[str]:
    """What every process says, in their order. All must call it."""
    if jax.process_count() == 1:
        return [text]
    data = np.frombuffer(text.encode(), np.uint8)
    sizes = np.ravel(multihost_utils.process_allgather(np.int32(len(data))))
    padded = np.zeros(max(1, sizes.max()), np.uint8)
    padded[: len(data)] = data
    rows = np.asarray(multihost_utils.process_allgather(padded)).reshape(len(sizes), -1)
    return [bytes(row[:n]).decode() for row, n in zip(rows, sizes, strict=True)]


def together(call: Callable[[], T]) -> T:
    """What `call` gives on this process; a mistake that one process finds is one of all, which leave together.

    Args:
      call: nothing in it may wait for other processes.

    Raises:
      UserError: of this process, or of another one, which is named.
    """
    result, problem = None, ""
    try:
        result = call()
    except UserError as e:
        problem = str(e)
    told = gathered(problem)
    if problem:
        raise UserError(problem)
    if other := next((f"process {i}: {text}" for i, text in enumerate(told) if text), ""):
        raise UserError(other)
    return result
