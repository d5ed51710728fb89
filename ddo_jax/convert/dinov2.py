"""DINOv2 state dicts (specs/metrics.md section 6) <-> variables of `ddo_jax.models.dinov2`.

    released name                                    ours
    patch_embed.proj.weight          [O,3,p,p]       params / patch_embed / weight        [p,p,3,O]
    blocks.<i>.<a>.<b>.weight        [out,in]        params / blocks_<i> / <a> / <b> / weight  [in,out]
    cls_token, pos_embed, mask_token, norms, biases  params / the same path, unchanged

Names and shapes are those of the module that the config builds; coverage is exact in both directions.
"""

import functools
import json
import re

import flax.traverse_util
import jax
import numpy as np

from ddo_jax.convert.coverage import check
from ddo_jax.models.dinov2 import DINOv2

# Order of a state dict
_TOP = ("cls_token", "pos_embed", "mask_token", "patch_embed", "blocks", "norm")
_LAYER = ("norm1", "attn", "ls1", "norm2", "mlp", "ls2")
_PART = ("qkv", "proj", "fc1", "fc2", "weight", "bias", "gamma")


def _order(name: str) -> tuple:
    """Sort key: where `name` stands in the released state dict."""
    head, *rest = name.split(".")
    key = [_TOP.index(head)]
    if head == "blocks":
        key += [int(rest[0]), _LAYER.index(rest[1])]
        rest = rest[2:]
    return (*key, *(_PART.index(part) for part in rest))


def _path(name: str) -> tuple:
    """Released name -> path in our variables."""
    name = re.sub(r"^blocks\.", "blocks_", name).replace("patch_embed.proj.", "patch_embed.")
    return ("params", *name.split("."))


def _name(path: tuple) -> str:
    """The inverse of `_path`."""
    name = re.sub(r"^blocks_", "blocks.", ".".join(path[1:]))
    return name.replace("patch_embed.", "patch_embed.proj.")


def _axes(name: str, ndim: int) -> tuple[int, ...]:
    """Transposition from our layout to the file's: HWIO -> OIHW, [in,out] -> [out,in]."""
    return {4: (3, 2, 0, 1), 2: (1, 0)}.get(ndim, range(ndim)) if name.endswith(".weight") else range(ndim)


@functools.lru_cache(maxsize=16)
def _layout(config_json: str):
    module = DINOv2(**json.loads(config_json))
    x = jax.ShapeDtypeStruct((1, 2 * module.patch_size, 2 * module.patch_size, 3), np.float32)
    abstract = jax.eval_shape(module.init, jax.random.key(0), x)
    shapes = {}
    for path, leaf in flax.traverse_util.flatten_dict({"params": abstract["params"]}).items():
        name = _name(path)
        shapes[name] = tuple(leaf.shape[i] for i in _axes(name, leaf.ndim))
    return module, {name: shapes[name] for name in sorted(shapes, key=_order)}


def layout(config: dict):
    """(module, {released name: released shape} in file order); allocates nothing.

    Raises:
      ValueError: an argument that DINOv2 has not, or that is missing.
    """
    try:
        return _layout(json.dumps(config, sort_keys=True, default=lambda v: v.tolist()))  # tolist: NumPy numbers
    except TypeError as e:
        raise ValueError(f"config of DINOv2: {e}") from None


def from_torch(config: dict, state_dict: dict):
    """(DINOv2, variables) of a released network; contiguous NumPy arrays of unchanged dtype.

    Args:
      config: arguments of `DINOv2`, as in `ddo_jax.models.dinov2.RELEASED`. state_dict: {released name: array}.

    Raises:
      ValueError: as `ddo_jax.convert.from_torch`.
    """
    module, expected = layout(config)
    state = {name: np.asarray(v) for name, v in state_dict.items()}
    check(state, expected)
    flat = {
        _path(name): np.ascontiguousarray(state[name].transpose(np.argsort(_axes(name, len(shape)))))
        for name, shape in expected.items()
    }
    return module, flax.traverse_util.unflatten_dict(flat)


def to_torch(config: dict, variables: dict) -> dict:
    """{released name: contiguous NumPy array} in the order of the file; the inverse of `from_torch`."""
    _, expected = layout(config)
    seen = {}
    for path, v in flax.traverse_util.flatten_dict(dict(variables)).items():
        name, v = _name(path), np.asarray(v)
        if _path(name) != path:
            name = "/".join(path)  # not one of ours: to be named below as it is
        seen[name] = np.ascontiguousarray(v.transpose(_axes(name, v.ndim)))
    check(seen, expected)
    return {name: seen[name] for name in expected}
