"""The pool of fakes: read back as written; damage is seen and named."""

import tracemalloc

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


def latents(rows, channels=4):
    return np.random.default_rng(rows).standard_normal((rows, 4, 4, channels)).astype(np.float32)


@pytest.fixture
def latents_directory(tmp_path):
    """A finished pool of latents."""
    directory = tmp_path / "002" / "pool"
    directory.mkdir(parents=True)
    for i, n in enumerate((5, 5, 2)):
        pool.write_chunk(directory, i, latents(n), np.arange(n, dtype=np.int32))
    files.write_json(directory / pool.MARKER, {"chunks": 3, "num_classes": 5})
    return directory


def test_latents_round_trip(latents_directory):
    """Breaks if float32 latents are quantised on the way, or chunks land in the wrong rows."""
    images, _ = pool.read_chunk(pool.chunk_path(latents_directory, 1))
    assert images.dtype == np.float32 and np.array_equal(images, latents(5))
    source = pool.open_pool(latents_directory)
    assert (source.images.dtype, source.max_level, source.labels.dtype) == (np.float32, 0, np.int32)
    assert np.array_equal(source.images, np.concatenate([latents(n) for n in (5, 5, 2)]))
    assert source.labels.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1]


def test_a_pool_is_in_memory_once(tmp_path):
    """Breaks if all chunks are collected before they are joined: 3.3 GB would be 6.6."""
    chunk = np.zeros((16, 16, 16, 4), np.float32)
    for i in range(16):
        pool.write_chunk(tmp_path, i, chunk, np.zeros(16, np.int32))
    files.write_json(tmp_path / pool.MARKER, {"chunks": 16, "num_classes": 1})
    tracemalloc.start()
    source = pool.open_pool(tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < source.images.nbytes + 6 * chunk.nbytes


@pytest.mark.parametrize(
    "images, labels",
    [(latents(2, 3), 2), (latents(2).astype(np.float64), 2), (latents(2), 3), (latents(2)[0], 2)],
    ids=["channels", "dtype", "labels", "axes"],
)
def test_chunk_unlike_the_others_is_named(latents_directory, images, labels):
    """Breaks if a chunk is broadcast or cast into the pool."""
    pool.write_chunk(latents_directory, 2, images, np.zeros(labels, np.int32))
    with pytest.raises(UserError, match="chunk-00002.npz .*(expected float32|labels int32)"):
        pool.open_pool(latents_directory)


def test_damage_is_never_read(latents_directory):
    """Breaks if a flipped bit anywhere in a chunk changes what is read, or ends in a traceback."""
    path, rng = pool.chunk_path(latents_directory, 2), np.random.default_rng(0)
    whole, wanted = path.read_bytes(), pool.open_pool(latents_directory)
    for at in rng.integers(0, len(whole), 300):
        data = bytearray(whole)
        data[at] ^= 1 << rng.integers(0, 8)
        path.write_bytes(data)
        try:
            source = pool.open_pool(latents_directory)  # a date in the zip's directory, say
        except UserError as e:
            assert "chunk-00002.npz" in str(e)
        else:
            assert source.fingerprint == wanted.fingerprint


@pytest.mark.parametrize("damage", ["torn", "empty", "flipped", "absent"])
@pytest.mark.parametrize("kind", ["directory", "latents_directory"])
def test_damaged_chunk_is_named(kind, damage, request):
    """Breaks if a torn, flipped or lost chunk is read as if it were whole, or not named."""
    directory = request.getfixturevalue(kind)
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
    assert pool.kept_digest(path, None, np.arange(3)) is None
    assert pool.kept_digest(pool.chunk_path(directory, 0), None, np.arange(6)) is not None
    with pytest.raises(UserError, match="chunk-00001.npz"):
        pool.open_pool(directory)


def test_unfinished_pool_is_refused(directory):
    """Breaks if a pool without its marker is taken for a finished one."""
    (directory / pool.MARKER).unlink()
    with pytest.raises(UserError, match="no finished pool"):
        pool.open_pool(directory)


def test_exchanged_and_replaced_chunks_are_seen(tmp_path):
    """Breaks if two chunks of one size change places, or one is another run's, without a word."""
    rng, rows = np.random.default_rng(0), np.arange(8, dtype=np.uint32)
    parts = [(rng.integers(0, 17, (8, 8, 8, 1), np.uint8), rng.integers(0, 10, 8, np.int32)) for _ in range(3)]
    digests = [pool.write_chunk(tmp_path, i, *part, rows + 8 * i) for i, part in enumerate(parts[:2])]
    files.write_sealed(tmp_path / pool.MARKER, {"chunks": 2, "num_classes": 10, "digests": digests})
    marker = files.read_sealed(tmp_path / pool.MARKER)
    assert pool.problem(tmp_path, marker) == "" and len(pool.open_pool(tmp_path)) == 16
    first, second = (pool.chunk_path(tmp_path, i) for i in range(2))
    a, b = first.read_bytes(), second.read_bytes()
    first.write_bytes(b), second.write_bytes(a)
    assert pool.kept_digest(first, None, rows) is None, "of an interrupted pool the seeds show it"
    assert "chunk-00000.npz" in pool.problem(tmp_path, marker)
    with pytest.raises(UserError, match="chunk-00000.npz .*does not match its digest"):
        pool.open_pool(tmp_path)
    pool.write_chunk(tmp_path, 0, *parts[0], rows)
    pool.write_chunk(tmp_path, 1, *parts[2], rows + 8)
    with pytest.raises(UserError, match="chunk-00001.npz .*does not match its digest"):
        pool.open_pool(tmp_path)


@pytest.mark.parametrize(
    "marker", ["", "{", "[]", "{}", '{"chunks": 1e99}', '{"chunks": -1}', '{"chunks": 2, "digests": 3}']
)
def test_a_damaged_record_of_a_pool_is_named(directory, marker):
    """Breaks if it ends in a traceback, or in memory for 10^99 chunks."""
    (directory / pool.MARKER).write_text(marker)
    with pytest.raises(UserError, match="result.json"):
        pool.open_pool(directory)
