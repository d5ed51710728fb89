"""The digits builder and the data source: what is read back is what scikit-learn ships."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ddo_jax.data import sources
from ddo_jax.errors import UserError

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def splits(digits_directory):
    return {name: sources.open_source("digits", name) for name in ("train", "test")}


@pytest.fixture(scope="module")
def original():
    from sklearn.datasets import load_digits

    return load_digits()


def test_sizes_and_range(splits):
    """Breaks if the split sizes or the 17 grey levels change."""
    assert {name: len(s) for name, s in splits.items()} == {"train": 1437, "test": 360}
    for s in splits.values():
        assert s.images.shape[1:] == (8, 8, 1) and s.images.dtype == np.uint8 and s.labels.dtype == np.int32
        assert s.images.min() == 0 and s.images.max() == 16
        assert s.num_classes == 10


def test_stratified(splits, original):
    """Breaks if the test images are drawn without regard to their class."""
    share = 360 / len(original.target)
    for k in range(10):
        expected = share * np.sum(original.target == k)
        assert abs(np.sum(splits["test"].labels == k) - expected) <= 1


def test_reads_back_what_scikit_learn_ships(splits, original):
    """Breaks if PNG, array_record or the split lose, double or change an image or its label."""

    def rows(images, labels):
        return sorted(x.tobytes() + bytes([y]) for x, y in zip(images.astype(np.uint8), labels, strict=True))

    images = np.concatenate([s.images[..., 0] for s in splits.values()])
    labels = np.concatenate([s.labels for s in splits.values()])
    assert rows(images, labels) == rows(original.images, original.target)


def test_fingerprint_names_the_content(splits):
    """Breaks if the fingerprint ignores the labels or the images."""
    s = splits["test"]
    other_labels = sources.ArraySource("", s.images, np.roll(s.labels, 1), 10)
    other_images = sources.ArraySource("", np.roll(s.images, 1, 0), s.labels, 10)
    assert len({s.fingerprint, other_labels.fingerprint, other_images.fingerprint}) == 3


def test_reading_needs_no_tensorflow(digits_directory, splits):
    """Breaks if TFDS is used in a way that imports TensorFlow (in a fresh process: here others may have)."""
    code = (
        "import sys; from ddo_jax.data import sources; print(len(sources.open_source('digits', 'test')), "
        "'tensorflow' in sys.modules)"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["360", "False"]


def test_unknown_names_are_refused():
    """Breaks if a misspelt dataset or split ends in a traceback."""
    with pytest.raises(UserError, match="'digit'; allowed: digits"):
        sources.open_source("digit", "train")
    with pytest.raises(UserError, match="'tran'.*test, train"):
        sources.open_source("digits", "tran")


def test_directory_that_cannot_be_used(tmp_path):
    """Breaks if a data directory below a file ends in a traceback."""
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file.*config.data.dir"):
        sources.open_source("digits", "train", str(tmp_path / "file" / "data"))
