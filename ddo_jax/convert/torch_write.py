"""State dicts -> .pth files without torch: the zip that torch.save writes since torch 1.6 (specs/var.md section 6.1).

    write(path, state_dict)     torch.load(path, weights_only=True) gives an OrderedDict of contiguous CPU tensors

The bytes are those of torch 2.13's torch.save into a buffer, but without `.data/serialization_id`, a fingerprint made
of C++'s hashes, which torch.load does not need and files before torch 2.1 lack too; and with both sizes in the local
header of a tensor beyond 4 GiB, where torch leaves one 0. One tensor at a time; equal arrays give equal files.
"""

import struct
import zlib

import numpy as np

from ddo_jax import files
from ddo_jax.convert.inert import show
from ddo_jax.convert.torch_files import STORAGES

TOP = "archive"  # the one folder of the zip: as torch.save names it where it has no file name
ALIGNMENT = 64  # of the payloads in the file, so that they can be mapped
LIMIT = 0xFFFFFFFF  # sizes and offsets from here on go to ZIP64's fields; smaller in a test
BATCH = 1000  # items of a dictionary that the pickle sets at once
CLASSES = {dtype: name.removeprefix("torch.").encode() for name, dtype in STORAGES.items()}


def write(path, state_dict: dict, dtypes: dict | None = None) -> None:
    """Write a state dict; a reader of `path` sees either the old file or the new one.

    Args:
      path: a local file. state_dict: {name: NumPy array}, kept in order; bfloat16 is that of ml_dtypes.
      dtypes: {name: dtype}, as `read` leaves them in extras["dtypes"]: where it says bfloat16, an array that was
        widened to float32 is narrowed back. Everything else is written as it is.

    Raises:
      ValueError: a dtype that the files do not have, or a value that is not one of bfloat16; names the parameter.
    """
    arrays = {name: np.asarray(array) for name, array in state_dict.items()}
    stored = {name: _stored(name, array, (dtypes or {}).get(name)) for name, array in arrays.items()}
    head = {"data.pkl": _pickle({name: (stored[name], array.shape) for name, array in arrays.items()})}
    head |= {".format_version": b"1", ".storage_alignment": b"%d" % ALIGNMENT, "byteorder": b"little"}
    with files.writing(path) as f:
        archive = _Zip(f)
        for name, content in head.items():
            archive.add(name, content)
        for i, (name, array) in enumerate(arrays.items()):
            archive.add(f"data/{i}", _payload(name, array, stored[name]))
        archive.add("version", b"3\n")
        archive.finish()


def _stored(name: str, array: np.ndarray, wanted: str | None) -> str:
    """torch's name of the dtype in the file."""
    dtype = array.dtype.name
    if dtype not in CLASSES:
        raise ValueError(f"{show(str(name))}: dtype {dtype}; allowed: {', '.join(CLASSES)}")
    return "bfloat16" if (dtype, wanted) == ("float32", "bfloat16") else dtype


def _payload(name: str, array: np.ndarray, stored: str) -> np.ndarray:
    """The elements as bytes, in C order and little-endian; narrowing is the inverse of how `read` widens."""
    array = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    if stored == "bfloat16" and array.dtype == np.float32:
        bits = array.view(np.uint32)
        if (bits & np.uint32(0xFFFF)).any():
            raise ValueError(f"{show(name)}: values that bfloat16 does not have; allowed: those, or float32")
        array = (bits >> np.uint32(16)).astype("<u2")
    return array.reshape(-1).view(np.uint8)


# ----------------------------------------------------------------------------------------------------
# data.pkl: the opcodes of CPython's pickler at protocol 2, which memoises every string, global, tuple and call result


def _indexed(short: bytes, long: bytes, n: int) -> bytes:
    return short + bytes([n]) if n < 1 << 8 else long + struct.pack("<I", n)


def _number(n: int) -> bytes:
    for code, bits in (b"KB", 8), (b"MH", 16), (b"JI", 31):
        if n < 1 << bits:
            return struct.pack(f"<c{code[1:].decode()}", code[:1], n)
    size = n.bit_length() // 8 + 1  # with room for the sign
    return struct.pack("<cB", b"\x8a", size) + n.to_bytes(size, "little")


def _text(value: str) -> bytes:
    data = value.encode("utf-8", "surrogatepass")
    return struct.pack("<cI", b"X", len(data)) + data


