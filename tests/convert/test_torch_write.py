""".pth files without torch: exact round trips, torch's own bytes, aligned payloads, ZIP64; torch itself where it is."""

import collections
import hashlib
import io
import json
import os
import struct
import tracemalloc
import zipfile

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddo_jax.convert import __main__ as command
from ddo_jax.convert import from_torch, read, safetensors, to_torch, torch_write
from ddo_jax.convert.read import CONFIG_KEY, KIND_KEY
from tests.harness import exit_code

from . import conftest as build

DTYPES = [np.float64, np.float32, np.float16, np.int64, np.int32, np.int16, np.int8, np.uint8, np.bool_, jnp.bfloat16]
VAR = {"num_classes": 3, "depth": 2, "embed_dim": 8, "num_heads": 2, "patch_nums": [1, 2, 3], "vocab_size": 11}
VAR |= {"z_channels": 4, "mlp_ratio": 2.0, "shared_aln": False, "attn_l2_norm": True}
VQVAE = {"vocab_size": 5, "z_channels": 3, "ch": 2, "ch_mult": [1], "num_res_blocks": 1, "quant_conv_ks": 3}
VQVAE |= {"share_quant_resi": 4, "patch_nums": [1, 2, 3, 4, 5, 6, 8, 10, 13, 16], "in_channels": 3, "norm_groups": 2}
VQVAE |= {"quant_resi": 0.5, "using_znorm": False, "beta": 0.25}


def every_dtype():
    """All dtypes and shapes that a state dict can have; numbers that every machine makes the same."""
    state = {np.dtype(d).name: (np.arange(-7, 8).reshape(3, 5) * 3 % 7 - 2).astype(d) for d in DTYPES}
    state |= {"scalar": np.array(2.5), "flag": np.array(True), "empty": np.zeros((0, 4), np.float16)}
    state |= {"flat": np.zeros((3, 0, 5), np.int32), "transposed": np.arange(6.0).reshape(2, 3).T, "ü.β": np.ones(300)}
    state |= {"five": np.ones((1, 2, 1, 2, 300), np.float32), "big": np.zeros((1, 70_000), np.int8)}
    return state | {"swapped": np.arange(4, dtype=">f4"), "many": np.ones((2, 2, 2, 2), jnp.bfloat16)}


def widened(array):
    """As `read` gives it."""
    return array.astype(np.float32 if array.dtype == jnp.bfloat16 else array.dtype.newbyteorder("="))


def assert_same(seen, expected):
    assert list(seen) == list(expected)
    for name, array in expected.items():
        assert seen[name].dtype == array.dtype and seen[name].shape == array.shape, name
        assert seen[name].tobytes() == array.tobytes(), name


def test_round_trip_of_every_dtype(tmp_path):
    state = every_dtype()
    torch_write.write(tmp_path / "a.pth", state)
    released = read(tmp_path / "a.pth")
    assert released.extras["format"] == "torch-zip" and released.extras["top_level"][:2] == ["float64", "float32"]
    assert released.extras["dtypes"] == {name: array.dtype.name for name, array in state.items()}
    assert_same(released.state_dict, {name: widened(array) for name, array in state.items()})
    torch_write.write(tmp_path / "b.pth", released.state_dict, released.extras["dtypes"])
    assert (tmp_path / "a.pth").read_bytes() == (tmp_path / "b.pth").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.pth", "b.pth"]  # nothing temporary


def test_the_golden_torch_file(tmp_path):
    """Parameters, views of one storage, infinities, bfloat16: what a file of torch's holds comes out again."""
    source = read(build.GOLDENS / "ckpt_small.pth")
    torch_write.write(tmp_path / "a.pth", source.state_dict, source.extras["dtypes"])
    again = read(tmp_path / "a.pth")
    assert_same(again.state_dict, source.state_dict)
    assert again.extras == source.extras and "bfloat16" in again.extras["dtypes"].values()


def before_the_fingerprint(data):
    """torch.save's bytes up to `.data/serialization_id`, the last member; or ours up to the directory."""
    with zipfile.ZipFile(io.BytesIO(data)) as f:
        last = f.infolist()[-1]
        return data[: last.header_offset if last.filename.endswith("serialization_id") else f.start_dir]


