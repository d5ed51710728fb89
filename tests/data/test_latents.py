"""Sets of .npy latents as sources: values, order and labels as written; whatever is wrong is named, never unpickled."""

import io
import itertools
import json
import pickle
import zipfile

import numpy as np
import pytest

from ddo_jax.data import latents, sources
from ddo_jax.data import make as making
from ddo_jax.data.pipeline import batches
from ddo_jax.errors import UserError

N, CLASSES = 7, 4
_RNG = np.random.default_rng(0)
MEAN = _RNG.standard_normal((N, 4, 6, 4)).astype(np.float32)  # H, W, C
STD = _RNG.uniform(0.0, 2.0, (N, 4, 6, 4)).astype(np.float32)
MOMENTS = np.concatenate([MEAN, STD], -1)
LABELS = np.array([(3 * i + 1) % CLASSES for i in range(N)], np.int32)
NAMES = [f"00000/img-mean-std-{i:08d}.npy" for i in range(N)]
ALL = np.arange(N)


def npy(array, **options):
    buffer = io.BytesIO()
    np.save(buffer, array, **options)
    return buffer.getvalue()


FILES = {name: npy(np.ascontiguousarray(m.transpose(2, 0, 1))) for name, m in zip(NAMES, MOMENTS, strict=True)}
TABLE = [[name, int(y)] for name, y in zip(NAMES, LABELS, strict=True)]
FOURTH = MOMENTS[3].transpose(2, 0, 1)


def write(path, files=FILES, labels=TABLE):
    """A zip if the path says so, else a folder."""
    files = files | ({"dataset.json": json.dumps({"labels": labels}).encode()} if labels != "absent" else {})
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as z:
            for name, data in files.items():
                z.writestr(name, data)
        return path
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


def opened(path, split="train"):
    return sources.open_source(str(path), split)


@pytest.mark.parametrize("place", ["set.zip", "set"])
@pytest.mark.parametrize("cached", [True, False])
def test_read_gives_what_was_written(tmp_path, place, cached, monkeypatch):
    """Breaks if a value, the layout (NHWC, mean first), the order or a label changes, in the cache or without it."""
    monkeypatch.setattr(sources, "CACHE_BYTES", 2**30 if cached else 0)
    shuffled = dict(sorted(FILES.items(), reverse=True))
    s = opened(write(tmp_path / place, shuffled, TABLE[::-1]))
    assert (len(s), s.num_classes, s.image_shape, s.dtype, s.max_level) == (N, CLASSES, (4, 6, 8), np.float32, 0)
    indices = np.array([5, 0, 5, 6])
    for _ in range(2):
        record = s.read(indices)
        assert record["image"].dtype == np.float32 and record["label"].dtype == np.int32
        assert np.array_equal(record["image"], MOMENTS[indices]) and np.array_equal(record["label"], LABELS[indices])
        record["image"][:] = 0  # the caller's copy


def test_the_cache_counts_bytes(tmp_path, monkeypatch):
    """Breaks if a set of float32 is taken for one of a quarter of its size."""
    path = write(tmp_path / "a.zip")
    for limit, kept in ((MOMENTS.nbytes, True), (MOMENTS.nbytes - 1, False)):
        monkeypatch.setattr(sources, "CACHE_BYTES", limit)
        s = opened(path)
        s.read(ALL[:1])
        assert (s._cache is not None) == kept


@pytest.mark.parametrize("place", ["set.zip", "set"])
def test_parts_and_no_labels(tmp_path, place):
    """Breaks if the folders 00000/ of EDM2 become classes, or a part is another one than of images."""
    s = opened(write(tmp_path / place, labels="absent"), "train[-2:]")
    assert s.num_classes == 0 and not s.read(ALL[:2])["label"].any()
    assert np.array_equal(s.read(ALL[:2])["image"], MOMENTS[-2:])


