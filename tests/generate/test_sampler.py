"""The sampler: the fixed padded micro-batch, one image a seed and label, samples that are no numbers."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddo_jax import sharding
from ddo_jax.config import base
from ddo_jax.data.labels import balanced_labels
from ddo_jax.families import Guidance, get_family
from ddo_jax.generate.sampler import NotFinite, finite_rows, make_sampler
from tests.harness import random_variables


@pytest.fixture(scope="module")
def sampler():
    """(function of seeds and labels, calls of the network's trace)."""
    c = base()
    c.model.update(img_resolution=8, img_channels=1, label_dim=10, levels=17)
    with c.unlocked():
        c.model.update(width=8, blocks=1)
    c.sampler.update(num_steps=3, s_churn=1.0)
    family = get_family(c)
    params, frozen = random_variables(family.init)
    run = make_sampler(family, family.settings(c.sampler), sharding.make_mesh(), 16)
    return lambda seeds, labels: list(run(params, frozen, seeds, labels))


def test_image_is_a_function_of_seed_and_label(sampler):
    """Breaks if an image depends on its row, on the request's size or on the padding, also with churn."""
    seeds = np.arange(100, 116)
    labels = balanced_labels(np.arange(len(seeds)), 10)
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
        spec=SimpleNamespace(guidance=Guidance()),
        sample=sample,
        latents=jax.vmap(lambda key: jax.random.normal(key, (4,))),
        decode=lambda frozen, examples: examples["x"].astype(jnp.uint8),
        store=lambda frozen, examples: examples,
    )
    run = make_sampler(family, None, sharding.make_mesh(), 8, output=output)
    records = run({}, {}, np.arange(100, 116), np.where(np.arange(16) % 8 == 5, np.arange(16) // 8 * 3, 1))
    assert len(next(records)["label"]) == 8
    with pytest.raises(NotFinite, match=r"seed 113, label 3: the sample is not finite \(1 of 8 images"):
        next(records)


def test_finite_rows():
    """Breaks if one infinite number of an example is missed, or tokens are taken for numbers."""
    x = np.zeros((3, 2, 2), np.float32)
    x[1, 1, 0], y = np.inf, np.array([0, 0, np.nan], np.float16)
    tokens = np.zeros((3, 5), np.int32)
    assert finite_rows({"x": jnp.asarray(x), "y": jnp.asarray(y), "t": tokens}).tolist() == [True, False, False]
    assert finite_rows({"t": jnp.asarray(tokens)}).tolist() == [True] * 3


def test_long_requests_come_in_order(sampler):
    """Breaks if the last, padded batch is returned with its padding, or batches are numbered anew."""
    seeds = np.arange(100, 119)
    parts = sampler(seeds, balanced_labels(np.arange(len(seeds)), 10))
    assert [len(p["image"]) for p in parts] == [16, 3]
    (alone,) = sampler(seeds[16:], balanced_labels(np.arange(len(seeds)), 10)[16:])
    np.testing.assert_array_equal(parts[1]["image"], alone["image"])


def test_labels_matter(sampler):
    """Breaks if the sampler ignores the labels."""
    a, b = (sampler(np.arange(4), np.full(4, k))[0]["image"] for k in (1, 2))
    assert not np.array_equal(a, b)
