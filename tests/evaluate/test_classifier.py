"""The feature network that is fitted here: good enough to judge, the same in every run, for any labelled images."""

import jax
import numpy as np
import pytest

from ddo_jax.data import sources
from ddo_jax.errors import UserError
from ddo_jax.evaluate import classifier, features

DIGITS = classifier.Design((8, 8, 1), 17, 10)


@pytest.fixture(scope="module")
def fit(tmp_path_factory):
    train, test = (sources.open_source("digits", split) for split in ("train", "test"))
    return features.Fit(train, test, 17, tmp_path_factory.mktemp("features") / "features-digits.npz")


@pytest.fixture(scope="module")
def network(fit):
    with jax.numpy_dtype_promotion("standard"):  # optax.adamw fails under "strict"
        return features.get_features("digits", fit)


def test_classifies_held_out_images(network, fit):
    """Breaks if the classifier is trained badly, or on images scaled otherwise than at evaluation; or boasts."""
    vectors = network.apply(fit.holdout.images)
    assert vectors["features"].shape == (360, DIGITS.features)
    right = np.mean(np.argmax(vectors["class_logits"], 1) == fit.holdout.labels)
    assert right > 0.96 and network.accuracy == f"{right:.3f} on 360 images (digits:test)"


def test_training_is_deterministic(network, fit):
    """Breaks if two runs would judge by two networks."""
    with jax.numpy_dtype_promotion("standard"):
        again = classifier.train(fit.train.images, fit.train.labels, DIGITS)
    assert again.digest == network.digest


def test_kept_weights_are_the_same_network(network, fit, monkeypatch):
    """Breaks if a resumed run trains its own network, or reads layers in another order."""
    monkeypatch.setattr(classifier, "train", lambda *_: pytest.fail("trained again"))
    again = features.get_features("digits", fit)
    assert again.digest == network.digest
    for key, value in network.apply(fit.train.images[:5]).items():
        np.testing.assert_array_equal(again.apply(fit.train.images[:5])[key], value)


def test_digest_sees_one_bit():
    """Breaks if the digest leaves out a layer."""
    layers = [(np.ones((2, 3), np.float32), np.ones(3, np.float32)) for _ in range(2)]
    one = classifier.Classifier(tuple(layers)).digest
    layers[1][1].view(np.uint32)[2] ^= 1
    assert classifier.Classifier(tuple(layers)).digest != one


def test_unknown_network_is_a_user_error():
    """Breaks if a misspelt network ends in a traceback."""
    with pytest.raises(UserError, match="'digit'; allowed: digits, classifier, inception, dinov2"):
        features.get_features("digit")


def coloured(n=300, side=16):
    """Squares that are red, green or blue on noise."""
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 128, (n, side, side, 3), np.uint8), np.arange(n, dtype=np.int32) % 3
    images[np.arange(n), 4:12, 4:12, labels] = 255
    return sources.ArraySource("shapes", images, labels, 3)


def test_colours_without_a_held_out_split(tmp_path, monkeypatch):
    """Breaks if the accuracy is that of images it was fitted on."""
    monkeypatch.setattr(classifier.Design, "steps", 300)
    fit = features.Fit(coloured(), None, 256, tmp_path / "features-classifier.npz")
    with jax.numpy_dtype_promotion("standard"):
        network = features.get_features("classifier", fit)
    assert [shape[-2:] for shape in fit.design.weights] == [(3, 32), (32, 64), (64, 64), (64, 3)]
    assert network.resize == "none"
    assert network.accuracy == "1.000 on 30 images (every tenth training image)"
    assert network.apply(fit.train.images[:7])["features"].shape == (7, 64)
    assert not set(classifier.rows_to_fit(300, whole=False)) & set(range(9, 300, 10))


def test_large_images_are_averaged():
    """Breaks if 64 x 64 pixels are not seen as 32 x 32, or their rows and channels are mixed."""
    large = classifier.Design((64, 64, 3), 256, 3)
    small = classifier.Design((32, 32, 3), 256, 3)
    assert large.weights == small.weights and large.factor == 2
    rng = np.random.default_rng(0)
    layers = [(0.05 * rng.normal(size=s).astype(np.float32), np.zeros(s[-1], np.float32)) for s in small.weights]
    x = rng.integers(0, 256, (2, 32, 32, 3)).astype(np.uint8)
    for a, b in zip(
        classifier.features_and_logits(layers, x, small),
        classifier.features_and_logits(layers, x.repeat(2, 1).repeat(2, 2), large),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_its_convolution_is_a_convolution():
    """Breaks if the matrix product mixes up taps, channels or the padding of XLA's own convolution."""
    rng = np.random.default_rng(0)
    x, weight = rng.normal(size=(2, 9, 8, 3)).astype(np.float32), rng.normal(size=(3, 3, 3, 5)).astype(np.float32)
    layout = ("NHWC", "HWIO", "NHWC")
    wanted = jax.lax.conv_general_dilated(
        x, weight, (2, 2), ((1, 1), (1, 1)), dimension_numbers=layout, precision="highest"
    )
    found = classifier._convolved(x, weight, np.ones(5, np.float32))
    np.testing.assert_allclose(found, jax.nn.silu(wanted + 1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "shape, classes, words",
    [
        ((6, 6, 1), 10, "images of 6x6x1; allowed: 8x8 to 64x64, 1 or 3 channels"),
        ((128, 128, 3), 10, "images of 128x128x3"),
        ((32, 32, 4), 10, "images of 32x32x4"),
        ((32, 32, 3), 0, "0 classes; a classifier needs labels of at least 2"),
    ],
)
def test_what_it_cannot_judge_is_one_line(shape, classes, words):
    """Breaks if unlabelled data or latents reach the fitting."""
    source = sources.ArraySource("s", np.zeros((4, *shape), np.uint8), np.zeros(4, np.int32), classes)
    with pytest.raises(UserError, match=words):
        features.get_features("classifier", features.Fit(source, None, 256, None))
