"""Arrays of .npz files: what a header claims is not believed."""

import io
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest

from ddo_jax import npz


def packed(**arrays) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


def claiming(text: str, content: bytes = bytes(64)) -> bytes:
    """An .npz whose array "a" has this header and content."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as f:
        f.writestr("a.npy", b"\x93NUMPY\1\0" + struct.pack("<H", len(text) + 1) + text.encode() + b"\n" + content)
    return buffer.getvalue()


def header(shape, descr="<f4") -> str:
    return repr({"descr": descr, "fortran_order": False, "shape": shape})


def test_round_trip(tmp_path):
    """Breaks if an array comes back changed, in another order, or not writable."""
    arrays = {
        "a": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
        "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "scalar": np.int64(7),
        "none": np.zeros((0, 3), np.uint8),
        "flags": np.array([True, False]),
    }
    path = tmp_path / "x.npz"
    path.write_bytes(packed(**arrays))
    found = npz.read(path)
    assert list(found) == list(arrays) == npz.names(path)
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].dtype == np.asarray(array).dtype
    found["a"][:] = 0
    assert list(npz.read(path.read_bytes(), ["scalar"])) == ["scalar"]
    with path.open("rb") as f:
        assert npz.headers(f)["a"] == ((2, 3, 4), False, np.dtype(np.float32))


@pytest.mark.parametrize(
    "text",
    [
        header((10**12,)),
        header((-1, -16)),
        header((2**63, 2)),
        header((4, 5)),
        header((True, 16)),
        header((16,), "|O"),
        header((1.5,)),
        "(" * 5000,
        "{'a':" * 300,
        "os.system('true')",
        "",
    ],
)
def test_claims_are_held_against_the_file(text):
    """Breaks if memory for 10^12 rows is asked for, or anything but one exception comes out."""
    tracemalloc.start()
    with pytest.raises(npz.Damaged) as e:
        npz.read(claiming(text))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**22 and "\n" not in str(e.value) and str(e.value)


def test_a_bomb_is_not_unpacked():
    """Breaks if a member's own claim of its size is believed: 1 KB that becomes 10 GB."""
    data = bytearray(packed(a=np.zeros(1000, np.uint8)))
    at = data.rindex(b"PK\1\2")
    data[at + 24 : at + 28] = struct.pack("<I", 2**32 - 2)
    with pytest.raises(npz.Damaged, match="packed"):
        npz.read(bytes(data))


@pytest.mark.parametrize("data", [b"", b"PK", b"PK\3\4" + bytes(100), bytes(1000)])
def test_no_npz(data, tmp_path):
    """Breaks if another file ends in a traceback."""
    with pytest.raises(npz.Damaged):
        npz.read(data)
    with pytest.raises(npz.Damaged):
        npz.names(tmp_path / "nothing.npz")


def test_every_flipped_bit_is_seen_or_harmless():
    """Breaks if a flipped bit in the content is read."""
    whole = packed(a=np.arange(200, dtype=np.uint8))
    for at in range(len(whole)):
        data = bytearray(whole)
        data[at] ^= 4
        try:
            found = npz.read(bytes(data))
        except npz.Damaged:
            continue
        assert np.array_equal(next(iter(found.values())), np.arange(200)), at


def test_a_missing_array_is_named():
    """Breaks if the line does not say what there is."""
    with pytest.raises(npz.Damaged, match="no mu among a, b"):
        npz.read(packed(a=np.zeros(1), b=np.zeros(1)), ["mu"])
