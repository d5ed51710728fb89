"""The examples run and show what they promise."""

import runpy
from pathlib import Path

import jax
import numpy as np

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_optax_loop(capsys):
    example = runpy.run_path(str(EXAMPLES / "optax_loop.py"), run_name="example")
    with jax.numpy_dtype_promotion("standard"):  # optax.adam itself fails "strict"
        history = example["main"](steps=100, batch=256, every=50, pool=1024)
    start, middle, end = history
    assert [row["step"] for row in history] == [0, 50, 100]
    at_reference = (1 + example["ALPHA"]) * np.log(2)
    # Exactly zero: same program for both networks, on a CPU.
    assert start["r_real_mean"] == start["r_real_std"] == start["r_fake_mean"] == start["r_fake_std"] == 0
    assert start["accuracy"] == 0.5
    np.testing.assert_allclose(start["loss"], at_reference, rtol=1e-6)
    # It learns to tell data from its own samples.
    assert end["margin"] > middle["margin"] > 0.01
    assert end["loss"] < at_reference - 0.005
    np.testing.assert_allclose(end["loss_real"] + end["loss_fake"], end["loss"], rtol=1e-5)
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(history)
