"""The three containers of torch tensors, without torch: legacy streams, zip files, NVIDIA's pickles.

    load_pickle(data)   a pickle whose tensors hold one legacy stream each (specs/edm.md 16)
    load_legacy(data)   torch.save before 1.6, and each of those streams (specs/edm.md section 16.4)
    load_zip(data)      torch.save since 1.6: data.pkl and data/<key> in a zip, uncompressed (specs/var.md section 6.1)

Each returns the unpickled graph of `pickles` (dict, `Record`, `Stub`, `Tensor` ...), free of cycles. Tensors are
views of `data` until `Tensor.array()`. All raise `UnsafeOrDamaged`.
"""

import dataclasses
import struct
import zlib

from ddo_jax.convert.inert import Budget, Global, Storage, UnsafeOrDamaged, itemsize, show
from ddo_jax.convert.pickles import Machine, check_graph

MAGIC = 0x1950A86A20F9469CFC6C
MAX_MEMBERS = 100_000
STORAGES = {
    "torch.DoubleStorage": "float64",
    "torch.FloatStorage": "float32",
    "torch.HalfStorage": "float16",
    "torch.BFloat16Storage": "bfloat16",
    "torch.LongStorage": "int64",
    "torch.IntStorage": "int32",
    "torch.ShortStorage": "int16",
    "torch.CharStorage": "int8",
    "torch.ByteStorage": "uint8",
    "torch.BoolStorage": "bool",
}


def _persistent_id(pid) -> tuple:
    """("storage", class, key, location, count[, view]) -> dtype, key, count, view."""
    if type(pid) is not tuple or len(pid) not in (5, 6) or pid[0] != "storage":
        raise UnsafeOrDamaged("a persistent id that is not a storage")
    _, cls, key, location, count = pid[:5]
    if type(cls) is not Global or cls.name not in STORAGES:
        name = cls.name if type(cls) is Global else type(cls).__name__
        raise UnsafeOrDamaged(f"storage class {name}; allowed: {', '.join(STORAGES)}")
    if type(key) is not str or type(location) is not str or type(count) is not int or not 0 <= count < 2**40:
        raise UnsafeOrDamaged("a storage without key, location and element count")
    return STORAGES[cls.name], key, count, pid[5] if len(pid) == 6 else None


# ----------------------------------------------------------------------------------------------------
# Legacy streams


class _Storages:
    """The storages that the object pickle names; their data follow it in the stream."""

    def __init__(self):
        self.by_key, self.views = {}, []

    def __call__(self, pid) -> Storage:
        dtype, key, count, view = _persistent_id(pid)
        storage = self.by_key.setdefault(key, Storage(dtype, count))
        if (storage.dtype, storage.count) != (dtype, count):
            raise UnsafeOrDamaged(f"storage {show(key)} has two dtypes or sizes")
        if view is None:
            return storage
        if type(view) is not tuple or [type(v) for v in view] != [str, int, int]:
            raise UnsafeOrDamaged(f"storage {show(key)}: damaged view")
        _, offset, size = view
        if not 0 <= offset <= offset + size <= count:
            raise UnsafeOrDamaged(f"storage {show(key)}: a view outside it")
        part = Storage(dtype, size)
        self.views.append((part, storage, offset))
        return part

    def finish(self):
        if empty := [k for k, v in self.by_key.items() if v.data is None]:
            raise UnsafeOrDamaged(f"storage {show(empty[0])} has no data")
        for part, storage, offset in self.views:
            size = itemsize(part.dtype)
            part.data = storage.data[offset * size : (offset + part.count) * size]


