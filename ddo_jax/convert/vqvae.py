"""State dicts of VAR's tokenizer (specs/var.md sections 2, 3, 6) <-> variables of `ddo_jax.models.vqvae`.

    released name                                        ours
    quantize.ema_vocab_hit_SV   [S,V]                    buffers / quantize / ema_vocab_hit_SV   unchanged
    quantize.embedding.weight   [V,z]                    params / quantize / embedding / weight  unchanged
    quantize.quant_resi.qresi_ls.<k>.weight, .bias       params / quantize / phi_<k> / ...       several shared phis
    quantize.quant_resi.qresi.weight, .bias              params / quantize / phi_0 / ...         one for all scales
    quantize.quant_resi.<s>.weight, .bias                params / quantize / phi_<s> / ...       one a scale
    <a>.<i>.<b>.weight   4-d [out,in,k,k]                params / <a>_<i> / <b> / weight         [k,k,in,out]
    biases, norms        1-d                             params / ...                            unchanged

Names and shapes are those of the module that the config builds; coverage is exact in both directions. The one
freedom is S of ema_vocab_hit_SV: a file used with other scales than its own keeps its counts, which nobody reads.
"""

import functools
import json
import re

import flax.traverse_util
import jax
import numpy as np

from ddo_jax.convert import names
from ddo_jax.convert.coverage import check
from ddo_jax.convert.inert import UnsafeOrDamaged, show
from ddo_jax.convert.read import read
from ddo_jax.errors import UserError
from ddo_jax.models.vqvae import VQVAE, from_config

# Order of a state dict: at every level of the names, what comes first here comes first there.
_ORDER = ("encoder", "decoder", "quantize", "quant_conv", "post_quant_conv")
_ORDER += ("conv_in", "down", "mid", "up", "norm_out", "conv_out", "ema_vocab_hit_SV", "quant_resi", "embedding")
_ORDER += ("block", "attn", "block_1", "attn_1", "block_2", "downsample", "upsample", "conv", "qresi_ls", "qresi")
_ORDER += ("norm1", "conv1", "norm2", "conv2", "nin_shortcut", "norm", "qkv", "proj_out", "weight", "bias")

_HITS = "quantize.ema_vocab_hit_SV"
_PHI = {0: r"quantize.quant_resi.\1.", 1: "quantize.quant_resi.qresi."}  # by share_quant_resi
_PHIS = r"quantize.quant_resi.qresi_ls.\1."

UNSEEN = ("quant_resi", "using_znorm", "beta", "patch_nums", "norm_groups")  # guesses of `infer_config`

_TO_TORCH = {4: (3, 2, 0, 1)}  # HWIO -> OIHW
_FROM_TORCH = {4: (2, 3, 1, 0)}


def _order(name: str) -> list[int]:
    """Sort key: where `name` stands in the released state dict."""
    return [int(part) if part.isdigit() else _ORDER.index(part) for part in name.split(".")]


def _name(path: tuple, shared: int) -> str:
    """Released name of a path in our variables."""
    name = re.sub(r"(?<!mid\.block)(?<!mid\.attn)_(\d+)(?=\.)", r".\1", ".".join(path[1:]))
    return re.sub(r"^quantize\.phi\.(\d+)\.", _PHI.get(shared, _PHIS), name)


def _transposed(v, table: dict) -> np.ndarray:
    """Contiguous array in the other layout."""
    v = np.asarray(v)
    return np.ascontiguousarray(v.transpose(table.get(v.ndim, range(v.ndim))))


@functools.lru_cache(maxsize=32)
def _layout(config_json: str):
    module = from_config(json.loads(config_json))
    x = jax.ShapeDtypeStruct((1, module.image_size, module.image_size, module.in_channels), np.float32)
    abstract = jax.eval_shape(module.init, jax.random.key(0), x)
    paths, shapes = {}, {}
    for path, leaf in flax.traverse_util.flatten_dict(abstract).items():
        name = _name(path, module.share_quant_resi)
        paths[name], shapes[name] = path, tuple(leaf.shape[i] for i in _TO_TORCH.get(leaf.ndim, range(leaf.ndim)))
    return module, {name: shapes[name] for name in sorted(shapes, key=_order)}, paths


def _expected(config: dict, seen: dict | None = None):
    """(module, {released name: shape}, {released name: path}); counts of usage as they are in `seen`."""
    module, shapes, paths = _layout(json.dumps(config, sort_keys=True, default=lambda v: v.tolist()))  # NumPy numbers
    hits = np.shape((seen or {}).get(_HITS))
    if len(hits) == 2 and hits[1] == module.vocab_size:
        shapes = shapes | {_HITS: hits}
    return module, dict(shapes), paths


def layout(config: dict):
    """(module, {released name: released shape} in file order); allocates nothing.

    Raises:
        ValueError: as `ddo_jax.models.vqvae.from_config`.
    """
    return _expected(config)[:2]


