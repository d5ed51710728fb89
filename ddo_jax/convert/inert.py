"""What a pickle may hold and what its allowed globals do: our own inert values, nothing of the file.

`HANDLERS` is the allow-list (specs/edm.md 16.3, specs/edm2.md section 10,
specs/var.md section 6.1, specs/metrics.md section 7); `pickles` is the interpreter.
Everything is checked when it is built, so that a `Tensor` or `NumpyArray` that exists can be read.
"""

import dataclasses
import math
import re
from typing import Any

import numpy as np

MAX_OPS = 2_000_000  # the largest released file needs about 150,000
MAX_DIMS = 16


class UnsafeOrDamaged(ValueError):
    """A file that is not what it claims: one line with the place and the value seen."""


def show(text: str) -> str:
    """Somebody else's string, fit for one line of a message."""
    return ascii(text[:80])[1:-1]


class Budget:
    """Work and memory that one file may cost.

    Args:
      size: bytes of the file. Checksums, bfloat16 widened and a few tied weights fit into 5 × the file.
    """

    def __init__(self, size: int):
        self.ops, self.bytes = MAX_OPS, 5 * size + (16 << 20)

    def work(self, ops: int):
        self.ops -= ops
        if self.ops < 0:
            raise UnsafeOrDamaged(f"more than {MAX_OPS} pickle operations; no released checkpoint needs so many")

    def memory(self, size: int):
        self.bytes -= size
        if self.bytes < 0:
            raise UnsafeOrDamaged("the arrays need far more memory than the file has data")


# ----------------------------------------------------------------------------------------------------
# What a pickle can hold besides None, bool, int, float, str, bytes, tuple, list, dict and set


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class Global:
    """A name that the file refers to."""

    name: str
    inert: bool


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class Text:
    """A long string, undecoded."""

    view: memoryview


@dataclasses.dataclass(eq=False, slots=True)
class Stub:
    """An instance of a class that we do not have: its name, constructor arguments and attributes."""

    name: str
    args: tuple
    state: Any = None


@dataclasses.dataclass(eq=False, slots=True)
class Record:
    """A persistent object of NVIDIA's files (specs/edm.md section 16.2), without its source text."""

    class_name: str
    state: dict


@dataclasses.dataclass(eq=False, slots=True)
class Storage:
    """`count` elements of a torch dtype; `data` may arrive later (legacy files)."""

    dtype: str
    count: int
    data: memoryview | None = None
    order: str = "<"


# torch's dtype -> NumPy's code of the stored bytes
DTYPES = {
    **{"float64": "f8", "float32": "f4", "float16": "f2", "bfloat16": "u2", "int64": "i8", "int32": "i4"},
    **{"int16": "i2", "int8": "i1", "uint8": "u1", "bool": "u1"},
}


def itemsize(dtype: str) -> int:
    return int(DTYPES[dtype][1])


@dataclasses.dataclass(eq=False, slots=True)
class Tensor:
    """A strided view of a storage; offset and strides in elements, checked to lie inside."""

    storage: Storage
    offset: int
    shape: tuple
    strides: tuple
    budget: Budget
    _array: np.ndarray | None = None

    @property
    def dtype(self) -> str:
        return self.storage.dtype

    def array(self) -> np.ndarray:
        """A contiguous array of its own; bfloat16 is widened to float32 by shifting."""
        if self._array is None:
            self._array = self._copy()
        return self._array

    def _copy(self):
        size, wide = itemsize(self.dtype), self.dtype == "bfloat16"
        self.budget.memory(math.prod(self.shape) * (4 if wide else size))
        out = np.zeros(self.shape, np.uint32 if wide else DTYPES[self.dtype])
        if out.size:
            flat = np.frombuffer(self.storage.data, self.storage.order + DTYPES[self.dtype], self.storage.count)
            # the stride of an axis of length 1 is arbitrary and may not fit NumPy's integers
            strides = [size * s if n > 1 else 0 for n, s in zip(self.shape, self.strides, strict=True)]
            out[...] = np.lib.stride_tricks.as_strided(flat[self.offset :], self.shape, strides)
        if wide:
            out <<= np.uint32(16)
            return out.view(np.float32)
        return np.asarray(out != 0) if self.dtype == "bool" else out


@dataclasses.dataclass(eq=False, slots=True)
class Dtype:
    """numpy.dtype: a code such as "f8" and the byte order that BUILD sets."""

    code: str
    order: str | None = None

    def numpy(self) -> np.dtype:
        return np.dtype({"|": "", "=": "<"}.get(self.order or "=", self.order) + self.code)


@dataclasses.dataclass(eq=False, slots=True)
class NumpyArray:
    """numpy.ndarray, filled by BUILD."""

    value: np.ndarray | None = None

    def array(self) -> np.ndarray:
        if self.value is None:
            raise UnsafeOrDamaged("a NumPy array without content")
        return self.value


# ----------------------------------------------------------------------------------------------------
# What the allowed globals do: handler(machine, args) -> value


def arguments(args: tuple, *types) -> tuple:
    """`args`, at least of these types; None stands for any."""
    if len(args) < len(types) or any(t and type(a) not in t for a, t in zip(args, types, strict=False)):
        raise UnsafeOrDamaged(f"unexpected arguments ({', '.join(type(a).__name__ for a in args[:8])})")
    return args


