"""SD-VAE against the numbers of the public reference (specs/edm2.md sections 13, 18, 19). `pytest -s` prints errors."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from ddo_jax.convert import from_torch

TOLERANCE = 1e-5  # section 19; measured: 4e-6
with np.load(Path(__file__).parents[1] / "goldens" / "sdvae_small.npz") as f:
    GOLDEN = dict(f)


def nhwc(key):
    return np.moveaxis(GOLDEN[key], 1, -1)


def check(key, value, elementwise=False):
    value, expected = np.asarray(value), nhwc(key)
    assert value.shape == expected.shape and value.dtype == np.float32, key
    error = np.max(np.abs(value - expected) / (np.abs(expected) if elementwise else np.abs(expected).max()))
    print(f"\n{key}: {error:.1e}", end="")
    assert error <= TOLERANCE, f"{key}: error {error:.2e}, tolerance {TOLERANCE:.0e}"


@pytest.fixture(scope="module")
def vae():
    """One method of the golden network, with its intermediates: (method, input) -> (output, layers)."""
    state = {k.removeprefix("param/"): v for k, v in GOLDEN.items() if k.startswith("param/")}
    module, variables = from_torch("sdvae", json.loads(str(GOLDEN["config"])), state)

    def run(method, x):
        with jax.default_matmul_precision("float32"):
            program = jax.jit(lambda x: module.apply(variables, x, method=method, capture_intermediates=True))
            out, layers = program(x)
        return out, layers["intermediates"]

    return run


def check_layers(layers, prefixes):
    keys = [key for key in GOLDEN if key.startswith(tuple(f"act/{prefix}" for prefix in prefixes))]
    for key in keys:
        node = layers
        for part in key.removeprefix("act/").replace("s.", "s_").split("."):
            node = node[part]
        check(key, node["__call__"][0])
    return len(keys)


def test_encoder(vae):
    image = nhwc("in/image_u8").astype(np.float32) / np.float32(255)
    (mean, std), layers = vae("encode", image)
    assert check_layers(layers, ["encoder."]) == 9
    check("enc/moments", layers["quant_conv"]["__call__"][0])
    check("enc/mean", mean)
    check("enc/std", std, elementwise=True)
    check("enc/logvar_clamped", 2 * np.log(std))
    assert std.min() < 4e-7 and std.max() > 2e4  # both ends of the clamp are in these numbers


def test_decoder(vae):
    image, layers = vae("decode", nhwc("dec/z"))
    assert check_layers(layers, ["decoder.", "post_quant_conv"]) == 8
    check("dec/sample", image)