class _Pickle:
    def __init__(self):
        self.out, self.memo, self.count = bytearray(b"\x80\2"), {}, 0

    def add(self, opcodes: bytes):
        """Opcodes, whose result the pickler memoises."""
        self.out += opcodes + _indexed(b"q", b"r", self.count)
        self.count += 1

    def once(self, opcodes: bytes):
        """What is one object in all of the pickle: the first time its opcodes, then references to it."""
        if opcodes in self.memo:
            self.out += _indexed(b"h", b"j", self.memo[opcodes])
        else:
            self.memo[opcodes] = self.count
            self.add(opcodes)

    def numbers(self, values: tuple):
        if not values:
            self.out += b")"  # the one empty tuple
            return
        start, end = {1: (b"", b"\x85"), 2: (b"", b"\x86"), 3: (b"", b"\x87")}.get(len(values), (b"(", b"t"))
        self.add(start + b"".join(map(_number, values)) + end)

    def dictionary(self):
        """A new, empty OrderedDict."""
        self.once(b"ccollections\nOrderedDict\n")
        self.add(b")R")

    def tensor(self, key: str, dtype: str, shape: tuple):
        """_rebuild_tensor_v2(storage, offset 0, shape, strides, requires_grad False, no hooks)."""
        strides, count = (), 1
        for n in reversed(shape):
            strides, count = (count, *strides), count * max(n, 1)  # torch counts empty axes as 1
        self.once(b"ctorch._utils\n_rebuild_tensor_v2\n")
        self.out += b"(("  # the arguments, the persistent id
        self.once(_text("storage"))
        self.once(b"ctorch\n%s\n" % CLASSES[dtype])
        self.add(_text(key))
        self.once(_text("cpu"))
        self.add(_number(0 if 0 in shape else count) + b"t")
        self.out += b"Q" + _number(0)
        self.numbers(shape)
        self.numbers(strides)
        self.out += b"\x89"
        self.dictionary()
        self.add(b"t")
        self.add(b"R")


def _pickle(tensors: dict) -> bytes:
    """data.pkl of {name: (dtype, shape)}; the storages are numbered from 0."""
    p, items = _Pickle(), list(enumerate(tensors.items()))
    p.dictionary()
    for at in range(0, len(items), BATCH):
        batch = items[at : at + BATCH]
        p.out += b"(" if len(batch) > 1 else b""
        for i, (name, (dtype, shape)) in batch:
            p.add(_text(name))
            p.tensor(str(i), dtype, shape)
        p.out += b"u" if len(batch) > 1 else b"s"
    return bytes(p.out + b".")


# ----------------------------------------------------------------------------------------------------
# The zip, with the fields as torch's writer fills them: checksum and size behind the payload, dates 0, always ZIP64


def _short(value: int) -> int:
    return 0xFFFFFFFF if value >= LIMIT else value


def _zip64(*values: int) -> bytes:
    """The extra field with those values that are too large for theirs; empty if none is."""
    wide = [v for v in values if v >= LIMIT]
    return struct.pack(f"<2H{len(wide)}Q", 1, 8 * len(wide), *wide) if wide else b""


class _Zip:
    def __init__(self, file):
        self.file, self.at, self.entries = file, 0, []  # at: the byte that comes next

    def write(self, data):
        self.file.write(data)
        self.at += len(data)

    def add(self, name: str, data):
        """One stored member; data: bytes, or an array of them."""
        path, size, crc, start = f"{TOP}/{name}".encode(), len(data), zlib.crc32(data), self.at
        flags = 0x0808 if size else 0x0800  # UTF-8; checksum and sizes behind the data
        wide = _zip64(size, size, start)
        lengths = (_short(size), _short(size), len(path), len(wide))
        fields = (b"PK\1\2", 0, 0, flags, 0, 0, 0, crc, *lengths, 0, 0, 0, 0, _short(start))
        self.entries.append(struct.pack("<4s6H3L5H2L", *fields) + path + wide)
        padding = -(start + 30 + len(path) + len(wide) + 4) % ALIGNMENT
        extra = wide + struct.pack("<2sH", b"FB", padding) + b"Z" * padding
        fields = (b"PK\3\4", 0, flags, 0, 0, 0, 0, 0, 0, len(path), len(extra))
        self.write(struct.pack("<4s5H3L2H", *fields) + path + extra)
        self.write(data)
        if size:
            self.write(struct.pack("<4sL2Q" if wide else "<4s3L", b"PK\7\x08", crc, size, size))

    def finish(self):
        directory, start, count = b"".join(self.entries), self.at, len(self.entries)
        self.write(directory)
        end = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 0x031E, 45, 0, 0, count, count, len(directory), start)
        end += struct.pack("<4sLQL", b"PK\6\7", 0, self.at, 1)
        fields = (*[min(count, 0xFFFF)] * 2, _short(len(directory)), _short(start))
        self.write(end + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, *fields, 0))
