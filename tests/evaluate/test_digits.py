"""The feature network of the digits: good enough to judge, and the same in every run."""

import jax
import numpy as np
import pytest

from ddo_jax.data import sources
from ddo_jax.errors import UserError
from ddo_jax.evaluate import digits, features


@pytest.fixture(scope="module")
def train():
    return sources.open_source("digits", "train")


@pytest.fixture(scope="module")
def network(train, tmp_path_factory):
    """(the network, where its weights were kept)."""
    directory = tmp_path_factory.mktemp("features")
    with jax.numpy_dtype_promotion("standard"):  # optax.adamw fails under "strict"
        return features.get_features("digits", train, directory), directory


def test_classifies_held_out_images(network):
    """Breaks if the classifier is trained badly, or on images scaled otherwise than at evaluation."""
    test = sources.open_source("digits", "test")
    vectors = network[0].apply(test.images)
    assert vectors["features"].shape == (360, digits.FEATURES)
    assert np.mean(np.argmax(vectors["class_logits"], 1) == test.labels) > 0.96


def test_training_is_deterministic(network, train):
    """Breaks if two runs would judge by two networks."""
    with jax.numpy_dtype_promotion("standard"):
        again = digits.train(train.images, train.labels)
    assert again.digest == network[0].digest


def test_kept_weights_are_the_same_network(network, train, monkeypatch):
    """Breaks if a resumed run trains its own network, or reads layers in another order."""
    monkeypatch.setattr(digits, "train", lambda *_: pytest.fail("trained again"))
    again = features.get_features("digits", train, network[1])
    assert again.digest == network[0].digest
    for key, value in network[0].apply(train.images[:5]).items():
        np.testing.assert_array_equal(again.apply(train.images[:5])[key], value)


def test_digest_sees_one_bit():
    """Breaks if the digest leaves out a layer."""
    layers = [(np.ones((2, 3), np.float32), np.ones(3, np.float32)) for _ in range(2)]
    one = digits.Classifier(tuple(layers)).digest
    layers[1][1].view(np.uint32)[2] ^= 1
    assert digits.Classifier(tuple(layers)).digest != one


def test_unknown_network_is_a_user_error(tmp_path):
    """Breaks if a misspelt network ends in a traceback."""
    with pytest.raises(UserError, match="'digit'; allowed: digits, inception, dinov2"):
        features.get_features("digit", None, tmp_path)