def test_feeds_the_pipeline(tmp_path):
    """Breaks if the host pipeline cannot read latents."""
    epoch = list(itertools.islice(batches(opened(write(tmp_path / "a.zip")), 1, seed=0), N))
    found = np.concatenate([b["image"] for b in epoch])
    assert found.dtype == np.float32 and sorted(x.tobytes() for x in found) == sorted(x.tobytes() for x in MOMENTS)


@pytest.mark.parametrize(
    "stored",
    [FOURTH.astype(np.float16), FOURTH.astype(">f4"), np.asfortranarray(FOURTH)],
    ids=["half", "big", "fortran"],
)
def test_other_ways_to_store_the_values(tmp_path, stored):
    """Breaks if float16 is not widened, or a byte or array order is not undone."""
    s = opened(write(tmp_path / "a", FILES | {NAMES[3]: npy(stored)}))
    wanted = stored.astype(np.float32).transpose(1, 2, 0)
    record = s.read(np.array([3]))["image"]
    assert record.dtype == np.float32 and np.array_equal(record[0], wanted)


class Bomb:
    """Unpickling it would fail the test loudly."""

    def __reduce__(self):
        return pytest.fail, ("a pickle was opened",)


def changed(channel, value):
    array = FOURTH.copy()
    array[channel, 1, 2] = value
    return npy(array)


HUGE = npy(np.zeros((8, 4, 6), np.float32)).replace(b"(8, 4, 6)", b"(8, 4, 6000000000000)")[:1000]
BAD = {
    "torn": (FILES[NAMES[3]][:-1], r"float32 \(8, 4, 6\): damaged latents \(767 of 768 bytes\)"),
    "longer": (FILES[NAMES[3]] + b"\0", r"damaged latents \(769 of 768 bytes\)"),
    "empty": (b"", "damaged latents .*; 0 bytes"),
    "text": (b"<html>404</html>", "damaged latents"),
    "header": (FILES[NAMES[3]].replace(b"'descr'", b"'descr(", 1), "damaged latents"),
    "version": (b"\x93NUMPY\3\0" + FILES[NAMES[3]][8:], "npy version"),
    "huge": (HUGE, "damaged latents"),
    "float64": (npy(FOURTH.astype(np.float64)), r"float64 \(8, 4, 6\); allowed: float32 or float16"),
    "pixels": (npy(np.zeros((3, 8, 8), np.uint8)), r"uint8 \(3, 8, 8\); allowed: float32"),
    "objects": (npy(np.array([Bomb()]), allow_pickle=True), "object .*a pickle, which is never opened"),
    "axes": (npy(FOURTH[None]), r"float32 \(1, 8, 4, 6\); allowed: .*\(2 C, H, W\)"),
    "odd": (npy(FOURTH[:7]), r"float32 \(7, 4, 6\); allowed: .*\(2 C, H, W\)"),
    "none": (npy(FOURTH[:, :0]), r"float32 \(8, 0, 6\); allowed"),
    "shape": (npy(FOURTH[:, :3]), r"\(3, 6, 8\); allowed: \(4, 6, 8\) as the first image, .*img-mean-std-00000000.npy"),
    "nan": (changed(0, np.nan), "holds NaN or infinity"),
    "infinite": (changed(7, np.inf), "holds NaN or infinity"),
    "log variance": (changed(4, -2.5), "-2.5 in channels 4 to 7, the standard deviation; allowed: 0 or more"),
}


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("cached", [True, False])
def test_bad_latents_are_named(tmp_path, kind, cached, monkeypatch):
    """Breaks if a file that holds no posterior is read, skipped or executed, or ends in a traceback."""
    monkeypatch.setattr(sources, "CACHE_BYTES", 2**30 if cached else 0)
    data, message = BAD[kind]
    s = opened(write(tmp_path / "a", FILES | {NAMES[3]: data}))
    with pytest.raises(UserError, match=f"img-mean-std-00000003.npy: .*{message}") as e:
        s.read(np.arange(2, 6))
    assert "\n" not in str(e.value)


