"""Generate and score: distances, the fixed padded micro-batch, seed ranges."""

import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddo_jax import sharding
from ddo_jax.evaluate import score
from ddo_jax.evaluate.features import FeatureNet
from ddo_jax.families import get_family
from ddo_jax.run.config import base

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 17, (90, 4, 4, 1), np.uint8)
LABELS = np.arange(90, dtype=np.int32) % 3
MAP = RNG.standard_normal((16, 5)).astype(np.float32)


def network(classes=True):
    def apply(images):
        x = images.reshape(len(images), -1).astype(np.float32) @ MAP
        return {"features": np.tanh(x / 30)} | ({"class_logits": x[:, :3]} if classes else {})

    return FeatureNet("test", "0", "fd", 100.0, apply)


def records(*ends, images=IMAGES):
    for a, b in itertools.pairwise((0, *ends)):
        yield {"image": images[a:b], "label": LABELS[a:b]}


def test_identical_sets_have_no_distance():
    """Breaks if the two sides are not measured alike (n or n - 1, scale, dtype)."""
    ref = score.reference(network(), IMAGES)
    (values, _) = score.score(network(), {"train": ref}, records(90))
    assert abs(values["fd"]) < 1e-6
    other, _ = score.score(network(), {"train": ref}, records(90, images=16 - IMAGES))
    assert other["fd"] > 0.1


def test_split_into_batches_does_not_matter():
    """Breaks if moments of batches are merged wrongly, or the last batch is left out."""
    refs = {"train": score.reference(network(), IMAGES[:40], batch=7), "test": score.reference(network(), IMAGES[40:])}
    whole, _ = score.score(network(), refs, records(90))
    for ends in ((50, 90), (1, 2, 90), range(10, 91, 10)):
        parts, _ = score.score(network(), refs, records(*ends))
        assert set(parts) == {"fd", "fd_test", "accuracy"}
        np.testing.assert_allclose([*parts.values()], [*whole.values()], rtol=1e-9)


def test_accuracy_is_always_there_for_a_classifier():
    """Breaks if 0 right is reported as "no classifier", so that one record lacks the column of another."""
    ref = {"train": score.reference(network(), IMAGES)}
    wrong = (np.argmin(network().apply(IMAGES)["class_logits"], 1)).astype(np.int32)
    values, _ = score.score(network(), ref, iter([{"image": IMAGES, "label": wrong}]))
    assert values["accuracy"] == 0
    values, _ = score.score(network(classes=False), ref, records(90))
    assert "accuracy" not in values


def test_keeps_the_first_images():
    """Breaks if images for the picture are taken per batch, or in another order."""
    ref = {"train": score.reference(network(), IMAGES)}
    for keep in (0, 7, 50, 200):
        _, kept = score.score(network(), ref, records(30, 60, 90), keep=keep)
        np.testing.assert_array_equal(kept, IMAGES[:keep])


def test_nearest_distance():
    """Breaks if levels or the mean are wrong: one pixel off by one level of 17 is 2/16."""
    assert score.nearest_distance(IMAGES[:4], IMAGES, 17) == pytest.approx(0, abs=1e-6)
    other = IMAGES[:2].copy()
    other[0, 0, 0, 0] ^= 1
    other[1, 0, 0, 0] ^= 2
    assert score.nearest_distance(other, IMAGES, 17) == pytest.approx((0.125 + 0.25) / 2, abs=1e-6)


@pytest.fixture(scope="module")
def sampler():
    """(function of seeds and labels, calls of the network's trace)."""
    c = base()
    c.model.update(img_resolution=8, img_channels=1, label_dim=10, levels=17)
    with c.unlocked():
        c.model.update(width=8, blocks=1)
    c.sampler.update(num_steps=3, s_churn=1.0)
    family = get_family(c)
    params, frozen = family.init(jax.random.key(0))
    params = jax.tree.map(lambda v: v + 0.1 * np.sin(np.arange(v.size, dtype=np.float32)).reshape(v.shape), params)
    run = score.make_sampler(family, family.settings(c.sampler), sharding.make_mesh(), 16)
    return lambda seeds, labels: list(run(params, frozen, seeds, labels))