# SHA-256 of `before_the_fingerprint`(torch.save(...)) by torch 2.13.0: see `test_torch_itself`, which made them.
TORCH = {
    "every_dtype": "57a0bd6b17a099112639dd5f22245126e4dba0edfc91ba808544ffe20d19b63e",
    0: "66e2bf8598acb1ec59c0562c4982d2f54a99c640e63156e78216613e8e6151e7",
    1: "2da85f3930f6af0a7d08c69ba442733e339d63b632770b211099f9a5be245ee7",
    1000: "535afefc085a41d7c1be142a00a68188d10800df4d9cee1b2e69c62a747c8404",
    1001: "6cd7bd48523a4fff20a4b2e66c97749e680f1184f1c0235a18628d5f1caff2f9",
}


def numbered(count):
    """Enough tensors for the pickle's long forms and its second batch of items."""
    return {f"layers.{i}.weight": np.full((i % 3 + 1, 2), i, np.float32) for i in range(count)}


@pytest.mark.parametrize("what", TORCH)
def test_the_bytes_are_those_of_torch(what, tmp_path):
    state = every_dtype() if what == "every_dtype" else numbered(what)
    torch_write.write(tmp_path / "a.pth", state)
    data = (tmp_path / "a.pth").read_bytes()
    assert hashlib.sha256(before_the_fingerprint(data)).hexdigest() == TORCH[what]
    if state:
        assert list(read(tmp_path / "a.pth").state_dict) == list(state)


@pytest.mark.parametrize("limit", [torch_write.LIMIT, 1000, 0])
def test_the_container(limit, tmp_path, monkeypatch):
    """Stored, aligned, with checksums; sizes and offsets above the limit are in ZIP64's fields."""
    monkeypatch.setattr(torch_write, "LIMIT", limit)
    path, state = tmp_path / "a.pth", every_dtype()
    torch_write.write(path, state)
    data = path.read_bytes()
    with zipfile.ZipFile(path) as f:
        assert f.testzip() is None
        names = ["data.pkl", ".format_version", ".storage_alignment", "byteorder"]
        names += [*(f"data/{i}" for i in range(len(state))), "version"]
        assert f.namelist() == [f"archive/{name}" for name in names]
        contents = [f.read(name) for name in f.namelist()]
        assert contents[1:4] == [b"1", b"64", b"little"] and contents[-1] == b"3\n"
        for member, content in zip(f.infolist(), contents, strict=True):
            name, extra = struct.unpack_from("<2H", data, member.header_offset + 26)
            start = member.header_offset + 30 + name + extra
            assert start % 64 == 0 and member.compress_type == zipfile.ZIP_STORED
            assert data[start : start + member.file_size] == content
        fields = [v for e in f.infolist() for v in (e.header_offset, e.file_size, e.compress_size)]
        fields += [f.start_dir, path.stat().st_size - f.start_dir - 98]  # of the end record, 98 bytes with ZIP64's
        assert data[f.start_dir :].count(b"\xff\xff\xff\xff") == sum(v >= limit for v in fields)
    assert_same(read(path).state_dict, {name: widened(array) for name, array in state.items()})


@pytest.mark.parametrize(
    "array, message",
    [
        (np.ones(2, np.uint16), "dtype uint16; allowed: float64, float32, float16, bfloat16, int64"),
        (np.ones(2, np.complex64), "dtype complex64; allowed"),
        (np.array(["a"]), "dtype str32; allowed"),
        (np.array([None]), "dtype object; allowed"),
        (np.float32([1, 1.001]), "values that bfloat16 does not have; allowed: those, or float32"),
    ],
)
def test_mistakes_are_named_and_nothing_is_left(array, message, tmp_path):
    path = tmp_path / "a.pth"
    path.write_bytes(b"before")
    with pytest.raises(ValueError) as e:
        torch_write.write(path, {"first": np.ones(1), "w.\n": array}, {"w.\n": "bfloat16"})
    assert str(e.value).startswith(f"w.\\n: {message}") and "\n" not in str(e.value)
    assert [p.name for p in tmp_path.iterdir()] == ["a.pth"] and path.read_bytes() == b"before"


