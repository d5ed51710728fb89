"""A released file -> names, arrays and constructor arguments, without executing anything of it.

    read(path) -> Released(kind, config, state_dict, extras)

The format is recognised by content: NVIDIA's persistence pickle, torch zip, torch legacy stream, safetensors. Where a
file does not record its constructor arguments they follow from names and shapes (`infer`).
"""

import collections
import dataclasses
import importlib
import json
import math
import mmap
import os
import re

import numpy as np

from ddo_jax.convert import infer, safetensors, torch_files
from ddo_jax.convert.inert import NumpyArray, Record, Stub, Tensor, UnsafeOrDamaged, show
from ddo_jax.errors import UserError

MAX_ENTRIES, MAX_NAME = 20_000, 512  # of a state dict: parameters and modules; characters
# Our own metadata in safetensors; the last one is `extras["encoder"]`.
KIND_KEY, CONFIG_KEY, ENCODER_KEY = "ddo_jax_kind", "ddo_jax_config", "ddo_jax_released_encoder"
# ...-{kimg}-{EMA std}.pkl, specs/edm2.md section 9
SNAPSHOT = re.compile(r".*-([0-9]{1,12})-([0-9]{1,3}\.[0-9]{1,6})\.[a-z]+")


@dataclasses.dataclass(frozen=True)
class Released:
    """What a file holds.

    Attributes:
      kind: "edm", "mlp", "edm2", "sdvae", "sit", "var", "vqvae", "inception", "dinov2",
        "efficientnet", or None: none of these.
      config: the constructor arguments as recorded, with what they leave out but the shapes show.
      state_dict: {released name: NumPy array} in file order, with the dtypes of the file: EDM2's are float16, to be
        cast to float32 before any use (specs/edm2.md section 5). Only bfloat16 is widened, to float32.
      extras: format; dtypes {name: dtype in the file}; top_level (keys of the file's outermost dictionary);
        class_name (NVIDIA's pickles); metadata (safetensors); kimg and std, thousands of images and EMA length, where
        the file is named as EDM2's snapshots. Of edm2 also
        encoder (NVIDIA's pickles, and safetensors made of them): {class_name, vae_name, scale, bias} as far as
        recorded, scale and bias lists of floats; None means plain pixels;
        assumed (nothing recorded; of vqvae too): {argument: value} of what no shape shows;
        emas (training states): the EMA lengths in the file; state_dict is the first one's.
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
        released = _READERS[sniff(data)](data)
    except UnsafeOrDamaged as e:
        raise UnsafeOrDamaged(f"{path}: {e}") from None
    if named := SNAPSHOT.fullmatch(os.path.basename(path)):
        released.extras.update(kimg=int(named[1]), std=float(named[2]))
    return released


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
    kind = infer.kind_of(state)
    if kind in _CLASSES and recorded.get("class_name", _CLASSES[kind]) != _CLASSES[kind]:
        return Released(None, recorded, state, extras)
    config = recorded
    if kind == "inception":
        config = {"naming": next(naming for head, naming in infer.INCEPTION.items() if head in state)}
    elif kind == "dinov2":
        config = infer.infer_dinov2(state)
    elif kind in ("sdvae", "sit", "var", "vqvae") and not recorded:
        # imports flax, which reading other kinds does not need
        converter = importlib.import_module(f"ddo_jax.convert.{kind}")
        config = converter.infer_config(state)
        if unseen := getattr(converter, "UNSEEN", ()):
            extras["assumed"] = {key: config[key] for key in unseen}
        if beside := getattr(converter, "BESIDE", ()):  # of training, not of the network
            state = {name: v for name, v in state.items() if not name.startswith(beside)}
    elif kind == "edm":
        config = infer.edm_config(recorded, state)
    elif kind == "edm2":
        config = infer.edm2_config(recorded, state)
        if not recorded:
            extras["assumed"] = {"channels_per_head": config["channels_per_head"], **infer.UNSEEN_EDM2}
    return Released(kind, config, state, extras)


_CLASSES = {"edm": "EDMPrecond", "edm2": "Precond"}  # of NVIDIA's pickles


# ----------------------------------------------------------------------------------------------------
# Pickles and torch files


def flatten(module) -> dict:
    """{dotted name: Tensor} of a pickled module: parameters, buffers, then sub-modules (specs/edm.md section 16.5)."""
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
        if network.class_name == _CLASSES["edm2"]:
            extras["encoder"] = _encoder(top.get("encoder") if type(top) is dict else None)
    return _released(state, dtypes, config, extras)


def _encoder(value) -> dict | None:
    """What makes pixels of EDM2's x (specs/edm2.md section 12), as recorded; None: plain pixels."""
    if value is None:
        return None
    if type(value) is not Record:
        raise UnsafeOrDamaged(f"encoder: a {type(value).__name__}; expected a persistent object or None")
    found = {"class_name": show(value.class_name)}
    if "vae_name" in value.state:
        found["vae_name"] = _value("vae_name", value.state["vae_name"])
    return found | {key: _floats(key, value.state[key]) for key in ("scale", "bias") if key in value.state}