def test_image_is_a_function_of_seed_and_label(sampler):
    """Breaks if an image depends on its row, on the request's size or on the padding, also with churn."""
    seeds = np.arange(100, 116)
    labels = score.balanced(seeds, 10)
    (whole,) = sampler(seeds, labels)
    assert whole["image"].shape == (16, 8, 8, 1) and whole["image"].dtype == np.uint8
    np.testing.assert_array_equal(whole["label"], labels)
    assert len(np.unique(whole["image"], axis=0)) == 16
    for rows in ([5], list(range(9, 16)), list(range(15, -1, -1))):
        (part,) = sampler(seeds[rows], labels[rows])
        np.testing.assert_array_equal(part["image"], whole["image"][rows])


@pytest.mark.parametrize("output", ["images", "records"])
def test_a_sample_that_is_not_finite_is_no_image(output):
    """Breaks if NaN becomes a grey level, or the message names another seed; a batch before it is delivered."""

    def sample(nets, frozen, labels, latents, noise, settings):
        wrong = jnp.where(labels == 3, jnp.where(latents[:, 0] > 0, jnp.nan, jnp.inf), 0.0)
        return {"x": latents + wrong[:, None], "label": labels}

    family = SimpleNamespace(
        own_guidance=False,
        sample=sample,
        latents=jax.vmap(lambda key: jax.random.normal(key, (4,))),
        decode=lambda frozen, examples: examples["x"].astype(jnp.uint8),
        store=lambda frozen, examples: examples,
    )
    run = score.make_sampler(family, None, sharding.make_mesh(), 8, output=output)
    records = run({}, {}, np.arange(100, 116), np.where(np.arange(16) % 8 == 5, np.arange(16) // 8 * 3, 1))
    assert len(next(records)["label"]) == 8
    with pytest.raises(score.NotFinite, match=r"seed 113, label 3: the sample is not finite \(1 of 8 images"):
        next(records)


def test_finite_rows():
    """Breaks if one infinite number of an example is missed, or tokens are taken for numbers."""
    x = np.zeros((3, 2, 2), np.float32)
    x[1, 1, 0], y = np.inf, np.array([0, 0, np.nan], np.float16)
    tokens = np.zeros((3, 5), np.int32)
    assert score.finite_rows({"x": jnp.asarray(x), "y": jnp.asarray(y), "t": tokens}).tolist() == [True, False, False]
    assert score.finite_rows({"t": jnp.asarray(tokens)}).tolist() == [True] * 3


def test_long_requests_come_in_order(sampler):
    """Breaks if the last, padded batch is returned with its padding, or batches are numbered anew."""
    seeds = np.arange(100, 119)
    parts = sampler(seeds, score.balanced(seeds, 10))
    assert [len(p["image"]) for p in parts] == [16, 3]
    (alone,) = sampler(seeds[16:], score.balanced(seeds, 10)[16:])
    np.testing.assert_array_equal(parts[1]["image"], alone["image"])


def test_labels_matter(sampler):
    """Breaks if the sampler ignores the labels."""
    a, b = (sampler(np.arange(4), np.full(4, k))[0]["image"] for k in (1, 2))
    assert not np.array_equal(a, b)


def test_seed_ranges_are_disjoint():
    """Breaks if selection, report and pool ever share a seed in 1000 rounds of 50k, or one wraps at 2**32."""
    last = -1
    for purpose in ("report", "select", "pool"):
        for index in range(1000):
            seeds = score.seed_range(purpose, index, 50_000)
            assert seeds.dtype == np.uint32 and len(seeds) == 50_000
            assert last < int(seeds[0]) and int(seeds[-1]) == int(seeds[0]) + 49_999
            last = int(seeds[-1])
    assert last < 2**32
