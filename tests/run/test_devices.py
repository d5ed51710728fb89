"""One program on 1 and on 8 devices: training, sampling, evaluation."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ddo_jax import sharding

ROOT = Path(__file__).parents[2]

SCRIPT = """
import json, sys
import jax
jax.config.update("jax_num_cpu_devices", 8)
import numpy as np
from ddo_jax import sharding
from ddo_jax.data.sources import ArraySource
from ddo_jax.evaluate import digits, score
from ddo_jax.evaluate.features import FeatureNet
from ddo_jax.families import get_family
from ddo_jax.run import config as configs
from ddo_jax.run import state, step

c = configs.base()
c.model.update(arch="mlp", img_resolution=8, img_channels=1, label_dim=10, levels=17)
with c.unlocked():
    c.model.update(width=64, blocks=1)
c.sampler.num_steps = 4
c.ddo.update(batch=16, lr=1e-3, ema_mimg=32e-6, eps=1e-3)
family = get_family(c)
rng = np.random.default_rng(0)
images, labels = rng.integers(0, 17, (64, 8, 8, 1)).astype(np.uint8), np.arange(64, dtype=np.int32) % 10
key = jax.random.key(3)
start, frozen = jax.tree.map(np.asarray, jax.jit(family.init)(key))
weights = [(rng.normal(size=s).astype(np.float32), np.zeros(s[1], np.float32)) for s in ((64, 32), (32, 10))]

def apply(x):
    f, logits = digits.features_and_logits(tuple(weights), x)
    return {"features": np.asarray(f), "class_logits": np.asarray(logits)}

network = FeatureNet("random", "0", "fd", 1.0, apply)

def everything(devices, fsdp):
    mesh = sharding.make_mesh(fsdp, devices)
    tx = state.optimizer(c.ddo)
    current = sharding.place(mesh, state.new_state(jax.tree.map(np.asarray, start), tx))
    ref = sharding.place(mesh, start)
    shapes = jax.eval_shape(lambda: current)
    advance = step.make_step(family, c.ddo, tx, mesh, shapes, objective="ddo", warmup=0.0, total=1e6)
    totals = sharding.replicate(mesh, step.zero_totals("ddo"))
    hyper, k = step.Hyper(4.0, 0.2, 1e-3, (-0.4, 1.2)), sharding.replicate(mesh, key)
    for i in range(2):
        parts = [sharding.put_batch(mesh, {"image": images[j::4], "label": labels[j::4]}) for j in (i, i + 2)]
        current, totals = advance(current, totals, ref, frozen, *parts, k, hyper)
    spread = {str(x.sharding.spec) for x in jax.tree.leaves(current["params"])}
    sampler = score.make_sampler(family, family.settings(c.sampler), mesh, 16)
    seeds = np.arange(40)
    records = list(sampler(current["ema"], frozen, seeds, seeds % 10))
    reference = {"train": score.reference(network, images)}
    found, _ = score.score(network, reference, iter(records))
    made = np.concatenate([r["image"] for r in records])
    return jax.tree.map(np.asarray, current), jax.device_get(totals), made, found, spread

a = everything(jax.devices()[:1], 1)
b = everything(jax.devices(), 2)
def worst(x, y):
    pairs = zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True)
    return max(float(np.max(np.abs(p - q) / (1e-3 + np.abs(p)))) for p, q in pairs)
print(json.dumps({
    "devices": len(jax.devices()), "sharded": sorted(b[4]),
    "state": worst(a[0], b[0]), "totals": worst(a[1], b[1]),
    "images": float(np.mean(a[2] != b[2])), "levels": int(np.max(np.abs(a[2].astype(int) - b[2].astype(int)))),
    "fd": [a[3]["fd"], b[3]["fd"]], "moved": worst(a[0]["params"], start),
}))
"""


def test_eight_devices_equal_one():
    """Breaks if a mean, a draw or a sample depends on the number of devices, or nothing is sharded at all."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["devices"] == 8 and any("fsdp" in spec for spec in found["sharded"])
    assert found["moved"] > 1e-2
    assert found["state"] < 1e-3 and found["totals"] < 1e-3
    assert found["images"] < 1e-3 and found["levels"] <= 1
    np.testing.assert_allclose(*found["fd"], rtol=1e-3)


@pytest.mark.parametrize(
    "shape, fsdp, expected",
    [
        ((3, 3, 128, 256), 8, (None, None, None, "fsdp")),
        ((512, 128), 8, ("fsdp",)),
        ((256,), 8, ()),
        ((127, 129), 2, ()),
        ((512, 512), 1, ()),
        ((), 8, ()),
    ],
)
def test_leaf_rule(shape, fsdp, expected):
    """Breaks if a small leaf is scattered, or a large one is copied to every device."""
    assert tuple(sharding.leaf_spec(shape, fsdp)) == expected
