"""VAR state dicts: byte-equal round trips, exact coverage, buffers, released names, inferred arguments (section 6).

Sections are those of specs/var.md.
"""

import json
import math
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddo_jax.convert import from_torch, layout, to_torch
from ddo_jax.convert.inert import UnsafeOrDamaged
from ddo_jax.convert.var import infer_config
from ddo_jax.models.var import SCALES_256, VAR_PRESETS

GOLDENS = Path(os.environ.get("DDO_JAX_GOLDENS") or Path(__file__).parents[1] / "goldens")
BUFFERS = ("lvl_1L", "attn_bias_for_masking", "zero_k_bias")
SHAPES = json.loads((GOLDENS / "var_shapes.json").read_text())


def read(name):
    """(our arguments, state dict as a file holds it) of a golden network."""
    with np.load(GOLDENS / f"{name}.npz") as f:
        info = json.loads(str(f["config"]))
        state = {k.removeprefix("param/"): f[k] for k in f.files if k.startswith("param/")}
    state["lvl_1L"] = state["lvl_1L"].astype(np.int64)  # int32 only in the npz (section 13b)
    keys = ("num_classes", "depth", "embed_dim", "num_heads", "mlp_ratio", "shared_aln", "attn_l2_norm", "patch_nums")
    return {k: info[k] for k in keys} | {"vocab_size": info["V"], "z_channels": info["Cvae"]}, state


NETWORKS = ["var_small", "var_small2"]


@pytest.mark.parametrize("dtype", [np.float32, np.float16, jnp.bfloat16])
@pytest.mark.parametrize("name", NETWORKS)
def test_round_trip_is_byte_equal_and_in_order(name, dtype):
    config, state = read(name)
    state = {k: v if k == "lvl_1L" else v.astype(dtype) for k, v in state.items()}
    shuffled = dict(sorted(state.items()))  # safetensors come in alphabetical order
    _, variables = from_torch("var", config, shuffled)
    assert all(v.flags.c_contiguous and v.dtype == dtype for v in jax.tree.leaves(variables))
    back = to_torch("var", config, variables)
    assert list(back) == list(state) != list(shuffled)
    for key, value in state.items():
        assert back[key].dtype == value.dtype and back[key].shape == value.shape, key
        assert back[key].tobytes() == value.tobytes() and back[key].flags.c_contiguous, key


@pytest.mark.parametrize("name", NETWORKS)
def test_variables_have_the_tree_of_init(name):
    config, state = read(name)
    module, variables = from_torch("var", config, state)
    maps = np.zeros((1, module.length - 1, module.z_channels), np.float32)
    abstract = jax.eval_shape(module.init, jax.random.key(0), np.zeros(1, np.int32), maps)
    shapes = jax.tree.map(lambda v: (v.shape, v.dtype), variables)
    assert shapes == jax.tree.map(lambda v: (v.shape, v.dtype), abstract)
    params = variables["params"]
    np.testing.assert_array_equal(
        params["blocks_1"]["attn"]["mat_qkv"]["weight"], state["blocks.1.attn.mat_qkv.weight"].T
    )
    np.testing.assert_array_equal(params["head_nm"]["ada_lin_1"]["weight"], state["head_nm.ada_lin.1.weight"].T)
    np.testing.assert_array_equal(params["class_emb"]["weight"], state["class_emb.weight"])
    np.testing.assert_array_equal(params["lvl_embed"]["weight"], state["lvl_embed.weight"])


