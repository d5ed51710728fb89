"""A released file -> names, arrays and constructor arguments, without executing anything of it.

    read(path) -> Released(kind, config, state_dict, extras)

The format is recognised by content: NVIDIA's persistence pickle, torch zip, torch legacy stream, safetensors. Where a
file does not record its constructor arguments they follow from names and shapes (specs/edm.md 16.2), which
determine everything except dropout.
"""

import collections
import dataclasses
import json
import math
import mmap
import os
import re

import numpy as np

from ddo_jax.convert import safetensors, torch_files
from ddo_jax.convert.inert import Record, Stub, Tensor, UnsafeOrDamaged, show
from ddo_jax.errors import UserError

MAX_ENTRIES, MAX_NAME = 20_000, 512  # of a state dict: parameters and modules; characters
KIND_KEY, CONFIG_KEY = "ddo_jax_kind", "ddo_jax_config"  # our own metadata in safetensors


@dataclasses.dataclass(frozen=True)
class Released:
    """What a file holds.

    Attributes:
      kind: "edm", "inception", "dinov2", or None if it is none of the kinds that can be converted so far.
      config: the constructor arguments as recorded, with what they leave out but the shapes show.
      state_dict: {released name: NumPy array} in file order; bfloat16 widened to float32.
      extras: format; dtypes {name: dtype in the file}; top_level (keys of the file's outermost dictionary);
        class_name (NVIDIA's pickles); metadata (safetensors).
    """

    kind: str | None
    config: dict
    state_dict: dict
    extras: dict


def read(path) -> Released:
    """Read a released checkpoint.

    Args:
      path: a local file; `ddo_jax.convert.names.resolve` turns names and URLs into one.

    Raises:
      UserError: no such file.
      UnsafeOrDamaged: not a checkpoint, damaged, or asking for code to be run; one line.
    """
    path = os.fspath(path)
    try:
        with open(path, "rb") as f:
            empty = os.fstat(f.fileno()).st_size == 0
            # A view of the file: arrays are copied out of it one by one, and only those that are wanted.
            data = b"" if empty else memoryview(mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ))
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror}); expected a .pkl, .pth or .safetensors file") from None
    try:
        return _READERS[sniff(data)](data)
    except UnsafeOrDamaged as e:
        raise UnsafeOrDamaged(f"{path}: {e}") from None


def sniff(data) -> str:
    """The format by its first bytes: safetensors | torch-zip | torch-legacy | nvidia-pickle."""
    head = bytes(data[:16])
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= len(data) - 8:
        return "safetensors"
    if head[:4] == b"PK\3\4":
        return "torch-zip"
    if head[:2] == b"\x80\2" and head[2:14] == b"\x8a\x0a" + torch_files.MAGIC.to_bytes(10, "little"):
        return "torch-legacy"
    if head[:1] == b"\x80" and head[1:2] in (b"\2", b"\3", b"\4", b"\5"):
        return "nvidia-pickle"
    formats = "a pickle, a torch file or safetensors"
    raise UnsafeOrDamaged(f"starts with {head.hex() or 'nothing'}, which is not {formats}")


def _released(state: dict, dtypes: dict, recorded: dict, extras: dict) -> Released:
    """Kind and configuration by names; class_name, if recorded, must agree."""
    extras = {**extras, "dtypes": dtypes}
    looks_edm = "model.map_layer0.weight" in state and any(_FIRST.fullmatch(name) for name in state)
    for head, naming in _INCEPTION.items():
        if head in state:
            return Released("inception", {"naming": naming}, state, extras)
    if "blocks.0.ls1.gamma" in state and "patch_embed.proj.weight" in state:
        return Released("dinov2", infer_dinov2(state), state, extras)
    if not looks_edm or recorded.get("class_name", "EDMPrecond") != "EDMPrecond":
        return Released(None, recorded, state, extras)
    return Released("edm", edm_config(recorded, state), state, extras)


# ----------------------------------------------------------------------------------------------------
# Pickles and torch files


def flatten(module) -> dict:
    """{dotted name: Tensor} of a pickled module: parameters, buffers, then sub-modules (edm.md 16.5)."""
    out, visits = {}, 0

    def walk(node, prefix):
        nonlocal visits
        visits += 1
        state = getattr(node, "state", None)
        if type(state) is not dict or visits > MAX_ENTRIES:
            raise UnsafeOrDamaged(f"module {show(prefix) or 'at the top'}: no attributes, or too many modules")
        hidden = state.get("_non_persistent_buffers_set", ())
        hidden = hidden if type(hidden) in (set, list, tuple) else ()
        for group, skip in (("_parameters", ()), ("_buffers", hidden)):
            for name, value in _named(state, group):
                if value is not None and name not in skip:
                    out[_joined(prefix, name)] = value
        for name, value in _named(state, "_modules"):
            if value is not None:
                walk(value, _joined(prefix, name) + ".")

    walk(module, "")
    return _tensors(out)


