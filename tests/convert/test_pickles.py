"""The restricted pickle reader: what it accepts, what it refuses and by which line.

Sections: specs/edm.md section 16, specs/var.md section 6.1.
"""

import pickle
import struct
import time
import tracemalloc

import numpy as np
import pytest

from ddo_jax.convert import inert, torch_files
from ddo_jax.convert.inert import Budget, Record, Storage, Stub, Tensor
from ddo_jax.convert.pickles import Machine, UnsafeOrDamaged, check_graph, loads

from . import conftest as build


def refused(data, reader=loads):
    """The one line with which `data` is refused."""
    with pytest.raises(UnsafeOrDamaged) as e:
        reader(data)
    assert "\n" not in str(e.value) and len(str(e.value)) < 400
    return str(e.value)


def text(value):
    return b"\x8c" + bytes([len(value)]) + value.encode()


def stack_global(module, name):
    return text(module) + text(name) + b"\x93"


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_reference_statistics(protocol):
    mu, sigma = np.arange(5.0), np.asfortranarray(np.arange(6.0).reshape(2, 3))
    big = np.arange(4000, dtype=np.int32)
    value = {"num_images": 50_000, "fid": {"mu": mu, "sigma": sigma, "n": np.float32(1.5)}, "big": big.astype(">i4")}
    value["rest"] = [
        None,
        True,
        -1,
        2**70,
        1.5,
        "ü",
        (),
        (1,),
        (1, 2),
        (1, 2, 3),
        (1, 2, 3, 4),
        {1, 2},
        b"x",
        "y" * 300,
    ]
    back = loads(pickle.dumps(value, protocol) if protocol > 2 else pickle.dumps(value | {"rest": [{3}]}, protocol))
    assert back["num_images"] == 50_000 and back["fid"]["n"] == 1.5
    assert back["rest"] == (value["rest"] if protocol > 2 else [{3}])
    for seen, expected in ((back["fid"]["mu"], mu), (back["fid"]["sigma"], sigma), (back["big"], big)):
        assert seen.dtype == expected.dtype and seen.dtype.isnative
        np.testing.assert_array_equal(seen, expected)


HOSTILE = [
    ("os", "system"),
    ("posix", "system"),
    ("nt", "system"),
    ("subprocess", "Popen"),
    ("builtins", "eval"),
    ("builtins", "exec"),
    ("builtins", "getattr"),
    ("builtins", "__import__"),
    ("__builtin__", "eval"),
    ("copyreg", "_reconstructor"),
    ("copy_reg", "_reconstructor"),
    ("importlib", "import_module"),
    ("functools", "partial"),
    ("operator", "attrgetter"),
    ("numpy", "load"),
    ("numpy.testing._private.utils", "runstring"),
    ("torch", "load"),
    ("torch", "os.system"),
    ("torch", "Foo.system"),
    ("torch.hub", "load"),
    ("torch.os", "system"),
    ("torch.serialization", "os.Popen"),
    ("torchvision", "Evil"),
    ("torch\n", "Evil"),
    ("torch_utils.persistence", "import_hook"),
    ("dnnlib.util", "open_url"),
]


@pytest.mark.parametrize("module, name", HOSTILE)
def test_hostile_globals_are_refused_by_name(module, name, tmp_path):
    command = text(f"touch {tmp_path}/x") + b"\x85"
    for call in (stack_global(module, name) + command + b"R.", stack_global(module, name) + command + b"\x81.", b"."):
        seen = refused(b"\x80\x04" + stack_global(module, name) + call)
        assert f"{module}.{name}".replace("\n", "\\n") in seen and "not allowed" in seen
    if "\n" not in module:
        assert f"{module}.{name}" in refused(b"\x80\x02c" + f"{module}\n{name}\n".encode() + command + b"R.")
    assert not list(tmp_path.iterdir())


def test_classes_of_torch_are_inert():
    data = b"\x80\x04" + stack_global("torch.nn.modules.linear", "Linear") + b")\x81}" + text("a") + b"K\x01sb."
    machine = Machine(data, Budget(len(data)))
    value = machine.run()
    assert type(value) is Stub and value.name == "torch.nn.modules.linear.Linear" and value.state == {"a": 1}
    assert "Stub where plain values" in refused(data)


