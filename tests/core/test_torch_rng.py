"""PyTorch's CPU streams against the goldens."""

from pathlib import Path

import numpy as np
import pytest

from ddo_jax.core.torch_rng import TorchCpuStream, edm_streams

GOLDEN = np.load(Path(__file__).parents[1] / "goldens" / "edm_units.npz")


def test_streams_of_the_released_sampler():
    """Breaks if the seeding, the order of draws, the pairing of Box-Muller or a bit width differs."""
    seeds = GOLDEN["rng/seeds"]
    latents, labels, normals = edm_streams(seeds, (32, 32, 3), 10, 1)
    flat = latents.transpose(0, 3, 1, 2).reshape(len(seeds), -1)
    np.testing.assert_allclose(flat[:, :24], GOLDEN["rng/cpu_latents_first24"], atol=3e-7)
    np.testing.assert_array_equal(labels, GOLDEN["rng/cpu_label10"])
    noise = normals[0].transpose(0, 3, 1, 2).reshape(len(seeds), -1)[:, :8]
    np.testing.assert_allclose(noise, GOLDEN["rng/cpu_churn_f64_first8"], rtol=1e-6)


def test_a_whole_image():
    """Breaks beyond the first run of 16 values, or if the layout is not [C, H, W]."""
    golden = GOLDEN["rng/seed0_latents_full"].reshape(3, 32, 32)
    np.testing.assert_allclose(TorchCpuStream(0).normal((3, 32, 32)), golden, atol=3e-7)


def test_odd_sizes_are_refused():
    """Breaks if a shape is filled by a rule that torch does not use."""
    with pytest.raises(ValueError, match="15 values; allowed: a multiple of 16"):
        TorchCpuStream(0).normal((15,))
