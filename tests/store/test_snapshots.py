"""Snapshots: what is written, what is found, sums of files against the public reference (specs/edm2.md section 9)."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ddo_jax import convert
from ddo_jax.convert import safetensors
from ddo_jax.core import phema
from ddo_jax.errors import UserError
from ddo_jax.store import snapshots
from tests.harness import random_variables

ROOT = Path(__file__).parents[2]
GOLDEN = dict(np.load(ROOT / "tests" / "goldens" / "edm2_phema.npz"))


def put(directory, images, std, state, name="network-snapshot", **metadata):
    """A snapshot as a file of any dtype, so that float16 does not hide an error."""
    metadata = {"ddo_jax_kind": "mlp", "ddo_jax_images": str(images), "ddo_jax_std": str(float(std)), **metadata}
    path = directory / snapshots.file_name(name, int(images) // 1000, float(std))
    path.write_bytes(safetensors.dumps(state, metadata))
    return path


def some(value=1.0, size=3):
    return {"a.weight": np.full(size, value, np.float32), "b.freqs": np.full(2, value, np.float32)}


# -- writing ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_written_files_are_found_with_their_weights(setup, tmp_path):
    """Breaks if lengths are swapped, time or length are rounded to the name's, or names are not the released ones."""
    family, frozen = setup.family, setup.frozen
    params = [random_variables(family.init, seed=i)[0] for i in range(2)]
    for images in (1_500, 200_600):
        snapshots.write(tmp_path / "x" / "snapshots", family, frozen, {0.05: params[0], 0.1004: params[1]}, images)
    found = snapshots.find(str(tmp_path / "x"))
    assert [s[1:] for s in found] == [(1, 1500, 0.05), (1, 1500, 0.1004), (200, 200_600, 0.05), (200, 200_600, 0.1004)]
    assert found[0].path.name == "network-snapshot-0000001-0.050.safetensors"
    for s in found:
        released = convert.read(s.path)
        arrays, metadata = family.export(params[s.std != 0.05], frozen)
        assert released.extras["metadata"] == {
            **metadata,
            "ddo_jax_images": str(s.images),
            "ddo_jax_std": f"{s.std}",
        }
        assert set(released.state_dict) == set(arrays)
        for name, array in arrays.items():
            assert released.state_dict[name].dtype == np.float16
            np.testing.assert_allclose(released.state_dict[name], array, rtol=5e-4, atol=1e-7)


def test_buffers_keep_their_digits():
    """Breaks if a constant of the network is rounded, or a parameter is not."""
    thirds = np.full((2, 2), 1 / 3, np.float32)
    state = {
        "a.weight": thirds,
        "b.gain": thirds[0, 0],
        "c.freqs": thirds,
        "d.phases": thirds,
        "resample_filter": thirds,
    }
    state["model.up.resample_filter"] = state.pop("resample_filter")
    arrays, _ = safetensors.loads(snapshots.encode(state, {}, 5, 0.1))
    dtypes = {name: array.dtype for name, array in arrays.items()}
    assert dtypes == dict(zip(state, [np.float16] * 2 + [np.float32] * 3, strict=True))
    assert {name: array.shape for name, array in arrays.items()} == {k: np.shape(v) for k, v in state.items()}


@pytest.mark.parametrize("value", [7e4, np.nan, np.inf])
def test_weights_that_float16_cannot_hold(value):
    """Breaks if infinities are written instead of weights."""
    with pytest.raises(UserError, match=r"a\.weight: \|x\| up to .*; allowed in float16: up to 65504"):
        snapshots.encode({"a.weight": np.array([1, value], np.float32)}, {}, 5, 0.1)


# -- finding ----------------------------------------------------------------------------------------------


def test_folders_and_names(tmp_path):
    """Breaks if a released name's time is not the next multiple of 1024, or a result is taken for a snapshot."""
    workdir = tmp_path / "run"
    folder = workdir / "pretrain" / "snapshots"
    folder.mkdir(parents=True)
    for name in ("edm2-img64-s-0008388-0.050.pkl", "edm2-img64-s-0008388-0.100.pkl", "x-0-0.05.pkl"):
        (folder / name).write_bytes(b"not looked into")
    for name in ("phema-0008388-0.075.pkl", ".x-0008388-0.050.pkl", "x-0008388-0.050.pkl.tmp", "x-8388.pkl", "notes"):
        (folder / name).write_bytes(b"")
    put(folder, 2_000_000, 0.05, some())
    put(folder, 2_000_000, 0.2, some(), name="mine", ddo_jax_posthoc="sum of 3 snapshots")
    put(folder, 2_000_000, 0.2, some(), name="phema")
    expected = [(0, 0, 0.05), (2000, 2_000_000, 0.05), (8388, 8388608, 0.05), (8388, 8388608, 0.1)]
    for what in (workdir, workdir / "pretrain", folder):
        assert [s[1:] for s in snapshots.find(str(what))] == expected


