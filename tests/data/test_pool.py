"""The pool of fakes: read back as written; damage is seen and named."""

import numpy as np
import pytest

from ddo_jax import files
from ddo_jax.data import pool
from ddo_jax.errors import UserError


@pytest.fixture
def directory(tmp_path):
    """A finished pool of two chunks."""
    directory = tmp_path / "001" / "pool"
    directory.mkdir(parents=True)
    for i, (images, labels) in enumerate(chunks()):
        pool.write_chunk(directory, i, images, labels)
    files.write_json(directory / pool.MARKER, {"chunks": 2, "num_classes": 10})
    return directory


def chunks():
    rng = np.random.default_rng(0)
    for n in (6, 3):
        yield rng.integers(0, 17, (n, 8, 8, 1), np.uint8), rng.integers(0, 10, n, np.int32)


def test_round_trip(directory):
    """Breaks if order, dtype or content change between writing and reading."""
    images, labels = (np.concatenate(parts) for parts in zip(*chunks(), strict=True))
    source = pool.open_pool(directory)
    assert (len(source), source.num_classes, source.images.dtype) == (9, 10, np.uint8)
    assert np.array_equal(source.images, images) and np.array_equal(source.labels, labels)


def test_latents_round_trip(tmp_path):
    """Breaks if float32 latents are quantised on the way."""
    latents = np.random.default_rng(0).standard_normal((2, 4, 4, 4)).astype(np.float32)
    pool.write_chunk(tmp_path, 0, latents, np.zeros(2, np.int32))
    images, _ = pool.read_chunk(pool.chunk_path(tmp_path, 0))
    assert images.dtype == np.float32 and np.array_equal(images, latents)


@pytest.mark.parametrize("damage", ["torn", "empty", "flipped", "absent"])
def test_damaged_chunk_is_named(directory, damage):
    """Breaks if a torn, flipped or lost chunk is read as if it were whole, or not named."""
    path = pool.chunk_path(directory, 1)
    data = bytearray(path.read_bytes())
    if damage == "flipped":
        at = data.index(b"\x93NUMPY") + 128 + 40  # inside the images
        data[at] ^= 1
        path.write_bytes(data)
    elif damage == "absent":
        path.unlink()
    else:
        path.write_bytes(data[: len(data) // 2 if damage == "torn" else 0])
    assert not pool.is_whole(path) and pool.is_whole(pool.chunk_path(directory, 0))
    with pytest.raises(UserError, match="chunk-00001.npz"):
        pool.open_pool(directory)


def test_unfinished_pool_is_refused(directory):
    """Breaks if a pool without its marker is taken for a finished one."""
    (directory / pool.MARKER).unlink()
    with pytest.raises(UserError, match="no finished pool"):
        pool.open_pool(directory)