def test_a_persistent_object_drops_its_source():
    top = torch_files.load_pickle(build.dumps({"ema": build.persistent("EDMPrecond", {"x": np.float64(2.5)})}))
    assert type(top["ema"]) is Record and (top["ema"].class_name, top["ema"].state) == ("EDMPrecond", {"x": 2.5})
    meta = {"type": "function", "class_name": "X", "state": {}}
    assert "type 'class'" in refused(build.dumps(build.Call(build.RECONSTRUCT, meta)))


@pytest.mark.parametrize(
    "body, message",
    [
        (b"", "truncated"),
        (b"K", "truncated"),
        (b".", "damaged pickle"),
        (b"K\x01K\x01.", "damaged pickle"),
        (b"(K\x01.", "unfinished list"),
        (b"h\x05.", "damaged pickle (KeyError)"),
        (b"]K\x01s.", "damaged pickle"),
        (b"K\x01K\x01R.", "a call of int with int"),
        (b"}]K\x01s.", "dictionary key of type list"),
        (b"}\x8a\x09" + b"\1" * 9 + b"Ns.", "dictionary key of type int"),
        (b"\x8a\xff" + b"\1" * 255 + b".", "an integer of 255 bytes"),
        (b"\x8b\xff\xff\xff\x7f.", "opcode LONG4"),
        (b"X\xff\xff\xff\xffabc.", "4294967295 bytes wanted"),
        (b"\x8e\xff\xff\xff\xff\xff\xff\xff\xffabc.", "18446744073709551615 bytes wanted"),
        (b"\x95\xff\xff\xff\xff\xff\xff\xff\x7fN.", "a frame of"),
        (b"X\2\0\0\0\xff\xfe.", "damaged pickle (UnicodeDecodeError)"),
        (b"N.tail", "4 bytes behind the end"),
        (b"I1\n.", "opcode INT"),
        (b"\x82\1.", "opcode EXT1"),
        (b"\xff.", "opcode 0xff"),
        (b"NQ.", "persistent id"),
        (b"Nb.", "damaged pickle"),
        (b"K\1Nb.", "a state for a int"),
        (b"]\x94h\0a.", "a list contains itself"),
        (b"}\x94K\1h\0s.", "a dict contains itself"),
        (b"]\x94h\0\x85a.", "contains itself"),
        (b"]" * 200 + b"a" * 199 + b".", "nested deeper than 100"),
        (b")" + b"\x85" * 200 + b".", "nested deeper than 100"),
    ],
)
def test_damage_is_one_line(body, message):
    assert message in refused(b"\x80\x04" + body)


def test_protocols():
    assert "pickle protocol 1" in refused(b"\x80\x01N.")
    assert "pickle protocol 6" in refused(b"\x80\x06N.")


def test_memo_bombs_end_within_the_budget(monkeypatch):
    monkeypatch.setattr(inert, "MAX_OPS", 100_000)
    start = time.perf_counter()
    value = []
    for _ in range(60):
        value = [value, value]
    assert "pickle operations" in refused(pickle.dumps(value, 4))  # 2**60 leaves
    assert "pickle operations" in refused(b"\x80\x04" + b"]" * 200_000 + b".")
    # a list of 10,000 numbers, memoised once and copied into a set over and over
    items = b"](" + b"".join(b"M" + struct.pack("<H", i) for i in range(10_000)) + b"e\x94"
    copies = b"\x80\x04" + stack_global("builtins", "set") + b"\x94" + items + b"h\0h\1\x85R" * 1000 + b"."
    assert "builtins.set: more than 100000 pickle operations" in refused(copies)
    assert time.perf_counter() - start < 10


def test_tensors_stay_inside_their_storage():
    array = np.arange(6, dtype=np.float32)
    storage = build.Call(build.FROM_BYTES, build.blob(array))

    def read(offset, shape, strides):
        value = build.Call(build.TENSOR, storage, offset, shape, strides, False, {})
        return torch_files.load_pickle(build.dumps(value))

    def wrong(*args):
        return refused(args, lambda a: read(*a))

    np.testing.assert_array_equal(read(1, (2, 2), (1, 2)).array(), [[1, 3], [2, 4]])
    assert read(0, (), ()).array().shape == () and read(6, (0, 3), (3, 1)).array().shape == (0, 3)
    assert read(0, (1, 6), (2**39, 1)).array().shape == (1, 6)
    assert read(2, (2,), (1,)).array().flags.writeable and read(2, (2,), (1,)).array().flags.aligned
    for bad in ((1, (6,), (1,)), (0, (2, 6), (1, 1)), (0, (10**6,), (0,)), (0, (0, 2**39, 2**39), (0, 0, 0))):
        assert "outside its storage of 6" in wrong(*bad)
    for bad in ((-1, (2,), (1,)), (0, (-2,), (1,)), (0, (2,), (-1,)), (0, (2,), ()), (0, (1,) * 20, (1,) * 20)):
        assert "impossible sizes" in wrong(*bad)
    assert "unexpected arguments" in wrong(0, (2.0,), 1)
    assert "unexpected arguments" in wrong(True, (2,), (1,))


