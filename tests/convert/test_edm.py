"""EDM state dicts: byte-equal round trips, exact coverage, the released names and sizes (sections 6, 7).

Sections are those of specs/edm.md.
"""

import json
import math
from pathlib import Path

import jax
import numpy as np
import pytest

from ddo_jax.convert import from_torch, to_torch
from ddo_jax.convert.edm import layout
from ddo_jax.models.edm import RELEASED

GOLDENS = Path(__file__).parents[1] / "goldens"
FILES = [f"edm_{name}_small" for name in ("ddpmpp", "ncsnpp", "ncsnpp_release", "song_skip", "adm")]


def read(name):
    with np.load(GOLDENS / f"{name}.npz") as f:
        state = {k.removeprefix("param/"): f[k] for k in f.files if k.startswith("param/")}
        return json.loads(str(f["config"])), state


@pytest.mark.parametrize("name", FILES)
def test_round_trip_is_byte_equal_and_in_order(name):
    config, state = read(name)
    module, variables = from_torch("edm", config, state)
    back = to_torch("edm", config, variables)
    assert list(back) == list(state)
    for key, value in state.items():
        assert back[key].dtype == value.dtype and back[key].shape == value.shape, key
        assert back[key].tobytes() == value.tobytes() and back[key].flags.c_contiguous, key


def test_variables_have_the_tree_of_init():
    config, state = read("edm_ncsnpp_release_small")
    module, variables = from_torch("edm", config, state)
    x, sigma = np.zeros((1, 16, 16, 3), np.float32), np.ones(1, np.float32)
    abstract = jax.eval_shape(module.init, jax.random.key(0), x, sigma)
    shapes = jax.tree.map(lambda v: (v.shape, v.dtype), variables)
    assert shapes == jax.tree.map(lambda v: (v.shape, v.dtype), abstract)
    key = "model.enc.16x16_block0.conv0.weight"
    weight = variables["params"]["net"]["enc"]["16x16_block0"]["conv0"]["weight"]
    np.testing.assert_array_equal(weight, state[key].transpose(2, 3, 1, 0))


def test_every_mistake_is_named():
    config, state = read("edm_ncsnpp_release_small")
    key, filt = "model.dec.8x8_in0.qkv.weight", "model.enc.8x8_aux_residual.resample_filter"
    uniform = np.full((1, 1, 4, 4), 1 / 16)
    mistakes = {
        f"{key}: missing; expected shape [72, 24, 1, 1]": {k: v for k, v in state.items() if k != key},
        f"{key}: shape [72, 24]; expected [72, 24, 1, 1]": state | {key: state[key][:, :, 0, 0]},
        "model.extra: shape [2]; this configuration has no such": state | {"model.extra": np.ones(2)},
        f"{filt}: first row [0.0625, 0.0625, 0.0625, 0.0625]; expected": state | {filt: uniform},
    }
    for message, wrong in mistakes.items():
        with pytest.raises(ValueError) as e:
            from_torch("edm", config, wrong)
        assert str(e.value).startswith(message) and "\n" not in str(e.value)
    variables = from_torch("edm", config, state)[1]
    with pytest.raises(ValueError, match="model.map_noise.freqs: missing"):
        to_torch("edm", config, {"params": variables["params"]})
    with pytest.raises(ValueError, match=r"params/net/extra: shape \[2\]; this configuration has no such"):
        to_torch("edm", config, variables | {"params": {"net": variables["params"]["net"] | {"extra": np.ones(2)}}})
    with pytest.raises(ValueError, match="kind is 'edn'; allowed: .*edm"):
        from_torch("edn", config, state)


def block(name, channels, emb, *, adm, resampled, taps, attention):
    """Entries of one U-Net block, section 7, in order."""
    ci, co = channels
    filt = {"resample_filter": (1, 1, taps, taps)}
    layer = {f"{name}.norm0": {"weight": (ci,), "bias": (ci,)}}
    layer[f"{name}.conv0"] = {"weight": (co, ci, 3, 3), "bias": (co,)} | (filt if resampled else {})
    layer[f"{name}.affine"] = {"weight": ((1 + adm) * co, emb), "bias": ((1 + adm) * co,)}
    layer[f"{name}.norm1"] = {"weight": (co,), "bias": (co,)}
    layer[f"{name}.conv1"] = {"weight": (co, co, 3, 3), "bias": (co,)}
    skip = {"weight": (co, ci, 1, 1), "bias": (co,)} if ci != co or (resampled and not adm) else {}
    layer[f"{name}.skip"] = skip | (filt if resampled else {})
    if attention:
        layer[f"{name}.norm2"] = {"weight": (co,), "bias": (co,)}
        layer[f"{name}.qkv"] = {"weight": (3 * co, co, 1, 1), "bias": (3 * co,)}
        layer[f"{name}.proj"] = {"weight": (co, co, 1, 1), "bias": (co,)}
    return {f"{at}.{leaf}": shape for at, leaves in layer.items() for leaf, shape in leaves.items()}


