"""DINOv2 and its resampling against float64 goldens (specs/metrics.md sections 6, 10.3, 10.5)."""

import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from PIL import Image

from ddo_jax.convert import from_torch
from ddo_jax.models import dinov2

GOLDENS = Path(__file__).parents[1] / "goldens"
with np.load(GOLDENS / "dinov2_tiny.npz") as f:
    TINY = dict(f)
with np.load(GOLDENS / "inception_resize.npz") as f:
    RESIZE = dict(f)
CONFIG = {"embed_dim": 48, "depth": 3, "num_heads": 3}
PROBED = [0, 1, 2, 16, 17, 136, 255, 256]


def weights(name, shape):
    """Rule 10.1 with the ranges of section 10.5."""
    n = int(np.prod(shape))
    seed = int(TINY["salt"]) * 2**32 + zlib.crc32(name.encode("ascii"))
    u = (np.random.PCG64(seed).random_raw(n) >> np.uint64(40)).astype(np.float64) / 2**24
    if name == "pos_embed":
        u = 0.2 * (2 * u - 1)
    elif name in ("cls_token", "mask_token"):
        u = 2 * u - 1
    elif name.endswith(".gamma"):
        u = 0.5 + 0.5 * u
    elif name.endswith(".bias"):
        u = -0.1 + 0.2 * u
    elif "norm" in name:
        u = 0.8 + 0.4 * u
    else:
        u = (2 * u - 1) * np.sqrt(3 * shape[0] / n)
    return u.reshape(shape).astype(np.float32)


@pytest.fixture(scope="module")
def tiny():
    shapes = [tuple(map(int, shape.split("x"))) for shape in TINY["param_shapes"].tolist()]
    state = {name: weights(name, shape) for name, shape in zip(TINY["param_names"].tolist(), shapes, strict=True)}
    assert [zlib.crc32(v.tobytes()) for v in state.values()] == TINY["param_crc32"].tolist()
    return from_torch("dinov2", CONFIG, state)


IMAGES = [TINY["img64"], RESIZE["img256"]]  # image_order


def test_forward(tiny):
    module, variables = tiny
    x = jnp.concatenate([dinov2.normalise(dinov2.resize(image[None])) for image in IMAGES])
    np.testing.assert_allclose(np.mean(x, axis=(1, 2)), TINY["input_mean"], atol=2e-5)
    np.testing.assert_allclose(np.std(x, axis=(1, 2)), TINY["input_std"], atol=2e-5)
    program = jax.jit(lambda variables, x: module.apply(variables, x, mutable=["stages"]))
    feature, stages = program(variables, x)
    errors = {"feature": np.abs(np.asarray(feature, np.float64) - TINY["feature"]).max()}
    stages = {name: np.asarray(value[0], np.float64) for name, value in stages["stages"].items()}
    errors["tokens"] = np.abs(stages["tokens"][:, PROBED, :8] - TINY["tokens_probe"]).max()
    for i in range(3):
        block = stages[f"block_{i}"]
        errors[f"cls {i}"] = np.abs(block[:, 0] - TINY["block_cls"][i]).max()
        errors[f"mean {i}"] = np.abs(block.mean(axis=(1, 2)) - TINY["block_mean"][i]).max()
        errors[f"std {i}"] = np.abs(block.std(axis=(1, 2)) - TINY["block_std"][i]).max()
    print({key: f"{value:.1e}" for key, value in errors.items()})
    assert max(errors.values()) < 2e-5, errors


def test_features_of_stored_images(tiny):
    for i, image in enumerate(IMAGES):
        mine = dinov2.features(*tiny, image[None])
        assert mine.dtype == np.float32
        np.testing.assert_allclose(mine[0], TINY["feature"][i], atol=2e-5)
    for bad in ((64, 64, 3), (1, 64, 64, 1)):
        with pytest.raises(ValueError, match=r"images have shape .*: they must be \[B, H, W, 3\]"):
            dinov2.features(*tiny, np.zeros(bad, np.uint8))


def equations(jaxpr):
    """All equations, those of inner jaxprs too."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from equations(inner)


def test_precision_is_highest_whatever_the_caller_says(tiny):
    module, variables = tiny
    with jax.default_matmul_precision("bfloat16"):
        jaxpr = jax.make_jaxpr(lambda v, x: dinov2.features(module, v, x))(variables, IMAGES[0][None]).jaxpr
    products = [e for e in equations(jaxpr) if e.primitive.name in ("conv_general_dilated", "dot_general")]
    assert len(products) == 2 + 1 + 2 + 3 * 6  # images, patches, positions, blocks
    highest = jax.lax.Precision.HIGHEST
    assert all(e.params["precision"] in (highest, (highest, highest)) for e in products)


@pytest.mark.parametrize("size", [32, 64, 256, 512])
def test_resize(size):
    image, index = RESIZE[f"img{size}"], RESIZE["idx224"]
    mine = np.asarray(dinov2.resize(image[None]))[0]
    np.testing.assert_allclose(mine[index][:, index], RESIZE[f"dino_{size}"], atol=0.005, rtol=0)
    np.testing.assert_allclose(mine.mean(dtype=np.float64), RESIZE[f"dino_{size}_mean"], rtol=1e-6)
    np.testing.assert_allclose((mine.astype(np.float64) ** 2).mean(), RESIZE[f"dino_{size}_meansq"], rtol=1e-6)
    bands = [Image.fromarray(image[..., c].astype(np.float32)) for c in range(3)]  # PIL in its float mode
    pil = np.stack([np.asarray(band.resize((224, 224), Image.Resampling.BICUBIC)) for band in bands], axis=-1)
    np.testing.assert_allclose(mine, pil, atol=2e-4, rtol=0)
    rounded = np.clip(np.round(mine), 0, 255)[index][:, index]
    assert np.abs(rounded - RESIZE[f"dinopil_{size}"]).mean() < 0.5  # section 6: 0.3 grey levels


def test_position_resampling():
    matrix = dinov2.position_resampling(37, 16)
    mine = np.asarray(dinov2.resample(jnp.asarray(RESIZE["posembed_in"])[None], matrix, matrix))[0]
    np.testing.assert_allclose(mine, RESIZE["posembed_out"], atol=2e-5, rtol=0)
    assert np.abs(mine - RESIZE["posembed_out_sizeonly"]).max() > 0.1  # without the 0.1
    np.testing.assert_allclose(matrix.sum(axis=1), 1, rtol=1e-12)
    np.testing.assert_array_equal(dinov2.position_resampling(37, 37), np.eye(37))
    np.testing.assert_allclose(dinov2.bicubic_antialiased(100, 100), np.eye(100), atol=1e-12)