def test_every_mistake_is_named():
    config, state = read("var_small")
    key, level = "blocks.2.ffn.fc1.weight", state["lvl_1L"]
    mask, zero = "attn_bias_for_masking", "blocks.1.attn.zero_k_bias"
    mistakes = {
        f"{key}: missing; expected shape [256, 64]": {k: v for k, v in state.items() if k != key},
        f"{key}: shape [64, 256]; expected [256, 64]": state | {key: state[key].T},
        f"{mask}: missing; expected shape [1, 1, 30, 30]": {k: v for k, v in state.items() if k != mask},
        "extra: shape [2]; this configuration has no such": state | {"extra": np.ones(2)},
        "lvl_1L: other values than those of patch_nums [1, 2, 3, 4]": state | {"lvl_1L": level[:, ::-1]},
        f"{mask}: other values": state | {mask: np.zeros((1, 1, 30, 30), np.float32)},
        f"{zero}: other values": state | {zero: np.full(64, 1e-6, np.float32)},
    }
    for message, wrong in mistakes.items():
        with pytest.raises(ValueError) as e:
            from_torch("var", config, wrong)
        assert str(e.value).startswith(message) and "\n" not in str(e.value)
    params = from_torch("var", config, state)[1]["params"]
    with pytest.raises(ValueError, match="pos_1LC: missing"):
        to_torch("var", config, {"params": {k: v for k, v in params.items() if k != "pos_1LC"}})
    with pytest.raises(ValueError, match=r"params/extra: shape \[2\]; this configuration has no such"):
        to_torch("var", config, {"params": params | {"extra": np.ones(2)}})


@pytest.mark.parametrize("name", ["d16", "d30", "d36"])
def test_released_names_and_shapes(name):
    """Shapes only: nothing of these sizes is allocated."""
    expected = SHAPES[f"var_{name}"]
    shapes = layout("var", VAR_PRESETS[f"var-{name}"])
    assert list(shapes.items()) == [(k, tuple(shape)) for k, (shape, _, _) in expected.items()]
    kinds = {k: "buffer" if k.endswith(BUFFERS) else "param" for k in shapes}
    assert kinds == {k: kind for k, (_, _, kind) in expected.items()}


ENTRIES = {"d16": (220, 1_243_054_656), "d20": (272, 2_405_625_984), "d24": (324, 4_135_599_936)}
ENTRIES |= {"d30": (402, 8_042_166_864), "d36": (446, 9_435_995_712)}


@pytest.mark.parametrize("name", ENTRIES)
def test_released_sizes(name):
    """Section 4.1: entries and bytes of the payload."""
    shapes = layout("var", VAR_PRESETS[f"var-{name}"])
    payload = sum((8 if k == "lvl_1L" else 4) * math.prod(v) for k, v in shapes.items())
    assert (len(shapes), payload) == ENTRIES[name]


@pytest.mark.parametrize("name", ["d16", "d36"])
def test_arguments_of_released_networks_are_inferred(name):
    """From arrays of the right shapes without their memory; only the levels are read."""
    preset = VAR_PRESETS[f"var-{name}"]
    state = {k: np.broadcast_to(np.float32(0), v) for k, v in layout("var", preset).items()}
    sides = preset.get("patch_nums", SCALES_256)
    state["lvl_1L"] = np.repeat(np.arange(10), np.square(sides))[None]
    config = infer_config(state)
    assert config == {
        **{k: preset[k] for k in ("depth", "embed_dim", "num_heads")},
        **{"num_classes": 1000, "patch_nums": list(sides), "vocab_size": 4096, "z_channels": 32, "mlp_ratio": 4.0},
        **{"shared_aln": name == "d36", "attn_l2_norm": True},
    }
    assert json.loads(json.dumps(config)) == config
    assert layout("var", config) == layout("var", preset)


def test_the_number_of_heads_can_be_a_guess():
    """Here it is wrong: a recorded value must win."""
    config, state = read("var_small")
    assert infer_config(state) == config
    config, state = read("var_small2")
    assert infer_config(state) == config | {"num_heads": 1}


def test_shapes_of_no_network():
    """Whatever a file holds: arguments, or one line."""
    _, state = read("var_small")
    for key in state:
        for broken in ({k: v for k, v in state.items() if k != key}, state | {key: np.float32(0)}):
            try:
                infer_config(broken)
            except UnsafeOrDamaged as e:
                assert "no network has these shapes" in str(e) and "\n" not in str(e)
    for levels in (state["lvl_1L"][:, 1:], state["lvl_1L"] + 1, np.full((1, 30), 2**62)):
        with pytest.raises(UnsafeOrDamaged, match="lvl_1L does not number the tokens of square maps"):
            infer_config(state | {"lvl_1L": levels})
