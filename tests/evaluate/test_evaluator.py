"""The evaluator: distances to several references, accuracy, kept images, nearest neighbours."""

import itertools

import numpy as np
import pytest

from ddo_jax.data.sources import ArraySource
from ddo_jax.evaluate import image_sets, references
from ddo_jax.evaluate.evaluator import MAIN, Evaluator, First, Images
from ddo_jax.evaluate.features import FeatureNet
from ddo_jax.evaluate.neighbours import nearest_distance
from ddo_jax.evaluate.records import read

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 17, (90, 4, 4, 1), np.uint8)
LABELS = np.arange(90, dtype=np.int32) % 3
MAP = RNG.standard_normal((16, 5)).astype(np.float32)


def network(classes=True):
    def apply(images):
        x = images.reshape(len(images), -1).astype(np.float32) @ MAP
        return {"features": np.tanh(x / 30)} | ({"class_logits": x[:, :3]} if classes else {})

    return FeatureNet("test", "0", "fd", 100.0, apply, levels=17, fitted=True)


def records(*ends, images=IMAGES):
    for a, b in itertools.pairwise((0, *ends)):
        yield {"image": images[a:b], "label": LABELS[a:b]}


def reference(images=IMAGES):
    source = ArraySource("real", images, np.zeros(len(images), np.int32), 1)
    return references.of_images(lambda limit: image_sets.of_source(source, limit, 17), {"fid": 5}, {MAIN: network()})


def score(net, refs, parts, wanted=("fid",), paired=False):
    images = Images("set", 90, (4, 4, 1), 17, 3, parts, {"quantised_to": "17 levels"})
    return Evaluator({MAIN: net}, refs).score(images, list(wanted), paired)


def test_identical_sets_have_no_distance():
    """Breaks if the two sides are not measured alike (n or n - 1, scale, dtype)."""
    ref = {"train": reference()}
    assert abs(score(network(), ref, records(90)).score) < 1e-6
    assert score(network(), ref, records(90, images=16 - IMAGES)).score > 0.1


def test_split_into_batches_does_not_matter():
    """Breaks if moments of batches are merged wrongly, or the last batch is left out."""
    refs = {"train": reference(IMAGES[:40]), "test": reference(IMAGES[40:])}
    whole = score(network(), refs, records(90))
    assert list(whole.values) == ["fd", "fd_test", "accuracy"] and whole.metric == "fd"
    for ends in ((50, 90), (1, 2, 90), range(10, 91, 10)):
        parts = score(network(), refs, records(*ends))
        np.testing.assert_allclose([*parts.values.values()], [*whole.values.values()], rtol=1e-6)
        assert parts.protocol.content == whole.protocol.content and parts.protocol.n_samples == 90


def test_influence_of_blocks():
    """Breaks if what a record keeps of the images does not say what leaving some of them out does to the score."""
    refs = {"train": reference(IMAGES[:40])}
    whole = score(network(), refs, records(90), paired=True)
    assert len(whole.influence) == 64
    assert read(whole.record()) == whole and score(network(), refs, records(90)).influence == ()
    left_out = [IMAGES[np.r_[:i, i + 1 : 90]] for i in range(3)]
    without = [score(network(), refs, records(89, images=x)).score for x in left_out]
    predicted = [whole.score - influence / 89 for influence in whole.influence[:3]]
    np.testing.assert_allclose(np.diff(without), np.diff(predicted), rtol=0.2, atol=0.02)


def test_accuracy_is_always_there_for_a_classifier():
    """Breaks if 0 right is reported as "no classifier", so that one record lacks the column of another."""
    ref = {"train": reference()}
    wrong = (np.argmin(network().apply(IMAGES)["class_logits"], 1)).astype(np.int32)
    assert score(network(), ref, iter([{"image": IMAGES, "label": wrong}])).values["accuracy"] == 0
    assert "accuracy" not in score(network(classes=False), ref, records(90)).values


def test_keeps_the_first_images():
    """Breaks if images for the picture are taken per batch, or in another order."""
    for keep in (0, 7, 50, 200):
        kept = First(records(30, 60, 90), keep)
        assert sum(len(r["image"]) for r in kept) == 90
        np.testing.assert_array_equal(kept.images(), IMAGES[:keep])


def test_nearest_distance():
    """Breaks if levels or the mean are wrong: one pixel off by one level of 17 is 2/16."""
    assert nearest_distance(IMAGES[:4], IMAGES, 17) == pytest.approx(0, abs=1e-6)
    other = IMAGES[:2].copy()
    other[0, 0, 0, 0] ^= 1
    other[1, 0, 0, 0] ^= 2
    assert nearest_distance(other, IMAGES, 17) == pytest.approx((0.125 + 0.25) / 2, abs=1e-6)
