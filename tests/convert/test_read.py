"""Whole files of every format: exactly the configuration and arrays they were built from, and the command line."""

import itertools
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from ddo_jax.convert import Released, from_torch, read, safetensors, to_torch
from ddo_jax.convert import __main__ as command
from ddo_jax.convert.inert import UnsafeOrDamaged
from ddo_jax.errors import UserError
from ddo_jax.models.edm import from_config
from tests.harness import exit_code

from . import conftest as build

DEFAULTED = ("dropout", "class_name")


def write(tmp_path, data, name="file"):
    path = tmp_path / name
    path.write_bytes(data)
    return path


def assert_same(seen, expected):
    assert list(seen) == list(expected)
    for name, array in expected.items():
        assert seen[name].dtype == array.dtype and seen[name].shape == array.shape, name
        assert seen[name].tobytes() == array.tobytes(), name


@pytest.mark.parametrize("name", build.FILES)
def test_nvidia_pickle(name, tmp_path):
    config, state = build.golden(name)
    released = read(write(tmp_path, build.nvidia(config, state, dataset_kwargs={"path": "x.zip"}), "net.safetensors"))
    assert isinstance(released, Released) and (released.kind, released.config) == ("edm", config)
    assert_same(released.state_dict, state)
    assert released.extras == {
        "format": "nvidia-pickle",
        "class_name": "EDMPrecond",
        "top_level": ["ema", "loss_fn", "augment_pipe", "dataset_kwargs"],
        "dtypes": dict.fromkeys(state, "float32"),
    }
    module, variables = from_torch("edm", released.config, released.state_dict)
    assert_same(to_torch("edm", released.config, variables), state)


@pytest.mark.parametrize("name", build.FILES)
def test_without_a_configuration_the_shapes_give_it(name, tmp_path):
    config, state = build.golden(name)
    for data in (build.torch_zip(state), build.torch_legacy(state), safetensors.dumps(state)):
        released = read(write(tmp_path, data))
        assert released.kind == "edm"
        assert_same(released.state_dict, state)
        missing = {k: released.config[k] for k in released.config if k not in config}
        assert missing == {"channel_mult_emb": 4}
        assert {k: v for k, v in config.items() if k in released.config} == {
            k: v for k, v in released.config.items() if k in config
        }
        assert set(config) - set(released.config) == {"dropout"}
    from_torch("edm", released.config, released.state_dict)


@pytest.mark.parametrize("name", ["edm_ddpmpp_small", "edm_adm_small"])
def test_released_files_do_not_record_everything(name, tmp_path):
    config, state = build.golden(name)
    recorded = {k: v for k, v in config.items() if k not in ("num_blocks", "attn_resolutions", "channel_mult")}
    released = read(write(tmp_path, build.nvidia(recorded, state)))
    assert released.config == config
    tuples = config | {"channel_mult": tuple(config["channel_mult"])}
    assert read(write(tmp_path, build.nvidia(tuples, state))).config == config


@pytest.mark.parametrize(
    "change, message",
    [
        ({"img_resolution": 32}, "img_resolution is recorded as 32, but the parameters have 16"),
        ({"channel_mult": [1, 1]}, "channel_mult is recorded as [1, 1], but the parameters have [1, 2]"),
        ({"attn_resolutions": [16]}, "attn_resolutions is recorded as [16], but the parameters have [8]"),
        ({"dropout": {"a": 1}}, "constructor argument dropout: a dict"),
        ({"encoder_type": "skip"}, "encoder_type is recorded as 'skip', but the parameters have 'standard'"),
    ],
)
def test_contradictions_are_named(change, message, tmp_path):
    config, state = build.golden("edm_ddpmpp_small")
    path = write(tmp_path, build.nvidia(config | change, state))
    with pytest.raises(UnsafeOrDamaged) as e:
        read(path)
    assert str(e.value) == f"{path}: {message}"


def test_the_golden_torch_file():
    released = read(build.GOLDENS / "ckpt_small.pth")
    assert released.kind is None and released.config == {} and released.extras["format"] == "torch-zip"
    with np.load(build.GOLDENS / "ckpt_small_expected.npz") as f:
        assert_same(released.state_dict, dict(f))
    assert released.extras["dtypes"]["extra.bf16"] == "bfloat16"
    assert released.extras["top_level"] == list(released.state_dict)


