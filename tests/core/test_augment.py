"""The augmentation against the reference's outputs (tests/goldens/edm_augment.npz), and what `draw` draws."""

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddo_jax.core import augment as A

NAMES = ("xflip", "yflip", "scale_w", "rot_theta", "aniso_w", "aniso_r", "trans_wx", "trans_wy")
CASES = ("mild", "strong", "geo_identity")
N = 20_000

apply = jax.jit(A.augment, static_argnums=2)


@pytest.fixture(scope="module")
def golden():
    with np.load(Path(__file__).parents[1] / "goldens" / "edm_augment.npz") as f:
        return dict(f)


def case(golden, name, dtype=jnp.float32):
    """(images NHWC, params, out NHWC in float64, labels, the reference's own margins)"""
    images, out = (np.moveaxis(golden[f"{name}/{k}"], 1, -1) for k in ("images", "out64"))
    params = {k: jnp.asarray(golden[f"{name}/{k}"]) for k in NAMES}
    margins = tuple(int(m) for m in golden[f"{name}/margins_x0x1y0y1"])
    return jnp.asarray(images, dtype), params, out, golden[f"{name}/labels"], margins


@pytest.mark.parametrize("name", CASES)
def test_goldens(golden, name):
    """Breaks if a filter is reversed, a shift is off by half a pixel, or a matrix is in the wrong order."""
    images, params, wanted, labels, margins = case(golden, name)
    for exact in (margins, None):
        out, found = apply(images, params, exact)
        error = np.abs(out - wanted).max()
        print(f"{name}, {'own' if exact else 'largest'} margins: {error:.1e}")
        # Measured 2e-6. The largest margins may cost more in a few images (specs/edm.md 13.2): not in these.
        assert error <= 5e-6 and out.dtype == jnp.float32
        np.testing.assert_allclose(found, labels, rtol=0, atol=1e-7)


@pytest.mark.parametrize("name", CASES)
def test_goldens_in_float64(golden, name):
    """Breaks if a float32 constant or cast slips into the maps."""
    with jax.enable_x64(True):
        images, params, wanted, _, margins = case(golden, name, jnp.float64)
        out, _ = apply(images, params, margins)
    assert out.dtype == np.float64
    np.testing.assert_allclose(out, wanted, rtol=0, atol=1e-6)  # measured 8e-7: the reference's own


def test_identity_geometry_gives_the_image_back(golden):
    """Breaks if up and down by 2 are not inverse to each other; an x-flip is exact up to their rounding."""
    images, params, *_ = case(golden, "geo_identity")
    out, _ = apply(images, params, None)
    flipped = np.where(np.asarray(params["xflip"])[:, None, None, None] > 0, images[:, :, ::-1], images)
    np.testing.assert_allclose(out, flipped, rtol=0, atol=2e-6)


def test_each_row_does_what_its_name_says():
    """Breaks if x and y are exchanged or a sign is wrong: whole-pixel moves of a non-square image are exact."""
    images = jax.random.uniform(jax.random.key(0), (1, 8, 16, 2))
    zero = {k: jnp.zeros(1) for k in NAMES}

    def out(**params):
        return np.asarray(apply(images, zero | {k: jnp.full(1, v) for k, v in params.items()}, None)[0])

    x = np.asarray(images)
    close = {"rtol": 0, "atol": 5e-6}
    np.testing.assert_allclose(out(yflip=1.0), x[:, ::-1], **close)
    np.testing.assert_allclose(out(trans_wx=1.0)[:, :, 2:], x[:, :, :-2], **close)  # 0.125 * 16 pixels to the right
    np.testing.assert_allclose(out(trans_wy=2.0)[:, 2:], x[:, :-2], **close)  # 0.125 * 8 * 2 pixels down


