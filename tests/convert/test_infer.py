"""Constructor arguments from names and shapes: every released EDM2 network and the goldens, and what is refused."""

import dataclasses
import json

import numpy as np
import pytest

from ddo_jax.convert import infer, layout
from ddo_jax.convert.inert import UnsafeOrDamaged
from ddo_jax.models.edm2 import PRESETS, EDM2Precond, UNet

from . import conftest as build

SEEN = [k for k in infer.DEFAULTS_EDM2 if k not in ("class_name", "channels_per_head")]
SEEN += ["img_resolution", "img_channels", "label_dim"]
GOLDENS = [("edm2_small", "param/", "config"), ("edm2_small", "gparam/", "gconfig"), ("edm2_alt", "param/", "config")]


def golden(name, prefix="param/", config="config"):
    with np.load(build.GOLDENS / f"{name}.npz") as f:
        state = {k.removeprefix(prefix): f[k] for k in f.files if k.startswith(prefix)}
        return json.loads(str(f[config])), state


def weightless(shapes, dtype=np.float16):
    """Arrays of these shapes that take two bytes each."""
    return {name: np.broadcast_to(dtype(0), shape) for name, shape in shapes.items()}


def shapes_of(state):
    return [(name, tuple(np.shape(v))) for name, v in state.items()]


def test_the_defaults_are_those_of_the_network():
    """Breaks if the tables here and the network drift apart: a file that leaves an argument out gets another value."""
    fields = {f.name: f.default for f in (*dataclasses.fields(UNet), *dataclasses.fields(EDM2Precond))}
    for key, value in (infer.DEFAULTS_EDM2 | infer.UNSEEN_EDM2).items():
        if key != "class_name":
            assert fields[key] == (tuple(value) if isinstance(value, list) else value), key


FAST = ("edm2-img64-s", "edm2-img512-xs-uncond")


@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in PRESETS])
def test_every_preset_is_inferred(name):
    config, shapes = PRESETS[name], layout("edm2", PRESETS[name])
    state = weightless(shapes)
    assert infer.kind_of(state) == "edm2"
    inferred = infer.edm2_config({}, state)
    full = infer.DEFAULTS_EDM2 | {k: v for k, v in config.items() if k not in ("dropout", "use_fp16")}
    assert inferred == full
    assert shapes_of(state) == list(layout("edm2", inferred).items())
    assert infer.edm2_config(config, state) == config  # nothing is added to what the file says


@pytest.mark.parametrize("name", ["img64_s", "img512_xs", "img512_l"])
def test_released_shapes(name):
    recorded = json.loads((build.GOLDENS / f"edm2_shapes_{name}.json").read_text())
    state = weightless({k: tuple(v) for k, v in recorded["shapes"].items()})
    inferred = infer.infer_edm2(state)
    assert {k: inferred[k] for k in recorded["kwargs"]} == recorded["kwargs"]
    assert list(layout("edm2", inferred).items()) == shapes_of(state)


@pytest.mark.parametrize("which", GOLDENS, ids=["small", "guide", "alt"])
def test_goldens(which):
    config, state = golden(*which)
    inferred = infer.infer_edm2(state)
    assert {k: inferred[k] for k in SEEN} == {k: config[k] for k in SEEN}
    assert list(layout("edm2", inferred).items()) == shapes_of(state)
    assert inferred["channels_per_head"] == min(v.shape[1] for k, v in state.items() if "attn_qkv" in k)  # the guess
    assert infer.infer_edm2(state, config)["channels_per_head"] == config["channels_per_head"]
    assert infer.edm2_config(config, state) == config


