"""A small config of every family, compiled for a slice of four TPUs: needs libtpu (`pip install 'jax[tpu]==V'`)."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HERE = importlib.util.find_spec("libtpu") is not None

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not HERE, reason="needs libtpu, a compiler for TPUs")]


@pytest.mark.parametrize("config", ["digits:unet", "edm2_in64:runlocal", "var_in256:runlocal", "sit_in256:runlocal"])
def test_the_step_compiles_for_a_tpu_slice(config):
    """Breaks if a step does not compile for TPUs, or its weights go round a ring instead of being gathered."""
    command = [sys.executable, "-m", "benchmarks.aot", "--target=v5e:2x2", f"--config={config}", "--fsdp=4"]
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["device"] == "TPU v5 lite" and found["devices"] == 4 and "error" not in found
    assert 0 < found["peak_memory_bytes"] < found["memory_bytes"] and found["flops"] > 0
    sent = {kind: numbers["bytes"] for kind, numbers in found["collectives"].items()}
    assert sent["all-gather"] > 0
    assert sent.get("collective-permute", 0) + sent.get("all-to-all", 0) < 0.02 * sum(sent.values())
