"""The shipped VAE of the digits, and the example that made it."""

import json
import runpy
from pathlib import Path

import jax
import numpy as np
import pytest

from ddo_jax import convert
from ddo_jax.data.sources import open_source

ROOT = Path(__file__).parents[1]
SHIPPED = ROOT / "configs" / "digits_vae.safetensors"


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """{split: uint8 images}; never in the user's own directory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TFDS_DATA_DIR", str(tmp_path_factory.getbasetemp() / "tfds"))
        yield {split: open_source("digits", split).images for split in ("train", "test")}


def load(path):
    """(encode, decode, recorded statistics) of a file."""
    released = convert.read(path)
    assert released.kind == "sdvae"
    module, variables = convert.from_torch("sdvae", released.config, released.state_dict)
    methods = [jax.jit(lambda x, m=m: module.apply(variables, x, method=m)) for m in ("encode", "decode")]
    return *methods, {k: json.loads(released.extras["metadata"][k]) for k in ("raw_mean", "raw_std")}


def error_of(encode, decode, images):
    """Mean absolute error in grey levels."""
    y = np.asarray(decode(encode(images / np.float32(16))[0]))
    return np.mean(np.abs(16 * np.clip(y, 0, 1) - images))


def check_statistics(encode, recorded, images):
    mean, std = (np.asarray(v, np.float64) for v in encode(images / np.float32(16)))
    np.testing.assert_allclose(mean.mean((0, 1, 2)), recorded["raw_mean"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(mean.std((0, 1, 2)), recorded["raw_std"], rtol=1e-4)
    return mean, std


def test_shipped_file(digits):
    encode, decode, recorded = load(SHIPPED)
    assert SHIPPED.stat().st_size < 250_000
    assert error_of(encode, decode, digits["test"]) < 0.4  # measured: 0.299
    mean, std = check_statistics(encode, recorded, digits["train"])
    assert mean.shape[1:] == (4, 4, 4)
    # No channel is switched off: the posterior is narrow against the spread of its means.
    assert (std.mean((0, 1, 2)) < 0.05 * np.array(recorded["raw_std"])).all()


@pytest.mark.slow  # compilation of the gradient and of the draw of the weights
def test_example_trains_and_writes(digits, tmp_path, capsys):
    example = runpy.run_path(str(ROOT / "configs/make/digits_vae.py"), run_name="example")
    out = tmp_path / "vae.safetensors"
    with jax.numpy_dtype_promotion("standard"):  # optax.adam itself fails "strict"
        error = example["main"](str(out), steps=150)
    average = np.mean(np.abs(digits["train"].mean(0) - digits["test"]))
    assert error < 0.8 * average  # something of each image comes through; measured: 0.66
    assert f"error {error:.3f} grey levels" in capsys.readouterr().out

    encode, decode, recorded = load(out)
    np.testing.assert_allclose(error_of(encode, decode, digits["test"]), error, rtol=1e-4)
    check_statistics(encode, recorded, digits["train"])
    assert convert.read(out).config == convert.read(SHIPPED).config == example["CONFIG"]