SMALL = {"img_resolution": 16, "img_channels": 2, "label_dim": 0, "num_blocks": 1, "logvar_channels": 8}
ODD = {
    "first multiplier is not 1": {"model_channels": 4, "channel_mult": [2, 3], "channels_per_head": 4},
    "embedding narrower than every level": {
        **{"model_channels": 4, "channel_mult": [2, 4], "channel_mult_noise": 1, "channel_mult_emb": 3},
        "channels_per_head": 8,
    },
    "no plain blocks in the encoder": {"model_channels": 6, "channel_mult": [1], "num_blocks": 0},
    "attention at the middle only": {"model_channels": 64, "channel_mult": [1, 1], "attn_resolutions": []},
    "too narrow for any head": {
        **{"model_channels": 4, "channel_mult": [1, 2], "channels_per_head": 64, "attn_resolutions": [16, 8]},
    },
    "the middle too narrow, the level above not": {
        **{"model_channels": 8, "channel_mult": [4, 1], "channels_per_head": 16, "attn_resolutions": [16]},
    },
    "wider than 64 without attention": {"model_channels": 96, "channel_mult": [1], "channels_per_head": 128},
    "not divisible into heads of 64": {"model_channels": 224, "channel_mult": [1], "channels_per_head": 112},
    "heads of 24 channels": {"model_channels": 24, "channel_mult": [1, 4], "channels_per_head": 24},
    "heads of one channel": {
        **{"model_channels": 5, "channel_mult": [1, 3, 4], "channels_per_head": 1, "attn_resolutions": [16, 8, 4]},
    },
}


@pytest.mark.parametrize("name", ODD)
def test_unusual_networks(name):
    """The inferred arguments rebuild the layout, whatever the recorded ones were; with those they agree."""
    config = SMALL | ODD[name]
    state = weightless(layout("edm2", config), np.float32)
    assert list(layout("edm2", infer.infer_edm2(state)).items()) == shapes_of(state)
    for key, value in infer.edm2_config(config, state).items():
        assert config.get(key, value) == value
    assert list(layout("edm2", infer.edm2_config(config, state)).items()) == shapes_of(state)


def test_equal_products_follow_what_is_recorded():
    config = SMALL | {"model_channels": 4, "channel_mult": [2, 4], "channel_mult_noise": 2, "channel_mult_emb": 4}
    config |= {"channels_per_head": 4}
    state = weightless(layout("edm2", config))
    assert infer.edm2_config(config, state) == config
    seen = infer.infer_edm2(state)
    assert (seen["model_channels"], seen["channel_mult"], seen["channel_mult_noise"]) == (8, [1, 2], None)
    only = infer.edm2_config({"model_channels": 4}, state)
    assert (only["model_channels"], only["channel_mult"]) == (4, [2, 4]) and "channel_mult_noise" not in only


@pytest.mark.parametrize(
    "change, message",
    [
        ({"img_resolution": 32}, "img_resolution is recorded as 32, but the parameters have 16"),
        ({"model_channels": 32}, "model_channels is recorded as 32, but the parameters have 16"),
        ({"model_channels": "a\nb"}, r"model_channels is recorded as 'a\\nb', but the parameters have 16"),
        ({"channel_mult": [1, 2, 3]}, "channel_mult is recorded as [1, 2, 3], but the parameters have [1, 2, 2]"),
        ({"channel_mult_emb": 1}, "channel_mult_emb is recorded as 1, but the parameters have 2"),
        ({"label_dim": 0}, "label_dim is recorded as 0, but the parameters have 10"),
        ({"num_blocks": 2}, "num_blocks is recorded as 2, but the parameters have 1"),
        ({"attn_resolutions": [16, 8]}, "attn_resolutions is recorded as [16, 8], but the parameters have [8]"),
        ({"attn_resolutions": None}, "attn_resolutions is recorded as something else than a list"),
        ({"channels_per_head": 64}, "channels_per_head is recorded as 64, but the parameters have 32"),
        ({"channels_per_head": 0}, "channels_per_head is recorded as 0, but the parameters have 32"),
        ({"logvar_channels": 64}, "logvar_channels is recorded as 64, but the parameters have 128"),
        ({"sigma_data": None}, "sigma_data is recorded as None; expected a number"),
        ({"dropout": float("nan")}, "dropout is recorded as nan; expected a number"),
        ({"clip_act": True}, "clip_act is recorded as True; expected a number"),
        ({"res_balance": 10**400}, "res_balance is recorded as 1000"),
    ],
)
def test_contradictions_are_named(change, message):
    config, state = golden("edm2_small")
    with pytest.raises(UnsafeOrDamaged) as e:
        infer.edm2_config(config | change, state)
    assert str(e.value).startswith(message) and "\n" not in str(e.value) and len(str(e.value)) < 300


