"""State dicts of diffusers' AutoencoderKL (specs/edm2.md section 13) <-> variables of `ddo_jax.models.sdvae`.

    released name                                   ours
    <a>.<i>.<b>.weight   4-d [out,in,k,k]           params / <a>_<i> / <b> / weight      [k,k,in,out]
    <a>.<i>.<b>.weight   2-d [out,in]               params / <a>_<i> / <b> / weight      [in,out]
    biases, norms        1-d                        params / ...                         unchanged

Names and shapes are those of the module that the config builds; coverage is exact in both directions. Old files
call the attention's layers query, key, value and proj_attn, some as [C,C,1,1]: `renamed` gives them today's names
and shapes. `from_torch` does so itself; `to_torch` writes today's names only.
"""

import functools
import json
import math
import re

import flax.traverse_util
import jax
import numpy as np

from ddo_jax.convert import names
from ddo_jax.convert.coverage import check
from ddo_jax.convert.inert import UnsafeOrDamaged, show
from ddo_jax.convert.read import read
from ddo_jax.errors import UserError
from ddo_jax.models.sdvae import from_config

# Order of a state dict: at every level of the names, what comes first here comes first there.
_ORDER = ("encoder", "decoder", "quant_conv", "post_quant_conv")
_ORDER += ("conv_in", "down_blocks", "up_blocks", "mid_block", "conv_norm_out", "conv_out")
_ORDER += ("attentions", "resnets", "downsamplers", "upsamplers", "conv")
_ORDER += ("norm1", "conv1", "norm2", "conv2", "conv_shortcut", "group_norm", "to_q", "to_k", "to_v", "to_out")
_ORDER += ("weight", "bias")

_OLD = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}

_TO_TORCH = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}  # HWIO -> OIHW, [in,out] -> [out,in]
_FROM_TORCH = {4: (2, 3, 1, 0), 2: (1, 0), 1: (0,)}


def _order(name: str) -> list[int]:
    """Sort key: where `name` stands in the released state dict."""
    return [int(part) if part.isdigit() else _ORDER.index(part) for part in name.split(".")]


def _path(name: str) -> tuple:
    """Released name -> path in our variables."""
    return ("params", *re.sub(r"\.(\d+)(?=\.)", r"_\1", name).split("."))


def _name(path: tuple) -> str:
    """The inverse of `_path`."""
    return re.sub(r"_(\d+)(?=\.)", r".\1", ".".join(path[1:]))


@functools.lru_cache(maxsize=32)
def _layout(config_json: str):
    module = from_config(json.loads(config_json))
    x = jax.ShapeDtypeStruct((1, module.downscale, module.downscale, module.in_channels), np.float32)
    abstract = jax.eval_shape(module.init, jax.random.key(0), x)
    shapes = {}
    for path, leaf in flax.traverse_util.flatten_dict({"params": abstract["params"]}).items():
        shapes[_name(path)] = tuple(leaf.shape[i] for i in _TO_TORCH[leaf.ndim])
    return module, {name: shapes[name] for name in sorted(shapes, key=_order)}


def layout(config: dict):
    """(module, {released name: released shape} in file order, with today's names); allocates nothing.

    Raises:
        ValueError: as `ddo_jax.models.sdvae.from_config`.
    """
    module, shapes = _layout(json.dumps(config, sort_keys=True, default=lambda v: v.tolist()))  # NumPy numbers
    return module, dict(shapes)


def renamed(state_dict: dict) -> dict:
    """The state dict with today's names and shapes of the attention's layers, in the order given; else unchanged.

    Raises:
        ValueError: a layer is there under both names.
    """
    state = {}
    for old, value in state_dict.items():
        name = re.sub(r"(\.attentions\.\d+\.)(query|key|value|proj_attn)\.", lambda m: m[1] + _OLD[m[2]] + ".", old)
        if name in state:
            raise ValueError(f"{name}: there under its old name too; expected one of the two")
        if re.search(r"\.attentions\.\d+\.to_(q|k|v|out\.0)\.weight$", name) and value.shape[2:] == (1, 1):
            value = value[:, :, 0, 0]
        state[name] = value
    return state


def from_torch(config: dict, state_dict: dict):
    """(AutoencoderKL, variables) of a released network; contiguous NumPy arrays of unchanged dtype.

    Args:
        config: diffusers' config.json, or what `infer_config` finds. state_dict: {released name: array}, with old
            names of the attention or today's.

    Raises:
        ValueError: as `ddo_jax.convert.from_torch`.
    """
    module, expected = layout(config)
    state = renamed({name: np.asarray(v) for name, v in state_dict.items()})
    check(state, expected)
    flat = {}
    for name, shape in expected.items():
        flat[_path(name)] = np.ascontiguousarray(state[name].transpose(_FROM_TORCH[len(shape)]))
    return module, flax.traverse_util.unflatten_dict(flat)


def to_torch(config: dict, variables: dict) -> dict:
    """{released name: contiguous NumPy array} in the order of the file; the inverse of `from_torch`.

    The names are today's: a file with old names comes back equal in content, but renamed.
    """
    _, expected = layout(config)
    ours = {_path(name): name for name in expected}
    seen = {}
    for path, v in flax.traverse_util.flatten_dict(dict(variables)).items():
        v = np.asarray(v)
        seen[ours.get(path, "/".join(path))] = np.ascontiguousarray(v.transpose(_TO_TORCH.get(v.ndim, range(v.ndim))))
    check(seen, expected)
    return {name: seen[name] for name in expected}


def infer_config(state_dict: dict) -> dict:
    """The arguments of AutoencoderKL whose released names and shapes these are.

    Everything can be seen but norm_num_groups, which is a GUESS: 32 (as in all public SD-VAEs) where it divides
    every width, else the largest power of two that does. A value that the file records must win over it.

    Raises:
        UnsafeOrDamaged: names that look like an AutoencoderKL, but no network has these shapes.
    """
    shapes = {name: np.shape(v) for name, v in state_dict.items()}
    try:
        widths = []
        while (name := f"encoder.down_blocks.{len(widths)}.resnets.0.conv1.weight") in shapes:
            widths.append(shapes[name][0])
        blocks = 0
        while f"encoder.down_blocks.0.resnets.{blocks}.conv1.weight" in shapes:
            blocks += 1
        common = math.gcd(*widths)
        if not common:
            raise ValueError("no level, or one without channels")
        return {
            "in_channels": shapes["encoder.conv_in.weight"][1],
            "out_channels": shapes["decoder.conv_out.weight"][0],
            "latent_channels": shapes["post_quant_conv.weight"][1],
            "block_out_channels": widths,
            "layers_per_block": blocks,
            "norm_num_groups": min(32, common & -common),  # the lowest bit that is set
        }
    except (KeyError, IndexError, ValueError) as e:
        raise UnsafeOrDamaged(f"names of an AutoencoderKL, but no network has these shapes ({show(str(e))})") from None


@functools.cache
def load(what: str):
    """(AutoencoderKL, variables as float32) of a file, known name or address; read once.

    Raises:
      UserError: not at hand, damaged, or another network.
    """
    try:
        released = read(names.resolve(what))
        if released.kind != "sdvae":
            raise UserError(f"{what}: holds {released.kind or 'an unknown network'}; allowed: an SD-VAE (kind sdvae)")
        module, variables = from_torch(released.config, released.state_dict)
    except UnsafeOrDamaged as e:
        raise UserError(str(e)) from None
    except ValueError as e:
        raise UserError(f"{what}: {e}") from None
    return module, jax.tree.map(lambda v: np.asarray(v, np.float32), variables)
