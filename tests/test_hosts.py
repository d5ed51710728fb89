"""How the processes of a run meet, here as threads: who is missing, what differs, which flags and variables say it."""

import socket
import threading
import time

import pytest

from ddo_jax import hosts
from ddo_jax.errors import UserError
from tests.run.test_processes import free_port


def meeting(number: int, about=None, start_s: float = 10.0, coming=None, port=None, number_of=None) -> list[str]:
    """What every process that comes says, "" if nothing. about: of each process."""
    port, found = port or free_port(), [""] * number

    def process(i):
        there = hosts.Hosts(f"localhost:{port}", (number_of or {}).get(i, number), i)
        try:
            hosts.meet(there, (about or {}).get(i, {"jax": "1"}), start_s)
        except UserError as e:
            found[i] = str(e)

    threads = [threading.Thread(target=process, args=(i,)) for i in coming or range(number)]
    for thread in threads:
        thread.start()
        time.sleep(0.05)
    for thread in threads:
        thread.join()
    return found


def test_all_come():
    assert meeting(3) == ["", "", ""]
    assert meeting(3, coming=[2, 1, 0]) == ["", "", ""], "process 0 may be the last"
    assert meeting(1) == [""]


def test_a_difference_names_both():
    """Breaks if processes of other versions or configs start a run together."""
    told = set(meeting(3, {1: {"jax": "2", "config.seed": 1}}))
    host = socket.gethostname()
    assert len(told) == 1 and told.pop() == (
        f"jax: 2 in process 1 ({host}), 1 in process 0 ({host}); config.seed: 1 in process 1 ({host}), absent in "
        f"process 0 ({host}); all processes of a run must be alike"
    )


def test_many_differences_are_not_all_shown():
    a, b = {str(i): 0 for i in range(9)}, {str(i): 1 for i in range(9)}
    line = hosts.difference([{"process_id": i, "host": "h", "about": x} for i, x in enumerate((a, b))])
    assert line.count("in process 1") == 3 and "and 6 more" in line


def test_no_answer():
    line = meeting(2, start_s=0.5, coming=[1])[1]
    assert "did not answer process 1 within 0.5 s (Connection refused)" in line and "--config.hosts.start_s" in line


def test_a_host_that_does_not_exist():
    with pytest.raises(UserError, match=r"nowhere\.invalid:7777 did not answer process 1 within 0\.5 s"):
        hosts.meet(hosts.Hosts("nowhere.invalid:7777", 2, 1), {}, 0.5)


def test_a_process_is_missing():
    told = meeting(4, start_s=1.0, coming=[0, 2])
    assert told[0] == told[2] and told[0].startswith("process 1, 3 of 4 did not come to localhost:")


def test_other_numbers():
    told = meeting(2, number_of={1: 3})
    assert told[0] == told[1] and told[0].startswith("--num_processes: 3 in process 1")


def test_one_number_twice():
    told = meeting(3, coming=[0, 1, 1])
    assert told[0] == told[1] and told[0].startswith("--process_id: 1 on ")


def test_a_taken_port():
    with socket.create_server(("", free_port())) as taken:
        port = taken.getsockname()[1]
        told = meeting(2, port=port, coming=[0])
    assert f"port {port} cannot be used here" in told[0]


def test_strangers_are_not_heard(monkeypatch):
    """Breaks if a port scanner, or a web server at the port, is taken for a process."""
    port = free_port()

    def stranger():
        time.sleep(0.3)
        with socket.create_connection(("localhost", port)) as s:
            s.sendall(b"GET / HTTP/1.0\r\n\r\n")

    thread = threading.Thread(target=stranger)
    thread.start()
    assert "process 1 of 2 did not come" in meeting(2, start_s=2.0, coming=[0], port=port)[0]
    thread.join()

    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    monkeypatch.setattr(hosts, "GUEST_S", 0.2)
    held = []

    def silent():
        time.sleep(0.1)
        held.append(socket.create_connection(("localhost", port)))
        held[0].sendall(b'{"problem": ""}\n{')

    thread = threading.Thread(target=silent)
    thread.start()
    assert "process 1 of 2 did not come" in meeting(2, start_s=1.0, coming=[0], port=port)[0]
    thread.join()
    held[0].close()

    def serve(server):
        with server, server.accept()[0] as guest:
            guest.recv(100)
            guest.sendall(b"HTTP/1.0 400 Bad Request\r\n\r\n")

    server = socket.create_server(("localhost", 0))
    thread = threading.Thread(target=serve, args=(server,))
    thread.start()
    line = meeting(2, start_s=1.0, coming=[1], port=server.getsockname()[1])[1]
    assert "did not answer" in line
    thread.join()


FLAGS = {"coordinator": "h:1", "num_processes": 2, "process_id": 0}
JAX = {"JAX_COORDINATOR_ADDRESS": "j:2", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}
TORCH = {"MASTER_ADDR": "t", "MASTER_PORT": "3", "WORLD_SIZE": "8", "RANK": "7", "LOCAL_WORLD_SIZE": "4"}
TORCH |= {"LOCAL_RANK": "3"}


def test_flags_win_over_variables():
    assert hosts.given({}, {}) is None, "JAX looks for a cluster"
    assert hosts.given(FLAGS, JAX | TORCH) == ("h:1", 2, 0, None)
    assert hosts.given({}, JAX | TORCH) == ("j:2", 4, 3, None)
    assert hosts.given({}, TORCH) == ("t:3", 8, 7, 3)
    assert hosts.given({"process_id": 1}, JAX) == ("j:2", 4, 1, None)
    assert hosts.given({}, {"JAX_COORDINATOR_ADDRESS": "j:2"}) is None, "of a cluster whose coordinator is named"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"coordinator": "h:1"}, "--num_processes: unset"),
        ({"num_processes": 2}, "--coordinator: unset"),
        (FLAGS | {"coordinator": "h"}, "--coordinator: 'h'; allowed: HOST:PORT"),
        (FLAGS | {"coordinator": "h:x"}, "allowed: HOST:PORT"),
        (FLAGS | {"coordinator": "h:70000"}, "allowed: HOST:PORT"),
        (FLAGS | {"num_processes": 0}, "--num_processes: 0; allowed: 1 or more"),
        (FLAGS | {"process_id": 2}, "--process_id: 2; allowed: 0 to 1"),
        (FLAGS | {"process_id": -1}, "--process_id: -1; allowed: 0 to 1"),
    ],
)
def test_flags_that_are_refused(flags, words):
    with pytest.raises(UserError, match="^--") as e:
        hosts.given(flags, {})
    assert words in str(e.value)


def test_variables_that_are_refused():
    with pytest.raises(UserError, match="JAX_NUM_PROCESSES: 'two'; allowed: a whole number"):
        hosts.given({}, JAX | {"JAX_NUM_PROCESSES": "two"})
    with pytest.raises(UserError, match="RANK: 9; allowed: 0 to 7"):
        hosts.given({}, TORCH | {"RANK": "9"})


def test_one_process_is_alone():
    assert hosts.gathered("héllo") == ["héllo"]
    assert hosts.together(lambda: 7) == 7
    with pytest.raises(UserError, match="^mine$"):
        hosts.together(lambda: (_ for _ in ()).throw(UserError("mine")))
