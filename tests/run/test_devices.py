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
from ddo_jax.evaluate import classifier, image_sets, references
from ddo_jax.evaluate.evaluator import Evaluator, Images
from ddo_jax.evaluate.features import FeatureNet
from ddo_jax.families import get_family
from ddo_jax import config as configs
from ddo_jax.generate.sampler import Guide, make_sampler
from ddo_jax.run import rounds, state, step

c = configs.base()
c.model.update(img_resolution=8, img_channels=1, label_dim=10, levels=17)
c.sampler.num_steps = 4
c.ddo.update(batch=16, lr=1e-3, ema_mimg=32e-6, eps=1e-3)
rng = np.random.default_rng(0)
images, labels = rng.integers(0, 17, (64, 8, 8, 1)).astype(np.uint8), np.arange(64, dtype=np.int32) % 10
records, guide = images, None
key = jax.random.key(3)
if sys.argv[1] == "mlp":
    with c.unlocked():
        c.model.update(arch="mlp", width=64, blocks=1)
else:  # latents, two EMA lengths, remat, a guided DPM-Solver
    with c.unlocked():
        c.family, c.remat = "edm2", True
        c.model.update(arch="UNet", model_channels=32, channel_mult=(1,), num_blocks=1, attn_resolutions=(4,))
        c.model.update(channels_per_head=16, img_resolution=4, img_channels=4, vae=sys.argv[2], image_size=8)
        c.model.update(image_channels=1, latent_mean=(0.0,) * 4, latent_std=(1.0,) * 4)
    c.sampler.solver, c.ddo.ema_stds = "dpmv3", (0.05, 0.1)
    records = np.abs(rng.normal(size=(64, 4, 4, 8))).astype(np.float32)
family = get_family(c)
start, frozen = jax.tree.map(np.asarray, jax.jit(family.init)(key))
if sys.argv[1] == "edm2":
    start = jax.tree.map(lambda v: v if v.ndim else np.ones((), np.float32), start)  # gains: 0 at the start
    frozen |= family.companions()
    guide = Guide(family, jax.tree.map(lambda v: 0.5 * v, start), frozen, 1.5)
weights = [(rng.normal(size=s).astype(np.float32), np.zeros(s[1], np.float32)) for s in ((64, 32), (32, 10))]

def apply(x):
    f, logits = classifier.features_and_logits(tuple(weights), x, classifier.Design((8, 8, 1), 17, 10))
    return {"features": np.asarray(f), "class_logits": np.asarray(logits)}

network = FeatureNet("random", "0", "fd", 1.0, apply, levels=17, fitted=True)

def everything(devices, fsdp):
    mesh = sharding.make_mesh(fsdp, devices)
    first, ref = (make() for make in rounds.anchors(family, mesh, lambda: sharding.place(mesh, start)))
    training = step.Training(family, mesh, c.ddo, "ddo", warmup=0.0, total=1e6)
    current = sharding.place(mesh, state.new_state(first, c.ddo))
    advance = step.make_step(training)
    totals = sharding.replicate(mesh, step.zero_totals(family, "ddo"))
    hyper, k = step.Hyper(4.0, 0.2, 1e-3, (-0.4, 1.2)), sharding.replicate(mesh, key)
    for i in range(2):
        parts = [sharding.put_batch(mesh, {"image": records[j::4], "label": labels[j::4]}) for j in (i, i + 2)]
        current, totals = advance(current, totals, step.Inputs(frozen, *parts, k, hyper, ref))
    spread = {str(x.sharding.spec) for x in jax.tree.leaves(current["params"])}
    sampler = make_sampler(family, family.settings(c.sampler), mesh, 16, guide=guide)
    seeds = np.arange(40)
    sampled = list(sampler(current["ema"], frozen, seeds, seeds % 10))
    real = ArraySource("real", images, labels, 10)
    reference = references.of_images(lambda n: image_sets.of_source(real, n, 17), {"fid": 32}, {"main": network})
    fake = Images("fake", 40, (8, 8, 1), 17, 10, sampled, {"quantised_to": "17 levels"})
    found = Evaluator({"main": network}, {"train": reference}).score(fake, ["fid"]).values
    made = np.concatenate([r["image"] for r in sampled])
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


