"""Thousands of damaged and hostile files: nothing runs, nothing but one clear error comes out, in bounded time.

A seed mutates small files of every format: bits, cuts, opcodes, lengths, memo indices, nesting, hostile globals. An
audit hook sees what the interpreter does meanwhile: no process, no compiled or executed code, no import, no socket, no
file besides the one that is read.
"""

import json
import os
import pickletools
import random
import struct
import sys
import time
import tracemalloc

import numpy as np
import pytest

from ddo_jax.convert import read, safetensors
from ddo_jax.convert.inert import UnsafeOrDamaged
from ddo_jax.errors import UserError

from . import conftest as build

PER_FORMAT = {"nvidia": 1100, "edm2": 700, "zip": 700, "legacy": 700, "safetensors": 700}  # 3,900
SECONDS = 5  # for one file of 20 kB: thousands of times what a good one takes, for a busy machine
BENIGN = {"object.__getattr__", "object.__setattr__", "object.__delattr__", "sys._getframe", "builtins.id"}
WATCH = {"armed": False, "path": None, "events": []}


def _hook(event, args):
    if not WATCH["armed"] or event in BENIGN:
        return
    reading = event == "open" and not args[2] & (os.O_WRONLY | os.O_RDWR)
    if event == "mmap.__new__" or reading and args[0] == WATCH["path"]:
        return
    WATCH["events"].append((event, str(args)[:200]))


@pytest.fixture(scope="module")
def watch():
    sys.addaudithook(_hook)  # cannot be taken away again: it sleeps unless armed
    yield WATCH
    WATCH["armed"] = False


@pytest.fixture
def files(small, small_edm2):
    config, state = small
    return {
        "nvidia": build.nvidia(config, state),
        "edm2": build.edm2_nvidia(*small_edm2, build.vae_encoder()),
        "zip": build.torch_zip(state),
        "legacy": build.torch_legacy(state),
        "safetensors": safetensors.dumps(state, {"a": "b"}),
    }


# ----------------------------------------------------------------------------------------------------
# Mutations: (random, bytes, sentinel) -> bytes

HOSTILE = [
    ("os", "system"),
    ("posix", "system"),
    ("subprocess", "Popen"),
    ("builtins", "eval"),
    ("builtins", "exec"),
    ("builtins", "open"),
    ("copyreg", "_reconstructor"),
    ("importlib", "import_module"),
    ("socket", "create_connection"),
    ("shutil", "rmtree"),
    ("torch.hub", "load"),
    ("torch.utils.cpp_extension", "load_inline"),
    ("torch_utils.persistence", "import_hook"),
    ("torch.serialization", "os.system"),
]


def flip(rng, data, sentinel):
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
    return bytes(out)


def cut(rng, data, sentinel):
    a, b = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    return rng.choice((data[:a], data[a:], data[:a] + data[b:], data[:b] + data[a:b] + data[b:]))


def opcodes(data):
    """(first byte, code) of every opcode of the pickle at the start of `data`."""
    return [(at, op) for op, _, at in pickletools.genops(data)]


def swap(rng, data, sentinel):
    out, ops = bytearray(data), opcodes(data)
    for _ in range(rng.choice((1, 1, 3))):
        out[rng.choice(ops)[0]] = ord(rng.choice(pickletools.opcodes).code)
    return bytes(out)


def shuffle(rng, data, sentinel):
    """Two neighbouring runs of opcodes change places, or one is repeated."""
    ats = [at for at, _ in opcodes(data)]
    a, b, c = sorted(rng.sample(ats, 3))
    return data[:a] + data[b:c] + data[a:b] + data[c:] if rng.random() < 0.7 else data[:b] + data[a:b] + data[b:]


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def hostile(rng, data, sentinel):
    """A call that leaves its traces if it happens, between two opcodes or in place of an allowed global."""
    module, name = rng.choice(HOSTILE)
    reference = rng.choice((f"c{module}\n{name}\n".encode(), text(module) + text(name) + b"\x93"))
    argument = text(rng.choice((f"touch {sentinel}", f"open({sentinel!r}, 'w')", sentinel)))
    call = reference + argument + b"\x85" + rng.choice((b"R", b"R0", b"\x81", b"\x81}b", b"R}b0"))
    references = [at for at, op in opcodes(data) if op.name in ("GLOBAL", "STACK_GLOBAL")]
    at = rng.choice([at for at, _ in opcodes(data)])
    if rng.random() < 0.5 or not references:
        return data[:at] + call + data[at:]
    at = rng.choice(references)
    following = min((a for a, _ in opcodes(data) if a > at), default=at + 1)
    return data[:at] + rng.choice((b"", b"00")) + reference + data[following:]