@pytest.mark.parametrize(
    "content, words",
    [
        ({}, r"no snapshots .* ema_stds and snapshot_every"),
        ({"a-1-0.5.pkl": b""}, r"a-1-0.5.pkl: an EMA of length 0.5 after 1024 images; .*0.2887"),
        ({"a-1-0.05.safetensors": b""}, r"a-1-0.05.safetensors: .*; make it again"),
        ({"a-1-0.05.safetensors": b"\0" * 20}, r"a-1-0.05.safetensors: safetensors: .*; make it again"),
        ({"a-1-0.05.pkl": b"", "b-1-0.05.pkl": b""}, r"b-1-0.05.pkl: of the same time and length as a-1-0.05.pkl"),
    ],
)
def test_folders_that_cannot_be_used(tmp_path, content, words):
    """Breaks if a bad file is skipped in silence, or ends in a traceback."""
    for name, data in content.items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=words) as e:
        snapshots.find(str(tmp_path))
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("metadata", [{"ddo_jax_images": "many"}, {"ddo_jax_std": "nan"}, {"ddo_jax_images": "-5"}])
def test_damaged_metadata(tmp_path, metadata):
    """Breaks if a time or length that makes no sense enters the fit."""
    path = put(tmp_path, 2000, 0.05, some(), **metadata)
    with pytest.raises(UserError, match=f"^{re.escape(str(path))}: "):
        snapshots.find(str(tmp_path))
    with pytest.raises(UserError, match="gs://bucket/run: .*local folder"):
        snapshots.find("gs://bucket/run")


# -- sums -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["last", "prev"])
def test_sums_equal_the_reference(tmp_path, case):
    """Breaks if a snapshot gets another one's weight, or sums lose digits."""
    at = f"posthoc/{case}/"
    rows = [GOLDEN[at + key] for key in ("in_nimg", "in_std", "in_values")]
    for images, std, values in zip(*rows, strict=True):
        put(tmp_path, images, std, {"a.weight": values, "b.freqs": np.array([images, std])})
    found, wanted = snapshots.find(str(tmp_path)), GOLDEN[at + "out_std"]
    x, rest = snapshots.fit(found, int(GOLDEN[at + "out_nimg"]), wanted)
    np.testing.assert_allclose(x, GOLDEN[at + "coefs"], atol=1e-10 * np.abs(x).max())
    states, metadata = snapshots.reconstruct(found, x)
    made, expected = np.stack([s["a.weight"] for s in states]), GOLDEN[at + "reconstructed"]
    assert json.loads(metadata.pop("ddo_jax_origin"))["licence"] == "unknown"
    assert made.dtype == np.float32 and metadata == {"ddo_jax_kind": "mlp"}
    np.testing.assert_allclose(made, expected, rtol=0, atol=2e-6 * np.abs(expected).max())
    for state in states:  # of the last snapshot in the order (time, length), not averaged
        np.testing.assert_array_equal(state["b.freqs"], [GOLDEN[at + "out_nimg"], 0.1])
    halves = [safetensors.loads(snapshots.encode(s, metadata, 1, 0.1))[0]["a.weight"] for s in states]
    np.testing.assert_allclose(halves, expected, rtol=2**-11, atol=1e-6)


def test_what_cannot_be_rebuilt_is_said():
    """Breaks if the rest is not the distance of the profiles, integrated by brute force."""
    t, std = GOLDEN["posthoc/last/in_nimg"], GOLDEN["posthoc/last/in_std"]
    found = [snapshots.Snapshot(Path("x"), 0, int(a), float(b)) for a, b in zip(t, std, strict=True)]
    end, wanted = int(t[-1]), [0.02, 0.05, 0.07, 0.15]
    x, rest = snapshots.fit(found, end, wanted)
    tau = (np.arange(400_000) + 0.5) / 400_000 * end

    def profile(t, std):
        gamma = phema.std_to_gamma(std)
        return np.where(tau <= t, (gamma + 1) * np.minimum(tau / t, 1) ** gamma / t, 0)

    sums = x.T @ np.stack([profile(s.images, s.std) for s in found])
    for share, own, std in zip(rest, sums, wanted, strict=True):
        p = profile(end, std)
        np.testing.assert_allclose(share, np.linalg.norm(own - p) / np.linalg.norm(p), rtol=1e-3, atol=1e-6)
    assert rest[0] > 0.1 and rest[1] < 1e-6 and rest[2] < 0.03


