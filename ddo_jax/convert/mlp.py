"""Our own networks of matrix products <-> their safetensors: parameters under our names, as `families.edm` writes them.

config = {"model_type": "mlp", "img_resolution", "img_channels", "label_dim", "sigma_data", "width", "blocks"}, with
"mixer" also {"patch", "tokens", "ratio"}.
"""

import functools
import json

import flax.traverse_util
import jax
import numpy as np

from ddo_jax.convert import safetensors
from ddo_jax.convert.coverage import check
from ddo_jax.models.edm import EDMPrecond
from ddo_jax.models.mixer import PatchMixer
from ddo_jax.models.mlp import ResidualMLP

_OUTER = ("img_resolution", "img_channels", "label_dim", "sigma_data")
_LEAST_WIDTH = 8
NETWORKS = {"mlp": ResidualMLP, "mixer": PatchMixer}


def from_config(config: dict) -> EDMPrecond:
    """The module for its arguments.

    Raises:
      TypeError, ValueError: unknown or impossible arguments.
    """
    arguments = {k: v for k, v in config.items() if k != "model_type"}
    if missing := [k for k in ("img_resolution", "img_channels") if k not in arguments]:
        raise ValueError(
            f"mlp: {missing[0]} is not recorded: files of versions before 2026-12 do not say what network they hold; "
            "take the workdir, or write the file again with the same command"
        )
    shared = {k: arguments.pop(k) for k in _OUTER if k in arguments}
    if arguments.get("width", _LEAST_WIDTH) < _LEAST_WIDTH:
        raise ValueError(f"width is {arguments['width']}: it must be at least {_LEAST_WIDTH}")
    patch = arguments.get("patch", 1)
    if shared["img_resolution"] % max(patch, 1) or patch < 1:
        raise ValueError(f"patch is {patch}: it must divide img_resolution = {shared['img_resolution']}")
    network = NETWORKS[config.get("model_type", "mlp")]
    return EDMPrecond(net=network(num_classes=shared.get("label_dim", 0), **arguments), **shared)


@functools.lru_cache(maxsize=16)
def _layout(config_json: str):
    module = from_config(json.loads(config_json))
    x = jax.ShapeDtypeStruct((1, module.img_resolution, module.img_resolution, module.img_channels), np.float32)
    sigma, label = jax.ShapeDtypeStruct((1,), np.float32), None
    if module.label_dim:
        label = jax.ShapeDtypeStruct((1, module.label_dim), np.float32)
    abstract = jax.eval_shape(module.init, jax.random.key(0), x, sigma, label)["params"]
    return module, {name: leaf.shape for name, leaf in safetensors.flatten(abstract).items()}


def layout(config: dict):
    """(module, {name: shape} in file order); allocates nothing."""
    return _layout(json.dumps(config, sort_keys=True, default=lambda v: v.tolist()))


def from_torch(config: dict, state_dict: dict):
    """(EDMPrecond, variables) of a state dict of ours; arrays of unchanged dtype."""
    module, expected = layout(config)
    check(state_dict, expected)
    flat = {tuple(name.split(".")): np.asarray(state_dict[name]) for name in expected}
    return module, {"params": flax.traverse_util.unflatten_dict(flat)}


def to_torch(config: dict, variables: dict) -> dict:
    """{name: array} in the order of the file; the inverse of `from_torch`."""
    _, expected = layout(config)
    seen = {name: np.asarray(v) for name, v in safetensors.flatten(dict(variables["params"])).items()}
    check(seen, expected)
    return {name: seen[name] for name in expected}