def oversize(rng, data, sentinel):
    fields = {"BINUNICODE": 4, "BINBYTES": 4, "SHORT_BINUNICODE": 1, "FRAME": 8, "BINGET": 1, "BINPUT": 1, "BININT1": 1}
    fields |= {"BININT": 4, "LONG_BINGET": 4, "LONG1": 1, "BININT2": 2, "SHORT_BINBYTES": 1, "BINFLOAT": 8}
    at, op = rng.choice([(at, op) for at, op in opcodes(data) if op.name in fields])
    width = fields[op.name]
    value = rng.choice((b"\xff" * width, b"\xff" * (width - 1) + b"\x7f", rng.randbytes(width), bytes(width)))
    return data[: at + 1] + value + data[at + 1 + width :]


def nest(rng, data, sentinel):
    n = rng.choice((50, 150, 3000))
    deep = rng.choice(
        (b"]" * n + b"a" * (n - 1), b")" + b"\x85" * n, b"(" * n, b"}" + b"K\1}" * n + b"s" * n, b"(" * n + b"t" * n)
    )
    at = rng.choice([at for at, _ in opcodes(data)])
    return data[:at] + deep + data[at:]


def itself(rng, data, sentinel):
    """Containers that contain themselves, through a memo index nobody else uses."""
    put, get = b"r\0\0\1\0", b"j\0\0\1\0"
    loop = rng.choice((b"]%sa", b"]%s\x85a", b"}K\1%ss", b"]%s\x85\x85a"))
    at = rng.choice([at for at, _ in opcodes(data)])
    return data[:at] + loop[:1] + put + loop[1:].replace(b"%s", get) + data[at:]


def memo(rng, data, sentinel):
    ats = [at for at, op in opcodes(data) if op.name == "BINGET"] or [1]
    at = rng.choice(ats)
    return data[: at + 1] + bytes([rng.randrange(256)]) + data[at + 2 :]


def header(rng, data, sentinel):
    """A safetensors header with other names, types, shapes or offsets."""
    length = struct.unpack_from("<Q", data)[0]
    entries = json.loads(data[8 : 8 + length])
    odd = [-1, 0, 1, 2**31, 2**63, 2**200, 1.5, None, True, [], {}, "F32", "BF16", [[[1]]], [0, 2**40, 2**40]]
    for _ in range(rng.choice((1, 1, 2))):
        target = entries[rng.choice([k for k in entries if type(entries[k]) is dict])]
        if target:
            key = rng.choice(list(target))
            inner = target[key]
            if type(inner) is list and inner and rng.random() < 0.6:
                inner[rng.randrange(len(inner))] = rng.choice([*odd, rng.randrange(10_000)])
            else:
                target[key] = rng.choice(odd)
    text = json.dumps(entries).encode()
    return struct.pack("<Q", rng.choice((len(text), len(text), 2 ** rng.randrange(64)))) + text + data[8 + length :]


PICKLE = (swap, shuffle, hostile, hostile, oversize, nest, itself, memo)


def in_pickle(kind, data, change):
    """`change` applied to the pickle inside a file of that kind."""
    if kind in ("nvidia", "edm2"):
        return change(data)
    if kind == "legacy":  # the fourth pickle names the storages
        start = 0
        for _ in range(3):
            start += max(at for at, _ in opcodes(data[start:])) + 1
        stop = start + max(at for at, _ in opcodes(data[start:])) + 1
        return data[:start] + change(data[start:stop]) + data[stop:]
    with build.zipfile.ZipFile(build.io.BytesIO(data)) as f:
        members = {info.filename: f.read(info) for info in f.infolist()}
    members["archive/data.pkl"] = change(members["archive/data.pkl"])
    buffer = build.io.BytesIO()
    with build.zipfile.ZipFile(buffer, "w") as f:
        for name, content in members.items():
            f.writestr(name, content)
    return buffer.getvalue()


