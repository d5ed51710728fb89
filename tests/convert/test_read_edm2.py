"""Files of EDM2 networks and SD-VAEs: what they record, what their shapes tell, and the command on them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ddo_jax.convert import __main__ as command
from ddo_jax.convert import from_torch, infer, layout, read, safetensors, to_torch
from ddo_jax.convert.inert import UnsafeOrDamaged
from tests.harness import exit_code

from . import conftest as build
from .test_read import assert_same, write

NAME = "edm2-img64-s-1073741-0.075.pkl"


@pytest.fixture(scope="module")
def released():
    """(config, float16 state dict) as a released file has them."""
    config, state = build.golden("edm2_small")
    return config | {"channel_mult_emb": None}, build.half(state)


@pytest.fixture(scope="module")
def vae():
    return build.golden("sdvae_small")


# ----------------------------------------------------------------------------------------------------
# NVIDIA's pickles


@pytest.mark.parametrize("encoder", [None, build.vae_encoder()], ids=["pixels", "latents"])
def test_a_snapshot(released, encoder, tmp_path):
    config, state = released
    found = read(write(tmp_path, build.edm2_nvidia(config, state, encoder), NAME))
    assert (found.kind, found.config) == ("edm2", {"class_name": "Precond", **config})
    assert list(found.config) == ["class_name", *config]
    assert_same(found.state_dict, state)  # float16, gains and Fourier buffers too
    extras = dict(found.extras)
    seen = extras.pop("encoder")
    assert extras == {
        "format": "nvidia-pickle",
        "class_name": "Precond",
        "top_level": ["encoder", "dataset_kwargs", "loss_fn", "ema"],
        "dtypes": dict.fromkeys(state, "float16"),
        "kimg": 1073741,
        "std": 0.075,
    }
    if encoder is None:
        assert seen is None
    else:
        assert list(seen) == ["class_name", "vae_name", "scale", "bias"] and type(seen["scale"][0]) is float
        assert (seen["class_name"], seen["vae_name"]) == ("StabilityVAEEncoder", "stabilityai/sd-vae-ft-mse")
        assert np.float32(seen["scale"]).tobytes() == build.SCALE.tobytes()
        assert np.float32(seen["bias"]).tobytes() == build.BIAS.tobytes()
    assert_same(to_torch("edm2", found.config, from_torch("edm2", found.config, found.state_dict)[1]), state)


def test_encoders(released, tmp_path):
    config, state = released
    tensors = build.vae_encoder(
        build.nested_tensor(build.SCALE, False), build.nested_tensor(build.BIAS[:, None], False)
    )
    seen = read(write(tmp_path, build.edm2_nvidia(config, state, tensors))).extras["encoder"]
    assert seen["scale"] == build.SCALE.astype(float).tolist() and seen["bias"] == build.BIAS.astype(float).tolist()
    rgb = build.persistent("StandardRGBEncoder", {"_init_args": (), "_init_kwargs": {}})
    seen = read(write(tmp_path, build.edm2_nvidia(config, state, rgb))).extras["encoder"]
    assert seen == {"class_name": "StandardRGBEncoder"}
    for top in ({"ema": build.edm2_network(config, state)}, build.edm2_network(config, state)):
        assert read(write(tmp_path, build.dumps(top))).extras["encoder"] is None
    for wrong, message in {
        "vae": "encoder: a str; expected a persistent object or None",
        build.vae_encoder([0.1, 0.2]): "encoder: scale is not a short list of floats",
        build.vae_encoder(build.SCALE, np.arange(4)): "encoder: bias is not a short list of floats",
        build.vae_encoder(build.SCALE, build.BIAS * np.float32(np.nan)): "encoder: bias is not a short list of floats",
        build.vae_encoder(np.zeros(65, np.float32)): "encoder: scale is not a short list of floats",
    }.items():
        path = write(tmp_path, build.edm2_nvidia(config, state, wrong))
        with pytest.raises(UnsafeOrDamaged) as e:
            read(path)
        assert str(e.value) == f"{path}: {message}"


def test_defaults_are_not_recorded(released, tmp_path):
    """As in released files: only the arguments that were given; the rest is completed where shapes contradict it."""
    config, state = released
    hidden = ("channel_mult_noise", "channel_mult_emb", "label_balance", "logvar_channels", "sigma_data", "clip_act")
    short = {k: v for k, v in config.items() if k not in hidden}
    assert read(write(tmp_path, build.edm2_nvidia(short, state))).config == {"class_name": "Precond", **short}
    fewer = {k: v for k, v in short.items() if k not in ("channel_mult", "num_blocks", "attn_resolutions")}
    found = read(write(tmp_path, build.edm2_nvidia(fewer | {"use_fp16": False}, state)))
    assert found.config == {"class_name": "Precond", **short, "use_fp16": False}
    assert "assumed" not in found.extras


def test_contradictions_are_named(released, tmp_path):
    config, state = released
    path = write(tmp_path, build.edm2_nvidia(config | {"model_channels": 32}, state))
    with pytest.raises(UnsafeOrDamaged) as e:
        read(path)
    assert str(e.value) == f"{path}: model_channels is recorded as 32, but the parameters have 16"

    network = build.edm2_network(config, state)
    unet = network.args[0]["state"]["_modules"]["unet"].args[0]["state"]
    unet["_init_kwargs"] = unet["_init_kwargs"] | {"channels_per_head": 16}
    with pytest.raises(UnsafeOrDamaged, match="channels_per_head is 8 for the network and 16 inside it"):
        read(write(tmp_path, build.dumps({"ema": network})))
    unet["_init_kwargs"] = {}  # nothing recorded inside: the outer arguments are enough
    assert read(write(tmp_path, build.dumps({"ema": network}))).config == {"class_name": "Precond", **config}


def test_another_class_is_no_edm2(released, tmp_path):
    config, state = released
    other = build.edm2_network(config, state)
    other.args[0]["class_name"] = "EDMPrecond"
    found = read(write(tmp_path, build.dumps({"ema": other})))
    assert found.kind is None and "encoder" not in found.extras


# ----------------------------------------------------------------------------------------------------
# Plain state dicts


def test_without_a_configuration_the_shapes_give_it(released, tmp_path):
    config, state = released
    for data in (build.torch_zip(state), build.torch_legacy(state), safetensors.dumps(state)):
        found = read(write(tmp_path, data))
        assert found.kind == "edm2" and found.config == infer.infer_edm2(state)
        assert_same(found.state_dict, state)
        assert found.extras["assumed"] == {"channels_per_head": 32, **infer.UNSEEN_EDM2}
        assert "kimg" not in found.extras and "encoder" not in found.extras
    assert {k: found.config[k] for k in ("model_channels", "channel_mult")} == {
        "model_channels": 16,
        "channel_mult": [1, 2, 2],
    }


def test_our_safetensors(released, tmp_path):
    """What the file records wins over what the shapes would give: heads, balances."""
    config, state = released
    metadata = {"ddo_jax_config": json.dumps(config), "ddo_jax_kind": "edm2", "ddo_jax_released_encoder": "null"}
    found = read(write(tmp_path, safetensors.dumps(state, metadata), "network-snapshot-0002097-0.050.safetensors"))
    assert (found.kind, found.config) == ("edm2", config)
    assert (found.extras["kimg"], found.extras["std"], found.extras["encoder"]) == (2097, 0.05, None)
    assert "assumed" not in found.extras
    for text, message in {"[1]": "is not a JSON object", "{": "is not JSON", '{"a": {}}': "argument a: a dict"}.items():
        with pytest.raises(UnsafeOrDamaged, match=message):
            read(write(tmp_path, safetensors.dumps(state, metadata | {"ddo_jax_released_encoder": text})))


def test_a_training_state(released, tmp_path):
    """torch.save of a run: the first EMA, neither the raw network nor a later EMA; its lengths are listed."""
    _, state = released
    later = {k: (v + 1).astype(v.dtype) for k, v in state.items()}
    net = {f"{k}": (v + 2).astype(np.float32) for k, v in state.items()}
    arrays = {f"{tag}.{k}": v for tag, d in {"a": state, "b": later, "n": net}.items() for k, v in d.items()}

    def nest(v, emas=None):
        part = {tag: {k: v[f"{tag}.{k}"] for k in state} for tag in "abn"}
        loss = build.persistent("EDM2Loss", {"P_mean": -0.4})
        ema = {"stds": [0.05, 0.1], "emas": [part["a"], part["b"]]} if emas is None else emas
        optimizer = {"state": {0: {"step": 1.0, "exp_avg": part["n"]["unet.out_gain"]}}, "param_groups": [{"lr": 0.1}]}
        progress = {"cur_nimg": 2048, "total_elapsed_time": 1.5}
        return {"state": progress, "net": part["n"], "loss_fn": loss, "optimizer": optimizer, "ema": ema}

    found = read(write(tmp_path, build.torch_zip(arrays, nest=nest), "training-state-0000002.pt"))
    assert found.kind == "edm2" and found.extras["emas"] == [0.05, 0.1]
    assert found.extras["top_level"] == ["state", "net", "loss_fn", "optimizer", "ema"]
    assert_same(found.state_dict, state)
    for wrong in (
        {"emas": []},
        {"stds": [0.1], "emas": []},
        {"stds": ["a"], "emas": [{}]},
        {"stds": [0.1], "emas": [1]},
    ):
        with pytest.raises(UnsafeOrDamaged, match="ema: expected"):
            read(write(tmp_path, build.torch_zip(arrays, nest=lambda v, wrong=wrong: nest(v, wrong))))


@pytest.mark.parametrize(
    "name, kimg, std",
    [
        ("phema-0002097-0.100.safetensors", 2097, 0.1),
        ("https%3A%2F%2Fexample.org%2Fedm2-img512-xxl-0939524-0.015.pkl", 939524, 0.015),
        ("network-snapshot-0000008.pkl", None, None),
        ("a-1-0.1", None, None),
        ("edm2-img64-s-ddo.pkl", None, None),
    ],
)
def test_file_names(name, kimg, std, small_edm2, tmp_path):
    extras = read(write(tmp_path, build.edm2_nvidia(*small_edm2), name)).extras
    assert (extras.get("kimg"), extras.get("std")) == (kimg, std)


def test_reading_imports_neither_torch_nor_flax(small_edm2, tmp_path):
    path = write(tmp_path, build.edm2_nvidia(*small_edm2))
    code = "import sys; from ddo_jax.convert import read; print(read(sys.argv[1]).kind, 'flax' in sys.modules)"
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    run = subprocess.run([sys.executable, "-c", code, path], env=env, capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["edm2", "False"]


# ----------------------------------------------------------------------------------------------------
# SD-VAEs


def old_names(state):
    """The attention as diffusers named it before 2023: other names, 1x1 convolutions."""
    renamed = {}
    for name, v in state.items():
        for new, old in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}.items():
            if f".{new}." in name:
                name, v = name.replace(new, old), v[:, :, None, None] if v.ndim == 2 else v
        renamed[name] = v
    return renamed


def test_autoencoders(vae, tmp_path):
    config, state = vae
    for data in (safetensors.dumps(state), build.torch_zip(state), safetensors.dumps(old_names(state))):
        found = read(write(tmp_path, data))
        assert found.kind == "sdvae"
        assert {k: found.config[k] for k in found.config if k != "norm_num_groups"} == {
            k: config[k] for k in found.config if k != "norm_num_groups"
        }
        from_torch("sdvae", found.config, found.state_dict)
    recorded = {"ddo_jax_config": json.dumps(config), "ddo_jax_kind": "sdvae"}
    assert read(write(tmp_path, safetensors.dumps(state, recorded))).config == config  # its 4 groups, not a guess
    damaged = {k: v for k, v in state.items() if not k.startswith("encoder.down_blocks.0")}
    with pytest.raises(UnsafeOrDamaged, match="names of an AutoencoderKL, but"):
        read(write(tmp_path, safetensors.dumps(damaged)))


# ----------------------------------------------------------------------------------------------------
# python -m ddo_jax.convert


def run(capsys, *args):
    """(lines printed, exit code)."""
    code = exit_code(command.main, [str(a) for a in args])
    seen = capsys.readouterr()
    assert code == 0 or seen.err.count("\n") == 1
    return seen.out.splitlines() + seen.err.splitlines(), code


def test_command_on_a_snapshot(released, tmp_path, capsys):
    config, state = released
    src = write(tmp_path, build.edm2_nvidia(config, state, build.vae_encoder()), NAME)
    dst, again = tmp_path / "b.safetensors", tmp_path / "c.npz"
    lines, code = run(capsys, src, dst)
    assert code == 0 and [line.split()[0] for line in lines[: len(state)]] == list(state)
    assert all(line.endswith("matched") and "float16" in line for line in lines[: len(state)])
    total = sum(v.size for v in state.values())
    assert lines[len(state)] == f"kind edm2; {len(state) - 4} parameter tensors, 4 buffers, {total:,} values"
    assert lines[-1] == f"wrote {dst}, equal to the source byte for byte"

    back = read(dst)
    assert (back.kind, back.config) == ("edm2", {"class_name": "Precond", **config})
    assert back.extras["encoder"] == read(src).extras["encoder"]  # the latents' constants are not lost
    assert_same(back.state_dict, state)
    assert run(capsys, dst, again)[1] == 0
    with np.load(again) as f:
        assert_same({k.removeprefix("param/"): f[k] for k in f.files if k.startswith("param/")}, state)


def test_command_keeps_what_our_files_say(small_edm2, tmp_path, capsys):
    config, state = small_edm2
    metadata = {"ddo_jax_config": json.dumps(config), "ddo_jax_std": "0.05", "ddo_jax_images": "2048", "raw_mean": "[]"}
    src, dst = write(tmp_path, safetensors.dumps(state, metadata), "a.safetensors"), tmp_path / "b.safetensors"
    assert run(capsys, src, dst)[1] == 0
    told = {"ddo_jax_origin": '{"starts": ["a.safetensors"], "licence": "unknown"}'}
    assert read(dst).extras["metadata"] == {"format": "pt", "ddo_jax_kind": "edm2", **metadata, **told}


def test_command_says_what_is_assumed(released, tmp_path, capsys):
    lines, code = run(capsys, write(tmp_path, build.torch_zip(released[1])), "--dry_run")
    assert code == 0 and lines[-1].startswith("the file does not record, and no shape shows: ")
    assert '"channels_per_head": 32, "dropout": 0.0' in lines[-1]


def test_command_refuses_what_does_not_fit(released, tmp_path, capsys):
    config, state = released
    key = "unet.enc.8x8_block0.attn_proj.weight"
    fewer = {k: v for k, v in state.items() if k != key}
    for data, message in [
        (build.edm2_nvidia(config, fewer), f"{key}: missing; shape [32, 32, 1, 1]"),
        (build.edm2_nvidia(config | {"width": 3}, state), "unknown key 'width' for EDM2"),
        (build.edm2_nvidia({k: v for k, v in config.items() if k != "label_dim"}, fewer), f"{key}: missing"),
    ]:
        lines, code = run(capsys, write(tmp_path, data), "--dry_run")
        assert code == 2 and message in lines[-1]


def test_command_on_an_autoencoder(vae, tmp_path, capsys):
    config, state = vae
    metadata = {"ddo_jax_config": json.dumps(config)}
    src, dst = write(tmp_path, safetensors.dumps(state, metadata), "a.safetensors"), tmp_path / "b.safetensors"
    lines, code = run(capsys, src, dst)
    assert code == 0 and lines[-1] == f"wrote {dst}, equal to the source byte for byte"
    assert lines[len(state)].startswith(f"kind sdvae; {len(state)} parameter tensors, 0 buffers, ")
    assert_same(read(dst).state_dict, state)

    old = write(tmp_path, safetensors.dumps(old_names(state), metadata), "old.safetensors")
    lines, code = run(capsys, old, dst, "--force")
    assert code == 0 and lines[-1] == f"wrote {dst}, equal to the source but for the names it had"
    assert lines[0].startswith("16 parameters (encoder.mid_block.attentions.0.query.weight, ...) have old names")
    assert_same(read(dst).state_dict, state)

    both = state | {k: v for k, v in old_names(state).items() if "query.bias" in k}
    lines, code = run(capsys, write(tmp_path, safetensors.dumps(both, metadata)), "--dry_run")
    assert code == 2 and "there under its old name too" in lines[-1]


def test_layouts_of_the_fixtures(small_edm2):
    """The small file of the fuzz test is a network, not only names."""
    config, state = small_edm2
    assert list(layout("edm2", config).items()) == [(k, v.shape) for k, v in state.items()]
