"""VAR's tokenizer against the numbers of the public reference (specs/var.md section 13). `pytest -s` prints errors.

tests/goldens has two tokenizers: vqvae_small2 complete, of vqvae_small (five levels, as the released one) what the
quantizer and the first level of the encoder need. The complete files are tested by the same code: put their folder into
the environment variable DDO_JAX_GOLDENS.
"""

import functools
import json
import os
import re
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddo_jax.convert import from_torch, layout, to_torch
from ddo_jax.models.vqvae import phi_indices

GOLDENS = Path(os.environ.get("DDO_JAX_GOLDENS", Path(__file__).parents[1] / "goldens"))
NETWORKS = ("vqvae_small", "vqvae_small2")
ARGUMENTS = ("vocab_size", "z_channels", "ch", "ch_mult", "num_res_blocks", "quant_conv_ks", "quant_resi")
ARGUMENTS += ("share_quant_resi", "using_znorm", "beta", "patch_nums", "in_channels")
# section 13: |a - b| <= absolute + relative |b|
MAPS, IMAGES, SCALES, LOSS = (1e-5, 1e-5), (3e-5, 0), (5e-5, 0), (1e-5, 1e-5)
MARGIN, NORMS = (2e-5, 0), (1e-6, 1e-4)
KEYS = (  # of a tokenizer; each is compared below
    r"config|param/.+|img|img_u8|enc_out|f|(idx|fhat|pooled_rest)/\d+|idx_BL|code_margin|var_input|recon_raw|recon",
    r"recon_scales_img0|trace/.+|tok/(idx_BL|fhat|img|var_input)|train/(gradnorm|grad)/.+",
    r"train/(recon_mse|recon_l1|vq_loss|loss|recon_unclamped_maxdiff_vs_recon_raw)|released_shapes",
)
TRIMMED = 63  # keys of the short copy of vqvae_small


@functools.cache
def load(name):
    """The golden file with its network; parameters that a short copy lacks are zeros."""
    with np.load(GOLDENS / f"{name}.npz") as f:
        golden = dict(f)
    config = json.loads(str(golden["config"]))
    if config["kind"] == "quantizer":  # alone: the smallest networks around it
        arguments = {"ch": 1, "ch_mult": [1], "num_res_blocks": 1, "quant_conv_ks": 1, "norm_groups": 1}
        prefix = "quantize."
    else:
        arguments, prefix = {}, ""
    arguments |= {k: config[k] for k in ARGUMENTS if k in config}
    state = {name: np.zeros(shape, np.float32) for name, shape in layout("vqvae", arguments).items()}
    given = {prefix + k.removeprefix("param/"): v for k, v in golden.items() if k.startswith("param/")}
    assert given.keys() <= state.keys()
    module, variables = from_torch("vqvae", arguments, state | given)
    short = config.get("trimmed", False)
    assert short or prefix or given.keys() == state.keys()
    return SimpleNamespace(
        golden=golden, config=config, arguments=arguments, module=module, variables=variables, short=short
    )


def nchw(v):
    return np.moveaxis(np.asarray(v), -1, -3)


def close(golden, key, value, tolerance=MAPS):
    expected, value = golden[key], np.asarray(value)
    assert value.shape == expected.shape, key
    absolute, relative = tolerance
    error = np.abs(value.astype(np.float64) - expected)
    print(f"\n{key}: {error.max():.1e} (tolerance {absolute:.0e} + {relative:.0e} |b|)", end="")
    assert (error <= absolute + relative * np.abs(expected)).all(), f"{key}: error {error.max():.2e}"


def run(network, method, *args):
    """The outputs of `method` of the golden network, as NumPy arrays."""
    with jax.default_matmul_precision("highest"):
        program = jax.jit(lambda variables, *args: network.module.apply(variables, *args, method=method))
        return jax.tree.map(np.asarray, program(network.variables, *args))


def traced(network, method, x):
    """(output, {released module name: its output}) of a method."""
    with jax.default_matmul_precision("highest"):
        apply = functools.partial(network.module.apply, method=method, capture_intermediates=True)
        out, layers = jax.jit(lambda variables, x: apply(variables, x))(network.variables, x)
    found = {}
    for path, value in jax.tree_util.tree_leaves_with_path(layers["intermediates"]):
        names = [part.key for part in path[:-1] if part.key != "__call__"]
        found[".".join(names)] = value
    return out, found


def close_traces(network, layers, part, expected_number, rows=slice(None)):
    """Mean, deviation, first and last element of every module output whose name starts with `part`."""
    keys = [k for k in network.golden if k.startswith(f"trace/{part}")]
    assert len(keys) == expected_number
    for key in keys:
        name = re.sub(r"\.(\d+)", r"_\1", key.removeprefix("trace/"))
        v = np.asarray(layers[name][rows], np.float64)
        close(network.golden, key, [v.mean(), v.std(), v.flat[0], v.flat[-1]])


