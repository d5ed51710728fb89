"""Damaged and hostile inputs of every kind through the functions of the commands: `python tests/fuzz.py --count=10000`.

Allowed are success and one line (UserError, UnsafeOrDamaged). Counted are: code executed, hangs (10 s), anything else
that comes out, memory beyond 4 GiB among it. The table says how many there were of each kind.
"""

import argparse
import contextlib
import io
import json
import os
import pathlib
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import zipfile

import numpy as np

ROOT = pathlib.Path(__file__).parents[1]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from PIL import Image  # noqa: E402

from ddo_jax import files  # noqa: E402
from ddo_jax.convert import __main__ as command  # noqa: E402
from ddo_jax.convert import safetensors  # noqa: E402
from ddo_jax.convert.inert import UnsafeOrDamaged  # noqa: E402
from ddo_jax.data import pool, sources  # noqa: E402
from ddo_jax.errors import UserError  # noqa: E402
from ddo_jax.evaluate import image_sets, references  # noqa: E402
from ddo_jax.evaluate.collect import MAIN  # noqa: E402
from ddo_jax.evaluate.features import FeatureNet  # noqa: E402
from tests.convert import conftest as build  # noqa: E402
from tests.convert import test_fuzz as bytes_  # noqa: E402

SECONDS, MEMORY = 10, 4 * 2**30
ODD = [0, -1, 1, 2, 3, 7, 2**31 - 1, 2**31, 2**63, 10**12, 10**30, 1e30, -0.5, float("nan"), float("inf"), None, True]
ODD += ["", "x", "inf", [], [0], [-1], [1, 2, 3], [[1]], {}, {"a": 1}, [10**9] * 3, "\u2028", "../../x"]
WATCH = {"armed": False, "events": []}
# `exec` and `import` are watched by tests/convert/test_fuzz.py: here converters are imported, NumPy parses literals
HOSTILE = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.", "socket.connect", "socket.__new__")


def _hook(event, args):
    if WATCH["armed"] and event.startswith(HOSTILE):
        WATCH["events"].append((event, str(args)[:100]))


# -- good inputs: kind -> function(folder) that writes one ---------------------------------------------------


def small():
    """(config, state) of the small DDPM++ of the goldens, and of EDM2."""
    made = []
    for name in ("edm_ddpmpp_small", "edm2_small"):
        with np.load(ROOT / "tests" / "goldens" / f"{name}.npz") as golden:
            config = json.loads(str(golden["config"]))
            made.append((config, {k[6:]: golden[k] for k in golden.files if k.startswith("param/")}))
    return made


EDM, EDM2 = small()


def mutated(rng, value):
    """A copy of a JSON value with one to three entries replaced, dropped or added, at any depth."""
    value = json.loads(json.dumps(value))
    for _ in range(rng.choice((1, 1, 2, 3))):
        node = value
        while isinstance(node, dict | list) and node:
            key = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
            if isinstance(node[key], dict | list) and node[key] and rng.random() < 0.7:
                node = node[key]
                continue
            action = rng.random()
            if action < 0.8:
                node[key] = rng.choice(ODD)
            elif action < 0.9:
                del node[key]
            elif isinstance(node, dict):
                node[rng.choice(("x", "img_resolution", "class_name"))] = rng.choice(ODD)
            break
    return value


def deep(rng) -> bytes:
    n = rng.choice((100, 3000, 100_000))
    return rng.choice((b"[" * n, b'{"a":' * n, b"[" * n + b"]" * n))


def broken(rng, data: bytes) -> bytes:
    return rng.choice((bytes_.flip, bytes_.cut))(rng, data, "") if data else b""


def state_of(rng, state):
    """A state dict with a parameter renamed, dropped, reshaped or of another dtype."""
    state = dict(state)
    for _ in range(rng.choice((0, 1, 1, 2))):
        name = rng.choice(list(state))
        array = state.pop(name)
        new = rng.choice((name, name, name + "x", "a.b", name.replace("0", "9"), "pos_1LC"))
        change = rng.randrange(5)
        if change == 0:
            array = array[..., None]
        elif change == 1:
            array = array.ravel()[:0]
        elif change == 2:
            array = array.astype(np.float16)
        elif change == 3:
            array = np.zeros(rng.choice(((), (0, 3), (7,), (1, 1, 1, 1), (3, 0, 3, 3))), np.float32)
        if change < 4:
            state[new] = array
    return state


