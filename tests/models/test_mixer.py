"""The patch mixer: its size, that patches are put back where they were, what a pixel reaches, what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddo_jax.convert.mlp import from_config
from ddo_jax.models import mixer
from tests.harness import random_variables

CONFIG = dict(model_type="mixer", img_resolution=8, img_channels=3, label_dim=4)
CONFIG |= dict(patch=2, width=16, blocks=2, tokens=12)
MODULE = from_config(CONFIG)
X, SIGMA, LABELS = np.ones((2, 8, 8, 3), np.float32), np.full(2, 0.7, np.float32), np.eye(4, dtype=np.float32)[:2]


@pytest.fixture(scope="module")
def variables():
    return random_variables(MODULE.init, X, SIGMA, LABELS)


def test_patches_are_put_back():
    """Breaks if a patch is not a square of the image, or rows and columns of patches are mixed up."""
    x = np.arange(2 * 6 * 4 * 3).reshape(2, 6, 4, 3)
    t = mixer.to_patches(x, 2)
    assert t.shape == (2, 6, 12)
    np.testing.assert_array_equal(t[1, 3], x[1, 2:4, 2:4].reshape(-1))  # second row, second column
    np.testing.assert_array_equal(mixer.from_patches(t, 2, x.shape), x)


def test_size_of_the_network_of_fashion():
    """Breaks if the documented number of parameters is another."""
    module = from_config(dict(model_type="mixer", img_resolution=28, img_channels=1, label_dim=10))
    x = np.zeros((1, 28, 28, 1), np.float32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), x, np.ones(1, np.float32), np.zeros((1, 10), np.float32))
    assert sum(s.size for s in jax.tree.leaves(shapes)) == 191_284


def test_starts_at_the_mean_of_its_target():
    """Breaks if D at the start is not c_skip x: the first steps would undo noise that initialisation made."""
    variables = jax.jit(MODULE.init)(jax.random.key(0), X, SIGMA, LABELS)
    f = MODULE.apply(variables, X, SIGMA, LABELS, method="raw")
    assert f.shape == X.shape and f.dtype == jnp.float32 and 0 < np.abs(f).max() < 1e-3


def test_every_pixel_reaches_every_pixel(variables):
    """Breaks if tokens or channels are not mixed: pictures would be of independent patches."""

    def one(x):
        return MODULE.apply(variables, x, SIGMA[:1], LABELS[:1], method="raw")[0, 7, 7, 2]

    assert (np.abs(jax.jit(jax.grad(one))(X[:1])) > 0).all()


def test_depends_on_noise_level_and_label(variables):
    """Breaks if AdaLN does not reach the output."""
    f = jax.jit(lambda s, y: MODULE.apply(variables, X, s, y, method="raw"))
    base = f(SIGMA, LABELS)
    assert np.abs(f(2 * SIGMA, LABELS) - base).max() > 1e-3 and np.abs(f(SIGMA, LABELS[::-1]) - base).max() > 1e-3


def test_matrix_products_only(variables):
    """Breaks if a convolution comes in: XLA's CPU backend is slow at them."""
    text = str(jax.make_jaxpr(lambda v: MODULE.apply(v, X, SIGMA, LABELS))(variables))
    assert "dot_general" in text and "conv_general" not in text


@pytest.mark.parametrize("patch", [3, 0, 16])
def test_a_patch_must_divide_the_side(patch):
    with pytest.raises(ValueError, match=f"patch is {patch}: it must divide img_resolution = 8"):
        from_config(CONFIG | {"patch": patch})