@pytest.mark.parametrize("name", NETWORKS)
def test_every_key_is_compared(name):
    network = load(name)
    assert [k for k in network.golden if not re.fullmatch("|".join(KEYS), k)] == []
    if network.short:
        assert name == "vqvae_small" and len(network.golden) == TRIMMED
    else:
        assert len(network.golden) > 400


@pytest.mark.parametrize("name", NETWORKS)
def test_encoder(name):
    network = load(name)
    golden, (levels, blocks) = network.golden, (len(network.module.ch_mult), network.module.num_res_blocks)
    image = golden["img_u8"].astype(np.float32) / np.float32(255) * 2 - 1
    f, layers = traced(network, "features", image)
    if network.short:
        return close_traces(network, layers, "encoder.", 1 + blocks + 1)
    close(golden, "img", nchw(image), (1.2e-7, 0))
    close_traces(network, layers, "encoder.", 1 + levels * blocks + blocks + levels - 1 + 3 + 2)
    close(golden, "enc_out", nchw(layers["encoder"]))
    close(golden, "f", nchw(f))
    np.testing.assert_array_equal(run(network, "tokens", image), golden["idx_BL"])
    np.testing.assert_array_equal(run(network, "quantize", f)[0], golden["idx_BL"])


@pytest.mark.parametrize("name", NETWORKS)
def test_convolutions_beside_the_quantizer(name):
    network = load(name)
    f = run(network, lambda module, x: module.quant_conv(x), np.moveaxis(network.golden["enc_out"], 1, -1))
    close(network.golden, "f", nchw(f))
    close_traces(network, {"quant_conv": f}, "quant_conv", 1)
    f_hat = np.moveaxis(network.golden[f"fhat/{len(network.module.patch_nums) - 1}"], 1, -1)
    after = run(network, lambda module, x: module.post_quant_conv(x), f_hat)
    close_traces(network, {"post_quant_conv": after}, "post_quant_conv", 1)


