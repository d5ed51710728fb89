"""The memory plan of the benchmarks."""

import importlib.util
import sys
from pathlib import Path

import pytest

from configs import edm2_in64

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("benchmark_memory", FOLDER / "memory.py")
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(FOLDER), *sys.path])
        spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_largest_batch_fits_and_the_next_does_not(benchmark):
    """Breaks if the two batch sizes are extrapolated wrongly."""
    config, budget = edm2_in64.get_config("runlocal"), 2 * 10**8

    def needed(batch):
        return benchmark.step_bytes(config, True, batch)["total"]

    largest = benchmark.largest_batch(config, True, budget)
    assert largest > 64 and needed(largest) <= budget < needed(largest + 1)
    assert largest > benchmark.largest_batch(config, False, budget)
