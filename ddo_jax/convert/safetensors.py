"""The safetensors format: a JSON header and raw little-endian arrays (https://github.com/huggingface/safetensors)."""

import json
import math
import struct

import numpy as np

from ddo_jax.convert.inert import UnsafeOrDamaged, show

NAMES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
MAX_HEADER = 16 << 20  # bytes; the largest released file needs about 100 kB
_ENTRY = {"dtype", "shape", "data_offsets"}


def flatten(tree, prefix: str = "") -> dict:
    """Nested dict of arrays -> {"a.b.c": array}."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {k: v for key in tree for k, v in flatten(tree[key], f"{prefix}.{key}" if prefix else key).items()}


def dumps(arrays: dict[str, np.ndarray], metadata: dict[str, str] | None = None) -> bytes:
    """The bytes of a safetensors file.

    Args:
      arrays: {name: array}, kept in order. metadata: strings stored under "__metadata__".

    Raises:
      ValueError: a dtype the format does not have.
    """
    codes = {np.dtype(v): k for k, v in NAMES.items()}
    header, blobs, offset = {"__metadata__": metadata} if metadata else {}, [], 0
    for name, array in arrays.items():
        if array.dtype not in codes:
            raise ValueError(f"{name}: dtype {array.dtype}; allowed: {', '.join(map(str, codes))}")
        blob = np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<")).tobytes()
        header[name] = {
            "dtype": codes[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [offset, offset + len(blob)],
        }
        blobs.append(blob)
        offset += len(blob)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the arrays start aligned
    return struct.pack("<Q", len(text)) + text + b"".join(blobs)


def _size(name: str, entry) -> int:
    """Bytes of a header's entry, every field checked."""
    if type(entry) is not dict or set(entry) != _ENTRY:
        raise UnsafeOrDamaged(f"safetensors: {show(name)}: expected dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if dtype != "BF16" and (type(dtype) is not str or dtype not in NAMES):
        allowed = ", ".join([*NAMES, "BF16"])
        raise UnsafeOrDamaged(f"safetensors: {show(name)}: dtype {show(str(dtype)[:80])}; allowed: {allowed}")
    for numbers in (shape, offsets):
        if type(numbers) is not list or len(numbers) > 32 or any(type(n) is not int or n < 0 for n in numbers):
            raise UnsafeOrDamaged(f"safetensors: {show(name)}: shape and data_offsets must be lists of sizes")
    if len(offsets) != 2 or math.prod(n or 1 for n in shape) >= 2**40:
        raise UnsafeOrDamaged(f"safetensors: {show(name)}: impossible shape or data_offsets")
    return math.prod(shape) * (2 if dtype == "BF16" else np.dtype(NAMES[dtype]).itemsize)


def _unique(pairs):
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a name occurs twice")
    return dict(pairs)


def read_header(data) -> tuple[dict, dict, int]:
    """({name: entry} in the order of the header, metadata, where the arrays start), all checked.

    The arrays must cover the rest of the file exactly: no overlap, no gap, nothing outside.

    Raises:
      UnsafeOrDamaged: with the entry that is wrong.
    """
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > min(len(data) - 8, MAX_HEADER):
        raise UnsafeOrDamaged(f"safetensors: a header of {length} bytes in a file of {len(data)}")
    try:
        entries = json.loads(bytes(data[8 : 8 + length]).decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as e:
        raise UnsafeOrDamaged(f"safetensors: the header is not JSON ({show(str(e))})") from None
    if type(entries) is not dict:
        raise UnsafeOrDamaged("safetensors: the header is not a JSON object")
    metadata = entries.pop("__metadata__", {})
    if type(metadata) is not dict or any(type(v) is not str for v in metadata.values()):
        raise UnsafeOrDamaged("safetensors: __metadata__ must hold strings")
    sizes = {name: _size(name, entry) for name, entry in entries.items()}
    end = 0
    for name in sorted(entries, key=lambda k: entries[k]["data_offsets"]):
        start, stop = entries[name]["data_offsets"]
        if start != end or stop - start != sizes[name]:
            where = f"bytes {start}-{stop}; expected {end}-{end + sizes[name]} from its shape and the one before it"
            raise UnsafeOrDamaged(f"safetensors: {show(name)}: {where}")
        end = stop
    if end != len(data) - 8 - length:
        raise UnsafeOrDamaged(f"safetensors: arrays of {end} bytes, but {len(data) - 8 - length} in the file")
    return entries, metadata, 8 + length


def loads(data) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """(arrays, metadata) of the bytes of a file; bfloat16 is widened to float32. Inverse of `dumps`.

    Raises:
      UnsafeOrDamaged: a header whose sizes or offsets do not fit the file; a dtype that NumPy does not have.
    """
    entries, metadata, base = read_header(data)
    arrays = {}
    for name, entry in entries.items():
        start, stop = entry["data_offsets"]
        raw = np.frombuffer(data, np.uint8, stop - start, base + start) if stop > start else np.zeros(0, np.uint8)
        if entry["dtype"] == "BF16":
            value = (np.frombuffer(raw.tobytes(), "<u2").astype(np.uint32) << np.uint32(16)).view(np.float32)
        elif entry["dtype"] == "BOOL":
            value = raw != 0
        else:
            dtype = np.dtype(NAMES[entry["dtype"]])
            value = np.frombuffer(raw.tobytes(), dtype.newbyteorder("<")).astype(dtype)
        arrays[name] = value.reshape(entry["shape"])
    return arrays, metadata
