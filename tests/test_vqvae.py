"""The shipped VQ-VAEs, and the example that made them."""

import runpy
from pathlib import Path

import jax
import numpy as np
import pytest

from ddo_jax import convert
from ddo_jax.data.sources import open_source

ROOT = Path(__file__).parents[1]
SHIPPED = ROOT / "configs" / "digits_vqvae.safetensors"
FASHION = SHIPPED.with_name("fashion_vqvae.safetensors")


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """{split: uint8 images}; never in the user's own directory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TFDS_DATA_DIR", str(tmp_path_factory.getbasetemp() / "tfds"))
        yield {split: open_source("digits", split).images for split in ("train", "test")}


def load(path):
    """(images in [-1, 1] -> tokens, tokens -> images in [-1, 1], module) of a file."""
    released = convert.read(path)
    assert released.kind == "vqvae"
    module, variables = convert.from_torch("vqvae", released.config, released.state_dict)
    encode = jax.jit(lambda x: module.apply(variables, x, method="tokens"))
    decode = jax.jit(lambda t: module.apply(variables, module.apply(variables, t, method="f_hat"), method="decode"))
    return encode, decode, module


def error_of(encode, decode, images):
    """Mean absolute error in grey levels."""
    y = np.asarray(decode(encode(images / np.float32(8) - 1)))
    return np.mean(np.abs(8 * (y + 1) - images))


def test_shipped_file(digits):
    encode, decode, module = load(SHIPPED)
    assert SHIPPED.stat().st_size < 300_000
    assert (module.image_size, module.length) == (8, 21)
    assert error_of(encode, decode, digits["test"]) < 0.75  # measured: 0.645

    tokens = np.asarray(encode(digits["train"] / np.float32(8) - 1))
    assert tokens.shape[1:] == (21,)
    assert len(np.unique(tokens)) > 0.9 * module.vocab_size  # measured: all
    # VAR draws its fakes as tokens, decodes them and encodes them again: most survive.
    again = np.asarray(encode(decode(tokens)))
    assert np.mean(again == tokens) > 0.6  # measured: 0.68


def test_the_file_of_fashion():
    """Breaks if the file is not of the network that the example trains; how well it does, its data decide."""
    encode, decode, module = load(FASHION)
    example = runpy.run_path(str(ROOT / "configs/make/vqvae.py"), run_name="example")
    assert convert.read(FASHION).config == example["NETWORKS"]["fashion"]
    assert FASHION.stat().st_size < 1_000_000 and (module.image_size, module.length) == (28, 70)
    tokens = np.random.default_rng(0).integers(0, module.vocab_size, (4, 70)).astype(np.int32)
    images = decode(tokens)
    assert images.shape == (4, 28, 28, 1) and encode(images).shape == (4, 70)


@pytest.mark.slow  # compilation of the gradient and of the draw of the weights
def test_example_trains_and_writes(digits, tmp_path, capsys):
    example = runpy.run_path(str(ROOT / "configs/make/vqvae.py"), run_name="example")
    out = tmp_path / "vqvae.safetensors"
    with jax.numpy_dtype_promotion("standard"):  # optax.adam itself fails "strict"
        error = example["main"]("digits", out=str(out), steps=150)
    average = np.mean(np.abs(digits["train"].mean(0) - digits["test"]))
    assert error < 0.8 * average  # something of each image comes through
    assert f"error {error:.3f} grey levels" in capsys.readouterr().out

    encode, decode, _ = load(out)
    np.testing.assert_allclose(error_of(encode, decode, digits["test"]), error, rtol=1e-4)
    assert convert.read(out).config == convert.read(SHIPPED).config == example["NETWORKS"]["digits"]