def from_torch(config: dict, state_dict: dict):
    """(VQVAE, variables) of a released tokenizer; contiguous NumPy arrays of unchanged dtype.

    Args:
        config: the arguments of `VQVAE`, or what `infer_config` finds. state_dict: {released name: array}.

    Raises:
        ValueError: as `ddo_jax.convert.from_torch`.
    """
    module, shapes, paths = _expected(config, state_dict)
    check(state_dict, shapes)
    flat = {paths[name]: _transposed(state_dict[name], _FROM_TORCH) for name in shapes}
    return module, flax.traverse_util.unflatten_dict(flat)


def to_torch(config: dict, variables: dict) -> dict:
    """{released name: contiguous NumPy array} in the order of the file; the inverse of `from_torch`."""
    flat = flax.traverse_util.flatten_dict(dict(variables))
    names = {path: name for name, path in _expected(config)[2].items()}
    seen = {names.get(path, "/".join(path)): _transposed(v, _TO_TORCH) for path, v in flat.items()}
    _, shapes, _ = _expected(config, seen)
    check(seen, shapes)
    return {name: seen[name] for name in shapes}


def infer_config(state_dict: dict) -> dict:
    """The arguments of VQVAE whose released names and shapes these are; those in `UNSEEN` are guesses.

    quant_resi, using_znorm and beta, which do not show at all, are those of the released tokenizer. norm_groups is 32
    where that divides every width, else the largest power of two that does. patch_nums are the released ones at 256x256
    if there are 10 scales (files of the 512x512 model have 10 too: give its scales yourself), else None, which
    `from_config` refuses. Values that the file records must win over all of these.

    Raises:
        UnsafeOrDamaged: names that look like VAR's tokenizer, but no network has these shapes.
    """
    shapes = {name: np.shape(v) for name, v in state_dict.items()}
    try:
        return _infer(shapes)
    except (KeyError, IndexError, ValueError) as e:
        what = show(str(e))
        raise UnsafeOrDamaged(f"names of VAR's tokenizer, but no network has these shapes ({what})") from None


def _infer(shapes: dict) -> dict:
    ch, in_channels, _, _ = shapes["encoder.conv_in.weight"]
    widths = [shape[0] for shape in _numbered(shapes, "encoder.down.{}.block.0.conv1.weight")]
    common = np.gcd.reduce([ch, *widths]).item()
    if not widths or not ch or any(width % ch or not width for width in widths):
        raise ValueError(f"widths {widths} of the levels are no multiples of {ch}")
    scales, (codes, width) = shapes[_HITS][0], shapes["quantize.embedding.weight"]
    shared = len(_numbered(shapes, "quantize.quant_resi.qresi_ls.{}.weight"))
    return {
        "vocab_size": codes,
        "z_channels": width,
        "ch": ch,
        "ch_mult": [width // ch for width in widths],
        "num_res_blocks": len(_numbered(shapes, "encoder.down.0.block.{}.conv1.weight")),
        "quant_conv_ks": shapes["quant_conv.weight"][-1],
        "share_quant_resi": shared or int("quantize.quant_resi.qresi.weight" in shapes),
        "patch_nums": list(VQVAE.patch_nums) if scales == len(VQVAE.patch_nums) else None,
        "in_channels": in_channels,
        "norm_groups": min(32, common & -common),  # the lowest bit that is set
        **{key: getattr(VQVAE, key) for key in ("quant_resi", "using_znorm", "beta")},
    }


def _numbered(shapes: dict, name: str) -> list:
    """Shapes of name.format(0), name.format(1) ... as far as they are there."""
    found = []
    while name.format(len(found)) in shapes:
        found.append(shapes[name.format(len(found))])
    return found


@functools.cache
def load(what: str, patch_nums: tuple[int, ...]):
    """(VQVAE, variables as float32) of a file, known name or address, used with these scales; read once.

    Args:
      what: the tokenizer. patch_nums: of the transformer; the file of the 256 x 256 networks serves 512 x 512, too.

    Raises:
      UserError: not at hand, damaged, or another network.
    """
    try:
        released = read(names.resolve(what))
        if released.kind != "vqvae":
            raise UserError(f"{what}: holds {released.kind or 'an unknown network'}; allowed: a VQ-VAE (kind vqvae)")
        recorded = None if "patch_nums" in released.extras.get("assumed", ()) else released.config.get("patch_nums")
        if recorded and list(recorded) != list(patch_nums):
            raise UserError(f"{what}: made for patch_nums {list(recorded)}; allowed: those, not {list(patch_nums)}")
        module, variables = from_torch(released.config | {"patch_nums": list(patch_nums)}, released.state_dict)
    except UnsafeOrDamaged as e:
        raise UserError(str(e)) from None
    except ValueError as e:
        raise UserError(f"{what}: {e}") from None
    return module, jax.tree.map(lambda v: np.asarray(v, np.float32), variables)