def pickled(rng, folder, which):
    (config, state), make = (EDM, build.nvidia) if which == "nvidia" else (EDM2, build.edm2_nvidia)
    if rng.random() < 0.5:
        data = make(mutated(rng, config), state_of(rng, state))
    else:
        data = bytes_.mutate(rng, which, make(config, state), str(folder / "sentinel"))
    return write(folder / "f.pkl", data)


def torched(rng, folder, which):
    make = build.torch_zip if which == "zip" else build.torch_legacy
    if rng.random() < 0.5:
        data = make(state_of(rng, EDM[1]))
    else:
        data = bytes_.mutate(rng, which, make(EDM[1]), str(folder / "sentinel"))
        data = zip_fields(rng, data) if which == "zip" and rng.random() < 0.3 else data
    return write(folder / "f.pth", data)


def tensors(rng, folder):
    config, state = rng.choice((EDM, EDM2))
    kind = rng.choice(("edm", "edm2", "var", "vqvae", "sdvae", "inception", "dinov2", "x"))
    about = json.dumps(mutated(rng, config)) if rng.random() < 0.8 else deep(rng)[:5000].decode()
    data = safetensors.dumps(state_of(rng, state), {"ddo_jax_kind": kind, "ddo_jax_config": about})
    return write(folder / "f.safetensors", bytes_.mutate(rng, "safetensors", data, "") if rng.random() < 0.3 else data)


def write(path, data):
    path.write_bytes(data)
    return path


def npy(rng, array) -> bytes:
    """A .npy with an odd header."""
    shape = list(array.shape) or [1]
    shape[rng.randrange(len(shape))] = rng.choice((0, -1, 1, 10**12, 2**63, 2**31, 5, "3", None, 1.5, True))
    descr = rng.choice(
        (array.dtype.str, array.dtype.str, "|O", "<f8", "<M8[s]", "|S0", "<U9", "x", "<f16", [("a", "<i4")])
    )
    about = {"descr": descr, "fortran_order": rng.choice((False, False, True, 3)), "shape": tuple(shape)}
    if rng.random() < 0.2:
        about.pop(rng.choice(list(about)))
    text = (
        repr(about) if rng.random() < 0.8 else rng.choice(("(" * 5000, "{'a':" * 300, "[1,", "\\", "{" + "1:2," * 9000))
    )
    head = text.encode() + b"\n"
    if rng.random() < 0.2:
        return (
            b"\x93NUMPY" + bytes([rng.choice((0, 2, 3, 9)), 0]) + struct.pack("<I", len(head)) + head + array.tobytes()
        )
    return b"\x93NUMPY\1\0" + struct.pack("<H", min(len(head), 65535)) + head + array.tobytes()


def zip_fields(rng, data: bytes) -> bytes:
    """Numbers in the headers of a zip replaced: versions, flags, methods, sizes, offsets, counts."""
    out = bytearray(data)
    for mark, fields in ((b"PK\3\4", 30), (b"PK\1\2", 46), (b"PK\5\6", 22)):
        at = [i for i in range(len(data) - fields) if data[i : i + 4] == mark] or [0]
        if rng.random() < 0.6:
            i = rng.choice(at) + rng.randrange(4, fields, 2)
            out[i : i + 2] = rng.choice(
                (b"\0\0", b"\xff\xff", b"\1\0", b"\x63\0", b"\x0c\0", b"\x0e\0", rng.randbytes(2))
            )
    return bytes(out)


def archive(rng, arrays) -> bytes:
    """An .npz of which one array is odd, then perhaps broken as a whole."""
    buffer, odd = io.BytesIO(), rng.choice([*arrays, None])
    method = rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
    with zipfile.ZipFile(buffer, "w", method) as f:
        for name, array in arrays.items():
            plain = io.BytesIO()
            np.save(plain, array)
            f.writestr(f"{name}.npy", npy(rng, array) if name == odd else plain.getvalue())
        if rng.random() < 0.1:
            f.writestr(rng.choice(("../x", "a.txt", "b.npy", "")), b"0" * rng.choice((0, 10, 10**7)))
    data = buffer.getvalue()
    how = rng.random()
    return broken(rng, data) if how < 0.3 else zip_fields(rng, data) if how < 0.6 else data