def test_storage_blobs():
    array = np.arange(3, dtype=np.float16)
    good = build.blob(array)
    pid = ("storage", build.STORAGES["HalfStorage"], "k", "cpu", 3)
    for variant in (good, build.blob(array, view=()), build.legacy(build.Persistent(pid), {"k": array})):
        assert type(torch_files.load_legacy(variant)) is Storage
    view = torch_files.load_legacy(build.blob(array, view=(("v", 1, 2),)))
    assert bytes(view.data) == array[1:].tobytes() and view.count == 2
    bits = np.array([1.0, -2.5, np.inf, 3e-39], np.float32).view(np.uint32) >> np.uint32(16)
    half = bits.astype(np.uint16).view(np.float16)  # two bytes each, whatever they mean
    wide = ("storage", build.STORAGES["BFloat16Storage"], "k", "cpu", 4)
    value = build.Call(build.TENSOR, build.Call(build.FROM_BYTES, build.legacy(build.Persistent(wide), {"k": half})))
    value.args += (0, (4,), (1,), False, {})
    tensor = torch_files.load_pickle(build.dumps(value))
    assert tensor.dtype == "bfloat16" and tensor.array().dtype == np.float32
    np.testing.assert_array_equal(tensor.array().view(np.uint32), bits << np.uint32(16))

    read = torch_files.load_legacy
    assert "wants 6 bytes" in refused(good[:-1], read)
    assert "1 bytes behind" in refused(good + b"x", read)
    assert "3 announced" in refused(good.replace(struct.pack("<q", 3), struct.pack("<q", 4)), read)
    assert "magic number" in refused(good.replace(b"\xf9 j\xa8P", b"\xf9 j\xa8Q"), read)
    assert "names others" in refused(build.legacy(build.Persistent(pid), {"k": array}, order=["z"]), read)
    assert "names others" in refused(build.legacy(build.Persistent(pid), {"k": array}, order=["k", "k"]), read)
    assert "names others" in refused(build.legacy(build.Persistent(pid), {"k": array}, order=[1]), read)
    huge = (*pid[:4], 10**12)
    assert "wants" in refused(build.legacy(build.Persistent(huge), {"k": array}), read)
    two = [build.Persistent(pid), build.Persistent((*pid[:4], 2))]
    assert "two dtypes or sizes" in refused(build.legacy(two, {"k": array}), read)
    nested = build.legacy([build.Call(build.FROM_BYTES, good), build.Persistent(pid)], {"k": array})
    assert "where none belongs" in refused(nested, read)
    assert "where none belongs" in refused(build.dumps(build.Call(build.FROM_BYTES, good)), loads)


def test_memory_is_bounded_by_the_file():
    """Many overlapping views of one storage end where they need far more than the file has."""
    array = np.zeros(1 << 20, np.float32)
    storage = build.Call(build.FROM_BYTES, build.blob(array))
    views = [build.Call(build.TENSOR, storage, i, (1 << 19,), (1,), False, {}) for i in range(100)]
    data = build.dumps(views)
    top = torch_files.load_pickle(data)
    assert all(type(t) is Tensor for t in top)
    tracemalloc.start()
    with pytest.raises(UnsafeOrDamaged, match="far more memory"):
        [t.array() for t in top]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5 * len(data) + (20 << 20)


def test_announced_sizes_allocate_nothing():
    bodies = [b"X" + b"\xff" * 4, b"\x8d" + b"\xff" * 7 + b"\0", b"B" + b"\xff" * 4, b"\x8e" + b"\xff" * 7 + b"\0"]
    tracemalloc.start()
    for body in bodies:
        assert "bytes wanted" in refused(b"\x80\x04]" + body + b".")
    assert loads(b"\x80\x04]r\xff\xff\xff\xff.") == []  # a memo index is a key, not a length
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_check_graph_is_linear_in_shared_parts():
    value = []
    for _ in range(90):
        value = [value, value, value]
    check_graph(value)  # 3**90 paths
