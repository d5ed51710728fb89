"""safetensors: exact round trips; a header that lies is refused before anything is allocated."""

import json
import struct

import numpy as np
import pytest

from ddo_jax.convert.inert import UnsafeOrDamaged
from ddo_jax.convert.safetensors import NAMES, dumps, loads


def test_round_trip_of_every_dtype():
    rng = np.random.default_rng(0)
    arrays = {k: (100 * rng.standard_normal((2, 3))).astype(dtype) for k, dtype in NAMES.items()}
    arrays |= {"scalar": np.array(2.5), "empty": np.zeros((0, 4), np.float32), "ü.β": np.ones(1, np.int8)}
    arrays["transposed"] = np.arange(6.0).reshape(2, 3).T
    back, metadata = loads(dumps(arrays, {"a": "b"}))
    assert metadata == {"a": "b"} and list(back) == list(arrays)
    for name, expected in arrays.items():
        assert back[name].dtype == expected.dtype and back[name].shape == expected.shape, name
        assert back[name].tobytes() == expected.tobytes() and back[name].flags.aligned, name
    assert loads(dumps({})) == ({}, {})


def file(entries, data=b"", length=None):
    header = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def entry(start, stop, shape=(1,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}


def test_bfloat16_is_widened():
    values = np.array([1.0, -2.5, np.inf, -0.0], np.float32)
    raw = (values.view(np.uint32) >> np.uint32(16)).astype("<u2").tobytes()
    back, _ = loads(file({"w": entry(0, 8, (2, 2), "BF16")}, raw))
    np.testing.assert_array_equal(back["w"].view(np.uint32), values.view(np.uint32).reshape(2, 2))


@pytest.mark.parametrize(
    "data, message",
    [
        (b"", "header of 0 bytes in a file of 0"),
        (b"\2\0\0\0\0\0\0\0{", "header of 2 bytes in a file of 9"),
        (file({}, length=2**63), "header of 9223372036854775808 bytes"),
        (file(b"{" + b" " * (17 << 20) + b"}"), "header of 17825794 bytes"),
        (file(b"{]"), "not JSON"),
        (file(b"\xff\xfe"), "not JSON"),
        (file(b"[" * 100_000), "not JSON"),
        (file(b'{"a": ' + b"9" * 5000 + b"}"), "not JSON"),
        (file(b'{"a": 1, "a": 2}'), "occurs twice"),
        (file([1]), "not a JSON object"),
        (file({"__metadata__": {"a": 1}}), "must hold strings"),
        (file({"w": [1]}), "w: expected dtype, shape and data_offsets"),
        (file({"w": entry(0, 4, dtype="F8_E4M3")}, b"1234"), "w: dtype F8_E4M3; allowed: F64, F32"),
        (file({"w": entry(0, 4, dtype=["F32"])}, b"1234"), "w: dtype"),
        (file({"w": entry(0, 4, shape=[-1])}, b"1234"), "lists of sizes"),
        (file({"w": entry(0, 4, shape=[True])}, b"1234"), "lists of sizes"),
        (file({"w": entry(0, 4, shape=[2**30, 2**30])}, b"1234"), "impossible shape"),
        (file({"w": entry(0, 4, shape=[0, 2**50])}, b"1234"), "impossible shape"),
        (file({"w": entry(0, 4, shape=[2])}, b"1234"), "w: bytes 0-4; expected 0-8"),
        (file({"w": entry(4, 8)}, b"12345678"), "w: bytes 4-8; expected 0-4"),
        (file({"v": entry(0, 4), "w": entry(2, 6)}, b"12345678"), "w: bytes 2-6; expected 4-8"),
        (file({"w": entry(0, 4)}, b"12345678"), "arrays of 4 bytes, but 8 in the file"),
        (file({"w": entry(0, 4)}, b"12"), "arrays of 4 bytes, but 2 in the file"),
        (file({"\33[31m": entry(4, 8)}, b"12345678"), "\\x1b[31m: bytes"),
    ],
)
def test_a_lying_header_is_one_line(data, message):
    with pytest.raises(UnsafeOrDamaged) as e:
        loads(data)
    assert message in str(e.value) and "\n" not in str(e.value)
