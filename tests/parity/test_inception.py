"""FID-Inception and the TF1 resize against float64 goldens (specs/metrics.md sections 10.1-10.3)."""

import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from ddo_jax.convert import from_torch
from ddo_jax.core.stats.metrics import inception_score
from ddo_jax.models import inception

GOLDENS = Path(__file__).parents[1] / "goldens"
with np.load(GOLDENS / "inception_random.npz") as f:
    RANDOM = dict(f)
with np.load(GOLDENS / "inception_resize.npz") as f:
    RESIZE = dict(f)


def weights(name, shape):
    """Rule 10.1."""
    n = int(np.prod(shape))
    seed = int(RANDOM["salt"]) * 2**32 + zlib.crc32(name.encode("ascii"))
    k = (np.random.PCG64(seed).random_raw(n) >> np.uint64(40)).astype(np.int64)
    u = k / 2**24
    if name.endswith("conv.weight") or name == "fc.weight":
        k = k.reshape(shape[0], -1)
        m = k.shape[1]
        u = (m * k - k.sum(axis=1, keepdims=True)) / (m * 2**23) * np.sqrt((12 if name == "fc.weight" else 9) / m)
    elif name == "fc.bias":
        u = -1 + 2 * u
    else:
        low, width = {"weight": (0.8, 0.4), "running_var": (0.6, 0.8)}.get(name.split(".")[-1], (-0.2, 0.4))
        u = low + width * u
    return u.reshape(shape).astype(np.float32)


@pytest.fixture(scope="module")
def state():
    shapes = [tuple(map(int, shape.split("x"))) for shape in RANDOM["param_shapes"].tolist()]
    state = {name: weights(name, shape) for name, shape in zip(RANDOM["param_names"].tolist(), shapes, strict=True)}
    assert [zlib.crc32(v.tobytes()) for v in state.values()] == RANDOM["param_crc32"].tolist()
    return state


def run(state, dtype):
    """(outputs, {stage: value}) of the four images, one compiled program for all."""
    variables = jax.tree.map(lambda v: v.astype(dtype), from_torch("inception", {}, state)[1])
    images = [RANDOM[name][None] for name in RANDOM["image_order"].tolist()]
    x = jnp.concatenate([inception.normalise(inception.tf1_resize(image)) for image in images])
    module = inception.Inception(dtype=dtype)
    program = jax.jit(lambda variables, x: module.apply(variables, x, mutable=["stages"]))
    outputs, stages = jax.tree.map(np.asarray, program(variables, x.astype(dtype)))
    assert outputs["pool3"].dtype == dtype
    return outputs, {name.removeprefix("after_"): value for name, (value,) in stages["stages"].items()}


def compare(outputs, stages, state, pool, stage, probe, logits):
    """Every key of the golden; the arguments are tolerances."""
    golden = RANDOM
    error = np.linalg.norm(outputs["pool3"] - golden["pool"], axis=1) / np.linalg.norm(golden["pool"], axis=1)
    worst = {"pool": error.max(), "pool_maxabs": np.abs(outputs["pool3"] - golden["pool"]).max()}
    assert error.max() < pool and worst["pool_maxabs"] < 20 * pool
    unbiased = outputs["logits_unbiased"].astype(np.float64)
    worst["logits"] = np.abs(unbiased - golden["logits_unbiased"]).max()
    np.testing.assert_allclose(unbiased, golden["logits_unbiased"], atol=logits, rtol=0)
    np.testing.assert_allclose(unbiased + state["fc.bias"][None], golden["logits"], atol=logits, rtol=0)
    # stored as float32
    np.testing.assert_allclose(outputs["spatial"], golden["spatial"], rtol=0, atol=max(probe, 1e-7) * 20)
    p = np.asarray(jax.nn.softmax(outputs["logits_unbiased"], axis=1))
    np.testing.assert_array_equal(p.argmax(1), golden["softmax_unbiased_argmax"])
    np.testing.assert_allclose(p.max(1), golden["softmax_unbiased_top1"], rtol=10 * logits)
    score = inception_score(unbiased, splits=1).mean
    np.testing.assert_allclose(score, golden["is_1split"], rtol=10 * logits)
    assert len(stages) == len(golden["stage_names"]) == 18
    for i, name in enumerate(golden["stage_names"].tolist()):
        value = stages[name].astype(np.float64)
        assert value.shape[1:] == tuple(golden["stage_shape_hwc"][i])
        moments = {"mean": value.mean(axis=(1, 2, 3)), "std": value.std(axis=(1, 2, 3))}
        for key, mine in moments.items():
            np.testing.assert_allclose(mine, golden[f"stage_{key}"][i], rtol=stage, err_msg=f"{name} {key}")
            worst["stages"] = max(worst.get("stages", 0), np.abs(mine / golden[f"stage_{key}"][i] - 1).max())
        h, w, c = golden["probe_hwc"][i].T
        theirs = golden["probe_value"][i]
        error = np.abs(value[:, h, w, c] - theirs).max() / np.abs(theirs).max()
        worst["probes"] = max(worst.get("probes", 0), error)
        assert error < probe, (name, error)
    print({key: f"{value:.1e}" for key, value in worst.items()})


def test_float32(state):
    outputs, stages = run(state, np.float32)
    assert np.abs(outputs["pool3"] - RANDOM["pool"]).max() < 2e-3
    compare(outputs, stages, state, pool=1e-4, stage=1e-4, probe=1e-4, logits=1e-3)


