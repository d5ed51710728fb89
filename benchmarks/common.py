"""What every benchmark shares: a JSON line with versions and device, whole-process costs, paired ratios."""

import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent


def report(name: str, **numbers) -> None:
    """Print one JSON line: the numbers and what they were measured on."""
    versions = {p: importlib.metadata.version(p) for p in ("jax", "flax", "numpy")}
    machine = {"python": platform.python_version(), "machine": platform.machine(), "cpus": os.cpu_count()}
    print(json.dumps({"benchmark": name, **numbers, **versions, **machine}), flush=True)


def process(command: list[str], **environment: str) -> dict:
    """Run a command to its end: wall and CPU seconds, peak memory of the process, exit code."""
    began = time.perf_counter()
    child = subprocess.Popen(
        command, env={**os.environ, **environment}, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    errors = child.stderr.read().decode()
    _, status, usage = os.wait4(child.pid, 0)
    return {
        "wall_s": round(time.perf_counter() - began, 2),
        "cpu_s": round(usage.ru_utime + usage.ru_stime, 2),
        "peak_mb": round(usage.ru_maxrss / 1024),
        "exit": os.waitstatus_to_exitcode(status),
        "last_line": errors.strip().splitlines()[-1] if errors.strip() else "",
    }


def python(*arguments: str) -> list[str]:
    return [sys.executable, *arguments]


def spread(values: list[float]) -> dict:
    """{"median", "min", "max", "n"}."""
    middle = round(statistics.median(values), 4)
    return {"median": middle, "min": round(min(values), 4), "max": round(max(values), 4), "n": len(values)}


def paired(a, b, repeats: int = 15) -> tuple[list[float], list[float]]:
    """Seconds of a() and b(), called in turn: the machine's drift meets both alike. One warm-up each."""
    times = ([], [])
    for i in range(repeats + 1):
        for f, seconds in zip((a, b), times, strict=True):
            began = time.perf_counter()
            f()
            if i:
                seconds.append(time.perf_counter() - began)
    return times