def scale_keys(network):
    """{key: scale} of the maps f_hat in the file."""
    scales = len(network.module.patch_nums)
    if "fhat_last" in network.golden:
        return {"fhat_mid": scales // 2, "fhat_last": scales - 1}
    return {f"fhat/{s}": s for s in range(scales)}


QUANTIZERS = (*NETWORKS, "quant_10scale")


@pytest.mark.parametrize("name", QUANTIZERS)
def test_features_to_tokens(name):
    """Indices, partial sums, what each scale sees, and how close the second-best codes are."""
    network = load(name)
    golden, module = network.golden, network.module
    f = np.moveaxis(golden["f"], 1, -1)
    assert list(phi_indices(len(module.patch_nums), module.share_quant_resi)) == network.config["phi_index_per_scale"]

    def everything(module, f):
        tokens, sums = module.quantizer.encode(f)
        rests = [module.quantizer.pooled(s, f - (sums[s - 1] if s else 0)) for s in range(len(sums))]
        return tokens, sums, rests, module.quantize(f)

    tokens, sums, rests, quantized = run(network, everything, f)
    assert tokens.dtype == np.int32
    np.testing.assert_array_equal(tokens, golden["idx_BL"])
    np.testing.assert_array_equal(tokens, quantized[0])
    np.testing.assert_array_equal(sums[-1], quantized[1])
    for key, s in scale_keys(network).items():
        close(golden, key, nchw(sums[s]))
    codes = network.variables["params"]["quantize"]["embedding"]["weight"].astype(np.float64)
    margins = []
    ends = np.cumsum(np.square(module.patch_nums))
    for s, (rest, p) in enumerate(zip(rests, module.patch_nums, strict=True)):
        if name in NETWORKS:
            close(golden, f"pooled_rest/{s}", rest.reshape(-1, p, p, module.z_channels))
            np.testing.assert_array_equal(tokens[:, ends[s] - p * p : ends[s]], golden[f"idx/{s}"])
        v = rest.astype(np.float64)
        if module.using_znorm:
            cost = -(v / np.linalg.norm(v, axis=-1, keepdims=True)) @ (codes.T / np.linalg.norm(codes, axis=-1))
        else:
            cost = np.square(v[:, :, None] - codes).sum(-1)
        best, second = np.moveaxis(np.sort(cost, axis=-1)[..., :2], -1, 0)
        margins.append((second - best).min())
    close(golden, "code_margin", margins, MARGIN)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_tokens_to_maps(name):
    """Teacher forcing and, one scale at a time, sampling, for the image's tokens and for random ones."""
    network = load(name)
    golden, module = network.golden, network.module
    last = len(module.patch_nums) - 1
    ends = np.cumsum(np.square(module.patch_nums))

    def everything(module, tokens):
        f_hat, maps = jnp.zeros((tokens.shape[0], *2 * [module.patch_nums[-1]], module.z_channels)), []
        for s, part in enumerate(jnp.split(tokens, ends[:-1], axis=1)):
            f_hat, following = module.step(s, module.embed(part), f_hat)
            maps.append(following)
        assert maps.pop() is None
        return module.partial_sums(tokens), module.f_hat(tokens), module.var_input(tokens), f_hat, maps

    for prefix in ("", "tok/"):
        sums, f_hat, inputs, stepped, maps = run(network, everything, golden[f"{prefix}idx_BL"])
        close(golden, f"{prefix}var_input", inputs)
        np.testing.assert_allclose(np.concatenate(maps, axis=1), inputs, rtol=0, atol=1e-6)
        np.testing.assert_allclose(stepped, f_hat, rtol=0, atol=1e-6)
        np.testing.assert_array_equal(sums[-1], f_hat)
        keys = scale_keys(network) if not prefix else {"tok/fhat" if name in NETWORKS else "tok/fhat_last": last}
        for key, s in keys.items():
            close(golden, key, nchw(sums[s]))


def test_vq_loss_of_the_released_scales():
    network = load("quant_10scale")
    f = np.moveaxis(network.golden["f"], 1, -1)
    out, vq, tokens = run(network, lambda module, f: module.quantizer.straight_through(f), f)
    close(network.golden, "train_vq_loss", vq, LOSS)
    close(network.golden, "train_out", nchw(out))
    np.testing.assert_array_equal(tokens, network.golden["idx_BL"])


@pytest.mark.parametrize("name", NETWORKS)
def test_decoder(name):
    """One program decodes the reconstructions, the previews of image 0 and the random tokens."""
    network = load(name)
    if network.short:
        pytest.skip("complete files only")  # `test_every_key_is_compared` pins which file may be short
    golden, (levels, blocks) = network.golden, (len(network.module.ch_mult), network.module.num_res_blocks + 1)
    previews = [golden[key][:1] for key in scale_keys(network)]
    maps = np.concatenate([golden[f"fhat/{len(previews) - 1}"], *previews, golden["tok/fhat"]])
    raw, layers = traced(network, "decode_unclipped", np.moveaxis(maps, 1, -1))
    number = len(golden["img"])
    close_traces(network, layers, "decoder.", 1 + levels * blocks + blocks + levels - 1 + 3 + 1, slice(number))
    raw, images = nchw(raw), nchw(run(network, "decode", np.moveaxis(maps, 1, -1)))
    close(golden, "recon_raw", raw[:number], IMAGES)
    close(golden, "recon", images[:number], IMAGES)
    close(golden, "recon_scales_img0", images[number:-2], SCALES)
    close(golden, "tok/img", images[-2:], IMAGES)
    np.testing.assert_array_equal(images, np.clip(raw, -1, 1))
    clipped = np.mean(np.abs(raw[:number]) > 1)
    np.testing.assert_allclose(clipped, network.config["clamped_fraction"], atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_training(name):
    network = load(name)
    if network.short:
        pytest.skip("complete files only")
    golden, module = network.golden, network.module
    image = np.moveaxis(golden["img"], 1, -1)

    def loss(params):
        reconstruction, vq, tokens = module.apply({"params": params}, image, method="training_loss")
        error = jnp.mean(jnp.square(reconstruction - image))
        return error + vq, (error, vq, reconstruction, tokens)

    with jax.default_matmul_precision("highest"):
        program = jax.jit(jax.value_and_grad(loss, has_aux=True))
        (total, (error, vq, reconstruction, tokens)), gradient = program(network.variables["params"])
    close(golden, "train/loss", total, LOSS)
    close(golden, "train/recon_mse", error, LOSS)
    close(golden, "train/vq_loss", vq, LOSS)
    close(golden, "train/recon_l1", np.mean(np.abs(reconstruction - image)), LOSS)
    np.testing.assert_array_equal(tokens, golden["idx_BL"])
    off = np.abs(nchw(reconstruction) - golden["recon_raw"]).max()
    assert abs(off - golden["train/recon_unclamped_maxdiff_vs_recon_raw"]) <= IMAGES[0]
    state = to_torch("vqvae", network.arguments, {"params": gradient, "buffers": network.variables["buffers"]})
    norms = [k for k in golden if k.startswith("train/gradnorm/")]
    assert len(norms) == len(state) - 1  # all but the buffer
    for key in norms:
        close(golden, key, np.linalg.norm(state[key.removeprefix("train/gradnorm/")].astype(np.float64)), NORMS)
    gradients = [k for k in golden if k.startswith("train/grad/")]
    assert len(gradients) == 3
    for key in gradients:
        close(golden, key, state[key.removeprefix("train/grad/")], (5e-5 * np.abs(golden[key]).max(), 0))
