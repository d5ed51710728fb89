"""The digits denoiser: its size, what it depends on, and that it is matrix products only."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddo_jax.models.edm import EDMPrecond
from ddo_jax.models.mlp import ResidualMLP

MODULE = EDMPrecond(net=ResidualMLP(), img_resolution=8, img_channels=1, label_dim=10)
X, SIGMA = np.ones((3, 8, 8, 1), np.float32), np.full(3, 0.7, np.float32)
LABELS = np.eye(10, dtype=np.float32)[:3]


@pytest.fixture(scope="module")
def variables():
    return jax.jit(MODULE.init)(jax.random.key(0), X, SIGMA, LABELS)


def test_size(variables):
    assert set(variables) == {"params"}
    assert sum(v.size for v in jax.tree.leaves(variables)) == 64_864


def test_starts_at_the_mean_of_its_target(variables):
    f = jax.jit(lambda v: MODULE.apply(v, X, SIGMA, LABELS, method="raw"))(variables)
    assert f.shape == X.shape and f.dtype == jnp.float32
    assert 0 < np.abs(f).max() < 1e-3


def test_depends_on_image_noise_level_and_label_after_one_change_of_weights(variables):
    def shift(v):
        return v + 0.1 * np.sin(np.arange(v.size, dtype=np.float32)).reshape(v.shape)

    perturbed = jax.tree.map(shift, variables)
    f = jax.jit(lambda x, s, y: MODULE.apply(perturbed, x, s, y))
    base = f(X, SIGMA, LABELS)
    for other in (f(2 * X, SIGMA, LABELS), f(X, 2 * SIGMA, LABELS), f(X, SIGMA, LABELS[::-1])):
        assert np.abs(other - base).max() > 1e-3
    absent = MODULE.apply(perturbed, X, SIGMA)
    np.testing.assert_allclose(absent, f(X, SIGMA, 0 * LABELS), rtol=0, atol=1e-5)


def test_unconditional_network_ignores_labels():
    module = EDMPrecond(net=ResidualMLP(width=16, blocks=1, num_classes=0), img_resolution=8, img_channels=1)
    shapes = jax.eval_shape(module.init, jax.random.key(0), X, SIGMA)
    assert "map_label" not in shapes["params"]["net"]


def test_matrix_products_only(variables):
    text = str(jax.make_jaxpr(lambda v: MODULE.apply(v, X, SIGMA, LABELS))(variables))
    assert "dot_general" in text and "conv_general" not in text