def key(value):
    """`value` if it may be a dictionary key or a member of a set."""
    if type(value) is int and -(2**63) <= value < 2**63 or type(value) in (str, bytes, float, bool, type(None)):
        return value
    raise UnsafeOrDamaged(f"dictionary key of type {type(value).__name__}; allowed: short strings and numbers")


def _empty_dict(machine, args):
    if args:
        raise UnsafeOrDamaged("a dictionary with constructor arguments")
    return {}


def _set(machine, args):
    (items,) = arguments(args, (list, tuple, set))
    machine.budget.work(len(items))  # a memoised list could be copied again and again
    return {key(v) for v in items}


def _record(machine, args):
    (meta,) = arguments(args, (dict,))
    kind, name, state = meta.get("type"), meta.get("class_name"), meta.get("state")
    if kind != "class" or type(name) is not str or type(state) is not dict:
        raise UnsafeOrDamaged("a persistent object without type 'class', class_name and state")
    return Record(name, state)


def _parameter(machine, args):
    return arguments(args, (Tensor,))[0]


def _sizes(value) -> bool:
    return len(value) <= MAX_DIMS and all(type(n) is int and 0 <= n < 2**40 for n in value)


def _tensor(machine, args):
    storage, offset, shape, strides, *_ = arguments(args, (Storage,), (int,), (tuple,), (tuple,))
    if not (_sizes(shape) and _sizes(strides) and len(shape) == len(strides) and offset >= 0):
        raise UnsafeOrDamaged(f"tensor with impossible sizes: {len(shape)} axes, {len(strides)} strides")
    count = math.prod(shape)
    last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    if count and (count > storage.count or last >= storage.count) or math.prod(n or 1 for n in shape) >= 2**40:
        raise UnsafeOrDamaged(f"tensor of shape {list(shape)} is outside its storage of {storage.count} elements")
    return Tensor(storage, offset, shape, strides, machine.budget)


def _load_from_bytes(machine, args):
    (blob,) = arguments(args, (bytes, memoryview))
    if machine.load_bytes is None:
        raise UnsafeOrDamaged("a torch stream (torch.storage._load_from_bytes) where none belongs")
    return machine.load_bytes(memoryview(blob), machine.budget)


def _dtype(machine, args):
    (code, *_) = arguments(args, (str,))
    if not re.fullmatch(r"f[248]|[iu][1248]|b1", code):
        raise UnsafeOrDamaged(f"NumPy dtype {show(code)!r}; allowed: f2-f8, i1-i8, u1-u8, b1")
    return Dtype(code)


def from_raw(budget: Budget, dtype: Dtype, shape: tuple, raw, order="C") -> np.ndarray:
    """Array of a NumPy pickle; the number of bytes must be exactly right."""
    dt = dtype.numpy()
    if not _sizes(shape) or math.prod(shape) * dt.itemsize != len(raw) or math.prod(n or 1 for n in shape) >= 2**40:
        raise UnsafeOrDamaged(f"NumPy array of {len(raw)} bytes does not have {len(shape)} axes of its dtype {dt}")
    budget.memory(len(raw))
    value = np.frombuffer(raw, dt if dt.kind != "b" else np.uint8) if len(raw) else np.zeros(0, dt)
    value = value.astype(dt.newbyteorder("=")) if dt.kind != "b" else value != 0
    return value.reshape(shape, order=order)


def _scalar(machine, args):
    dtype, raw, *_ = arguments(args, (Dtype,), (bytes,))
    return from_raw(machine.budget, dtype, (), raw).item()


def _reconstruct(machine, args):
    array_type, shape, *_ = arguments(args, (Global,), (tuple,), (bytes, str))
    if array_type.name != "numpy.ndarray" or shape != (0,):
        raise UnsafeOrDamaged(f"NumPy array of type {array_type.name}")
    return NumpyArray()


def _encode(machine, args):
    """Protocol 2 writes bytes as latin-1 text."""
    text, codec = arguments(args, (str, Text), (str,))
    if codec not in ("latin1", "latin-1"):
        raise UnsafeOrDamaged(f"text encoded as {show(codec)!r}; allowed: latin1")
    machine.budget.memory(len(text.view if type(text) is Text else text))
    return (str(text.view, "utf-8") if type(text) is Text else text).encode("latin1")


def _refused(machine, args):
    raise UnsafeOrDamaged("a class that is only a name was called")


HANDLERS = {
    "collections.OrderedDict": _empty_dict,
    "dnnlib.util.EasyDict": _empty_dict,
    "builtins.set": _set,
    "__builtin__.set": _set,  # as protocol 2 spells it
    "torch_utils.persistence._reconstruct_persistent_obj": _record,
    "torch.Size": lambda machine, args: arguments(args, (tuple,))[0],
    "torch.device": lambda machine, args: Stub("torch.device", args),
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch.storage._load_from_bytes": _load_from_bytes,
    "numpy.core.multiarray.scalar": _scalar,
    "numpy._core.multiarray.scalar": _scalar,
    "numpy.core.multiarray._reconstruct": _reconstruct,
    "numpy._core.multiarray._reconstruct": _reconstruct,
    "numpy.dtype": _dtype,
    "numpy.ndarray": _refused,  # the first argument of _reconstruct, nothing else
    "_codecs.encode": _encode,
    "codecs.encode": _encode,
}