def _floats(name: str, value) -> list:
    array = value.array() if type(value) in (NumpyArray, Tensor) else np.zeros(())
    if array.ndim == 0 or array.size > 64 or array.dtype.kind != "f" or not np.isfinite(array).all():
        raise UnsafeOrDamaged(f"encoder: {name} is not a short list of floats")
    return array.astype(np.float64).ravel().tolist()


def _keys(top) -> list:
    return [show(str(k)) for k in top][:100] if type(top) is dict else []


def _recorded(network: Record) -> dict:
    """`_init_kwargs` of the preconditioner and, where it has one, of the network in it."""
    modules = network.state["_modules"]
    inner = modules.get("model") or modules.get("unet") if type(modules) is dict else None  # EDM's or EDM2's
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
    extras = {"format": "torch-legacy" if legacy else "torch-zip", "top_level": _keys(top)}
    if _is_module(top):
        tensors = flatten(top)
    elif stds := _ema_lengths(top):
        tensors, extras["emas"] = _tensors(top["ema"]["emas"][0]), stds
    else:
        tensors = _tensors(find_state_dict(top))
    return _released(*_arrays(tensors), {}, extras)


def _ema_lengths(top) -> list:
    """The stds of an EDM2 training state, one state dict each (specs/edm2.md section 8); empty for any other file.

    Its `net` has the weights of the last step, which nobody samples from: `_torch` takes the first EMA instead.
    """
    ema = top.get("ema") if type(top) is dict else None
    if type(ema) is not dict or "emas" not in ema:
        return []
    stds, emas = ema.get("stds"), ema["emas"]
    if type(stds) not in (list, tuple) or type(emas) not in (list, tuple) or not 1 <= len(stds) == len(emas) <= 64:
        raise UnsafeOrDamaged("ema: expected stds and emas, lists of equal length")
    if type(emas[0]) is not dict or any(type(std) is not float for std in stds):
        raise UnsafeOrDamaged("ema: expected a number in stds for every state dict in emas")
    return list(stds)


def find_state_dict(top) -> dict:
    """The dict of tensors in a (nested) checkpoint: that with `pos_1LC` (specs/var.md section 6.1), or the largest; of
    equals the average, "ema" (specs/sit.md section 2)."""
    if type(top) is dict and "ema" in top:
        top = {"ema": top["ema"], **top}
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
    recorded = _metadata(metadata, CONFIG_KEY) or {}
    dtypes = {k: "bfloat16" if v["dtype"] == "BF16" else str(state[k].dtype) for k, v in entries.items()}
    extras = {"format": "safetensors", "top_level": ["__metadata__"] * bool(metadata), "metadata": metadata}
    if ENCODER_KEY in metadata:
        extras["encoder"] = _metadata(metadata, ENCODER_KEY)
    return _released(state, dtypes, recorded, extras)


def _metadata(metadata: dict, name: str) -> dict | None:
    """The JSON object under `name`; None if there is none, or null."""
    try:
        found = json.loads(metadata.get(name, "null"))
    except (ValueError, RecursionError):
        raise UnsafeOrDamaged(f"metadata {name} is not JSON") from None
    if type(found) not in (dict, type(None)):
        raise UnsafeOrDamaged(f"metadata {name} is not a JSON object")
    return None if found is None else {_joined("", k): _value(k, v) for k, v in found.items()}


_READERS = {"nvidia-pickle": _nvidia, "torch-zip": _torch, "torch-legacy": _torch, "safetensors": _safetensors}


def same_bytes(a: dict, b: dict) -> bool:
    """Whether two state dicts hold the same names, dtypes, shapes and bytes."""
    return a.keys() == b.keys() and all(
        np.dtype(a[k].dtype) == b[k].dtype and a[k].shape == b[k].shape and a[k].tobytes() == b[k].tobytes() for k in a
    )


def count(state: dict) -> int:
    """Number of values in a state dict, buffers included."""
    return sum(math.prod(v.shape) for v in state.values())
