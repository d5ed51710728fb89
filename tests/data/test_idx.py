"""MNIST's format: images and labels of both splits, plain or gzip, as any other set."""

import gzip

import numpy as np
import pytest

from ddo_jax.data import sources
from ddo_jax.errors import UserError
from tests.harness import idx


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (40, 5, 5)), np.arange(40) % 4
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images[:30])))
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels[:30])))
    (tmp_path / "t10k-images.idx3-ubyte").write_bytes(idx(images[30:]))
    (tmp_path / "t10k-labels.idx1-ubyte").write_bytes(idx(labels[30:]))
    return tmp_path, images.astype(np.uint8), labels


def test_pixels_and_labels(folder):
    """Breaks if rows and columns, or images and labels, are mixed, or a split is the other one."""
    path, images, labels = folder
    for split, rows in (("train", slice(30)), ("test", slice(30, 40))):
        source = sources.open_source(f"idx:{path}", split)
        assert (source.num_classes, source.image_shape, len(source)) == (4, (5, 5, 1), len(labels[rows]))
        record = source.read(np.arange(len(source)))
        np.testing.assert_array_equal(record["image"][..., 0], images[rows])
        np.testing.assert_array_equal(record["label"], labels[rows])
    assert source.name == f"idx:{path.name}:test"


def test_parts_share_nothing(folder):
    """Breaks if train[:80%] and train[80%:] meet, or have one fingerprint."""
    path, images, _ = folder
    parts = [sources.open_source(f"idx:{path}", split) for split in ("train[:80%]", "train[80%:]")]
    read = [p.read(np.arange(len(p)))["image"][..., 0].reshape(len(p), -1) for p in parts]
    assert sorted(map(bytes, np.concatenate(read))) == sorted(map(bytes, images[:30].reshape(30, -1)))
    assert parts[0].fingerprint != parts[1].fingerprint


IMAGES, LABELS = "train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"
DAMAGE = {
    "torn": (IMAGES, gzip.compress(idx(np.zeros((30, 5, 5)))[:-1]), r"749 values; its header says"),
    "no gzip": (IMAGES, b"\x1f\x8bnothing", "damaged or unreadable"),
    "floats": (IMAGES, gzip.compress(b"\0\0\x0d\3" + bytes(12)), r"begins with b'\\x00\\x00\\r\\x03'"),
    "fewer labels": (LABELS, gzip.compress(idx(np.zeros(29))), "they must be as many"),
    "huge header": (IMAGES, gzip.compress(b"\0\0\x08\3\xff\xff\xff\xff" + bytes(8)), "must be as many"),
    "no columns": (IMAGES, gzip.compress(idx(np.zeros((30, 5, 0)))), r"allowed: \[N, H, W\]"),
    "two channels": (IMAGES, gzip.compress(idx(np.zeros((30, 5, 5, 2)))), "with C = 1 or 3"),
}


@pytest.mark.parametrize("case", DAMAGE)  # by name: gzip writes the time, and workers must agree on their tests
def test_damage_is_named(folder, case):
    """Breaks if a torn file is read as fewer images, or ends in a traceback."""
    name, data, words = DAMAGE[case]
    (folder[0] / name).write_bytes(data)
    with pytest.raises(UserError, match=words):
        sources.open_source(f"idx:{folder[0]}", "train")


@pytest.mark.parametrize(
    "split, words",
    [("valid", "allowed: train, test"), ("train[:0]", "empty"), ("test", "the images of split 'test'; th")],
)
def test_what_is_not_there(folder, split, words):
    """Breaks if a split that does not exist is another one."""
    if split == "test":
        (folder[0] / "t10k-images.idx3-ubyte").unlink()
    with pytest.raises(UserError, match=words):
        sources.open_source(f"idx:{folder[0]}", split)
