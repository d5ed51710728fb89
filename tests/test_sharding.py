"""Weights gathered where they are multiplied, and parameters parked with the host, on eight devices."""

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import jax
jax.config.update("jax_num_cpu_devices", 8)
import jax.numpy as jnp
import numpy as np
from ddo_jax import sharding

mesh = sharding.make_mesh(4)
host = {"w": np.arange(128 * 64, dtype=np.float32).reshape(128, 64) / 1e4, "b": np.arange(3, dtype=np.float32)}
placed = sharding.place(mesh, host)

parked = sharding.Parked(placed)
shards = [x.data for x in jax.tree.leaves(parked._tree, is_leaf=lambda x: isinstance(x, sharding._Shards))]
assert sorted(len(x) for x in shards) == [1, 4]  # of 8 devices, each shard once
back = parked()
for a, b in zip(*map(jax.tree.leaves, (placed, back)), strict=True):
    assert a.sharding == b.sharding and a is not b
    np.testing.assert_array_equal(a, b)

x = jax.device_put(np.ones((16, 128), np.float32), sharding.batch_sharding(mesh))

def loss(w, x):
    return jnp.sum(jnp.square(x @ sharding.whole(w)))

def inside(w, x):
    with sharding.rows_over(mesh):
        return jax.grad(loss)(w, x)

compiled = jax.jit(inside).lower(placed["w"], x).compile()
text, found = compiled.as_text(), compiled(placed["w"], x)
assert "all-gather" in text and found.sharding.spec == placed["w"].sharding.spec
np.testing.assert_allclose(found, jax.grad(loss)(host["w"], np.asarray(x)), rtol=1e-5)
assert sharding.whole(placed["w"]) is placed["w"]  # outside of a training program
print("fine")
"""


def test_gathered_and_parked_on_eight_devices():
    """Breaks if a parked shard is kept once a device or comes back elsewhere, or a gradient is left whole."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(__file__).parents[1])}
    found = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=300)
    assert found.stdout.strip() == "fine", found.stderr[-3000:]