TOKENS = """
import functools, json, sys
from types import SimpleNamespace
import jax
jax.config.update("jax_num_cpu_devices", 8)
import numpy as np
from ddo_jax import sharding
from ddo_jax import config as configs
from ddo_jax.families import get_family
from ddo_jax.generate.sampler import make_sampler
from ddo_jax.run import fakes, loop, reference_scores, state, step

c = configs.base()
c.family = "var"
c.model.update(arch="VAR", img_resolution=8, img_channels=1, label_dim=100, levels=17)
with c.unlocked():
    c.model.update(vae=sys.argv[1], patch_nums=(1, 2, 4), vocab_size=128, z_channels=8, cond_drop_rate=0.3)
    c.model.update(depth=2, embed_dim=64, num_heads=2)
c.ddo.update(batch=16, lr=1e-3, eps=1e-3, ema_mimg=0.0, weight_decay=0.05, clip=2.0, accumulation=2)
rng = np.random.default_rng(0)
family = get_family(c)
start = jax.tree.map(np.asarray, jax.jit(family.init)(jax.random.key(3))[0])
frozen = family.companions()
images = rng.integers(0, 17, (32, 8, 8, 1)).astype(np.uint8)
hyper, settings = step.Hyper(4.0, 0.2, 1e-3, (0.0, 1.0)), family.fake_settings(family.settings(c.sampler))

def everything(devices, fsdp):
    mesh = sharding.make_mesh(fsdp, devices)
    ref, whole = sharding.place(mesh, start), sharding.place(mesh, frozen)
    training = step.Training(family, mesh, c.ddo, "ddo", warmup=0.0, total=1e6)
    current = sharding.place(mesh, state.new_state(ref, training.config))
    advance = step.make_step(training)
    totals, key = sharding.replicate(mesh, (step.zero_totals(family, "ddo"), jax.random.key(5)))
    sampler = make_sampler(family, settings, mesh, 16, output="records")
    pair = fakes.online(mesh, functools.partial(sampler, ref, whole), 16, 2, 0, False)(0)
    kept = {"real": reference_scores.Kept(32), "fake": reference_scores.Kept(32)}
    phase = SimpleNamespace(partners=loop.Partners(ref, None, kept), hyper=hyper)
    programs = reference_scores.programs(family, c.ddo, mesh)
    asks = reference_scores.ReferenceScores(programs, mesh, whole, phase, key)
    tokens = jax.jit(lambda f, r: family.store(f, family.encode(f, r, key)))
    seen = []
    for k in range(2):
        rows = np.arange(16 * k, 16 * k + 16)
        record = {"image": images[rows], "label": rows.astype(np.int32) % 10}
        real = tokens(whole, sharding.put_batch(mesh, record))
        fake, own = pair(k, real)
        s_ref = asks(k, {"real": real, "fake": fake}, {"real": rows, "fake": own})
        seen += [real["image"], fake["image"], jax.numpy.stack(s_ref)]
        arguments = (current, totals, step.Inputs(whole, real, fake, key, hyper, s_ref=s_ref))
        if k == 0:
            kept_over_devices = advance.lower(*arguments).as_text().count("sharding_constraint")
        current, totals = advance(*arguments)
    spread = {str(x.sharding.spec) for x in jax.tree.leaves(current["params"])}
    seen = [np.asarray(x) for x in seen]
    return jax.tree.map(np.asarray, current), jax.device_get(totals), seen, spread, kept_over_devices

a, b = everything(jax.devices()[:1], 1), everything(jax.devices(), 8)
def worst(x, y):
    pairs = zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True)
    return max(float(np.max(np.abs(p - q) / (1e-3 + np.abs(p)))) for p, q in pairs)
print(json.dumps({
    "devices": len(jax.devices()), "sharded": sorted(b[3]), "state": worst(a[0], b[0]),
    "totals": worst(*({n: x[1][n] for n in ("loss_real", "loss_fake", "nll_real", "grad_norm")} for x in (a, b))),
    "tokens": float(np.mean([np.mean(a[2][i] != b[2][i]) for i in (0, 1, 3, 4)])),
    "asked": worst([a[2][2], a[2][5]], [b[2][2], b[2][5]]), "moved": worst(a[0]["params"], start), "rows": b[4],
}))
"""


@pytest.mark.slow
def test_eight_devices_equal_one_for_tokens():
    """Breaks if fakes, dropped labels, kept scores or micro-batches depend on the number of devices."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", TOKENS, str(ROOT / "configs" / "digits_vqvae.safetensors")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["devices"] == 8 and any("fsdp" in spec for spec in found["sharded"])
    assert found["moved"] > 1e-2 and found["tokens"] == 0 and found["asked"] < 1e-5
    assert found["state"] < 1e-3 and found["totals"] < 1e-3
    assert found["rows"] >= 4  # a device holds its own rows, whatever the sharding of the tables they look up


@pytest.mark.slow
@pytest.mark.parametrize("network", ["mlp", pytest.param("edm2", marks=pytest.mark.slow)])
def test_eight_devices_equal_one(network):
    """Breaks if a mean, a draw or a sample depends on the number of devices, or nothing is sharded at all."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", SCRIPT, network, str(ROOT / "configs" / "digits_vae.safetensors")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
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
