"""The safetensors format: a JSON header and raw little-endian arrays (https://github.com/huggingface/safetensors)."""

import json
import struct

import numpy as np

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
