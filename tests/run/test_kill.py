"""kill -9 at ten moments of a run; the same command again ends with bit-identical parameters."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

CONFIG = """
from ddo_jax import config as configs

def get_config(variant=""):
    c = configs.base()
    c.name = "kill"
    c.model.update(arch="mlp", img_resolution=8, img_channels=1, label_dim=10, levels=17)
    with c.unlocked():
        c.model.update(width=8, blocks=1)
    c.sampler.num_steps = 2
    for phase in ("pretrain", "ddo", "control"):
        c[phase].update(batch=16, ema_mimg=16e-6, lr=1e-3)
        c[phase].save_every.steps = 50
    c.pretrain.length.steps = 400
    c.ddo.update(rounds=2, beta=(0.1, 0.2), pool=2000, lr=2e-4, p_mean=-0.4, ema_mimg=320e-6)
    c.ddo.length.steps = 150
    c.ddo.eval_every.steps = 50
    c.control.update(enabled=True, factor=1, lrs=(1e-3,))
    c.control.eval_every.steps = 100
    c.eval.update(num=500, batch=50, report_seeds=1, grid=10)
    c.log.update(every=10, tensorboard=False)
    return c
"""

# A moment is a file that has appeared, and a random delay after it.
MOMENTS = (
    "config.json",
    "pretrain/claim.json",
    "pretrain/checkpoints/50",
    "pretrain/checkpoints/350",
    "report/scores/start",
    "rounds/001/start",
    "rounds/001/pool/chunk-00005.npz",
    "rounds/001/a4_b0.1/metrics.jsonl",
    "rounds/001/a4_b0.1/samples/00000050.png",
    "rounds/002/pool",
)


def start(config: Path, workdir: Path, cache: Path, *flags: str, devices: int | None = None) -> subprocess.Popen:
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(cache / "xla"),
        "TFDS_DATA_DIR": str(cache / "tfds"),
    }
    if devices is not None:
        environment["JAX_NUM_CPU_DEVICES"] = str(devices)
    command = [sys.executable, "-m", "ddo_jax.main", f"--config={config}", f"--workdir={workdir}", *flags]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, cwd=ROOT)


def kill_at(job: subprocess.Popen, moment: Path, delay: float) -> None:
    """Kill the job soon after `moment` is there; it must not have ended before."""
    deadline = time.monotonic() + 120
    while not moment.exists() and job.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    time.sleep(delay)
    ended = job.poll()
    job.send_signal(signal.SIGKILL)
    errors = job.communicate()[1].decode()
    assert ended is None, f"ended with {ended} before {moment}:\n{errors}"


def finish(job: subprocess.Popen) -> str:
    errors = job.communicate(timeout=300)[1].decode()
    assert job.returncode == 0, errors
    return errors


def evaluations(workdir: Path) -> list[dict]:
    """Every evaluation of the run but the time it was made."""
    records = [json.loads(line) for line in (workdir / "evals.jsonl").read_text().splitlines()]
    for r in records:
        assert r["protocol"].pop("time") and r["protocol"]["weights"]
    return records


@pytest.mark.slow
def test_ten_kills_change_nothing(tmp_path):
    """Breaks if any unit of work is published half-written, or anything but files carries over a step."""
    config = tmp_path / "kill.py"
    config.write_text(CONFIG)
    finish(start(config, tmp_path / "whole", tmp_path))
    generator = random.Random(0)
    for moment in MOMENTS:
        job = start(config, tmp_path / "killed", tmp_path)
        kill_at(job, tmp_path / "killed" / moment, generator.uniform(0, 0.3))
    finish(start(config, tmp_path / "killed", tmp_path))
    for name in ("best/params.safetensors", "features-digits.npz"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes(), name
    logs = [(tmp_path / run / "metrics.jsonl").read_text() for run in ("whole", "killed")]
    steps = [[line.split('"images"')[0] for line in log.splitlines()] for log in logs]
    assert steps[0] == steps[1]
    # the best may come from early on; the digest of the weights behind every number covers all units
    whole, killed = (evaluations(tmp_path / run) for run in ("whole", "killed"))
    assert whole == killed and len(whole) >= 20
