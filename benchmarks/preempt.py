"""Signals to a run at random moments until it is done: seconds from signal to exit, exit codes, and whether its scores
are those of a run that was left alone.

    python benchmarks/preempt.py --processes=2 --signal=TERM

Expected: TERM: all processes leave with 75 behind the same step, within a step, a second of JAX's preemption service
and a checkpoint, or the rest of a compilation; KILL: the other process ends within config.hosts.heartbeat_s. Scores
are equal. One JSON line.
"""

import argparse
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import runs  # noqa: F401  puts the repository on the path
from common import report, spread

ROOT = Path(__file__).parents[1]
HEARTBEAT_S = 10


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as s:
        return s.getsockname()[1]


def launch(args, workdir: Path, log: Path) -> list[subprocess.Popen]:
    flags = [f"--config={args.config}", f"--workdir={workdir}", f"--config.hosts.heartbeat_s={HEARTBEAT_S}"]
    flags += [f"--config.ddo.length.steps={args.steps}", f"--config.ddo.eval_every.steps={args.steps // 4}"]
    devices = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(args.devices), "PYTHONPATH": str(ROOT)}
    jobs, port = [], free_port()
    for i in range(args.processes):
        own = []
        if args.processes > 1:
            own = [f"--coordinator=127.0.0.1:{port}", f"--num_processes={args.processes}", f"--process_id={i}"]
        command = [sys.executable, "-m", "ddo_jax.main", *flags, *own]
        with open(f"{log}.{i}", "ab") as out:
            jobs.append(subprocess.Popen(command, env={**os.environ, **devices}, stderr=out, stdout=out, cwd=ROOT))
    return jobs


def interrupted(jobs: list[subprocess.Popen], signum: int, after: float) -> tuple[float | None, list[int]]:
    """(seconds from the signal to the last exit, exit codes); None where the run was done before."""
    began = None
    try:
        jobs[-1].wait(after)
    except subprocess.TimeoutExpired:
        began = time.monotonic()
        jobs[-1].send_signal(signum)
    codes = [job.wait() for job in jobs]
    return None if began is None or not any(codes) else time.monotonic() - began, codes


def scores(workdir: Path) -> list:
    lines = [json.loads(line) for line in (workdir / "evals.jsonl").read_text().splitlines()]
    return sorted([e["phase"], e["step"], e["protocol"]["seeds"], e[e["metric"]]] for e in lines)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--config", default="digits:runlocal")
    p.add_argument("--processes", type=int, default=2)
    p.add_argument("--devices", type=int, default=2, help="of a process")
    p.add_argument("--signal", default="TERM", choices=("TERM", "INT", "KILL"))
    p.add_argument("--steps", type=int, default=200, help="of a round")
    p.add_argument("--after", type=float, nargs=2, default=(15.0, 40.0), help="seconds, from and to")
    p.add_argument("--most", type=int, default=40, help="signals")
    args = p.parse_args()
    signum, draw, times, codes = getattr(signal, f"SIG{args.signal}"), random.Random(0), [], []
    with tempfile.TemporaryDirectory() as folder:
        whole, stopped = Path(folder) / "whole", Path(folder) / "stopped"
        assert not any(job.wait() for job in launch(args, whole, Path(folder) / "whole.log"))
        for i in range(args.most):
            jobs = launch(args, stopped, Path(folder) / "stopped.log")
            seconds, found = interrupted(jobs, signum, draw.uniform(*args.after) if i < args.most - 1 else 3600)
            if seconds is None:
                break
            times.append(seconds)
            codes.append(found)
        equal = scores(whole) == scores(stopped)
    report(
        "preempt",
        config=args.config,
        processes=args.processes,
        devices=args.devices,
        signal=args.signal,
        signals=len(times),
        codes=codes,
        seconds_to_exit=spread(times),
        scores_equal=equal,
    )


if __name__ == "__main__":
    main()
