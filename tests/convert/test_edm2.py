"""EDM2 state dicts: byte-equal round trips, exact coverage, the released names and sizes (sections 6, 7).

Sections are those of specs/edm2.md.
"""

import json
import math
from pathlib import Path

import jax
import numpy as np
import pytest

from ddo_jax.convert import from_torch, layout, to_torch
from ddo_jax.models.edm2 import PRESETS, from_config

GOLDENS = Path(__file__).parents[1] / "goldens"


def read(name, prefix="param/", config="config"):
    with np.load(GOLDENS / f"{name}.npz") as f:
        state = {k.removeprefix(prefix): f[k] for k in f.files if k.startswith(prefix)}
        return json.loads(str(f[config])), state


NETWORKS = [("edm2_small", "param/", "config"), ("edm2_small", "gparam/", "gconfig"), ("edm2_alt", "param/", "config")]


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("network", NETWORKS, ids=["small", "guide", "alt"])
def test_round_trip_is_byte_equal_and_in_order(network, dtype):
    config, state = read(*network)
    state = {k: v.astype(dtype) for k, v in state.items()}
    _, variables = from_torch("edm2", config, state)
    assert all(v.flags.c_contiguous for v in jax.tree.leaves(variables))
    back = to_torch("edm2", config, variables)
    assert list(back) == list(state)
    for key, value in state.items():
        assert back[key].dtype == value.dtype and back[key].shape == value.shape, key
        assert back[key].tobytes() == value.tobytes() and back[key].flags.c_contiguous, key


def test_variables_have_the_tree_of_init():
    config, state = read("edm2_small")
    module, variables = from_torch("edm2", config, state)
    x, sigma = np.zeros((1, 16, 16, 3), np.float32), np.ones(1, np.float32)
    abstract = jax.eval_shape(module.init, jax.random.key(0), x, sigma)
    shapes = jax.tree.map(lambda v: (v.shape, v.dtype), variables)
    assert shapes == jax.tree.map(lambda v: (v.shape, v.dtype), abstract)
    key = "unet.enc.16x16_block0.conv_res0.weight"
    weight = variables["params"]["unet"]["enc"]["16x16_block0"]["conv_res0"]["weight"]
    np.testing.assert_array_equal(weight, state[key].transpose(2, 3, 1, 0))
    key = "logvar_linear.weight"
    np.testing.assert_array_equal(variables["params"]["logvar_linear"]["weight"], state[key].T)


def test_every_mistake_is_named():
    config, state = read("edm2_small")
    key, gain = "unet.dec.8x8_block0.attn_qkv.weight", "unet.out_gain"
    mistakes = {
        f"{key}: missing; expected shape [96, 32, 1, 1]": {k: v for k, v in state.items() if k != key},
        f"{key}: shape [96, 32]; expected [96, 32, 1, 1]": state | {key: state[key][:, :, 0, 0]},
        f"{gain}: shape [1]; expected []": state | {gain: state[gain].reshape(1)},
        "unet.extra: shape [2]; this configuration has no such": state | {"unet.extra": np.ones(2)},
    }
    for message, wrong in mistakes.items():
        with pytest.raises(ValueError) as e:
            from_torch("edm2", config, wrong)
        assert str(e.value).startswith(message) and "\n" not in str(e.value)
    variables = from_torch("edm2", config, state)[1]
    with pytest.raises(ValueError, match="unet.emb_fourier.freqs: missing"):
        to_torch("edm2", config, {"params": variables["params"]})
    extra = variables | {"params": variables["params"] | {"extra": np.ones(2)}}
    with pytest.raises(ValueError, match=r"params/extra: shape \[2\]; this configuration has no such"):
        to_torch("edm2", config, extra)


def test_configuration_mistakes_are_named():
    config = PRESETS["edm2-img64-s"]
    with pytest.raises(ValueError, match="unknown key 'width' for EDM2; allowed: img_resolution, .*clip_act"):
        from_config(config | {"width": 3})
    with pytest.raises(ValueError, match="key 'label_dim' is missing"):
        from_config({"img_resolution": 8, "img_channels": 3})
    with pytest.raises(ValueError, match="class_name is 'EDMPrecond'; allowed: Precond"):
        from_config(config | {"class_name": "EDMPrecond"})
    uneven = {"img_resolution": 8, "img_channels": 3, "label_dim": 0, "model_channels": 10, "channels_per_head": 3}
    with pytest.raises(ValueError, match="10 channels cannot be split over 3 heads equally"):
        layout("edm2", uneven | {"num_blocks": 1})


@pytest.mark.parametrize("name", ["img64_s", "img512_xs", "img512_l"])
def test_released_names_and_shapes(name):
    expected = json.loads((GOLDENS / f"edm2_shapes_{name}.json").read_text())
    config = PRESETS[expected["preset"]]
    assert {k: config[k] for k in expected["kwargs"]} == expected["kwargs"]
    shapes = layout("edm2", config)
    assert list(shapes.items()) == [(k, tuple(v)) for k, v in expected["shapes"].items()]


SIZES = {  # section 6: trainable parameters
    "edm2-img512-xxs": 31_309_029,
    "edm2-img512-xs": 124_713_253,
    "edm2-img512-s": 280_212_837,
    "edm2-img512-m": 497_807_781,
    "edm2-img512-l": 777_498_085,
    "edm2-img512-xl": 1_119_283_749,
    "edm2-img512-xxl": 1_523_164_773,
    "edm2-img512-xs-uncond": 124_201_253,
    "edm2-img64-xs": 124_710_949,
    "edm2-img64-s": 280_209_381,
    "edm2-img64-m": 497_803_173,
    "edm2-img64-l": 777_492_325,
    "edm2-img64-xl": 1_119_276_837,
}


FAST = ("edm2-img64-s", "edm2-img512-l")


@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in PRESETS])
def test_preset_sizes(name):
    """Shapes only: nothing of these sizes is allocated."""
    shapes, config = layout("edm2", PRESETS[name]), PRESETS[name]
    buffers = {k: v for k, v in shapes.items() if k.endswith((".freqs", ".phases"))}
    parameters = {k: v for k, v in shapes.items() if k not in buffers}
    assert len(buffers) == 4 and sum(map(math.prod, buffers.values())) == 2 * config["model_channels"] + 256
    assert len(parameters) == 199 - (config["label_dim"] == 0)
    count = sum(map(math.prod, parameters.values()))
    label = 0 if config["label_dim"] else 1000 * 4 * config["model_channels"]
    assert count == SIZES.get(name) or count + label == SIZES[name.removesuffix("-uncond")]