@pytest.mark.slow
def test_float64(state):
    with jax.enable_x64(True):
        outputs, stages = run(state, np.float64)
        compare(outputs, stages, state, pool=1e-8, stage=1e-8, probe=1e-8, logits=1e-8)


# ----------------------------------------------------------------------------------------------------
# Input path


def tf1_by_numpy(image):
    """Section 3.1 with one float32 rounding per operation."""
    x = image.astype(np.float32)
    for axis in (1, 0):
        lo, hi, t = inception.tf1_indices(x.shape[axis])
        first, second = np.take(x, lo, axis), np.take(x, hi, axis)
        x = first + (second - first) * t.reshape([-1 if i == axis else 1 for i in range(3)])
    return x


@pytest.mark.parametrize("size", [32, 64, 256, 512])
def test_tf1_resize_is_bit_exact(size):
    image, index = RESIZE[f"img{size}"], RESIZE["idx299"]
    mine = np.asarray(jax.jit(inception.tf1_resize)(image[None]))[0]
    np.testing.assert_array_equal(mine, tf1_by_numpy(image))  # no fused multiply-add under jit
    np.testing.assert_array_equal(mine[index][:, index], RESIZE[f"tf1_{size}"])
    np.testing.assert_allclose(mine.mean(dtype=np.float64), RESIZE[f"tf1_{size}_mean"], rtol=1e-9)
    np.testing.assert_allclose((mine.astype(np.float64) ** 2).mean(), RESIZE[f"tf1_{size}_meansq"], rtol=1e-9)


def test_other_conventions_are_far_away():
    """The golden tells the TF1 resize from the usual ones (section 3.1)."""
    index = RESIZE["idx299"][::3]
    for size in (32, 64, 512):
        mine = np.asarray(inception.tf1_resize(RESIZE[f"img{size}"][None]))[0][index][:, index]
        for other in ("halfpix", "clean"):
            assert np.abs(mine - RESIZE[f"{other}_{size}"]).mean() > 1


def test_resize_sides_of_any_kind():
    image = RESIZE["img64"]
    same = inception.tf1_resize(RANDOM["img299a"][None])
    np.testing.assert_array_equal(same[0], RANDOM["img299a"].astype(np.float32))  # the identity
    oblong = np.asarray(inception.tf1_resize(image[None, :32]))[0]
    np.testing.assert_array_equal(oblong, tf1_by_numpy(image[:32]))
    as_float = inception.tf1_resize(image[None].astype(np.float32))
    np.testing.assert_array_equal(as_float, inception.tf1_resize(image[None]))
    np.testing.assert_array_equal(inception.normalise(np.float32([0, 128, 255])), np.float32([-1, 0, 0.9921875]))


# ----------------------------------------------------------------------------------------------------
# The module


def equations(jaxpr):
    """All equations, those of inner jaxprs too."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from equations(inner)


def test_precision_is_highest_whatever_the_caller_says():
    x = jax.ShapeDtypeStruct((2, 64, 64, 3), np.uint8)
    shapes = jax.eval_shape(
        inception.Inception().init, jax.random.key(0), jax.ShapeDtypeStruct((1, 299, 299, 3), np.float32)
    )
    with jax.default_matmul_precision("bfloat16"):
        jaxpr = jax.make_jaxpr(inception.features)({"params": shapes["params"]}, x).jaxpr
    products = [e for e in equations(jaxpr) if e.primitive.name in ("conv_general_dilated", "dot_general")]
    assert len(products) == 95
    highest = jax.lax.Precision.HIGHEST
    assert all(e.params["precision"] in (highest, (highest, highest)) for e in products)
    assert {v.aval.dtype for e in products for v in (*e.invars, *e.outvars)} == {np.dtype("float32")}


def test_features_shapes_and_bad_images():
    x = jax.ShapeDtypeStruct((1, 299, 299, 3), np.float32)
    shapes = jax.eval_shape(inception.Inception().init, jax.random.key(0), x)
    assert sum(v.size for v in jax.tree.leaves(shapes["params"])) == 23_885_392
    for size in ((32, 32), (64, 48), (512, 512)):
        images = jax.ShapeDtypeStruct((5, *size, 3), np.uint8)
        out = jax.eval_shape(inception.features, {"params": shapes["params"]}, images)
        assert {k: v.shape for k, v in out.items()} == {
            "pool3": (5, 2048),
            "spatial": (5, 2023),
            "logits_unbiased": (5, 1008),
        }
    for bad in ((32, 32, 3), (1, 32, 32, 1), (1, 3, 32, 32)):
        with pytest.raises(ValueError, match=r"images have shape .*: they must be \[B, H, W, 3\]"):
            inception.features({}, np.zeros(bad, np.uint8))


def test_average_pool_leaves_the_padding_out():
    x = np.random.default_rng(0).normal(size=(1, 4, 5, 2)).astype(np.float32)
    mine = np.asarray(inception.POOLS["avg"](x))
    for h in range(4):
        for w in range(5):
            window = x[:, max(h - 1, 0) : h + 2, max(w - 1, 0) : w + 2]
            np.testing.assert_allclose(mine[:, h, w], window.mean(axis=(1, 2)), atol=1e-6)