def test_torch_files_of_other_shapes(tmp_path):
    state = {"pos_1LC": np.arange(4.0), "b": np.ones((2, 3), np.float16)}
    other = {f"vae.{i}": np.ones(1) for i in range(5)}
    nested = build.torch_zip(
        state | other,
        nest=lambda v: {
            "epoch": 3,
            "trainer": {
                "vae_local": {k: v[k] for k in other},
                "var_wo_ddp": {k: v[k] for k in state},
                "var_opt": {"state": {0: {"step": 1.0, "m": v["b"]}}, "param_groups": [{"lr": 0.1}]},
            },
        },
    )
    released = read(write(tmp_path, nested))
    assert_same(released.state_dict, state)
    assert released.extras["top_level"] == ["epoch", "trainer"]
    cca = build.torch_zip(state | other, nest=lambda v: {"epoch": 3, "args": {"lr": 1e-5}, "trainer": v})
    assert_same(read(write(tmp_path, cca)).state_dict, state | other)
    big = read(write(tmp_path, build.torch_zip(state, byteorder="big", top="a" * 100)))
    assert_same(big.state_dict, state)


def test_damaged_zips_are_named(tmp_path):
    state = {"a.weight": np.arange(300.0)}
    good = build.torch_zip(state)
    at = good.index(state["a.weight"].tobytes())
    cases = {
        "archive/data/0 is damaged (checksum)": good[: at + 8] + b"\xff" + good[at + 9 :],
        "compressed or encrypted": build.torch_zip(state, compress=zipfile.ZIP_DEFLATED),
        "the directory at its end is missing": good[:-30],
        "1 bytes behind the directory": good + b"x",
        "a torch file has one": good.replace(b"data.pkl", b"date.pkl"),
        "storage 0: missing; expected 300 elements of float64": good.replace(b"data/0", b"data/1"),
    }
    for message, data in cases.items():
        with pytest.raises(UnsafeOrDamaged) as e:
            read(write(tmp_path, data))
        assert message in str(e.value), message


def test_what_is_no_checkpoint(tmp_path):
    cases = {
        "starts with nothing": b"",
        "starts with 504b0506": b"PK\5\6" + bytes(18),
        "starts with 3c68746d6c3e": b"<html>",
        "no network under the key 'ema'; found keys G, D": build.dumps({"G": 1, "D": 2}),
        "no network under the key 'ema'; found list": build.dumps([1]),
        "no dictionary of tensors": build.torch_zip({}),
    }
    for message, data in cases.items():
        with pytest.raises(UnsafeOrDamaged) as e:
            read(write(tmp_path, data))
        assert message in str(e.value)
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(UserError, match="cannot be read"):
            read(path)


def test_shared_modules_do_not_explode(tmp_path):
    module = build.persistent("Layer", build.attributes({}, {}, {}))
    for _ in range(25):
        module = build.persistent("Layer", build.attributes({}, {}, {"a": module, "b": module}))
    with pytest.raises(UnsafeOrDamaged, match="too many modules"):
        read(write(tmp_path, build.dumps({"ema": module})))


# ----------------------------------------------------------------------------------------------------
# python -m ddo_jax.convert


def test_command_round_trip(tmp_path, capsys):
    config, state = build.golden("edm_song_skip_small")
    src, dst, again = (
        write(tmp_path, build.nvidia(config, state), "a.pkl"),
        tmp_path / "b.safetensors",
        tmp_path / "c.npz",
    )
    assert exit_code(command.main, [str(src), str(dst)]) == 0
    out = capsys.readouterr().out.splitlines()
    rows = out[: len(state)]
    assert all(row.startswith(name) and row.endswith("matched") for name, row in zip(state, rows, strict=True))
    assert len({row.index("  float32") for row in rows}) == 1  # aligned
    buffers = sum(k.endswith("resample_filter") for k in state)
    total = sum(v.size for v in state.values())
    expected = f"kind edm; {len(state) - buffers} parameter tensors, {buffers} buffers, {total:,} values"
    assert out[len(state)] == expected and out[-1].startswith(f"wrote {dst}")

    released = read(dst)
    assert (released.kind, released.config) == ("edm", config)  # dropout too: our export records it
    assert_same(released.state_dict, state)
    assert exit_code(command.main, [str(dst), str(again)]) == 0
    with np.load(again) as f:
        assert json.loads(str(f["config"])) == config
        assert_same({k.removeprefix("param/"): f[k] for k in f.files if k.startswith("param/")}, state)
    capsys.readouterr()

    before = dst.read_bytes()
    assert exit_code(command.main, [str(src), str(dst)]) == 2
    assert capsys.readouterr().err == f"error: {dst}: exists; choose another name or pass --force to replace it\n"
    assert exit_code(command.main, [str(src), str(dst), "--force"]) == 0 and dst.read_bytes() == before
    assert exit_code(command.main, [str(src), "--dry_run"]) == 0 and sorted(p.name for p in tmp_path.iterdir()) == [
        "a.pkl",
        "b.safetensors",
        "c.npz",
    ]