def _named(state: dict, group: str):
    members = state.get(group)
    if type(members) is not dict:
        raise UnsafeOrDamaged(f"a module without {group}")
    return members.items()


def _joined(prefix: str, name) -> str:
    if type(name) is not str or len(prefix) + len(name) > MAX_NAME or not name.isprintable():
        raise UnsafeOrDamaged(f"{show(prefix)}: a parameter or module with an impossible name")
    return prefix + name


def _tensors(state: dict) -> dict:
    if len(state) > MAX_ENTRIES:
        raise UnsafeOrDamaged(f"{len(state)} parameters; at most {MAX_ENTRIES} are read")
    for name, value in state.items():
        if type(value) is not Tensor:
            raise UnsafeOrDamaged(f"{show(_joined('', name))}: a {type(value).__name__}; expected a tensor")
    return state


def _arrays(tensors: dict) -> tuple[dict, dict]:
    """({name: array}, {name: dtype in the file})."""
    return {k: v.array() for k, v in tensors.items()}, {k: v.dtype for k, v in tensors.items()}


def _is_module(value) -> bool:
    return type(value) in (Record, Stub) and type(value.state) is dict and "_modules" in value.state


def _nvidia(data) -> Released:
    top = torch_files.load_pickle(data)
    network = top.get("ema") if type(top) is dict else top
    if not _is_module(network):
        seen = f"keys {', '.join(show(str(k)) for k in list(top)[:8])}" if type(top) is dict else type(top).__name__
        raise UnsafeOrDamaged(f"no network under the key 'ema'; found {seen}")
    state, dtypes = _arrays(flatten(network))
    extras = {"format": "nvidia-pickle", "top_level": _keys(top)}
    config = {}
    if type(network) is Record:
        config = {"class_name": network.class_name, **_recorded(network)}
        extras["class_name"] = network.class_name
    return _released(state, dtypes, config, extras)


def _keys(top) -> list:
    return [show(str(k)) for k in top][:100] if type(top) is dict else []


def _recorded(network: Record) -> dict:
    """`_init_kwargs` of the preconditioner and, where it has one, of the network in it."""
    modules = network.state["_modules"]
    inner = modules.get("model") if type(modules) is dict else None
    config = _kwargs(network)
    for k, v in (_kwargs(inner) if type(inner) is Record else {}).items():
        if k not in ("in_channels", "out_channels") and config.setdefault(k, v) != v:
            raise UnsafeOrDamaged(f"{k} is {config[k]!r} for the network and {v!r} inside it")
    return config


def _kwargs(record: Record) -> dict:
    args, kwargs = record.state.get("_init_args", ()), record.state.get("_init_kwargs", {})
    if args not in ((), []) or type(kwargs) is not dict:
        raise UnsafeOrDamaged(f"{show(record.class_name)}: constructor arguments without names")
    return {_joined("", k): _value(k, v) for k, v in kwargs.items()}


def _value(name: str, value):
    """A configuration value: a scalar or a flat list of scalars."""
    if type(value) in (list, tuple) and len(value) <= 64:
        return [_value(name, v) if type(v) not in (list, tuple) else _refuse(name, v) for v in value]
    return value if type(value) in (int, float, bool, str, type(None)) else _refuse(name, value)


def _refuse(name, value):
    raise UnsafeOrDamaged(f"constructor argument {show(str(name))}: a {type(value).__name__}")


def _torch(data) -> Released:
    legacy = sniff(data) == "torch-legacy"
    top = (torch_files.load_legacy if legacy else torch_files.load_zip)(data)
    tensors = flatten(top) if _is_module(top) else _tensors(find_state_dict(top))
    extras = {"format": "torch-legacy" if legacy else "torch-zip", "top_level": _keys(top)}
    return _released(*_arrays(tensors), {}, extras)


def find_state_dict(top) -> dict:
    """The dict of tensors in a (nested) checkpoint: the one with `pos_1LC` (var.md 6.1), else the largest."""
    found, todo, seen = [], collections.deque([top]), set()
    while todo:
        node = todo.popleft()
        if type(node) is not dict or id(node) in seen:
            continue
        seen.add(id(node))
        tensors = sum(type(v) is Tensor for v in node.values())
        if tensors and tensors == len(node):
            found.append(node)
        todo += node.values()
    if not found:
        raise UnsafeOrDamaged("no dictionary of tensors in this file")
    return max(found, key=lambda node: ("pos_1LC" in node, len(node)))


