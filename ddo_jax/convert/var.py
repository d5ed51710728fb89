"""State dicts of VAR (specs/var.md section 6) <-> variables of `ddo_jax.models.var`.

    released name                                   ours
    <a>.<i>.<b>.weight   linear, [out,in]           params / <a>_<i> / <b> / weight      [in,out]
    class_emb.weight, lvl_embed.weight [ids,C]      params / ... / weight                unchanged
    biases, positions, scale_mul_1H11, ada_gss      params / ...                         unchanged
    lvl_1L, attn_bias_for_masking, zero_k_bias      nothing: checked on reading, made again on writing

Names and shapes are those of the module that the config builds; coverage is exact in both directions. Arrays keep
their dtype; float buffers are written in that of the parameters.
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
from ddo_jax.models.var import from_config

# Order of a state dict: at every level of the names, what comes first here comes first there.
_ORDER = ("pos_start", "pos_1LC", "lvl_1L", "attn_bias_for_masking", "word_embed", "class_emb", "lvl_embed")
_ORDER += ("shared_ada_lin", "blocks", "head_nm", "head")
_ORDER += ("ada_gss", "attn", "ffn", "ada_lin")
_ORDER += ("scale_mul_1H11", "q_bias", "v_bias", "zero_k_bias", "mat_qkv", "proj", "fc1", "fc2")
_ORDER += ("weight", "bias")

_EMBEDDINGS = ("class_emb.weight", "lvl_embed.weight")


def _order(name: str) -> list[int]:
    """Sort key: where `name` stands in the released state dict."""
    return [int(part) if part.isdigit() else _ORDER.index(part) for part in name.split(".")]


def _path(name: str) -> tuple:
    """Released name -> path in our variables."""
    return ("params", *re.sub(r"\.(\d+)(?=\.)", r"_\1", name).split("."))


def _name(path: tuple) -> str:
    """The inverse of `_path`."""
    return re.sub(r"_(\d+)(?=\.)", r".\1", ".".join(path[1:]))


def _transposed(name: str, v) -> np.ndarray:
    """Contiguous copy in the other layout, which is the same operation both ways."""
    v = np.asarray(v)
    linear = v.ndim == 2 and name not in _EMBEDDINGS
    return np.ascontiguousarray(v.T if linear else v)


def _buffer_shapes(module) -> dict:
    length = module.length
    shapes = {"lvl_1L": (1, length), "attn_bias_for_masking": (1, 1, length, length)}
    return shapes | {f"blocks.{i}.attn.zero_k_bias": (module.embed_dim,) for i in range(module.depth)}


def _buffer(module, name: str, dtype) -> np.ndarray:
    """The values of a buffer; dtype: of those that are not integers."""
    levels = module.levels.astype(np.int64)
    if name == "lvl_1L":
        return levels[None]
    if name == "attn_bias_for_masking":
        return np.where(levels[:, None] >= levels[None, :], 0, -np.inf).astype(dtype)[None, None]
    return np.zeros(module.embed_dim, dtype)


@functools.lru_cache(maxsize=32)
def _layout(config_json: str):
    module = from_config(json.loads(config_json))
    labels = jax.ShapeDtypeStruct((1,), np.int32)
    var_input = jax.ShapeDtypeStruct((1, module.length - module.spans[0][1], module.z_channels), np.float32)
    abstract = jax.eval_shape(module.init, jax.random.key(0), labels, var_input)
    shapes = _buffer_shapes(module)
    for path, leaf in flax.traverse_util.flatten_dict({"params": abstract["params"]}).items():
        name = _name(path)
        linear = leaf.ndim == 2 and name not in _EMBEDDINGS
        shapes[name] = leaf.shape[::-1] if linear else leaf.shape
    return module, {name: tuple(shapes[name]) for name in sorted(shapes, key=_order)}


def layout(config: dict):
    """(module, {released name: released shape} in file order, buffers included); allocates nothing.

    Raises:
        ValueError: as `ddo_jax.models.var.from_config`.
    """
    module, shapes = _layout(json.dumps(config, sort_keys=True, default=lambda v: v.tolist()))  # NumPy numbers
    return module, dict(shapes)


def from_torch(config: dict, state_dict: dict):
    """(VAR, variables) of a released network; contiguous NumPy arrays of unchanged dtype.

    Args:
        config: constructor arguments, or what `infer_config` finds. state_dict: {released name: array}.

    Raises:
        ValueError: as `ddo_jax.convert.from_torch`; or a buffer is not what the sizes of the network make it.
    """
    module, expected = layout(config)
    check(state_dict, expected)
    buffers = _buffer_shapes(module)
    for name in buffers:
        if not np.array_equal(state_dict[name], _buffer(module, name, np.float32)):
            raise ValueError(f"{name}: other values than those of patch_nums {list(module.patch_nums)}")
    flat = {_path(name): _transposed(name, state_dict[name]) for name in expected if name not in buffers}
    return module, flax.traverse_util.unflatten_dict(flat)


def to_torch(config: dict, variables: dict) -> dict:
    """{released name: contiguous NumPy array} in the order of the file; the inverse of `from_torch`."""
    module, expected = layout(config)
    ours = {_path(name): name for name in expected}
    seen = {}
    for path, v in flax.traverse_util.flatten_dict(dict(variables)).items():
        name = ours.get(path, "/".join(path))
        seen[name] = _transposed(name, v)
    dtype = next((v.dtype for name, v in seen.items() if name == "pos_1LC"), np.dtype(np.float32))
    seen |= {name: _buffer(module, name, dtype) for name in _buffer_shapes(module)}
    check(seen, expected)
    return {name: seen[name] for name in expected}


def infer_config(state_dict: dict) -> dict:
    """The arguments of VAR whose released names, shapes and levels these are.

    Without attn_l2_norm nothing shows num_heads: then it is a GUESS, the released networks' C/64. Whatever only
    training needs (drop path, initial factors) cannot be seen and is left out.

    Raises:
        UnsafeOrDamaged: names that look like a VAR, but no network has these shapes.
    """
    shapes = {name: np.shape(v) for name, v in state_dict.items()}
    try:
        depth = 0
        while f"blocks.{depth}.attn.mat_qkv.weight" in shapes:
            depth += 1
        (hidden, width), l2 = shapes["blocks.0.ffn.fc1.weight"], "blocks.0.attn.scale_mul_1H11"
        config = {
            "num_classes": shapes["class_emb.weight"][0] - 1,
            "depth": depth,
            "embed_dim": width,
            "num_heads": shapes[l2][1] if l2 in shapes else max(width // 64, 1),
            "patch_nums": _sides(state_dict["lvl_1L"]),
            "vocab_size": shapes["head.weight"][0],
            "z_channels": shapes["word_embed.weight"][1],
            "mlp_ratio": hidden / width,
            "shared_aln": "shared_ada_lin.1.weight" in shapes,
            "attn_l2_norm": l2 in shapes,
        }
        from_config(config)
        return config
    except (KeyError, IndexError, ValueError, ZeroDivisionError) as e:
        raise UnsafeOrDamaged(f"names of a VAR, but no network has these shapes ({show(str(e))})") from None


def _sides(levels) -> list[int]:
    """Sides of the scales from the level of every token."""
    values, counts = np.unique(np.asarray(levels), return_counts=True)
    sides = [math.isqrt(n) for n in counts.tolist()]
    if values.tolist() != list(range(len(sides))) or [p * p for p in sides] != counts.tolist():
        raise ValueError("lvl_1L does not number the tokens of square maps")
    return sides
