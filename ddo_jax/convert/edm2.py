"""EDM2 state dicts (specs/edm2.md section 7) <-> variables of `ddo_jax.models.edm2`.

    released name                                   ours
    <a>.<b>.freqs, <a>.<b>.phases   1-d             buffers / <a> / <b> / freqs, phases   unchanged
    <a>.<b>.weight   4-d [out,in,k,k]               params / <a> / <b> / weight           [k,k,in,out]
    <a>.<b>.weight   2-d [out,in]                   params / <a> / <b> / weight           [in,out]
    unet.out_gain, <a>.emb_gain     0-d             params / ...                          unchanged

Names and shapes are those of the module that the config builds; coverage is exact in both directions. Arrays
keep their dtype (float16 in released files): cast them all to float32 before any use.
"""

import functools
import json
import re

import flax.traverse_util
import jax
import numpy as np

from ddo_jax.convert.coverage import check
from ddo_jax.models.edm2 import from_config

# Order of a state dict (section 7).
_TOP = ("out_gain", "emb_fourier", "emb_noise", "emb_label", "enc", "dec", "out_conv")
_ENTRY = ("conv", "down", "in0", "in1", "up", "block")
_LAYER = ("emb_gain", "conv_res0", "emb_linear", "conv_res1", "conv_skip", "attn_qkv", "attn_proj")
_BUFFERS = ("freqs", "phases")

_TO_TORCH = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,), 0: ()}  # HWIO -> OIHW, [in,out] -> [out,in]
_FROM_TORCH = {4: (2, 3, 1, 0), 2: (1, 0), 1: (0,), 0: ()}


def _order(name: str) -> tuple:
    """Sort key: where `name` stands in the released state dict."""
    head, *inner = name.split(".")
    if head != "unet":
        return (1, head, inner)  # logvar_fourier, logvar_linear; freqs, phases
    top, *inner = inner
    if top not in ("enc", "dec"):
        return (0, _TOP.index(top), inner)
    entry, *layer = inner
    resolution, kind, index = re.fullmatch(r"(\d+)x\d+_(in[01]|[a-z]+)(\d*)", entry).groups()
    level = int(resolution) if top == "dec" else -int(resolution)
    place = _LAYER.index(layer[0]) if kind != "conv" else 0
    return (0, _TOP.index(top), level, _ENTRY.index(kind), int(index or 0), place)


def _path(name: str) -> tuple:
    """Released name -> path in our variables."""
    parts = name.split(".")
    return ("buffers" if parts[-1] in _BUFFERS else "params", *parts)


@functools.lru_cache(maxsize=32)
def _layout(config_json: str):
    module = from_config(json.loads(config_json))
    image = (1, module.img_resolution, module.img_resolution, module.img_channels)
    x, sigma = jax.ShapeDtypeStruct(image, np.float32), jax.ShapeDtypeStruct((1,), np.float32)
    abstract = jax.eval_shape(module.init, jax.random.key(0), x, sigma)
    shapes = {}
    for (_, *parts), leaf in flax.traverse_util.flatten_dict(abstract).items():
        shapes[".".join(parts)] = tuple(leaf.shape[i] for i in _TO_TORCH[leaf.ndim])
    return module, {name: shapes[name] for name in sorted(shapes, key=_order)}


def layout(config: dict):
    """(module, {released name: released shape} in file order); allocates nothing."""
    module, shapes = _layout(json.dumps(config, sort_keys=True, default=lambda v: v.tolist()))  # NumPy numbers
    return module, dict(shapes)


def _transposed(v, table: dict) -> np.ndarray:
    """Contiguous copy in the other layout; unlike np.ascontiguousarray it keeps scalars 0-d."""
    v = np.asarray(v)
    return np.asarray(v.transpose(table.get(v.ndim, range(v.ndim))), order="C")


def from_torch(config: dict, state_dict: dict):
    """(EDM2Precond, variables) of a released network; contiguous NumPy arrays of unchanged dtype.

    Args:
        config: constructor arguments as the released file records them. state_dict: {released name: array}.
    """
    module, expected = layout(config)
    check(state_dict, expected)
    flat = {_path(name): _transposed(state_dict[name], _FROM_TORCH) for name in expected}
    return module, flax.traverse_util.unflatten_dict(flat)


def to_torch(config: dict, variables: dict) -> dict:
    """{released name: contiguous NumPy array} in the order of the file; the inverse of `from_torch`."""
    _, expected = layout(config)
    ours = {_path(name): name for name in expected}
    seen = {}
    for path, v in flax.traverse_util.flatten_dict(dict(variables)).items():
        seen[ours.get(path, "/".join(path))] = _transposed(v, _TO_TORCH)
    check(seen, expected)
    return {name: seen[name] for name in expected}