def section7(config):
    """Names and shapes of a released file, from the specification alone and not from the modules."""
    adm = config["model_type"] == "DhariwalUNet"
    fourier = config.get("embedding_type") == "fourier"
    residual = config.get("encoder_type") == "residual"
    m, mult = config["model_channels"], config["channel_mult"]
    labels, augment = config["label_dim"], config["augment_dim"]
    blocks, attn = (3, (32, 16, 8)) if adm else (4, (16,))
    noise, emb, taps = m * config.get("channel_mult_noise", 1), 4 * m, 4 if residual else 2
    out = {"map_noise.freqs": (noise // 2,)} if fourier else {}
    if labels and not adm:
        out |= {"map_label.weight": (noise, labels), "map_label.bias": (noise,)}
    if augment:
        out["map_augment.weight"] = (noise, augment)
    out |= {"map_layer0.weight": (emb, noise), "map_layer0.bias": (emb,)}
    out |= {"map_layer1.weight": (emb, emb), "map_layer1.bias": (emb,)}
    if labels and adm:
        out["map_label.weight"] = (emb, labels)

    def add(name, ci, co, resampled=False, attention=False):
        out.update(block(name, (ci, co), emb, adm=adm, resampled=resampled, taps=taps, attention=attention))
        return co

    c, aux, skips = m * mult[0] if adm else m, 3, []
    for level, k in enumerate(mult):
        res = config["img_resolution"] >> level
        at = f"enc.{res}x{res}_"
        if level == 0:
            out |= {f"{at}conv.weight": (c, 3, 3, 3), f"{at}conv.bias": (c,)}
        else:
            add(f"{at}down", c, c, resampled=True)
            if residual:
                out |= {f"{at}aux_residual.weight": (c, aux, 3, 3), f"{at}aux_residual.bias": (c,)}
                out[f"{at}aux_residual.resample_filter"] = (1, 1, taps, taps)
                aux = c
        skips.append(c)
        for i in range(blocks):
            c = add(f"{at}block{i}", c, m * k, attention=res in attn)
            skips.append(c)
    for level in reversed(range(len(mult))):
        res = config["img_resolution"] >> level
        at = f"dec.{res}x{res}_"
        if level == len(mult) - 1:
            add(f"{at}in0", c, c, attention=True)
            add(f"{at}in1", c, c)
        else:
            add(f"{at}up", c, c, resampled=True)
        for i in range(blocks + 1):
            attention = res in attn and (adm or i == blocks)
            c = add(f"{at}block{i}", c + skips.pop(), m * mult[level], attention=attention)
    norm, conv = ("out_norm", "out_conv") if adm else (f"{at}aux_norm", f"{at}aux_conv")
    out |= {f"{norm}.weight": (c,), f"{norm}.bias": (c,)}
    out |= {f"{conv}.weight": (3, c, 3, 3), f"{conv}.bias": (3,)}
    return {f"model.{name}": shape for name, shape in out.items()}


SIZES = {  # section 6: parameters, parameter tensors, buffers, buffer elements
    "edm-cifar10-32x32-cond-vp": (55_735_299, 419, 8, 32),
    "edm-cifar10-32x32-uncond-vp": (55_733_891, 417, 8, 32),
    "edm-cifar10-32x32-cond-ve": (56_400_643, 423, 11, 288),
    "edm-cifar10-32x32-uncond-ve": (56_397_827, 421, 11, 288),
    "edm-ffhq-64x64-uncond-vp": (61_805_571, 541, 12, 48),
    "edm-ffhq-64x64-uncond-ve": (62_761_091, 547, 16, 368),
    "edm-afhqv2-64x64-uncond-vp": (61_805_571, 541, 12, 48),
    "edm-afhqv2-64x64-uncond-ve": (62_761_091, 547, 16, 368),
    "edm-imagenet-64x64-cond-adm": (295_899_267, 541, 12, 48),
}


@pytest.mark.parametrize("name", RELEASED)
def test_released_sizes_names_and_shapes(name):
    """Shapes only: nothing of these sizes is allocated."""
    _, shapes, _ = layout(RELEASED[name])
    assert list(shapes.items()) == list(section7(RELEASED[name]).items())
    buffers = {k: v for k, v in shapes.items() if k.endswith((".freqs", ".resample_filter"))}
    parameters = {k: v for k, v in shapes.items() if k not in buffers}
    counts = [sum(math.prod(v) for v in part.values()) for part in (parameters, buffers)]
    assert (counts[0], len(parameters), len(buffers), counts[1]) == SIZES[name]
