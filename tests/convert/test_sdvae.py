"""SD-VAE state dicts: byte-equal round trips, exact coverage, old names, inferred arguments (section 13).

Sections are those of specs/edm2.md.
"""

import json
import math
import re
from pathlib import Path

import jax
import numpy as np
import pytest

from ddo_jax.convert import from_torch, layout, to_torch
from ddo_jax.convert.inert import UnsafeOrDamaged
from ddo_jax.convert.sdvae import infer_config, renamed

with np.load(Path(__file__).parents[1] / "goldens" / "sdvae_small.npz") as f:
    CONFIG = json.loads(str(f["config"]))
    STATE = {k.removeprefix("param/"): f[k] for k in f.files if k.startswith("param/")}

ATTENTION = "encoder.mid_block.attentions.0"
OLD = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def same(a, b):
    assert a.keys() == b.keys()
    for key, value in b.items():
        assert a[key].dtype == value.dtype and a[key].shape == value.shape, key
        assert a[key].tobytes() == value.tobytes() and a[key].flags.c_contiguous, key


def old_names(state, squeezed):
    """As old versions of diffusers save it; squeezed: weights of the attention stay [C,C]."""
    new = re.compile(r"(?<=attentions\.0\.)(to_q|to_k|to_v|to_out\.0)(?=\.)")
    old = {}
    for name, value in state.items():
        wide = new.search(name) and name.endswith("weight") and not squeezed
        old[new.sub(lambda m: OLD[m[1]], name)] = value[:, :, None, None] if wide else value
    return old


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_round_trip_is_byte_equal_and_in_order(dtype):
    state = {k: v.astype(dtype) for k, v in STATE.items()}
    shuffled = dict(sorted(state.items()))  # safetensors come in alphabetical order
    _, variables = from_torch("sdvae", CONFIG, shuffled)
    assert all(v.flags.c_contiguous for v in jax.tree.leaves(variables))
    back = to_torch("sdvae", CONFIG, variables)
    assert list(back) == list(state) != list(shuffled)
    same(back, state)


def test_variables_have_the_tree_of_init():
    module, variables = from_torch("sdvae", CONFIG, STATE)
    abstract = jax.eval_shape(module.init, jax.random.key(0), np.zeros((1, 8, 8, 3), np.float32))
    shapes = jax.tree.map(lambda v: (v.shape, v.dtype), variables)
    assert shapes == jax.tree.map(lambda v: (v.shape, v.dtype), abstract)
    params = variables["params"]["decoder"]
    weight = params["up_blocks_2"]["resnets_0"]["conv_shortcut"]["weight"]
    key = "decoder.up_blocks.2.resnets.0.conv_shortcut.weight"
    np.testing.assert_array_equal(weight, STATE[key].transpose(2, 3, 1, 0))
    weight = params["mid_block"]["attentions_0"]["to_out_0"]["weight"]
    np.testing.assert_array_equal(weight, STATE["decoder.mid_block.attentions.0.to_out.0.weight"].T)


@pytest.mark.parametrize("squeezed", [True, False])
def test_old_names_of_the_attention(squeezed):
    old = old_names(STATE, squeezed)
    assert len(old.keys() - STATE.keys()) == 16
    assert list(renamed(old)) == list(STATE)
    same(renamed(old), STATE)
    _, variables = from_torch("sdvae", CONFIG, old)
    same(to_torch("sdvae", CONFIG, variables), STATE)


def test_every_mistake_is_named():
    key = "encoder.down_blocks.1.resnets.0.conv1.weight"
    query = f"{ATTENTION}.to_q.weight"
    mistakes = {
        f"{key}: missing; expected shape [16, 8, 3, 3]": {k: v for k, v in STATE.items() if k != key},
        f"{key}: shape [16, 8]; expected [16, 8, 3, 3]": STATE | {key: STATE[key][:, :, 0, 0]},
        f"{query}: shape [32, 32, 3, 3]; expected [32, 32]": STATE | {query: np.ones((32, 32, 3, 3))},
        "encoder.extra: shape [2]; this configuration has no such": STATE | {"encoder.extra": np.ones(2)},
        f"{query}: there under its old name too": STATE | {f"{ATTENTION}.query.weight": np.ones((32, 32))},
    }
    for message, wrong in mistakes.items():
        with pytest.raises(ValueError) as e:
            from_torch("sdvae", CONFIG, wrong)
        assert str(e.value).startswith(message) and "\n" not in str(e.value)
    variables = from_torch("sdvae", CONFIG, STATE)[1]
    extra = {"params": variables["params"] | {"extra": np.ones(2)}}
    with pytest.raises(ValueError, match=r"params/extra: shape \[2\]; this configuration has no such"):
        to_torch("sdvae", CONFIG, extra)


def test_sd_vae_ft_mse():
    """Section 13; shapes only, nothing of this size is allocated."""
    shapes = layout("sdvae", {})
    counts = {part: sum(math.prod(v) for k, v in shapes.items() if k.startswith(part)) for part in ("enc", "dec")}
    total = sum(map(math.prod, shapes.values()))
    assert len(shapes) == 248 and total == 83_653_863
    assert counts == {"enc": 34_163_592, "dec": 49_490_179} and total - sum(counts.values()) == 92
    assert shapes["decoder.up_blocks.2.resnets.0.conv_shortcut.weight"] == (256, 512, 1, 1)
    assert shapes["encoder.mid_block.attentions.0.to_out.0.weight"] == (512, 512)
    assert "encoder.down_blocks.3.downsamplers.0.conv.weight" not in shapes
    assert list(shapes)[0] == "encoder.conv_in.weight" and list(shapes)[-1] == "post_quant_conv.bias"


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"block_out_channels": [8, 16], "norm_num_groups": 8, "in_channels": 1, "layers_per_block": 1},
        {"block_out_channels": [96], "out_channels": 2, "latent_channels": 5},
        {"block_out_channels": [48, 96, 48], "norm_num_groups": 16},
    ],
)
def test_arguments_are_inferred_from_shapes(config):
    full = {"in_channels": 3, "out_channels": 3, "latent_channels": 4, "layers_per_block": 2, "norm_num_groups": 32}
    full |= {"block_out_channels": [128, 256, 512, 512]} | config
    # arrays of the right shapes without their memory
    state = {k: np.broadcast_to(np.float32(0), v) for k, v in layout("sdvae", config).items()}
    assert infer_config(state) == full
    assert infer_config(old_names(state, squeezed=True)) == full


def test_the_number_of_groups_is_a_guess():
    """Here it is wrong: a recorded value must win."""
    inferred = infer_config(STATE)
    assert inferred["norm_num_groups"] == 8 and CONFIG["norm_num_groups"] == 4
    assert {k: CONFIG[k] for k in inferred} | {"norm_num_groups": 8} == inferred
    assert layout("sdvae", inferred) == layout("sdvae", CONFIG)


def test_shapes_of_no_network():
    """Whatever a file holds: arguments, or one line."""
    for key in STATE:
        for broken in ({k: v for k, v in STATE.items() if k != key}, STATE | {key: np.float32(0)}):
            try:
                infer_config(broken)
            except UnsafeOrDamaged as e:
                assert "no network has these shapes" in str(e) and "\n" not in str(e)
    with pytest.raises(UnsafeOrDamaged, match=r"no network has these shapes \('encoder.conv_in.weight'\)"):
        infer_config({k: v for k, v in STATE.items() if k != "encoder.conv_in.weight"})
    with pytest.raises(UnsafeOrDamaged, match="no level"):
        infer_config({k: v for k, v in STATE.items() if ".down_blocks.0." not in k})
