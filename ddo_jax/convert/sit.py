"""State dicts of SiT (specs/sit.md section 2) <-> variables of `ddo_jax.models.sit`.

    released name                                     ours
    <a>.<i>.<b>.weight  linear, [out,in]              params / <a>_<i> / <b> / weight     [in,out]
    x_embedder.proj.weight  [W,C,p,p]                 params / ... / weight               [p·p·C, W]
    y_embedder.embedding_table.weight  [K + 1, W]     params / ... / weight               unchanged
    biases                                            params / ...                        unchanged
    pos_embed                                         buffers / pos_embed                 unchanged

Names and shapes are those of the module that the config builds; coverage is exact in both directions. Arrays keep
their dtype.
"""

import functools
import json
import math
import re

import flax.traverse_util
import jax
import numpy as np

from ddo_jax.convert.coverage import check
from ddo_jax.convert.inert import UnsafeOrDamaged, show
from ddo_jax.models.sit import HEADS, from_config

# Order of a state dict: at every level of the names, what comes first here comes first there.
_ORDER = ("pos_embed", "x_embedder", "t_embedder", "y_embedder", "blocks", "final_layer")
_ORDER += ("attn", "mlp", "linear", "adaLN_modulation", "qkv", "proj", "fc1", "fc2", "embedding_table")
_ORDER += ("weight", "bias")
_PATCHES, _TABLE, _POSITIONS = "x_embedder.proj.weight", "y_embedder.embedding_table.weight", "pos_embed"
PROJECTORS = "projectors."  # of REPA's files
BESIDE = (PROJECTORS,)  # what belongs to training, not to the network
UNSEEN = ("num_heads", "convention")  # what no shape shows


def _order(name: str) -> list[int]:
    """Sort key: where `name` stands in the released state dict."""
    return [int(part) if part.isdigit() else _ORDER.index(part) for part in name.split(".")]


def _path(name: str) -> tuple:
    """Released name -> path in our variables."""
    if name == _POSITIONS:
        return ("buffers", name)
    return ("params", *re.sub(r"\.(\d+)(?=\.)", r"_\1", name).split("."))


def _name(path: tuple) -> str:
    """The inverse of `_path`."""
    return re.sub(r"_(\d+)(?=\.)", r".\1", ".".join(path[1:]))


def _shape(module, name: str, shape: tuple) -> tuple:
    """Of a leaf of ours, as released."""
    if name == _PATCHES:
        return (shape[1], module.in_channels, module.patch_size, module.patch_size)
    return shape[::-1] if len(shape) == 2 and name != _TABLE else shape


def _ours(name: str, v) -> np.ndarray:
    v = np.asarray(v)
    if name == _PATCHES:
        v = v.transpose(2, 3, 1, 0).reshape(-1, v.shape[0])
    elif v.ndim == 2 and name != _TABLE:
        v = v.T
    return np.ascontiguousarray(v)


def _theirs(module, name: str, v) -> np.ndarray:
    v = np.asarray(v)
    if name == _PATCHES and v.ndim == 2:
        p = module.patch_size
        v = v.reshape(p, p, module.in_channels, -1).transpose(3, 2, 0, 1)
    elif v.ndim == 2 and name != _TABLE:
        v = v.T
    return np.ascontiguousarray(v)


@functools.lru_cache(maxsize=32)
def _layout(config_json: str):
    module = from_config(json.loads(config_json))
    side = module.input_size
    x = jax.ShapeDtypeStruct((1, side, side, module.in_channels), np.float32)
    t, labels = jax.ShapeDtypeStruct((1,), np.float32), jax.ShapeDtypeStruct((1,), np.int32)
    abstract = jax.eval_shape(module.init, jax.random.key(0), x, t, labels)
    flat = flax.traverse_util.flatten_dict(dict(abstract))
    shapes = {_name(path): _shape(module, _name(path), leaf.shape) for path, leaf in flat.items()}
    return module, {name: tuple(shapes[name]) for name in sorted(shapes, key=_order)}


def layout(config: dict):
    """(module, {released name: released shape} in file order); allocates nothing.

    Raises:
        ValueError: as `ddo_jax.models.sit.from_config`.
    """
    module, shapes = _layout(json.dumps(config, sort_keys=True, default=lambda v: v.tolist()))  # NumPy numbers
    return module, dict(shapes)


def from_torch(config: dict, state_dict: dict):
    """(SiT, variables) of a released network; contiguous NumPy arrays of unchanged dtype.

    Args:
        config: constructor arguments, or what `infer_config` finds. state_dict: {released name: array}.

    Raises:
        ValueError: as `ddo_jax.convert.from_torch`.
    """
    module, expected = layout(config)
    check(state_dict, expected)
    flat = {_path(name): _ours(name, state_dict[name]) for name in expected}
    return module, flax.traverse_util.unflatten_dict(flat)


def to_torch(config: dict, variables: dict) -> dict:
    """{released name: contiguous NumPy array} in the order of the file; the inverse of `from_torch`."""
    module, expected = layout(config)
    ours = {_path(name): name for name in expected}
    seen = {}
    for path, v in flax.traverse_util.flatten_dict(dict(variables)).items():
        name = ours.get(path, "/".join(path))
        seen[name] = _theirs(module, name, v)
    check(seen, expected)
    return {name: seen[name] for name in expected}


def infer_config(state_dict: dict) -> dict:
    """The arguments of the SiT whose released names and shapes these are.

    Nothing shows num_heads: the released sizes' where the width is one of theirs, else width / 64, which is a GUESS.
    Nothing shows the convention either: files with REPA's projectors are taken for REPA's, others for SiT's.

    Raises:
        UnsafeOrDamaged: names that look like a SiT, but no network has these shapes; or a DiT, which has the same names
            and shapes but predicts noise and its variance: its last channels are in use, a SiT's are zero.
    """
    shapes = {name: np.shape(v) for name, v in state_dict.items()}
    try:
        depth = 0
        while f"blocks.{depth}.attn.qkv.weight" in shapes:
            depth += 1
        width, channels, patch, _ = shapes[_PATCHES]
        learn_sigma = shapes["final_layer.linear.weight"][0] == 2 * patch * patch * channels
        config = {
            "input_size": math.isqrt(shapes[_POSITIONS][1]) * patch,
            "patch_size": patch,
            "in_channels": channels,
            "hidden_size": width,
            "depth": depth,
            "num_heads": HEADS.get(width, max(width // 64, 1)),
            "mlp_ratio": shapes["blocks.0.mlp.fc1.weight"][0] / width,
            "num_classes": shapes[_TABLE][0] - 1,
            "learn_sigma": learn_sigma,
            "convention": "repa" if any(name.startswith(PROJECTORS) for name in shapes) else "sit",
        }
        from_config(config)
    except (KeyError, IndexError, ValueError, ZeroDivisionError) as e:
        raise UnsafeOrDamaged(f"names of a SiT, but no network has these shapes ({show(str(e))})") from None
    if learn_sigma and _in_use(state_dict, channels):
        raise UnsafeOrDamaged(
            "a DiT: names and shapes are a SiT's, but the output's last channels, which a SiT leaves at zero, are in "
            "use (variances): it predicts noise over 1000 steps and is no flow; allowed: files of SiT and REPA"
        )
    return config


def _in_use(state_dict: dict, channels: int) -> bool:
    """Whether the channels that a SiT throws away are other than 0."""
    weight, bias = (np.asarray(state_dict[f"final_layer.linear.{k}"]) for k in ("weight", "bias"))
    return any(np.any(v.reshape(-1, 2 * channels, *v.shape[1:])[:, channels:]) for v in (weight, bias))
