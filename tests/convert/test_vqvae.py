"""State dicts of VAR's tokenizer: byte-equal round trips, exact coverage, the released network, inferred arguments.

Sections are those of specs/var.md.
"""

import json
import math
from pathlib import Path

import jax
import numpy as np
import pytest

from ddo_jax.convert import from_torch, infer, layout, read, safetensors, to_torch
from ddo_jax.convert.inert import UnsafeOrDamaged
from ddo_jax.convert.read import CONFIG_KEY
from ddo_jax.convert.vqvae import UNSEEN, infer_config

from . import conftest as build

GOLDENS = Path(__file__).parents[1] / "goldens"
RECORDED = {"kind", "image_size", "L", "latent", "min_code_margin", "seed", "torch", "phi_index_per_scale"}
with np.load(GOLDENS / "vqvae_small2.npz") as f:
    CONFIG = json.loads(str(f["config"]))
    CONFIG = {k: v for k, v in CONFIG.items() if k not in RECORDED | {"clamped_fraction"}}
    STATE = {k.removeprefix("param/"): f[k] for k in f.files if k.startswith("param/")}
with np.load(GOLDENS / "vqvae_small.npz") as f:
    RELEASED = {name: tuple(shape) for name, (shape, _, _) in json.loads(str(f["released_shapes"])).items()}

HITS = "quantize.ema_vocab_hit_SV"
TINY = {"ch": 2, "ch_mult": [1], "num_res_blocks": 1, "norm_groups": 1, "vocab_size": 4, "z_channels": 3}
TINY |= {"patch_nums": [1, 2, 3]}


def weightless(shapes):
    """Arrays of these shapes without their memory."""
    return {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}


def same(a, b):
    assert a.keys() == b.keys()
    for key, value in b.items():
        assert a[key].dtype == value.dtype and a[key].shape == value.shape, key
        assert a[key].tobytes() == value.tobytes() and a[key].flags.c_contiguous, key


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_round_trip_is_byte_equal_and_in_order(dtype):
    state = {k: v.astype(dtype) for k, v in STATE.items()}
    shuffled = dict(sorted(state.items()))  # safetensors come in alphabetical order
    _, variables = from_torch("vqvae", CONFIG, shuffled)
    assert all(v.flags.c_contiguous for v in jax.tree.leaves(variables))
    back = to_torch("vqvae", CONFIG, variables)
    assert list(back) == list(state) != list(shuffled)
    same(back, state)


def test_variables_have_the_tree_of_init():
    module, variables = from_torch("vqvae", CONFIG, STATE)
    abstract = jax.eval_shape(module.init, jax.random.key(0), np.zeros((1, 32, 32, 3), np.float32))
    shapes = jax.tree.map(lambda v: (v.shape, v.dtype), variables)
    assert shapes == jax.tree.map(lambda v: (v.shape, v.dtype), abstract)
    block = variables["params"]["decoder"]["up_0"]["block_0"]
    np.testing.assert_array_equal(
        block["nin_shortcut"]["weight"], STATE["decoder.up.0.block.0.nin_shortcut.weight"].transpose(2, 3, 1, 0)
    )
    quantize, middle = variables["params"]["quantize"], variables["params"]["encoder"]["mid"]
    np.testing.assert_array_equal(quantize["phi_1"]["bias"], STATE["quantize.quant_resi.qresi_ls.1.bias"])
    np.testing.assert_array_equal(quantize["embedding"]["weight"], STATE["quantize.embedding.weight"])
    np.testing.assert_array_equal(middle["block_2"]["norm1"]["bias"], STATE["encoder.mid.block_2.norm1.bias"])
    np.testing.assert_array_equal(variables["buffers"]["quantize"]["ema_vocab_hit_SV"], STATE[HITS])


def test_the_released_tokenizer():
    """All 324 names and shapes in stored order; shapes only, nothing of this size is allocated."""
    shapes = layout("vqvae", {})
    assert shapes == RELEASED and list(shapes) == list(RELEASED) and len(shapes) == 324
    sizes = {k: math.prod(v) for k, v in shapes.items() if k != HITS}
    counts = {part: sum(v for k, v in sizes.items() if k.startswith(part)) for part in ("enc", "dec", "quantize.")}
    assert counts == {"enc": 44_107_872, "dec": 64_653_923, "quantize.": 168_064}
    assert sum(sizes.values()) == 108_948_355
    inferred = infer_config(weightless(shapes))
    assert layout("vqvae", inferred) == RELEASED
    assert (inferred["ch_mult"], inferred["patch_nums"][-1], inferred["norm_groups"]) == ([1, 1, 2, 2, 4], 16, 32)


@pytest.mark.parametrize(
    "shared, names",
    [
        (0, [f"quantize.quant_resi.{s}" for s in range(3)]),
        (1, ["quantize.quant_resi.qresi"]),
        (2, [f"quantize.quant_resi.qresi_ls.{k}" for k in range(2)]),
    ],
)
def test_names_of_the_phis(shared, names):
    config = TINY | {"share_quant_resi": shared}
    shapes = layout("vqvae", config)
    found = [name for name in shapes if name.startswith("quantize.")]
    phis = [f"{name}.{v}" for name in names for v in ("weight", "bias")]
    assert found == [HITS, *phis, "quantize.embedding.weight"]
    rng = np.random.default_rng(0)
    state = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    _, variables = from_torch("vqvae", config, state)
    for k, name in enumerate(names):
        bias = variables["params"]["quantize"][f"phi_{k}"]["bias"]
        np.testing.assert_array_equal(bias, state[f"{name}.bias"])
    same(to_torch("vqvae", config, variables), state)
    assert infer_config(state)["share_quant_resi"] == shared


