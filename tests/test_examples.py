"""The examples run and show what they promise."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_examples_are_short_and_need_no_harness():
    """Breaks if an example is no page any more, or takes something from the project that is no pure function."""
    for path in EXAMPLES.glob("*.py"):
        text = path.read_text()
        assert text.count("\n") < 120, path
        assert not re.search(r"^\s*(from|import) ddo_jax\.", text, re.MULTILINE), path


def example(name, monkeypatch):
    """The names of an example."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="example")


def test_optax_loop(monkeypatch, capsys):
    script = example("optax_loop", monkeypatch)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # optax.adam itself fails "strict"
        history = script["main"](steps=100, batch=256, every=50, pool=1024)
    start, middle, end = history
    assert [row["step"] for row in history] == [0, 50, 100]
    at_reference = (1 + script["ALPHA"]) * np.log(2)
    # Exactly zero: same program for both networks, on a CPU.
    assert start["r_real_mean"] == start["r_real_std"] == start["r_fake_mean"] == start["r_fake_std"] == 0
    assert start["accuracy"] == 0.5
    np.testing.assert_allclose(start["loss"], at_reference, rtol=1e-6)
    # It learns to tell data from its own samples.
    assert end["margin"] > middle["margin"] > 0.01
    assert end["loss"] < at_reference - 0.002
    assert end["score"] < start["score"]
    np.testing.assert_allclose(end["loss_real"] + end["loss_fake"], end["loss"], rtol=1e-5)
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(history)


def test_figure1(monkeypatch, tmp_path):
    """The paper's Figure 1: the numbers of docs/specs/ddo.md, section 10."""
    script = example("figure1", monkeypatch)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        kl, best, (mu, log_sigma) = script["run"](4.0, 0.1, -1)
        stays, *_ = script["run"](1.0, 0.1, -1)
        spreads, first, _ = script["run"](4.0, 0.1, 1)
    assert 270 < best < 295 and abs(kl[best] - 0.402) < 0.005 and kl[-1] > kl[0] > 1.6
    np.testing.assert_allclose((mu, np.exp(log_sigma)), (-0.15, 0.70), atol=0.02)
    assert np.ptp(stays) < 0.01 and first == 0 and spreads[-1] > 10
    script["draw"]({(4.0, 0.1, -1): (kl, best, (mu, log_sigma))}, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_rectified_flow(monkeypatch, capsys):
    """A flow gets nearer to its data under the weight of EDM."""
    script = example("rectified_flow", monkeypatch)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        start, end = script["main"](rounds=1, kinds=("edm",))["edm"]
    assert end < 0.85 * start
    assert "energy distance" in capsys.readouterr().out


@pytest.mark.slow
def test_transformer(monkeypatch):
    """Labels are dropped for real and fake alike, and a round of few steps is better than its start."""
    script = example("transformer", monkeypatch)
    script["main"].__globals__.update(STEPS=20, EVERY=10, POOL=1024, BATCH=128)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        start, end, _ = script["main"](rounds=1, pretraining=120)
    assert end < start


@pytest.mark.parametrize("name", ["nnx_model", "equinox_model"])
def test_models_of_other_libraries(name, monkeypatch):
    """The two modules of the loss are one network at first, and some steps of DDO keep it a generator."""
    script = example(name, monkeypatch)
    small = dict(pretraining=60) if name == "nnx_model" else dict(pretraining=60, rounds=1)
    script["main"].__globals__.update(STEPS=10, EVERY=5, POOL=1024, BATCH=256)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        start, end, _ = script["main"](**small)
    assert 0 < end < 2 * start < 1000


def test_shard_map():
    """Four devices in small batches take the steps of one in large batches."""
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, str(EXAMPLES / "shard_map.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    first, second = done.stdout.splitlines()
    assert first.startswith("4 devices: mean 0.00 -> 0.4")
    assert float(second.split()[-3]) < 1e-5


def test_masked(monkeypatch):
    """An ELBO with the same draws on both sides is a likelihood: some steps keep what the model can."""
    script = example("masked", monkeypatch)
    script["main"].__globals__.update(STEPS=10, EVERY=5, POOL=512, BATCH=128)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        start, end, _ = script["main"](pretraining=60)
    assert end <= start <= 100