def test_harmless_differences():
    config, state = golden("edm2_small")
    listed = config | {"attn_resolutions": [64, 8], "clip_act": None, "img_resolution": 16.0}
    found = infer.edm2_config(listed, state)
    assert found == config | {"attn_resolutions": [64, 8], "clip_act": None}
    assert type(found["img_resolution"]) is int


def test_what_makes_no_network():
    _, state = golden("edm2_small")
    shapes = {k: v.shape for k, v in state.items()}
    first = "unet.enc.16x16_conv.weight"
    cases = [
        {k: v for k, v in shapes.items() if not k.startswith("unet.dec.8x8_block")},  # a gap between levels
        {k: v for k, v in shapes.items() if "_block0" not in k or "dec" not in k},
        {k: v for k, v in shapes.items() if not k.startswith("unet.dec")},
        shapes | {"unet.emb_fourier.freqs": ()},
        shapes | {"unet.emb_noise.weight": (0, 0)},
        shapes | {first: (16,)},
        shapes | {"logvar_fourier.freqs": (0,)},
        shapes | {first: (16, 1, 3, 3)},
        shapes | {"unet.dec.16x16_block0.conv_res1.weight": (0, 16, 3, 3)},
        shapes | {"unet.dec.8x8_block0.attn_qkv.weight": (5, 0, 1, 1)},
        shapes | {"unet.dec.8x8_block0.attn_qkv.weight": (5,)},
        {k.replace("16x16", "8192x8192"): v for k, v in shapes.items()},
        {k.replace("16x16", "0x0").replace("8x8", "1x1"): v for k, v in shapes.items()},
    ]
    for i, case in enumerate(cases):
        with pytest.raises(UnsafeOrDamaged, match="names of an EDM2 network, but no network has these shapes"):
            infer.infer_edm2(weightless(case))
            raise AssertionError(f"case {i} passed")


def test_a_hostile_width_costs_nothing():
    """Breaks if sizes that a file only announces are counted up to."""
    _, state = golden("edm2_small")
    huge = weightless({k: v.shape for k, v in state.items()})
    huge["unet.dec.8x8_block0.attn_qkv.weight"] = np.zeros((0, 2**39, 1, 1), np.float16)
    with pytest.raises(UnsafeOrDamaged):
        infer.edm2_config({"channels_per_head": 2**40}, huge)


def test_kinds_are_told_apart():
    """Breaks if another autoencoder (VAR's, the original Stable Diffusion's) is taken for diffusers' AutoencoderKL."""
    vae = ["encoder.conv_in.weight", "decoder.conv_in.weight", "quant_conv.weight", "post_quant_conv.weight"]
    assert infer.kind_of(dict.fromkeys([*vae, "encoder.mid_block.resnets.0.conv1.weight"])) == "sdvae"
    assert infer.kind_of(dict.fromkeys([*vae, "encoder.mid.block_1.conv1.weight"])) is None
    edm, edm2 = golden("edm_ddpmpp_small")[1], golden("edm2_small")[1]
    assert (infer.kind_of(edm), infer.kind_of(edm2)) == ("edm", "edm2")
    assert infer.kind_of({k: v for k, v in edm2.items() if "16x16_conv" not in k}) is None


def test_a_hostile_dinov2():
    state = {"cls_token": np.zeros((1, 1, 8)), "patch_embed.proj.weight": np.zeros((8, 3, 2, 2))}
    state["pos_embed"] = np.zeros((1, 0, 8))
    assert infer.infer_dinov2(state)["img_size"] == 0
    with pytest.raises(UnsafeOrDamaged, match="DINOv2: pos_embed"):
        infer.infer_dinov2({k: v for k, v in state.items() if k != "pos_embed"})
