"""SD-VAE: shapes, dtypes, and the configurations that it takes and refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddo_jax.models.sdvae import AutoencoderKL, from_config

CONFIG = {"in_channels": 1, "out_channels": 2, "latent_channels": 3, "block_out_channels": [4, 8]}
CONFIG |= {"layers_per_block": 1, "norm_num_groups": 2}
MODULE = from_config(CONFIG)


@pytest.fixture(scope="module")
def variables():
    """Of the tree of `init`, whose compilation would take longer than all the tests here."""
    abstract = jax.eval_shape(MODULE.init, jax.random.key(0), np.zeros((1, 8, 4, 1), np.float32))
    return jax.tree.map(lambda v: np.random.default_rng(v.size).normal(0, 0.3, v.shape).astype(v.dtype), abstract)


def shapes(variables, x, method):
    return jax.eval_shape(lambda v, x: MODULE.apply(v, x, method=method), variables, x)


@pytest.mark.parametrize("dtype, out", [("float32", "float32"), ("bfloat16", "float32"), ("float64", "float64")])
def test_shapes_and_dtypes(variables, dtype, out):
    assert MODULE.downscale == 2 and AutoencoderKL().downscale == 8
    with jax.enable_x64(dtype == "float64"):
        pixels = jax.ShapeDtypeStruct((5, 8, 4, 1), jnp.dtype(dtype))
        for moment in shapes(variables, pixels, "encode"):
            assert moment.shape == (5, 4, 2, 3) and moment.dtype == out
        image = shapes(variables, jax.ShapeDtypeStruct((5, 4, 2, 3), jnp.dtype(dtype)), "decode")
        assert image.shape == (5, 8, 4, 2) and image.dtype == out


def test_deviation_is_clamped(variables):
    """logvar outside [-30, 20] has no effect, and no gradient that is not finite."""
    bias = jnp.asarray([0, 0, 0, -1000, 1000, 0], jnp.float32)
    zeros = jax.tree.map(jnp.zeros_like, variables["params"]["quant_conv"])
    params = variables["params"] | {"quant_conv": zeros | {"bias": bias}}
    x = np.ones((1, 4, 4, 1), np.float32)
    encode = jax.jit(lambda p: MODULE.apply({"params": p}, x, method="encode"))
    np.testing.assert_allclose(encode(params)[1][0, 0, 0], np.exp([-15, 10, 0]), rtol=1e-5)
    gradient = jax.jit(jax.grad(lambda p: jnp.sum(encode(p)[1])))(params)
    assert all(np.isfinite(v).all() for v in jax.tree.leaves(gradient))
    np.testing.assert_array_equal(gradient["quant_conv"]["bias"][3:5], 0)


def test_images_do_not_mix(variables):
    """The statistics of a group are of one image."""
    rng = np.random.default_rng(0)
    x = rng.random((2, 4, 4, 1), np.float32)
    reconstruct = jax.jit(lambda x: MODULE.apply(variables, x))
    other = reconstruct(np.stack([x[0], 3 * x[1] + 1]))
    np.testing.assert_array_equal(reconstruct(x)[0], other[0])
    assert np.abs(reconstruct(x)[1] - other[1]).max() > 1e-3


@pytest.mark.parametrize(
    "method, x, message",
    [
        ("encode", np.zeros((1, 4, 4, 1), np.uint8), "images: dtype uint8; allowed: floating point"),
        ("encode", np.zeros((1, 4, 4, 3), np.float32), r"images: shape \(1, 4, 4, 3\); allowed: \[B, H, W, 1\]"),
        ("decode", np.zeros((2, 2, 3), np.float32), r"z: shape \(2, 2, 3\); allowed: \[B, H, W, 3\]"),
    ],
)
def test_wrong_inputs_are_named(variables, method, x, message):
    with pytest.raises(ValueError, match=message):
        shapes(variables, x, method)


def test_config_json_of_diffusers():
    """The keys of a config.json of today; what the network does not compute with is passed over."""
    released = {
        **{"_class_name": "AutoencoderKL", "_diffusers_version": "0.4.2", "_name_or_path": "../sd", "act_fn": "silu"},
        **{"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4},
        **{"in_channels": 3, "out_channels": 3, "latent_channels": 4, "layers_per_block": 2, "norm_num_groups": 32},
        **{"block_out_channels": [128, 256, 512, 512], "sample_size": 256, "scaling_factor": 0.18215},
        **{"force_upcast": True, "shift_factor": None, "latents_mean": None, "latents_std": None},
        **{"use_quant_conv": True, "use_post_quant_conv": True, "mid_block_add_attention": True},
    }
    assert from_config(released) == from_config({}) == AutoencoderKL()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"_class_name": "VQModel"}, "_class_name is 'VQModel'; allowed: 'AutoencoderKL'"),
        ({"act_fn": "relu"}, "act_fn is 'relu'; allowed: 'silu'"),
        ({"up_block_types": ["UpDecoderBlock2D", "AttnUpDecoderBlock2D"]}, "up_block_types is .*; allowed: 'UpDec"),
        ({"use_quant_conv": False}, "use_quant_conv is False; allowed: True"),
        ({"widths": [1]}, "unknown key 'widths' for AutoencoderKL; allowed: in_channels, .*block_out_channels"),
        ({"layers_per_block": 0}, "layers_per_block: 0; allowed: whole numbers from 1"),
        ({"latent_channels": 4.0}, "latent_channels: 4.0; allowed: whole numbers"),
        ({"block_out_channels": []}, r"block_out_channels is \[\]; allowed: a list"),
        ({"block_out_channels": [8, "x"]}, "block_out_channels: 'x'; allowed: whole numbers"),
        ({"block_out_channels": [8, 12], "norm_num_groups": 8}, "norm_num_groups is 8; allowed: divisors of .* 12"),
    ],
)
def test_other_values_are_refused(change, message):
    with pytest.raises(ValueError, match=message) as e:
        from_config(CONFIG | change)
    assert "\n" not in str(e.value)