def test_only_what_was_widened_is_narrowed(tmp_path):
    """Breaks if the dtypes of the file rule arrays that are not float32, or bits of NaN are lost."""
    bits = np.array([0x7FC1, 0xFF81, 0x8000, 0x7F80, 1], np.uint16)
    wide = (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    state = {"a": wide, "b": wide, "c": np.arange(3)}
    torch_write.write(tmp_path / "a.pth", state, {"a": "bfloat16", "c": "bfloat16"})
    released = read(tmp_path / "a.pth")
    assert released.extras["dtypes"] == {"a": "bfloat16", "b": "float32", "c": "int64"}
    assert_same(released.state_dict, state)
    with zipfile.ZipFile(tmp_path / "a.pth") as f:
        assert f.read("archive/data/0") == bits.tobytes()


def test_one_tensor_at_a_time(tmp_path):
    """Breaks if the file is put together in memory: 16 GB of a large VAR twice."""
    state = {f"p{i}": np.zeros((1 << 10, 1 << 10), np.float32).T for i in range(4)}  # transposed: one copy of each
    tracemalloc.start()
    torch_write.write(tmp_path / "a.pth", state)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * 4 << 20 and (tmp_path / "a.pth").stat().st_size > 4 * 4 << 20


# ----------------------------------------------------------------------------------------------------
# Networks


def random_var(dtype=np.float32):
    """Variables of a small VAR, as a run of ours has them."""
    from ddo_jax.models.var import from_config

    module = from_config(VAR)
    maps = jax.ShapeDtypeStruct((1, module.length - 1, module.z_channels), np.float32)
    abstract = jax.eval_shape(module.init, jax.random.key(0), jax.ShapeDtypeStruct((1,), np.int32), maps)
    return filled({"params": abstract["params"]}, dtype)


def random_vqvae(dtype=np.float32):
    from ddo_jax.models.vqvae import from_config

    module = from_config(VQVAE)
    x = jax.ShapeDtypeStruct((1, module.image_size, module.image_size, 3), np.float32)
    return filled(jax.eval_shape(module.init, jax.random.key(0), x), dtype)


def filled(abstract, dtype):
    rng = np.random.default_rng(0)
    leaves = flax.traverse_util.flatten_dict(abstract)
    return flax.traverse_util.unflatten_dict({k: rng.normal(size=v.shape).astype(dtype) for k, v in leaves.items()})


@pytest.mark.parametrize("dtype", [np.float32, np.float16, jnp.bfloat16])
@pytest.mark.parametrize("kind, config, variables", [("var", VAR, random_var), ("vqvae", VQVAE, random_vqvae)])
def test_networks(kind, config, variables, dtype, tmp_path, capsys):
    """Ours -> released -> .pth -> released -> ours, all bytes and the order kept, the arguments inferred."""
    state = to_torch(kind, config, variables(dtype))
    torch_write.write(tmp_path / "a.pth", state)
    released = read(tmp_path / "a.pth")
    assert (released.kind, released.config) == (kind, config)
    assert released.extras["dtypes"] == {name: array.dtype.name for name, array in state.items()}
    assert_same(released.state_dict, {name: widened(array) for name, array in state.items()})
    _, back = from_torch(kind, released.config, released.state_dict)
    assert_same(to_torch(kind, released.config, back), released.state_dict)

    assert exit_code(command.main, [str(tmp_path / "a.pth"), str(tmp_path / "b.pth")]) == 0
    assert (tmp_path / "a.pth").read_bytes() == (tmp_path / "b.pth").read_bytes()
    out = capsys.readouterr().out
    assert ("bfloat16 tensors stay so" in out) == (dtype == jnp.bfloat16)
    assert "kind and config are not recorded" in out and out.endswith("equal to the source byte for byte\n")


def test_command_from_pickles_and_our_own_export(small_edm2, tmp_path, capsys):
    """EDM2's float16 out of a pickle; best/params.safetensors of a run, whose arrays may stand in any order."""
    config, state = small_edm2
    (tmp_path / "a.pkl").write_bytes(build.edm2_nvidia(config, state, build.vae_encoder()))
    ours, weights = build.golden("edm_ddpmpp_small")
    metadata = {KIND_KEY: "edm", CONFIG_KEY: json.dumps(ours)}
    (tmp_path / "params.safetensors").write_bytes(safetensors.dumps(dict(sorted(weights.items())), metadata))
    for name, kind, expected in ("a.pkl", "edm2", state), ("params.safetensors", "edm", weights):
        dst = tmp_path / f"{kind}.pth"
        assert exit_code(command.main, [str(tmp_path / name), str(dst)]) == 0, capsys.readouterr().err
        released = read(dst)
        assert released.kind == kind and set(released.extras["dtypes"].values()) <= {"float16", "float32"}
        assert_same(released.state_dict, expected)
        back = tmp_path / f"{kind}.safetensors"
        for argv in ([str(dst), str(back)], [str(back), str(dst), "--force"]):
            assert exit_code(command.main, argv) == 0
        assert_same(read(dst).state_dict, expected)


def test_a_full_disk_is_one_line(tmp_path, monkeypatch, capsys):
    torch_write.write(tmp_path / "a.pth", to_torch("var", VAR, random_var()))

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    for name in ("b.pth", "b.safetensors"):
        assert exit_code(command.main, [str(tmp_path / "a.pth"), str(tmp_path / name)]) == 2
        err = capsys.readouterr().err
        assert err == f"error: {tmp_path / name}: cannot be written (No space left on device)\n"
    assert [p.name for p in tmp_path.iterdir()] == ["a.pth"]


# ----------------------------------------------------------------------------------------------------
# torch


def tensors(torch, state):
    """Contiguous tensors of their own, as a module's state dict has them."""
    out = collections.OrderedDict()
    for name, array in state.items():
        array = np.ascontiguousarray(array, array.dtype.newbyteorder("=")).reshape(array.shape)
        bits = torch.from_numpy(array.view(np.int16) if array.dtype == jnp.bfloat16 else array)
        value = bits.view(torch.bfloat16) if array.dtype == jnp.bfloat16 else bits
        out[name] = torch.empty(value.shape, dtype=value.dtype).copy_(value)
    return out


def test_torch_itself(tmp_path):
    """It reads what we write, we read what it writes; of version 2.13.0 the bytes are the same."""
    torch = pytest.importorskip("torch")
    for what, digest in TORCH.items():
        state = every_dtype() if what == "every_dtype" else numbered(what)
        expected, buffer = tensors(torch, state), io.BytesIO()
        torch_write.write(tmp_path / "a.pth", state)
        loaded = torch.load(tmp_path / "a.pth", weights_only=True)
        assert type(loaded) is collections.OrderedDict and list(loaded) == list(expected)
        for name, value in expected.items():
            seen = loaded[name]
            assert seen.dtype == value.dtype and seen.shape == value.shape and seen.stride() == value.stride(), name
            assert torch.equal(seen, value) and not seen.requires_grad and seen.device.type == "cpu", name
        torch.save(expected, buffer)
        if torch.__version__.split("+")[0] == "2.13.0":
            assert hashlib.sha256(before_the_fingerprint(buffer.getvalue())).hexdigest() == digest, what
        if state:
            (tmp_path / "b.pth").write_bytes(buffer.getvalue())
            theirs = read(tmp_path / "b.pth")
            torch_write.write(tmp_path / "c.pth", theirs.state_dict, theirs.extras["dtypes"])
            assert (tmp_path / "c.pth").read_bytes() == (tmp_path / "a.pth").read_bytes()


def test_torch_loads_strictly(tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))  # a 0-d int64 buffer
    released = {name: value.numpy() for name, value in module.state_dict().items()}
    state = {name: np.full(v.shape, i + 1, v.dtype) for i, (name, v) in enumerate(released.items())}
    for limit in (torch_write.LIMIT, 0):
        monkeypatch.setattr(torch_write, "LIMIT", limit)
        torch_write.write(tmp_path / "a.pth", state)
        module.load_state_dict(torch.load(tmp_path / "a.pth", weights_only=True), strict=True)
        module.load_state_dict(torch.load(tmp_path / "a.pth", weights_only=True, mmap=True), strict=True)
        for name, value in module.state_dict().items():
            np.testing.assert_array_equal(value.numpy(), state[name])