def values(rng, array):
    """Sometimes the numbers themselves are odd."""
    array = np.array(array)
    if rng.random() < 0.3 and array.size:
        flat = array.reshape(-1)
        flat[rng.randrange(flat.size)] = (
            rng.choice((0, 1, 200)) if array.dtype == np.uint8 else rng.choice((-1, 2**31 - 1, 7))
        )
    if rng.random() < 0.1:
        array = rng.choice((array[:0], array[None], array.astype(np.float64), array.T))
    return array


LENGTH = 6


def statistics(rng, folder):
    x = np.random.default_rng(0).normal(size=(50, LENGTH))
    arrays = {"mu": values(rng, x.mean(0)), "sigma": values(rng, np.cov(x.T)), "num_images": np.int64(50)}
    if rng.random() < 0.3:
        import pickle

        value = {"fid": {"mu": x.mean(0), "sigma": np.cov(x.T)}, "num_images": 50}
        data = pickle.dumps(value, protocol=4)
        change = rng.choice((*bytes_.PICKLE, bytes_.flip, bytes_.cut))
        return write(folder / "f.pkl", change(rng, data, str(folder / "sentinel")))
    return write(folder / "f.npz", archive(rng, arrays))


def pictures(n=4, side=4):
    return np.random.default_rng(n).integers(0, 255, (n, side, side, 3), np.uint8)


def image_npz(rng, folder):
    arrays = {"arr_0": values(rng, pictures()), "labels": values(rng, np.arange(4)), "seeds": np.arange(4)}
    return write(folder / "f.npz", archive(rng, arrays))


def png(image) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return buffer.getvalue()


def labelled(rng) -> dict[str, bytes]:
    """Members of a data set: pictures and dataset.json, one of them odd."""
    members = {f"{i}.png": png(image) for i, image in enumerate(pictures())}
    table = {"labels": [[f"{i}.png", i % 2] for i in range(4)], "classes": ["a", "b"]}
    members["dataset.json"] = json.dumps(table).encode()
    odd = rng.choice([*members, "dataset.json", "dataset.json"])
    if odd == "dataset.json":
        text = json.dumps(mutated(rng, table)).encode()
        members[odd] = rng.choice((text, text, text, broken(rng, text), deep(rng)))
    else:
        members[odd] = broken(rng, members[odd])
    return members


def image_zip(rng, folder):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as f:
        for name, data in labelled(rng).items():
            f.writestr(name, data)
    data = buffer.getvalue()
    how = rng.random()
    return write(folder / "f.zip", broken(rng, data) if how < 0.2 else zip_fields(rng, data) if how < 0.5 else data)


def image_folder(rng, folder):
    path = folder / "set"
    path.mkdir()
    for name, data in labelled(rng).items():
        (path / name).write_bytes(data)
    return path


def pool_folder(rng, folder):
    path = files.epath.Path(folder / "pool")
    path.mkdir()
    parts = [(pictures(n), np.arange(n, dtype=np.int32) % 2) for n in (4, 2)]
    digests = [pool.write_chunk(path, i, *part, np.arange(len(part[0]))) for i, part in enumerate(parts)]
    marker = {"chunks": 2, "num_classes": 2, "digests": digests}
    if rng.random() < 0.5:
        text = json.dumps(mutated(rng, marker)).encode()
        (path / pool.MARKER).write_bytes(rng.choice((text, text, broken(rng, text), deep(rng))))
        return path
    files.write_sealed(path / pool.MARKER, marker if rng.random() < 0.5 else {"chunks": 2, "num_classes": 2})
    images, labels = rng.choice(parts)
    data = archive(rng, {"images": values(rng, images), "labels": values(rng, labels)})
    (path / f"chunk-0000{rng.randrange(2)}.npz").write_bytes(data)
    return path


# -- what reads them -----------------------------------------------------------------------------------------


def convert(path):
    how = ["--dry_run"] if path.stat().st_size % 2 else [str(path.with_name("dst.safetensors")), "--force"]
    command.run(command.parser().parse_args([str(path), *how]))


def reference(path):
    network = FeatureNet("fuzz", "0", "fid", 1.0, lambda images: {"features": np.zeros((len(images), LENGTH))})
    references.load_file(path, {"fid": LENGTH}, {"inception": network, MAIN: network})


def score_set(path):
    for _ in image_sets.open_images(str(path)).records(3):
        pass