def test_counts_of_other_scales_are_kept_and_not_used():
    """Section 3: a file may be used with another number of scales; what it says of its own has no effect."""
    state = STATE | {HITS: np.arange(3 * 48, dtype=np.float32).reshape(3, 48)}
    module, variables = from_torch("vqvae", CONFIG, state)
    same(to_torch("vqvae", CONFIG, variables), state)
    tokens = np.zeros((1, module.length), np.int32)
    f_hat = module.apply(variables, tokens, method="f_hat")
    np.testing.assert_array_equal(f_hat, module.apply({"params": variables["params"]}, tokens, method="f_hat"))


def test_every_mistake_is_named():
    key = "encoder.down.1.block.0.conv1.weight"
    mistakes = {
        f"{key}: missing; expected shape [64, 32, 3, 3]": {k: v for k, v in STATE.items() if k != key},
        f"{key}: shape [64, 32]; expected [64, 32, 3, 3]": STATE | {key: STATE[key][:, :, 0, 0]},
        f"{HITS}: shape [5, 47]; expected [5, 48]": STATE | {HITS: STATE[HITS][:, 1:]},
        f"{HITS}: missing; expected shape [5, 48]": {k: v for k, v in STATE.items() if k != HITS},
        "encoder.extra: shape [2]; this configuration has no such": STATE | {"encoder.extra": np.ones(2)},
    }
    for message, wrong in mistakes.items():
        with pytest.raises(ValueError) as e:
            from_torch("vqvae", CONFIG, wrong)
        assert str(e.value).startswith(message) and "\n" not in str(e.value)
    variables = from_torch("vqvae", CONFIG, STATE)[1]
    extra = variables | {"params": variables["params"] | {"extra": np.ones(2)}}
    with pytest.raises(ValueError, match=r"params/extra: shape \[2\]; this configuration has no such"):
        to_torch("vqvae", CONFIG, extra)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"ch": 8, "ch_mult": [1, 3], "in_channels": 1, "num_res_blocks": 1, "norm_groups": 8},
        {"ch": 96, "ch_mult": [2], "vocab_size": 5, "z_channels": 7, "quant_conv_ks": 1, "share_quant_resi": 1},
    ],
)
def test_arguments_are_inferred_from_shapes(config):
    full = {"vocab_size": 4096, "z_channels": 32, "ch": 160, "ch_mult": [1, 1, 2, 2, 4], "num_res_blocks": 2}
    full |= {"quant_conv_ks": 3, "quant_resi": 0.5, "share_quant_resi": 4, "using_znorm": False, "beta": 0.25}
    full |= {"patch_nums": [1, 2, 3, 4, 5, 6, 8, 10, 13, 16], "in_channels": 3, "norm_groups": 32} | config
    assert infer_config(weightless(layout("vqvae", config))) == full


def test_what_no_shape_shows_is_a_guess():
    """Here it is wrong, and the scales are not guessed at all: nothing is made of them without asking."""
    inferred = infer_config(STATE)
    assert CONFIG.keys() - inferred.keys() == set() and inferred.keys() - CONFIG.keys() == {"norm_groups"}
    assert {k for k in CONFIG if inferred[k] != CONFIG[k]} == {"quant_resi", "using_znorm", "patch_nums"} <= set(UNSEEN)
    with pytest.raises(ValueError, match="patch_nums is None; allowed: a list"):
        layout("vqvae", inferred)
    assert layout("vqvae", inferred | {"patch_nums": CONFIG["patch_nums"]}) == layout("vqvae", CONFIG)


def test_shapes_of_no_network():
    """Whatever a file holds: arguments, or one line."""
    for key in STATE:
        for broken in ({k: v for k, v in STATE.items() if k != key}, STATE | {key: np.float32(0)}):
            try:
                infer_config(broken)
            except UnsafeOrDamaged as e:
                assert "no network has these shapes" in str(e) and "\n" not in str(e)
    for change in ({"encoder.conv_in.weight": (0, 3, 3, 3)}, {"encoder.down.1.block.0.conv1.weight": (65, 32, 3, 3)}):
        with pytest.raises(UnsafeOrDamaged, match="levels are no multiples of (0|32)"):
            infer_config(STATE | weightless(change))


@pytest.mark.parametrize("suffix, recorded", [(".pth", False), (".safetensors", False), (".safetensors", True)])
def test_reading_files(tmp_path, suffix, recorded):
    """Recorded arguments win; else they are inferred, and the guesses are named."""
    metadata = {CONFIG_KEY: json.dumps(CONFIG)} if recorded else {}
    path = tmp_path / f"vae{suffix}"
    path.write_bytes(build.torch_zip(STATE) if suffix == ".pth" else safetensors.dumps(STATE, metadata))
    released = read(path)
    assert released.kind == "vqvae"
    assert released.config == (CONFIG if recorded else infer_config(STATE))
    if recorded:
        assert "assumed" not in released.extras
    else:
        assert released.extras["assumed"] == {key: released.config[key] for key in UNSEEN}
    _, variables = from_torch("vqvae", CONFIG, released.state_dict)
    same(to_torch("vqvae", CONFIG, variables), STATE)


def test_it_is_not_taken_for_its_relatives():
    """Other VQ autoencoders of the same code base have these names but for the counts by scale; VAR's other network."""
    assert infer.kind_of(STATE) == infer.kind_of(RELEASED) == "vqvae"
    assert infer.kind_of({k: v for k, v in STATE.items() if k != HITS}) is None
    var = ["pos_start", "pos_1LC", "word_embed.weight", "class_emb.weight", "lvl_embed.weight", "head.weight"]
    assert infer.kind_of(dict.fromkeys(var)) == "var"
    assert infer.kind_of(dict.fromkeys(var[1:])) is None