# ----------------------------------------------------------------------------------------------------
# safetensors


def _safetensors(data) -> Released:
    entries, metadata, _ = safetensors.read_header(data)
    for name in entries:
        _joined("", name)
    if len(entries) > MAX_ENTRIES:
        raise UnsafeOrDamaged(f"{len(entries)} parameters; at most {MAX_ENTRIES} are read")
    state, _ = safetensors.loads(data)
    recorded = {}
    if CONFIG_KEY in metadata:
        try:
            recorded = json.loads(metadata[CONFIG_KEY])
        except (ValueError, RecursionError):
            raise UnsafeOrDamaged(f"metadata {CONFIG_KEY} is not JSON") from None
        if type(recorded) is not dict:
            raise UnsafeOrDamaged(f"metadata {CONFIG_KEY} is not a JSON object")
        recorded = {_joined("", k): _value(k, v) for k, v in recorded.items()}
    dtypes = {k: "bfloat16" if v["dtype"] == "BF16" else str(state[k].dtype) for k, v in entries.items()}
    extras = {"format": "safetensors", "top_level": ["__metadata__"] * bool(metadata), "metadata": metadata}
    return _released(state, dtypes, recorded, extras)


_READERS = {"nvidia-pickle": _nvidia, "torch-zip": _torch, "torch-legacy": _torch, "safetensors": _safetensors}


# First convolution of FID-Inception in each of its namings (metrics.md section 4)
_INCEPTION = {
    "Conv2d_1a_3x3.conv.weight": "torch",
    "conv/conv2d_params": "tf",
    "layers.conv.weight": "nvidia",
    "layers.conv.conv.weight": "mixed",
}


