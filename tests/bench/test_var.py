"""The benchmark of VAR: what it compares gives the same results."""

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"
CONFIG = {"num_classes": 3, "depth": 1, "embed_dim": 8, "num_heads": 2, "patch_nums": [1, 2, 3], "vocab_size": 16}
CONFIG |= {"z_channels": 4}


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("benchmark_var", FOLDER / "var.py")
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(FOLDER), *sys.path])
        spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_samplers_give_the_same_tokens(benchmark):
    """Breaks if the contestants do not do the same work: other noise, other maps, other guidance."""
    args = SimpleNamespace(dtype="float32", batch=3, cfg=1.5, budget=0, first_calls=1)
    s = benchmark.setup("tiny", CONFIG, args)
    labels, keys = s.inputs()
    ours = benchmark.one_program(s, labels, keys)()
    apart = benchmark.per_scale_programs(s, labels, keys)()
    recompute = benchmark.Recompute(s.module)
    again = jax.jit(lambda w: benchmark.sample(s, w, labels, keys, module=recompute))(s.weights)
    assert benchmark.same_tokens(s, ours, apart) == benchmark.same_tokens(s, ours, again) == 1
    for other in (apart, again):
        np.testing.assert_allclose(ours[1], other[1], atol=1e-5)
    assert len(np.unique(ours[0])) > 5 and np.ptp(np.asarray(ours[0]), axis=0).any()
    with pytest.raises(AssertionError, match="of the tokens are equal"):
        benchmark.same_tokens(s, ours, (np.asarray(ours[0])[::-1], None))


def test_noise_per_scale(benchmark):
    module, _ = benchmark.modules(CONFIG, "float32")
    noise = benchmark.PerScale(module, jax.random.split(jax.random.key(0), 2))
    parts = [np.asarray(noise[:, first:end]) for first, end in module.spans]
    assert [p.shape for p in parts] == [(2, 1, 16), (2, 4, 16), (2, 9, 16)]
    values = np.concatenate([p.ravel() for p in parts])
    assert len(np.unique(values)) > 0.99 * len(values)


def test_attention_of_the_library(benchmark):
    q, k, v = np.random.default_rng(0).standard_normal((3, 2, 5, 2, 4)).astype(np.float32)
    level = np.array([0, 1, 1, 2, 2])
    mask = jnp.asarray(level[:, None] >= level[None])
    ours, library = (f(q, k, v, mask) for f in (benchmark.our_attention, benchmark.library_attention))
    np.testing.assert_allclose(ours, library, atol=1e-5)
