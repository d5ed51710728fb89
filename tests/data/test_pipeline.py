"""Batches by position: shuffling, hosts, resuming, flips, balanced labels."""

import itertools

import numpy as np
import pytest

from ddo_jax.data.labels import balanced_labels
from ddo_jax.data.pipeline import BatchSource, batches
from ddo_jax.data.sources import ArraySource

N, BATCH = 25, 10


@pytest.fixture(scope="module")
def source():
    images = np.random.default_rng(0).integers(0, 256, (N, 4, 6, 1), np.uint8)
    return ArraySource("noise", images, np.arange(N, dtype=np.int32), N)


def equal(a, b):
    return set(a) == set(b) and all(np.array_equal(a[k], b[k]) for k in a)


def test_every_epoch_visits_every_example_once(source):
    """Breaks if a batch that spans two epochs loses or doubles examples, or if all epochs have one order."""
    stream = BatchSource(source, BATCH, 0)
    labels = np.concatenate([stream[k]["label"] for k in range(5)]).reshape(2, N)
    assert [sorted(epoch) for epoch in labels.tolist()] == [list(range(N))] * 2
    assert not np.array_equal(labels[0], labels[1]) and not np.array_equal(labels[0], np.arange(N))


def test_batch_larger_than_the_data(source):
    """Breaks if a batch cannot span more than two epochs."""
    labels = BatchSource(source, 3 * N, 0)[0]["label"]
    assert np.bincount(labels).tolist() == [3] * N


def test_batch_is_a_function_of_seed_and_position(source):
    """Breaks if a batch depends on what was read before, or not on the seed."""
    one, two = (BatchSource(source, BATCH, 0, flip=True) for _ in range(2))
    forward = [one[k] for k in range(7)]
    backward = [two[k] for k in reversed(range(7))][::-1]
    assert all(map(equal, forward, backward))
    other = BatchSource(source, BATCH, 1, flip=True)
    assert not any(np.array_equal(forward[k]["label"], other[k]["label"]) for k in range(7))


def test_labels_stay_with_their_images(source):
    """Breaks if images and labels are permuted apart."""
    batch = BatchSource(source, BATCH, 3)[4]
    assert np.array_equal(batch["image"], source.images[batch["label"]])


def test_two_hosts_make_the_batch_of_one(source):
    """Breaks if order or flips depend on the number of hosts."""
    whole = BatchSource(source, BATCH, 0, flip=True)
    parts = [BatchSource(source, BATCH, 0, flip=True, host=(h, 2)) for h in range(2)]
    for k in range(6):
        joined = {key: np.concatenate([p[k][key] for p in parts]) for key in ("image", "label")}
        assert equal(joined, whole[k])


def test_index_is_that_of_the_whole_batch(source):
    """Breaks if a host gets its own rows' indices, or an index is given unasked or of what flips make another."""
    whole = BatchSource(source, BATCH, 0)
    for host in range(2):
        part = BatchSource(source, BATCH, 0, host=(host, 2), with_index=True)
        for k in (0, 2):  # batch 2 spans two epochs
            index = part[k]["index"]
            assert index.dtype == np.int64 and np.array_equal(index, whole[k]["label"])  # labels number the examples
            assert np.array_equal(part[k]["image"], source.images[index[5 * host : 5 * host + 5]])
    assert "index" not in whole[0]
    assert "index" not in BatchSource(source, BATCH, 0, flip=True, with_index=True)[0]
    stream = batches(source, BATCH, 0, start=2, with_index=True)
    assert equal(next(stream), BatchSource(source, BATCH, 0, with_index=True)[2])


def test_hosts_must_divide_the_batch(source):
    """Breaks if rows are dropped silently."""
    with pytest.raises(ValueError, match="10 .*3 hosts"):
        BatchSource(source, BATCH, 0, host=(0, 3))


def test_resume_continues_the_stream(source):
    """Breaks if Grain's slicing counts from elsewhere, or its threads change the order."""
    stream = list(itertools.islice(batches(source, BATCH, 0, flip=True), 8))
    resumed = list(itertools.islice(batches(source, BATCH, 0, flip=True, start=5), 3))
    assert all(map(equal, stream[5:], resumed))


def test_flips_mirror_the_width_of_about_half(source):
    """Breaks if another axis is mirrored, or all or no images are."""
    plain, flipping = BatchSource(source, BATCH, 0), BatchSource(source, BATCH, 0, flip=True)
    mirrored = 0
    for k in range(40):
        a, b = plain[k], flipping[k]
        assert np.array_equal(a["label"], b["label"])
        for x, y in zip(a["image"], b["image"], strict=True):
            same, mirror = np.array_equal(x, y), np.array_equal(x[:, ::-1], y)
            assert same != mirror
            mirrored += mirror
    assert 150 < mirrored < 250  # of 400; five standard deviations


def test_balanced_labels():
    """Breaks if class counts differ by more than one, or an unconditional model gets other labels than 0."""
    labels = balanced_labels(np.arange(23), 10)
    assert labels.dtype == np.int32
    counts = np.bincount(labels, minlength=10)
    assert counts.max() - counts.min() <= 1 and counts.sum() == 23
    assert not balanced_labels(np.arange(5), 0).any()