def _legacy(data: memoryview, budget: Budget):
    position, storages = 0, _Storages()

    def pickle(persistent=None):
        nonlocal position
        machine = Machine(data, budget, start=position, persistent=persistent)  # no load_bytes: streams do not nest
        value = machine.run()
        position = machine.position
        return value

    if pickle() != MAGIC or pickle() != 1001:
        raise UnsafeOrDamaged("not a torch stream: wrong magic number or version")
    info = pickle()
    if type(info) is not dict or info.get("little_endian") is not True:
        raise UnsafeOrDamaged("torch stream that is not little-endian")
    value, keys = pickle(storages), pickle()
    strings = type(keys) is list and all(type(k) is str for k in keys)
    if not strings or sorted(storages.by_key) != sorted(keys):
        raise UnsafeOrDamaged(f"{len(storages.by_key)} storages, but the list of their data names others")
    for key in keys:
        storage = storages.by_key[key]
        size = storage.count * itemsize(storage.dtype)
        if len(data) - position < 8 + size:
            raise UnsafeOrDamaged(f"truncated: storage {show(key)} wants {size} bytes")
        if (count := struct.unpack_from("<q", data, position)[0]) != storage.count:
            raise UnsafeOrDamaged(f"storage {show(key)}: {count} elements stored, {storage.count} announced")
        storage.data = data[position + 8 : position + 8 + size]
        position += 8 + size
    if position != len(data):
        raise UnsafeOrDamaged(f"{len(data) - position} bytes behind the last storage")
    storages.finish()
    check_graph(value)
    return value


def load_legacy(data):
    """A torch.save file from before torch 1.6: five pickles, then the raw storages."""
    return _legacy(memoryview(data), Budget(len(data)))


def _stream_storage(blob: memoryview, budget: Budget) -> Storage:
    """The one storage of a `torch.storage._load_from_bytes` argument."""
    value = _zip(blob, budget) if blob[:2] == b"PK" else _legacy(blob, budget)
    if type(value) is not Storage:
        raise UnsafeOrDamaged(f"a torch stream that holds a {type(value).__name__}; expected one storage")
    return value


def load_pickle(data):
    """NVIDIA's pickles: the object graph, its tensors in nested streams."""
    machine = Machine(data, Budget(len(data)), load_bytes=_stream_storage)
    value = machine.run()
    if machine.position != len(data):
        raise UnsafeOrDamaged(f"{len(data) - machine.position} bytes behind the end of the pickle")
    check_graph(value)
    return value


# ----------------------------------------------------------------------------------------------------
# Zip files: the central directory is parsed here, so that sizes are checked before anything is allocated


@dataclasses.dataclass(frozen=True, slots=True)
class Member:
    """Where the bytes of one uncompressed entry lie."""

    name: str
    header: int
    start: int
    size: int
    crc: int


def _unpack(fmt: str, data: memoryview, at: int) -> tuple:
    if not 0 <= at <= len(data) - struct.calcsize(fmt):
        raise UnsafeOrDamaged(f"zip: damaged or truncated, a record at byte {at} of {len(data)}")
    return struct.unpack_from(fmt, data, at)


def _directory(data: memoryview) -> tuple:
    """(entries, size, offset) of the central directory, from the (ZIP64) end record."""
    tail_at = max(0, len(data) - 22 - 65535)
    end = bytes(data[tail_at:]).rfind(b"PK\5\6")
    if end < 0:
        raise UnsafeOrDamaged("zip: truncated, the directory at its end is missing")
    end += tail_at
    *_, entries, size, offset, comment = _unpack("<4s4H2LH", data, end)
    if end + 22 + comment != len(data):
        raise UnsafeOrDamaged(f"zip: {len(data) - end - 22} bytes behind the directory, {comment} announced")
    if end >= 20 and data[end - 20 : end - 16] == b"PK\6\7":
        _, _, at, _ = _unpack("<4sLQL", data, end - 20)
        sig, *_, entries, size, offset = _unpack("<4sQ2H2L4Q", data, at)
        end = at
        if sig != b"PK\6\6":
            raise UnsafeOrDamaged("zip: damaged ZIP64 record")
    if offset + size > end or entries > MAX_MEMBERS or entries * 46 > size:
        raise UnsafeOrDamaged(f"zip: a directory of {entries} entries in {size} bytes at byte {offset}")
    return entries, size, offset


def _wide(extra: memoryview, values: list) -> list:
    """Sizes and offset with ZIP64 values in place of 0xFFFFFFFF."""
    at = 0
    while at + 4 <= len(extra):
        tag, size = struct.unpack_from("<HH", extra, at)
        if tag == 1:
            missing = [i for i, v in enumerate(values) if v == 0xFFFFFFFF]
            wide = _unpack(f"<{len(missing)}Q", extra[at + 4 : at + 4 + size], 0)
            for i, v in zip(missing, wide, strict=True):
                values[i] = v
            break
        at += 4 + size
    return values