def mutate(rng, kind, data, sentinel):
    general = (flip, cut, header) if kind == "safetensors" else (flip, cut)
    if kind == "safetensors" or rng.random() < 0.25:
        return rng.choice(general)(rng, data, sentinel)
    change = rng.choice((*PICKLE, flip, cut))
    return in_pickle(kind, data, lambda pickle: change(rng, pickle, sentinel))


# ----------------------------------------------------------------------------------------------------


def attempt(path, data, watch):
    """(error or None, seconds) of reading `data`; the audit hook is armed meanwhile."""
    path.write_bytes(data)
    watch["path"], error = str(path), None
    start = time.perf_counter()
    watch["armed"] = True
    try:
        read(str(path))
    except (UnsafeOrDamaged, UserError) as e:
        error = e
    finally:
        watch["armed"] = False
    return error, time.perf_counter() - start


@pytest.mark.parametrize("kind", PER_FORMAT)
def test_mutations(kind, files, watch, tmp_path):
    rng = random.Random(f"fuzz {kind}")
    path, sentinel = tmp_path / "file", tmp_path / "sentinel"
    read(_written(path, files[kind]))  # whatever Python imports on first use happens before
    attempt(path, files[kind][:-1], watch)
    watch["events"].clear()
    refused = 0
    for i in range(PER_FORMAT[kind]):
        data = mutate(rng, kind, files[kind], str(sentinel))
        error, seconds = attempt(path, data, watch)
        assert not watch["events"], (i, watch["events"][:3])
        assert seconds < SECONDS, (i, seconds)
        assert error is None or "\n" not in str(error) and len(str(error)) < 600, (i, error)
        refused += error is not None
    assert not sentinel.exists() and os.listdir(tmp_path) == ["file"]
    assert refused > 0.6 * PER_FORMAT[kind]  # the mutations do bite; the rest hit weights or unused names


def _written(path, data):
    path.write_bytes(data)
    return str(path)


@pytest.mark.parametrize("kind", PER_FORMAT)
def test_every_cut_is_refused(kind, files, watch, tmp_path):
    """No prefix of a file passes for the file."""
    data = files[kind]
    for size in {*range(0, len(data), max(1, len(data) // 60)), len(data) - 1}:
        assert attempt(tmp_path / "file", data[:size], watch)[0] is not None, size


def test_the_watch_sees(watch, tmp_path):
    """The hook would notice what it is there for."""
    watch["path"] = ""
    watch["events"].clear()
    watch["armed"] = True
    try:
        os.system("true")
        eval("1 + 1")
        open(os.devnull).close()
    finally:
        watch["armed"] = False
    assert {"os.system", "exec", "open"} <= {event for event, _ in watch["events"]}
    watch["events"].clear()


def test_bombs_stay_small(watch, tmp_path):
    """Peak memory of hostile files, by tracemalloc: of the order of the file, whatever they announce."""
    op = b"\x80\x04"
    many = np.zeros(20_000, np.int8).tobytes()
    bombs = [
        op + b"]" * 30_000 + b"a" * 29_999 + b".",
        op + b")" + b"\x85" * 30_000 + b".",
        op + b"(" * 30_000 + b".",
        op + b"]\x94" + b"](h\0h\0e" * 5000 + b".",
        op + b"X\xff\xff\xff\xff" + many,
        op + b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7f" + many,
        struct.pack("<Q", 2**40) + b"{" + many,
        struct.pack("<Q", 20_000) + b"{" + b'"a":[' * 3000 + many,
        b"PK\3\4" + many + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 60_000, 60_000, 10_000, 5, 0),
    ]
    for bomb in bombs:
        tracemalloc.start()
        error, seconds = attempt(tmp_path / "file", bomb, watch)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert error is not None and seconds < SECONDS
        assert peak < 200 * len(bomb) + (1 << 20), (bomb[:10], peak)
    watch["events"].clear()