def test_a_negative_mean_is_fine(tmp_path):
    """Breaks if the wrong half is checked for negative values."""
    assert np.array_equal(latents.decode(changed(3, -9.0), "x")[1, 2, 3], -9.0)


def test_bad_first_file_is_named_on_opening(tmp_path):
    """Breaks if the first file, which sets the shape, is not checked like the others."""
    with pytest.raises(UserError, match="img-mean-std-00000000.npy: object"):
        opened(write(tmp_path / "a.zip", FILES | {NAMES[0]: BAD["objects"][0]}))


def test_a_pickle_named_npy_is_not_opened(tmp_path):
    """Breaks if NumPy's fallback, which unpickles what has no magic, is ever reached."""
    with pytest.raises(UserError, match="damaged latents"):
        opened(write(tmp_path / "a.zip", FILES | {NAMES[0]: pickle.dumps(Bomb())}))


def test_flipped_bit_in_a_zip_is_named(tmp_path):
    """Breaks if the zip's CRC is not checked: any float is a possible latent."""
    path = write(tmp_path / "a.zip")
    data = bytearray(path.read_bytes())
    data[data.index(FILES[NAMES[5]]) + 200] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="img-mean-std-00000005.npy: damaged"):
        opened(path).read(ALL)


@pytest.mark.parametrize("place", ["set.zip", "set"])
def test_mixed_sets_are_refused(tmp_path, place):
    """Breaks if one of the two kinds is silently left out."""
    path = write(tmp_path / place, FILES | {"00000/img00000000.png": b""}, "absent")
    wanted = "both images .00000/img00000000.png. and latents .00000/img-mean-std-00000000.npy."
    with pytest.raises(UserError, match=wanted):
        opened(path)


def test_who_wants_pixels_gets_no_latents(tmp_path):
    """Breaks if `make` or the evaluation are handed floats instead of pixels."""
    for place in ("set.zip", "set"):
        path = write(tmp_path / place)
        with pytest.raises(UserError, match=f"{place}: latents .*npy.*, which are not images"):
            sources.open_records(str(path), "train")
        with pytest.raises(UserError, match="which are not images"):
            making.make(str(path), str(tmp_path / "b.zip"))


def test_bad_labels_are_named(tmp_path):
    """Breaks if labels of latents are checked less than those of images."""
    with pytest.raises(UserError, match="no label for 00000/img-mean-std-00000006.npy"):
        opened(write(tmp_path / "a.zip", labels=TABLE[:-1]))
    with pytest.raises(UserError, match="vectors are not supported"):
        opened(write(tmp_path / "b.zip", labels=[[n, [0.5, 0.5]] for n in NAMES]))


@pytest.mark.parametrize("ending", [".zip", ""])
def test_fingerprints(tmp_path, ending):
    """Breaks if a fingerprint ignores a value, or depends on the place."""
    sets = (FILES, FILES, FILES | {NAMES[4]: npy(FOURTH)})
    prints = [opened(write(tmp_path / f"{i}{ending}", files)).fingerprint for i, files in enumerate(sets)]
    assert prints[0] == prints[1] != prints[2]


def test_encode_is_the_inverse():
    """Breaks if a value or the layout changes between writing and reading, or what cannot be read is written."""
    data = latents.encode(MEAN[2], STD[2], "x")
    assert data == FILES[NAMES[2]]
    assert np.array_equal(latents.decode(data, "x"), MOMENTS[2])
    with pytest.raises(UserError, match="image 7: holds NaN"):
        latents.encode(MEAN[0] * np.float32(np.nan), STD[0], "image 7")


def test_array_source():
    """Breaks if a pool of latents claims grey levels, or hides that it holds floats."""
    s = sources.ArraySource("pool", MOMENTS, LABELS, CLASSES)
    assert (s.dtype, s.max_level, s.image_shape) == (np.float32, 0, (4, 6, 8))
    pixels = sources.ArraySource("pool", np.full((2, 4, 4, 1), 16, np.uint8), LABELS[:2], CLASSES)
    assert (pixels.dtype, pixels.max_level) == (np.uint8, 16)