def test_command_refusals(tmp_path, capsys):
    config, state = build.golden("edm_song_skip_small")
    key = "model.dec.4x4_in0.qkv.weight"
    fewer = {k: v for k, v in state.items() if k != key}
    wrong = [
        (build.nvidia(config, fewer), f"{key}: missing; shape [72, 24, 1, 1]"),
        (build.nvidia(config, state | {"model.extra": np.ones(2, np.float32)}), "model.extra: unknown; shape [2]"),
        (build.torch_zip(state | {key: state[key][:5]}), f"{key}: shape, expected [72, 24, 1, 1]; shape [5, 24, 1, 1]"),
        (build.torch_zip({"a": np.ones(2)}), "1 parameters (a, ...) of no kind we convert; allowed: "),
        (build.dumps(build.Call(os.getcwd)), "posix.getcwd is not allowed"),
    ]
    for data, message in wrong:
        src = write(tmp_path, data)
        assert exit_code(command.main, [str(src), str(tmp_path / "x.safetensors")]) == 2
        err = capsys.readouterr().err
        assert message in err and err.startswith("error: ") and err.count("\n") == 1
    src = write(tmp_path, build.nvidia(config, state))
    for args, message in [
        ([str(src)], "DST is missing"),
        ([str(src), str(tmp_path)], "must be a file ending in .safetensors, .pth or .npz"),
        ([str(src), str(tmp_path / "no" / "x.npz")], "its folder does not exist"),
        ([str(tmp_path / "absent"), "x.npz"], "no such file and no known name"),
        ([str(src), "x.npz", "--fast"], "unrecognized arguments: --fast"),
    ]:
        assert exit_code(command.main, args) == 2
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_reading_imports_neither_torch_nor_flax(tmp_path):
    config, state = build.golden("edm_song_skip_small")
    path = write(tmp_path, build.nvidia(config, state))
    code = "import sys; from ddo_jax.convert import read; r = read(sys.argv[1]); "
    code += "print(r.kind, *[m for m in ('torch', 'flax', 'pickle') if m in sys.modules])"
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    run = subprocess.run([sys.executable, "-c", code, path], env=env, capture_output=True, text=True, check=True)
    assert run.stdout.split()[:1] == ["edm"] and not {"torch", "flax"} & set(run.stdout.split())


def test_the_released_configurations_are_inferred(tmp_path):
    """Names and shapes alone give back every released architecture."""
    from ddo_jax.convert import layout
    from ddo_jax.convert.infer import infer_edm
    from ddo_jax.models.edm import RELEASED

    for name, config in itertools.islice(RELEASED.items(), 0, None, 4):
        shapes = layout("edm", config)
        inferred = infer_edm({k: np.broadcast_to(np.float32(0), v) for k, v in shapes.items()})
        assert from_config(inferred | {"dropout": config["dropout"]}) == from_config(config), name


def test_feature_networks_are_recognised(tmp_path):
    """Breaks if the metrics' networks need a flag, or DINOv2's size is not read off its shapes."""
    from ddo_jax.convert import layout, safetensors

    for kind, config in (
        ("inception", {"naming": "torch"}),
        ("dinov2", {"embed_dim": 128, "depth": 1, "num_heads": 2, "patch_size": 14, "img_size": 28}),
    ):
        state = {name: np.zeros(shape, np.float32) for name, shape in layout(kind, config).items()}
        (tmp_path / kind).write_bytes(safetensors.dumps(state))
        released = read(tmp_path / kind)
        assert (released.kind, released.config) == (kind, config)