def train_set(path):
    source = sources.open_source(f"{'zip' if path.suffix else 'folder'}:{path}", "train")
    source.read(np.arange(len(source)))


def open_pool(path):
    source = pool.open_pool(path)
    source.read(np.arange(len(source)))


KINDS = {
    "nvidia": (lambda r, f: pickled(r, f, "nvidia"), convert, 12),
    "edm2": (lambda r, f: pickled(r, f, "edm2"), convert, 12),
    "torch-zip": (lambda r, f: torched(r, f, "zip"), convert, 8),
    "torch-legacy": (lambda r, f: torched(r, f, "legacy"), convert, 8),
    "safetensors": (tensors, convert, 15),
    "references": (statistics, reference, 12),
    "image npz": (image_npz, score_set, 10),
    "image zip": (image_zip, score_set, 5),
    "image folder": (image_folder, score_set, 3),
    "data zip": (image_zip, train_set, 5),
    "data folder": (image_folder, train_set, 2),
    "pool": (pool_folder, open_pool, 8),
}  # {kind: (makes one, reads it, share in percent)}


class Hang(BaseException):
    """Not an Exception: no handler on the way takes it."""


def _alarm(*_):
    raise Hang


def attempt(kind: str, seed: int, index: int, folder: pathlib.Path) -> str:
    """ "accepted", "refused", "executed", "hang" or the exception's text."""
    make, read, _ = KINDS[kind]
    rng = random.Random(f"{kind} {seed} {index}")
    for _ in range(50):  # some mutations are too odd for the writers of this project's tests themselves
        with contextlib.suppress(Exception):
            path = make(rng, folder)
            break
        shutil.rmtree(folder)
        folder.mkdir()
    WATCH["events"].clear()
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    WATCH["armed"] = True
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            read(path)
        outcome = "accepted"
    except (UserError, UnsafeOrDamaged) as e:
        outcome = "refused" if "\n" not in str(e) and len(str(e)) < 700 else f"not one line: {str(e)[:200]!r}"
    except Hang:
        outcome = "hang"
    except Exception as e:
        where = e.__traceback__
        while where.tb_next is not None:
            where = where.tb_next
        outcome = f"{type(e).__name__}: {str(e)[:120]} ({where.tb_frame.f_code.co_filename}:{where.tb_lineno})"
    finally:
        WATCH["armed"] = False
        signal.setitimer(signal.ITIMER_REAL, 0)
    return f"executed {WATCH['events'][0]}" if WATCH["events"] or (folder / "sentinel").exists() else outcome


def limit_memory() -> None:
    used = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.RLIM_INFINITY))


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--count", type=int, default=1000, help="inputs in all, if all kinds are read")
    p.add_argument("--kinds", default="", help=", ".join(KINDS))
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args()
    sys.addaudithook(_hook)
    signal.signal(signal.SIGALRM, _alarm)
    for kind in KINDS:  # what is imported on first use takes address space, too
        with tempfile.TemporaryDirectory() as folder:
            attempt(kind, -1, 0, pathlib.Path(folder))
    limit_memory()
    wrong, root = 0, pathlib.Path(tempfile.mkdtemp())
    print(
        f"{'kind':<14} {'inputs':>6} {'accepted':>8} {'refused':>8} {'executed':>8} {'hangs':>6} {'others':>7} {'s':>5}"
    )
    for kind in [k.strip() for k in args.kinds.split(",") if k] or KINDS:
        number = args.count * KINDS[kind][2] // 100
        began, counts, examples = time.monotonic(), {}, []
        for i in range(number):
            folder = root / "one"
            folder.mkdir()
            outcome = attempt(kind, args.seed, i, folder)
            shutil.rmtree(folder)
            name = outcome.split()[0] if outcome.split()[0] in ("accepted", "refused", "executed", "hang") else "other"
            counts[name] = counts.get(name, 0) + 1
            if name in ("executed", "hang", "other"):
                examples.append(f"    {kind} {i}: {outcome}")
        found = [counts.get(name, 0) for name in ("accepted", "refused", "executed", "hang", "other")]
        print(f"{kind:<14} {number:>6}", *(f"{n:>{w}}" for n, w in zip(found, (8, 8, 8, 6, 7), strict=True)), end="")
        print(f" {time.monotonic() - began:>5.0f}", *examples[:5], sep="\n" if examples else "", flush=True)
        wrong += sum(found[2:])
    os.rmdir(root)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
