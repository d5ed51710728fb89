"""EDM state dicts (specs/edm.md section 7) <-> variables of `ddo_jax.models.edm`.

    released name                                   ours
    model.map_noise.freqs            [n]            buffers / net / map_noise / freqs
    model.<a>.<b>.weight   4-d [out,in,k,k]         params / net / <a> / <b> / weight       [k,k,in,out]
    model.<a>.<b>.weight   2-d [out,in]             params / net / <a> / <b> / weight       [in,out]
    model.<a>.<b>.weight   1-d, model.<a>.<b>.bias  params / net / <a> / <b> / weight, bias unchanged
    model.<a>.<b>.resample_filter    [1,1,n,n]      none: a constant of the config, checked on import

Names and shapes are those of the module that the config builds; coverage is exact in both directions.
"""

import functools
import json
import re

import flax.traverse_util
import jax
import numpy as np

from ddo_jax.convert.coverage import check
from ddo_jax.models.edm import ADM, SongUNet, from_config

# Order of a state dict (section 7). ADM has its map_label after the layers.
_TOP = ("map_noise", "map_label", "map_augment", "map_layer0", "map_layer1", "enc", "dec")
_TOP_ADM = ("map_augment", "map_layer0", "map_layer1", "map_label", "enc", "dec", "out_norm", "out_conv")
_ENTRY = ("conv", "down", "aux_down", "aux_skip", "aux_residual", "in0", "in1", "up", "block")
_ENTRY += ("aux_up", "aux_norm", "aux_conv")
_LAYER = ("norm0", "conv0", "affine", "norm1", "conv1", "skip", "norm2", "qkv", "proj")
_LEAF = ("weight", "bias", "resample_filter", "freqs")

_TO_TORCH = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}  # HWIO -> OIHW, [in,out] -> [out,in]
_FROM_TORCH = {4: (2, 3, 1, 0), 2: (1, 0), 1: (0,)}


def _order(name: str, top: tuple) -> tuple:
    """Sort key: where `name` stands in the released state dict."""
    head, *inner, leaf = name.removeprefix("model.").split(".")
    key = [top.index(head)]
    if head in ("enc", "dec"):
        resolution, kind, index = re.fullmatch(r"(\d+)x\d+_(in[01]|[a-z_]+)(\d*)", inner[0]).groups()
        level = int(resolution) if head == "dec" else -int(resolution)
        key += [level, _ENTRY.index(kind), int(index or 0)]
        key += [_LAYER.index(layer) for layer in inner[1:]]
    return (*key, _LEAF.index(leaf))


def _path(name: str) -> tuple:
    """Released name -> path in our variables."""
    collection = "buffers" if name.endswith(".freqs") else "params"
    return (collection, "net", *name.split(".")[1:])


def resample_filter(taps) -> np.ndarray:
    """outer(f, f) / (Σf)² as [1, 1, n, n] float32 (section 2.2)."""
    f = np.asarray(taps, np.float32)
    f = np.outer(f, f)
    return (f / f.sum())[None, None]


def _filter_names(names, decoder_type: str):
    """Buffers that the file has and we do not: the filter of each resampling layer."""
    for name in names:
        if m := re.fullmatch(r"(.*)_(up|down)\.conv0\.weight", name):
            yield from (f"{m[1]}_{m[2]}.conv0.resample_filter", f"{m[1]}_{m[2]}.skip.resample_filter")
            if m[2] == "up" and decoder_type == "skip":
                yield f"{m[1]}_aux_up.resample_filter"
        elif m := re.fullmatch(r"(.*_aux_residual)\.weight", name):
            yield f"{m[1]}.resample_filter"
        elif m := re.fullmatch(r"(.*)_aux_skip\.weight", name):
            yield f"{m[1]}_aux_down.resample_filter"


@functools.lru_cache(maxsize=16)
def _layout(config_json: str):
    module = from_config(json.loads(config_json))
    net, image = module.net, (1, module.img_resolution, module.img_resolution, module.img_channels)
    x, sigma = jax.ShapeDtypeStruct(image, np.float32), jax.ShapeDtypeStruct((1,), np.float32)
    abstract = jax.eval_shape(module.init, jax.random.key(0), x, sigma)
    shapes = {}
    for (_, _, *parts), leaf in flax.traverse_util.flatten_dict(abstract).items():
        shapes[".".join(["model", *parts])] = tuple(leaf.shape[i] for i in _TO_TORCH[leaf.ndim])
    filt = resample_filter(getattr(net, "resample_filter", ADM.taps))
    shapes |= dict.fromkeys(_filter_names(list(shapes), getattr(net, "decoder_type", "")), filt.shape)
    top = _TOP if isinstance(net, SongUNet) else _TOP_ADM
    return module, {k: shapes[k] for k in sorted(shapes, key=lambda name: _order(name, top))}, filt


def layout(config: dict):
    """(module, {released name: released shape} in file order, filter [1,1,n,n]); allocates nothing."""
    return _layout(json.dumps(config, sort_keys=True, default=lambda v: v.tolist()))  # tolist: NumPy numbers


def from_torch(config: dict, state_dict: dict):
    """(EDMPrecond, variables) of a released network; contiguous NumPy arrays of unchanged dtype.

    Args:
        config: constructor arguments as the released file records them. state_dict: {released name: array}.
    """
    module, expected, filt = layout(config)
    check(state_dict, expected)
    flat = {}
    for name in expected:
        v = np.asarray(state_dict[name])
        if not name.endswith(".resample_filter"):
            flat[_path(name)] = np.ascontiguousarray(v.transpose(_FROM_TORCH[v.ndim]))
        elif not np.allclose(v, filt, rtol=1e-6, atol=0):
            rows = f"first row {v[0, 0, 0].tolist()}; expected {filt[0, 0, 0].tolist()}"
            raise ValueError(f"{name}: {rows} from resample_filter of the configuration")
    return module, flax.traverse_util.unflatten_dict(flat)


def to_torch(config: dict, variables: dict) -> dict:
    """{released name: contiguous NumPy array} in the order of the file; the inverse of `from_torch`."""
    _, expected, filt = layout(config)
    ours = {_path(name): name for name in expected}
    seen = {name: filt.copy() for name in expected if name.endswith(".resample_filter")}
    for path, v in flax.traverse_util.flatten_dict(dict(variables)).items():
        v = np.asarray(v)
        axes = _TO_TORCH.get(v.ndim, range(v.ndim))
        seen[ours.get(path, "/".join(path))] = np.ascontiguousarray(v.transpose(axes))
    check(seen, expected)
    return {name: seen[name] for name in expected}
