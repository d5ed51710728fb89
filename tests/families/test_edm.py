"""Family edm: quantisation, labels, the log-ratio at the reference, matmul precision in the program."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddo_jax.config import base
from ddo_jax.errors import UserError
from ddo_jax.families import get_family
from ddo_jax.families.codecs import Pixels, to_uint8, to_unit

B = 4


def config(precision="highest", **model):
    c = base()
    c.precision = precision
    c.model.update(img_resolution=8, img_channels=1, label_dim=10, levels=17)
    with c.unlocked():
        c.model.update(model or {"arch": "mlp", "width": 8, "blocks": 1})
    return c


SONG = dict(arch="SongUNet", model_channels=8, channel_mult=[1], num_blocks=1, attn_resolutions=[8], dropout=0.0)


@functools.cache
def family():
    return get_family(config())


@pytest.fixture(scope="module")
def batch():
    """(params, frozen, examples, draws): a network that is not at its start, one batch."""
    fam = family()
    params, frozen = jax.jit(fam.init)(jax.random.key(0))
    params = jax.tree.map(lambda v: v + 0.1 * np.sin(np.arange(v.size, dtype=np.float32)).reshape(v.shape), params)
    record = {
        "image": np.random.default_rng(0).integers(0, 17, (B, 8, 8, 1), np.uint8),
        "label": np.arange(B, dtype=np.int32),
    }
    examples = fam.encode(frozen, record, jax.random.key(1))
    return params, frozen, examples, fam.draw(jax.random.key(2), B, (-0.4, 1.2))


@pytest.mark.parametrize("levels", [2, 17, 256])
def test_levels_round_trip(levels):
    """Breaks if quantisation truncates or shifts by half a level."""
    u = np.arange(levels, dtype=np.uint8)
    x = to_unit(u, levels)
    assert x.dtype == jnp.float32 and float(x[0]) == -1 and float(x[-1]) == 1
    np.testing.assert_array_equal(to_uint8(x, levels), u)
    just_inside = 0.98 / (levels - 1)  # half a level is 1 / (levels - 1)
    np.testing.assert_array_equal(to_uint8(x + just_inside, levels), u)
    np.testing.assert_array_equal(to_uint8(x - just_inside, levels), u)


@pytest.mark.parametrize("levels", [17, 256])
def test_decode_clips(levels):
    """Breaks if values outside [-1, 1] wrap around."""
    np.testing.assert_array_equal(to_uint8(jnp.array([-9.0, 9.0]), levels), [0, levels - 1])


def test_released_quantisation():
    """Breaks if 256 levels are not trunc(clip(127.5 x + 128, 0, 255)) of the released code."""
    x = np.linspace(-1.2, 1.2, 999, dtype=np.float32)
    np.testing.assert_array_equal(to_uint8(jnp.asarray(x), 256), np.clip(x * 127.5 + 128, 0, 255).astype(np.uint8))


def test_no_label_is_the_zero_row(batch):
    """Breaks if id == num_classes is an error, the last class, or wraps around."""
    from ddo_jax.families.edm import EDM, build_network

    model = config().model.to_dict()
    edm = EDM(build_network(model), Pixels((8, 8, 1), 17), model, "highest", "float32")
    one_hot = np.asarray(edm.one_hot(jnp.array([0, 9, 10])))
    np.testing.assert_array_equal(one_hot, np.stack([np.eye(10)[0], np.eye(10)[9], np.zeros(10)]))


def test_nll_is_the_weighted_denoising_error(batch):
    """Breaks if nll is a mean over pixels, or its target is not F_hat."""
    fam = family()
    params, frozen, examples, draws = jax.tree.map(jnp.asarray, batch)
    s = fam.score(params, frozen, examples, draws)
    x, sigma = np.asarray(examples["x"], np.float64), np.asarray(draws["sigma"], np.float64)[:, None, None, None]
    eps = np.asarray(draws["eps"], np.float64)
    c_skip, c_out = 0.25 / (sigma**2 + 0.25), sigma * 0.5 / np.sqrt(sigma**2 + 0.25)
    denoised = c_skip * (x + sigma * eps) + c_out * np.asarray(s, np.float64)
    expected = ((sigma**2 + 0.25) / (0.5 * sigma) ** 2 * (denoised - x) ** 2).sum((1, 2, 3))
    np.testing.assert_allclose(fam.nll(s, examples, draws), expected, rtol=1e-4)


def test_latents_depend_on_the_key_of_their_image_only():
    """Breaks if an image's starting noise depends on its row or on the batch."""
    keys = jax.random.split(jax.random.key(0), 5)
    alone = np.concatenate([family().latents(k[None]) for k in keys])
    np.testing.assert_array_equal(family().latents(keys), alone)


@functools.cache
def program(arch: str, precision: str) -> str:
    fam = get_family(config(precision, **(SONG if arch == "SongUNet" else {})))
    params, frozen = jax.eval_shape(fam.init, jax.random.key(0))
    examples = {"x": jnp.zeros((B, 8, 8, 1)), "label": jnp.zeros(B, jnp.int32)}
    draws = fam.draw(jax.random.key(0), B, (0.0, 1.0))
    return jax.jit(fam.score).lower(params, frozen, examples, draws).as_text()


def lines(text: str, operation: str) -> list[str]:
    return [line for line in text.splitlines() if re.search(rf"stablehlo\.{operation}\b", line)]


@pytest.mark.parametrize(
    "arch, operation", [("mlp", "dot_general"), ("SongUNet", "dot_general"), ("SongUNet", "convolution")]
)
def test_precision_is_in_the_program(arch, operation):
    """Breaks if one product or convolution of the network escapes config.precision."""
    highest = lines(program(arch, "highest"), operation)
    assert highest and all("HIGHEST" in line for line in highest), highest
    default = lines(program(arch, "default"), operation)
    assert len(default) == len(highest) and not any("HIGH" in line for line in default)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda c: c.model.update(arch="unet"), "'unet'; allowed: mlp, mixer, SongUNet"),
        (lambda c: c.model.update(wdth=8), "wdth"),
        (lambda c: c.update(family="emd"), "'emd'; allowed: edm"),
    ],
)
def test_unknown_names_are_user_errors(change, words):
    """Breaks if a misspelt architecture, argument or family ends in a traceback."""
    c = config()
    with c.unlocked():
        change(c)
    with pytest.raises(UserError, match=words):
        get_family(c)


@pytest.mark.parametrize("change", [{"num_steps": 1}, {"sigma_min": -1.0}, {"rho": 0.0}, {"s_churn": -1.0}])
def test_sampler_is_checked_before_anything_runs(change):
    """Breaks if a bad sampler setting is found only when the first image is sampled, after pretraining."""
    c = config()
    c.sampler.update(change)
    with pytest.raises(UserError, match="config.sampler"):
        family().settings(c.sampler)