def zip_members(data: memoryview, budget: Budget) -> dict:
    """{name: Member} of a zip whose entries are stored, not encrypted, inside the file and apart from each other."""
    entries, size, at = _directory(data)
    budget.work(entries)
    limit, members = at, {}
    for _ in range(entries):
        fields = _unpack("<4s6H3L5H2L", data, at)
        sig, _, _, flags, method, _, _, crc, packed, full, n, extra, comment, *_, header = fields
        stop = at + 46 + n + extra + comment
        if sig != b"PK\1\2" or stop > limit + size:
            raise UnsafeOrDamaged("zip: damaged directory")
        raw = bytes(data[at + 46 : at + 46 + n])
        full, packed, header = _wide(data[at + 46 + n : at + 46 + n + extra], [full, packed, header])
        name, at = raw.decode("utf-8", "replace"), stop
        if method or flags & 1 or packed != full:
            raise UnsafeOrDamaged(f"zip: {show(name)} is compressed or encrypted; torch stores its entries as they are")
        local, *_, n, extra = _unpack("<4s5H3L2H", data, header)
        start = header + 30 + n + extra
        if local != b"PK\3\4" or bytes(data[header + 30 : header + 30 + n]) != raw or start + full > limit:
            raise UnsafeOrDamaged(f"zip: {show(name)} is not where the directory says")
        if name in members:
            raise UnsafeOrDamaged(f"zip: {show(name)} occurs twice")
        members[name] = Member(name, header, start, full, crc)
    end = 0
    for member in sorted(members.values(), key=lambda m: m.header):
        if member.header < end:
            raise UnsafeOrDamaged(f"zip: {show(member.name)} overlaps another entry")
        end = member.start + member.size
    return members


def _content(data: memoryview, member: Member, budget: Budget) -> memoryview:
    budget.memory(member.size)  # read, not copied; but one nested zip could be read again and again
    content = data[member.start : member.start + member.size]
    if zlib.crc32(content) != member.crc:
        raise UnsafeOrDamaged(f"zip: {show(member.name)} is damaged (checksum)")
    return content


def _zip(data: memoryview, budget: Budget):
    members, storages = zip_members(data, budget), {}
    tops = [name.removesuffix("data.pkl") for name in members if name.endswith("/data.pkl")]
    if len(tops) != 1:
        raise UnsafeOrDamaged(f"zip with {len(tops)} files named data.pkl; a torch file has one")
    order = "<"
    if member := members.get(f"{tops[0]}byteorder"):
        word = bytes(_content(data, member, budget)[:16])
        if word not in (b"little", b"big"):
            raise UnsafeOrDamaged("zip: byteorder is neither little nor big")
        order = "<" if word == b"little" else ">"

    def storage(pid):
        dtype, key, count, _ = _persistent_id(pid)
        if key not in storages:
            member = members.get(f"{tops[0]}data/{key}")
            if member is None or member.size != count * itemsize(dtype):
                seen = "missing" if member is None else f"{member.size} bytes"
                raise UnsafeOrDamaged(f"storage {show(key)}: {seen}; expected {count} elements of {dtype}")
            storages[key] = Storage(dtype, count, _content(data, member, budget), order)
        if (storages[key].dtype, storages[key].count) != (dtype, count):
            raise UnsafeOrDamaged(f"storage {show(key)} has two dtypes or sizes")
        return storages[key]

    content = _content(data, members[f"{tops[0]}data.pkl"], budget)
    machine = Machine(content, budget, persistent=storage)
    value = machine.run()
    if machine.position != len(content):
        raise UnsafeOrDamaged(f"{len(content) - machine.position} bytes behind the end of data.pkl")
    check_graph(value)
    return value


def load_zip(data):
    """A torch.save file since torch 1.6; checksums of the entries that are used are verified."""
    return _zip(memoryview(data), Budget(len(data)))
