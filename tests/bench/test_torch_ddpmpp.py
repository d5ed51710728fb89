"""The PyTorch baseline of the benchmarks computes the same network (needs the extra [bench])."""

import importlib.util
from pathlib import Path

import pytest

pytest.importorskip("torch")
FILE = Path(__file__).parents[2] / "benchmarks" / "torch_ddpmpp.py"


@pytest.fixture(scope="module")
def baseline():
    spec = importlib.util.spec_from_file_location("torch_ddpmpp", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_goldens(baseline):
    errors = baseline.verify()
    assert set(errors) == {"torch.float32", "torch.float64"}


def test_parameter_count_of_the_real_network(baseline):
    import torch

    from ddo_jax.models.edm import RELEASED

    with torch.device("meta"):
        net = baseline.from_config(RELEASED["edm-cifar10-32x32-uncond-vp"])
    assert sum(p.numel() for p in net.parameters()) == 55_733_891