@pytest.mark.parametrize(
    "other, metadata, words",
    [
        (some(size=4), {}, r"shape of a.weight is \[4\], but \[3\] in network-snapshot-0000001-0.050"),
        ({"a.weight": np.ones(3, np.float32)}, {}, r"shape of b.freqs is absent, but \[2\] in"),
        ({**some(), "c.weight": np.ones(1, np.float32)}, {}, r"shape of c.weight is \[1\], but absent in"),
        (some(), {"ddo_jax_kind": "edm"}, "kind is edm, but mlp in"),
        (some(), {"ddo_jax_config": '{"label_dim": 10}'}, "config.label_dim is 10, but absent in"),
    ],
)
def test_other_networks_are_refused(tmp_path, other, metadata, words):
    """Breaks if weights of two networks are summed."""
    put(tmp_path, 1024, 0.05, some())
    path = put(tmp_path, 2048, 0.05, other, **metadata)
    with pytest.raises(UserError, match=f"^{re.escape(str(path))}: {words}") as e:
        snapshots.reconstruct(snapshots.find(str(tmp_path)), np.ones((2, 1)))
    assert "\n" not in str(e.value)


def test_a_network_nobody_knows(tmp_path):
    """Breaks if the result could not say what it is."""
    path = put(tmp_path, 1024, 0.05, some())
    path.write_bytes(safetensors.dumps(some()))
    with pytest.raises(UserError, match=f"^{re.escape(str(path))}: a network of no kind that is known; allowed: "):
        snapshots.reconstruct(snapshots.find(str(tmp_path)), np.ones((1, 1)))


def test_the_encoder_goes_along(tmp_path):
    """Breaks if a latent network loses what makes images of its latents."""
    encoder = {"vae_name": "vae", "scale": [1.0], "bias": [0.5]}
    put(tmp_path, 1024, 0.05, some(), ddo_jax_released_encoder=json.dumps(encoder))
    _, metadata = snapshots.reconstruct(snapshots.find(str(tmp_path)), np.ones((1, 1)))
    assert json.loads(metadata["ddo_jax_released_encoder"]) == encoder


SCRIPT = """
import sys
import jax
jax.config.update("jax_num_cpu_devices", 8)
import numpy as np
from etils import epath
from ddo_jax import sharding
from ddo_jax.families import get_family
from ddo_jax import config as configs
from ddo_jax.run import state, step
from ddo_jax.store import snapshots

c = configs.base()
c.model.update(arch="mlp", img_resolution=8, img_channels=1, label_dim=10, levels=17)
with c.unlocked():
    c.model.update(width=64, blocks=1)
c.pretrain.update(batch=16, lr=1e-3, eps=1e-3, ema_stds=(0.05, 0.1))
family, p = get_family(c), c.pretrain
rng = np.random.default_rng(0)
record = {"image": rng.integers(0, 17, (16, 8, 8, 1)).astype(np.uint8), "label": np.arange(16, dtype=np.int32) % 10}
start, frozen = jax.tree.map(np.asarray, jax.jit(family.init)(jax.random.key(3)))
for name, devices, fsdp in (("one", jax.devices()[:1], 1), ("eight", jax.devices(), 2)):
    mesh = sharding.make_mesh(fsdp, devices)
    training = step.Training(family, mesh, p, "mle", warmup=0.0, total=1e6)
    current = sharding.place(mesh, state.new_state(start, p))
    advance = step.make_step(training)
    totals = sharding.replicate(mesh, step.zero_totals(family, "mle"))
    key, hyper = sharding.replicate(mesh, jax.random.key(0)), step.Hyper(1.0, 1.0, 1e-3, (-1.2, 1.2))
    for _ in range(3):
        real = sharding.put_batch(mesh, record)
        current, totals = advance(current, totals, step.Inputs(frozen, real, None, key, hyper))
    print(name, sorted({str(x.sharding.spec) for x in jax.tree.leaves(current["emas"])}))
    averages = state.averages(current, p.ema_stds)
    snapshots.write(epath.Path(sys.argv[1]) / name, family, frozen, averages, 48)
"""


@pytest.mark.slow
def test_eight_devices_write_what_one_writes(tmp_path):
    """Breaks if an EMA length is not sharded by the rule, or a file holds one device's part."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    line = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "fsdp" in done.stdout.splitlines()[-1]
    one, eight = (snapshots.find(str(tmp_path / name)) for name in ("one", "eight"))
    assert [s.std for s in one] == [s.std for s in eight] == [0.05, 0.1]
    states = [convert.read(s.path).state_dict for s in (*one, *eight)]
    for name in states[0]:
        for a, b in ((0, 2), (1, 3)):  # one float16 unit where float32 rounding crosses a border
            np.testing.assert_allclose(*(states[i][name].astype(np.float32) for i in (a, b)), rtol=1e-3, atol=1e-6)
    assert any(np.any(states[0][name] != states[1][name]) for name in states[0])