def infer_dinov2(state: dict) -> dict:
    """Arguments of DINOv2 from the shapes; heads are 64 wide in all released sizes.

    Raises:
      UnsafeOrDamaged: an array that tells a size is missing.
    """
    try:
        width, patch = state["cls_token"].shape[-1], state["patch_embed.proj.weight"].shape[-1]
        side = round((state["pos_embed"].shape[1] - 1) ** 0.5) * patch
    except (KeyError, IndexError) as e:
        raise UnsafeOrDamaged(f"DINOv2: {e.args[0]}: missing, or not of its shape") from None
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    return {"embed_dim": width, "depth": depth, "num_heads": width // 64, "patch_size": patch, "img_size": side}


# ----------------------------------------------------------------------------------------------------
# EDM: constructor arguments from names and shapes

_FIRST = re.compile(r"model\.enc\.(\d+)x(\d+)_conv\.weight")
_DEFAULTS = {  # edm.md section 6; what a file leaves out has these values
    "class_name": "EDMPrecond",
    "model_type": "DhariwalUNet",
    "label_dim": 0,
    "augment_dim": 0,
    "channel_mult_emb": 4,
}
_DEFAULTS_SONG = _DEFAULTS | {
    "model_channels": 128,
    "channel_mult": [1, 2, 2, 2],
    "embedding_type": "positional",
    "channel_mult_noise": 1,
    "encoder_type": "standard",
    "decoder_type": "standard",
    "resample_filter": [1, 1],
}
_DEFAULTS_ADM = _DEFAULTS | {"model_channels": 192, "channel_mult": [1, 2, 3, 4]}
_TAPS = {2: [1, 1], 4: [1, 3, 3, 1]}


def infer_edm(state: dict) -> dict:
    """Constructor arguments of the network whose released names and shapes these are.

    What one resolution cannot show (the filter, the wiring of one level) and dropout are left out.

    Raises:
      UnsafeOrDamaged: names that look like EDM, but do not make a network.
    """
    try:
        return _infer_edm({k: np.shape(v) for k, v in state.items()})
    except (KeyError, IndexError, ValueError, ZeroDivisionError, StopIteration) as e:
        what = show(str(e))
        raise UnsafeOrDamaged(f"names of an EDM network, but no network has these shapes ({what})") from None


def _infer_edm(shapes: dict) -> dict:
    adm = "model.out_norm.weight" in shapes
    first = next(m for m in map(_FIRST.fullmatch, shapes) if m)
    resolution, (width, channels, _, _) = int(first[1]), shapes[first[0]]
    emb, noise = shapes["model.map_layer0.weight"]
    base = noise if adm else width
    blocks = [re.fullmatch(r"model\.enc\.(\d+)x\1_block(\d+)\.conv0\.weight", name) for name in shapes]
    blocks = [m for m in blocks if m]
    levels = sorted({int(m[1]) for m in blocks}, reverse=True)
    if (
        base == 0
        or levels != [resolution >> i for i in range(len(levels))]
        or not 1 <= levels[-1] <= resolution <= 4096
    ):
        raise ValueError("resolutions do not halve from level to level")
    indices = {int(m[2]) for m in blocks}
    if indices != set(range(len(indices))):  # also keeps num_blocks, and with it later work, below the file's size
        raise ValueError("blocks are not numbered 0, 1, 2 ...")
    at = "model.enc.{0}x{0}_block0.conv0.weight"
    config = {
        "class_name": "EDMPrecond",
        "model_type": "DhariwalUNet" if adm else "SongUNet",
        "img_resolution": resolution,
        "img_channels": channels,
        "label_dim": shapes.get("model.map_label.weight", (0, 0))[1],
        "augment_dim": shapes.get("model.map_augment.weight", (0, 0))[1],
        "model_channels": base,
        "channel_mult": [_ratio(shapes[at.format(r)][0], base) for r in levels],
        "channel_mult_emb": _ratio(emb, base),
        "num_blocks": len(indices),
        "attn_resolutions": [r for r in levels if f"model.enc.{r}x{r}_block0.qkv.weight" in shapes],
    }
    return config if adm else config | _infer_song(shapes, levels, _ratio(noise, base))


def _ratio(a: int, b: int) -> int:
    if a < 1 or a % b:
        raise ValueError(f"{a} channels are no multiple of {b}")
    return a // b


def _infer_song(shapes: dict, levels: list, channel_mult_noise: int) -> dict:
    config = {
        "embedding_type": "fourier" if "model.map_noise.freqs" in shapes else "positional",
        "channel_mult_noise": channel_mult_noise,
    }
    if len(levels) > 1:  # one level has neither resampling nor auxiliary branches
        r, low = levels[0], levels[-1]
        aux = {name for name in ("residual", "skip") if f"model.enc.{low}x{low}_aux_{name}.weight" in shapes}
        config["encoder_type"] = min(aux, default="standard")
        config["decoder_type"] = "skip" if f"model.dec.{r}x{r}_aux_up.resample_filter" in shapes else "standard"
        config["resample_filter"] = _TAPS[shapes[f"model.dec.{r}x{r}_up.conv0.resample_filter"][-1]]
    return config


def edm_config(recorded: dict, state: dict) -> dict:
    """`recorded` completed from the shapes, with which it must agree; all of it inferred if nothing is recorded.

    Raises:
      UnsafeOrDamaged: a recorded argument contradicts the parameters.
    """
    inferred = infer_edm(state)
    if not recorded:
        return inferred
    for key in ("dropout", "label_dropout", "sigma_data", "sigma_min", "sigma_max"):
        if type(recorded.get(key, 0)) not in (int, float) or math.isnan(recorded.get(key, 0)):
            raise UnsafeOrDamaged(f"{key} is recorded as {recorded[key]!r}; expected a number")
    config = dict(recorded)
    adm = inferred["model_type"] == "DhariwalUNet"
    defaults = _DEFAULTS_ADM if adm else _DEFAULTS_SONG
    for key, seen in inferred.items():
        if key == "attn_resolutions" and key in recorded:
            _check_attention(recorded[key], inferred)
        elif key in recorded and recorded[key] != seen:
            raise UnsafeOrDamaged(f"{key} is recorded as {recorded[key]!r}, but the parameters have {seen!r}")
        elif key not in recorded and defaults.get(key) != seen:
            config[key] = seen  # also num_blocks and attn_resolutions, which released files never record
    return config


def _check_attention(recorded, inferred: dict):
    """Listed resolutions that do not occur, or have too few channels for a head of ADM, are harmless."""
    adm, base, seen = inferred["model_type"] == "DhariwalUNet", inferred["model_channels"], inferred["attn_resolutions"]
    sizes = [inferred["img_resolution"] >> i for i in range(len(inferred["channel_mult"]))]
    widths = dict(zip(sizes, inferred["channel_mult"], strict=True))
    if type(recorded) is not list:
        raise UnsafeOrDamaged("attn_resolutions is recorded as something else than a list")
    expected = [r for r in sizes if r in recorded and (not adm or base * widths[r] >= 64)]
    if expected != seen:
        raise UnsafeOrDamaged(f"attn_resolutions is recorded as {recorded}, but the parameters have {seen}")


def same_bytes(a: dict, b: dict) -> bool:
    """Whether two state dicts hold the same names, dtypes, shapes and bytes."""
    return a.keys() == b.keys() and all(
        np.dtype(a[k].dtype) == b[k].dtype and a[k].shape == b[k].shape and a[k].tobytes() == b[k].tobytes() for k in a
    )


def count(state: dict) -> int:
    """Number of values in a state dict, buffers included."""
    return sum(math.prod(v.shape) for v in state.values())