def test_scales_and_rotation():
    """Breaks if the inverse map is applied forwards: scale 5 doubles a side, and angles turn counter-clockwise."""
    image = jnp.zeros((1, 16, 16, 1)).at[:, 6:10, 6:10].set(1.0).at[:, 6:10, 10:12].set(0.5)
    zero = {k: jnp.zeros(1) for k in NAMES}

    def out(**params):
        return np.asarray(apply(image, zero | {k: jnp.full(1, v) for k, v in params.items()}, None)[0])[0, :, :, 0]

    def extent(picture):
        """Twice the standard deviation of the mass along (y, x)."""
        at, mass = np.arange(16.0), picture / picture.sum()
        sums = mass.sum(1), mass.sum(0)
        return np.array([2 * math.sqrt(m @ at**2 - (m @ at) ** 2) for m in sums])

    plain = extent(np.asarray(image)[0, :, :, 0])
    np.testing.assert_allclose(extent(out(scale_w=5.0)), 2 * plain, rtol=0.03)
    along_x, along_y = extent(out(aniso_w=5.0)) / plain, extent(out(aniso_w=5.0, aniso_r=math.pi / 2)) / plain
    np.testing.assert_allclose([along_x[1], along_y[0]], 2, rtol=0.03)  # the other shrinks and shows mirror images
    # The asymmetric filter blurs a turned image slightly differently.
    np.testing.assert_allclose(out(rot_theta=math.pi / 2), np.rot90(image[0, :, :, 0]), rtol=0, atol=0.15)


def test_rows_are_independent(golden):
    """Breaks if an image depends on its neighbours, as the reference's batch-wide margins make it."""
    images, params, *_ = case(golden, "strong")
    whole, _ = apply(images, params, None)
    alone, _ = A.augment(images[2:3], {k: v[2:3] for k, v in params.items()})
    np.testing.assert_allclose(alone[0], whole[2], rtol=0, atol=2e-6)


def test_gates():
    """Breaks if a gate's probability is off, gates are shared between rows, or the x-flip is gated."""
    p = 0.3
    params = {k: np.asarray(v) for k, v in A.draw(jax.random.key(0), N, p).items()}
    assert set(params) == set(NAMES) and all(v.shape == (N,) and v.dtype == np.float32 for v in params.values())
    share = {k: np.mean(v != 0) for k, v in params.items()}
    wanted = dict(xflip=0.5, yflip=p / 2, scale_w=p, rot_theta=p, aniso_w=p, aniso_r=0.5, trans_wx=p, trans_wy=p)
    for k in NAMES:
        assert share[k] == pytest.approx(wanted[k], abs=5 * math.sqrt(0.25 / N)), k
    assert np.array_equal(params["trans_wx"] != 0, params["trans_wy"] != 0)  # one gate for both
    on = np.stack([params[k] != 0 for k in NAMES if k != "trans_wy"]).astype(np.float64)
    correlation = np.corrcoef(on) - np.eye(len(on))
    assert np.abs(correlation).max() < 5 / math.sqrt(N)


def test_distributions():
    """Breaks if a normal draw is not of unit variance or an angle not uniform on (-pi, pi)."""
    params = {k: np.asarray(v, np.float64) for k, v in A.draw(jax.random.key(1), N, 1.0).items()}
    for k in ("scale_w", "aniso_w", "trans_wx", "trans_wy"):
        assert abs(params[k].mean()) < 5 / math.sqrt(N) and params[k].std() == pytest.approx(1, abs=0.03), k
    for k in ("rot_theta", "aniso_r"):
        v = params[k][params[k] != 0]
        assert np.abs(v).max() <= math.pi and v.std() == pytest.approx(math.pi / math.sqrt(3), rel=0.03), k
    assert set(np.unique(params["yflip"])) == {0, 1}
    assert abs(np.corrcoef(params["trans_wx"], params["trans_wy"])[0, 1]) < 5 / math.sqrt(N)


def test_probability_zero_leaves_the_labelled_x_flip():
    """Breaks if p = 0 switches the x-flip off or leaves anything else on."""
    params = A.draw(jax.random.key(2), 256, 0.0)
    labels = np.asarray(A.augment_labels(params))
    assert 0.3 < labels[:, 0].mean() < 0.7 and set(np.unique(labels[:, 0])) == {0, 1}
    np.testing.assert_array_equal(labels[:, 1:], 0)


def test_probability_may_be_traced():
    """Breaks if p must be a Python number, so that a sweep over it recompiles."""
    traces = []

    @jax.jit
    def draw(key, p):
        traces.append(p)
        return A.draw(key, 8, p)["scale_w"]

    assert np.count_nonzero(draw(jax.random.key(0), 0.0)) == 0
    assert np.count_nonzero(draw(jax.random.key(0), 1.0)) == 8
    assert len(traces) == 1
