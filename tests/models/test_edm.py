"""EDM layers against edm_units.npz, and what the networks promise beside their numbers (see tests/parity).

Sections are those of specs/edm.md.
"""

import math
from pathlib import Path

import flax.errors
import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddo_jax.models import edm_layers as layers
from ddo_jax.models.edm import RELEASED, SongUNet, drop_labels, from_config

UNITS = Path(__file__).parents[1] / "goldens" / "edm_units.npz"
SMALL = {
    "img_resolution": 8,
    "img_channels": 3,
    "label_dim": 3,
    "model_channels": 32,
    "channel_mult": [1, 2],
    "num_blocks": 1,
    "attn_resolutions": [4],
    "dropout": 0.5,
}
TINY = {"channel_mult": [1], "num_blocks": 0}
SONG = {"model_type": "SongUNet", "augment_dim": 9, **SMALL}
ADM = {"model_type": "DhariwalUNet", **SMALL}
X = np.linspace(-1, 1, 2 * 8 * 8 * 3, dtype=np.float32).reshape(2, 8, 8, 3)
SIGMA = np.array([0.3, 2.0], np.float32)
LABELS = np.eye(3, dtype=np.float32)[:2]


@pytest.fixture(scope="module")
def units():
    with np.load(UNITS) as f:
        return dict(f)


def nhwc(v):
    return jnp.asarray(np.moveaxis(v, 1, -1))


def close(value, expected, tolerance):
    assert value.shape == expected.shape
    np.testing.assert_allclose(value, expected, rtol=0, atol=tolerance * np.max(np.abs(expected)))


# ----------------------------------------------------------------------------------------------------
# Layers


def test_embeddings(units):
    c = jnp.asarray(units["emb/c_noise"])
    close(layers.PositionalEmbedding(32, endpoint=True).apply({}, c), units["emb/pos32_endpoint"], 1e-6)
    close(layers.PositionalEmbedding(32, endpoint=False).apply({}, c), units["emb/pos32_noendpoint"], 1e-6)
    buffers = {"buffers": {"freqs": units["emb/fourier_freqs"]}}
    fourier = layers.FourierEmbedding(32)
    close(fourier.apply(buffers, c), units["emb/fourier32"], 1e-6)  # tight: the order of the products matters
    with jax.enable_x64(True):
        buffers = jax.tree.map(np.float64, buffers)
        c = jnp.asarray(units["emb/c_noise"].astype(np.float64))
        close(fourier.apply(buffers, c), units["emb/fourier32_64"], 1e-12)


@pytest.mark.parametrize("taps", [(1, 1), (1, 3, 3, 1)])
def test_resampling(units, taps):
    x, digits = nhwc(units["rs/x"]), "".join(map(str, taps))
    weights = {"params": {"weight": units["rs/w"].transpose(2, 3, 1, 0), "bias": units["rs/b"]}}
    for way in ("up", "down"):
        alone = layers.Conv(kernel=0, taps=taps, **{way: True})
        close(jax.jit(alone.apply)({}, x), nhwc(units[f"rs/{way}_{digits}"]), 1e-6)
        for suffix in ("", "_fused"):
            conv = layers.Conv(6, 3, taps=taps, fused=bool(suffix), **{way: True})
            close(jax.jit(conv.apply)(weights, x), nhwc(units[f"rs/conv3_{way}_{digits}{suffix}"]), 1e-6)


def test_group_norm(units):
    x = nhwc(units["gn/x"])
    weights = {"params": {"weight": units["gn/weight"], "bias": units["gn/bias"]}}
    for eps in (1e-5, 1e-6):
        value = layers.GroupNorm(eps).apply(weights, x)
        close(value, nhwc(units[f"gn/out_eps{'1e-5' if eps == 1e-5 else '1e-6'}"]), 2e-6)
    groups = [layers.group_count(int(c)) for c in units["gn/table_channels"]]
    assert groups == units["gn/table_groups"].tolist()
    for channels in (2, 70):
        with pytest.raises(ValueError, match=f"{channels} channels"):
            layers.group_count(channels)


@pytest.mark.parametrize("heads", [1, 2])
def test_attention(units, heads):
    qkv = nhwc(units[f"attn/heads{heads}_qkv"])
    q, k, _ = layers.split_qkv(qkv, heads)
    weights = layers.attention_weights(q, k)
    close(weights.reshape(-1, *weights.shape[2:]), units[f"attn/heads{heads}_weights"], 2e-6)
    close(layers.attention(qkv, heads), nhwc(units[f"attn/heads{heads}_out"]), 2e-6)


# ----------------------------------------------------------------------------------------------------
# Initialisation (section 8)


@pytest.mark.parametrize("mode", ["xavier_uniform", "kaiming_uniform", "kaiming_normal"])
def test_base_draws(mode):
    deviation = 1.5 * math.sqrt(2 / (200 + 56) if mode == "xavier_uniform" else 1 / 200)
    values = np.asarray(layers.draw(jax.random.key(0), mode, 1.5, (64, 64), (200, 56)))
    assert values.std() == pytest.approx(deviation, rel=0.05) and abs(values.mean()) < 0.1 * deviation
    assert (np.abs(values).max() > 1.8 * deviation) == (mode == "kaiming_normal")


@pytest.fixture
def initial(monkeypatch):
    """Initial variables with every unit draw replaced by 1: uniform weights become their bound, normal ones
    their standard deviation, and nothing random is compiled."""
    monkeypatch.setattr(jax.random, "uniform", lambda key, shape, minval, maxval: jnp.ones(shape))
    monkeypatch.setattr(jax.random, "normal", lambda key, shape: jnp.ones(shape))
    return lambda config: jax.jit(from_config(config).init)(jax.random.key(0), X, SIGMA)


def every(values, expected):
    np.testing.assert_allclose(values, expected, rtol=1e-6, atol=0)


def test_song_initialisation(initial):
    variables = initial(SONG | {"embedding_type": "fourier", "channel_mult_noise": 2, "encoder_type": "residual"})
    net = variables["params"]["net"]
    block = net["enc"]["4x4_block0"]
    every(block["conv0"]["weight"], math.sqrt(6 / (9 * (32 + 64))))
    every(block["affine"]["weight"], math.sqrt(6 / (128 + 64)))
    every(block["skip"]["weight"], math.sqrt(6 / (32 + 64)))
    every(block["conv1"]["weight"], 1e-5 * math.sqrt(6 / (9 * 128)))
    every(block["proj"]["weight"], 1e-5 * math.sqrt(6 / 128))
    every(block["qkv"]["weight"], math.sqrt(0.2 * 6 / (64 + 192)))
    every(net["enc"]["4x4_aux_residual"]["weight"], math.sqrt(6 / (9 * (3 + 32))))
    every(net["dec"]["8x8_aux_conv"]["weight"], 1e-5 * math.sqrt(6 / (9 * 35)))
    every(net["map_label"]["weight"], math.sqrt(6 / (3 + 64)))
    every(net["map_augment"]["weight"], math.sqrt(6 / (9 + 64)))
    every(variables["buffers"]["net"]["map_noise"]["freqs"], 16)
    assert set(net["map_augment"]) == {"weight"}
    for path, value in flax.traverse_util.flatten_dict(net).items():
        if path[-1] == "bias":
            assert not value.any(), path
        elif "norm" in path[-2]:
            every(value, 1)


def test_adm_initialisation(initial):
    net = initial(ADM | {"augment_dim": 2})["params"]["net"]
    block = net["enc"]["4x4_block0"]
    for leaf in ("weight", "bias"):  # the bias with the fans of the weight
        every(block["conv0"][leaf], 1 / math.sqrt(9 * 32))
        every(block["qkv"][leaf], 1 / math.sqrt(64))
        every(net["map_layer0"][leaf], 1 / math.sqrt(32))
    every(net["map_label"]["weight"], 1)
    assert set(net["map_label"]) == {"weight"}
    for layer in (block["conv1"], block["proj"], net["out_conv"], net["map_augment"]):
        assert not any(v.any() for v in layer.values())


# ----------------------------------------------------------------------------------------------------
# Behaviour


def random_variables(module):
    shapes = jax.eval_shape(module.init, jax.random.key(0), X, SIGMA)
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda v: rng.normal(0, 0.2, v.shape).astype(np.float32), shapes)


def test_dropout_needs_its_rng_in_training_and_only_then():
    module = from_config(ADM | TINY)
    variables = random_variables(module)
    train = jax.jit(lambda key: module.apply(variables, X, SIGMA, LABELS, train=True, rngs={"dropout": key}))
    first, again, other = train(jax.random.key(0)), train(jax.random.key(0)), train(jax.random.key(1))
    assert (first == again).all() and (first != other).any()
    with pytest.raises(flax.errors.InvalidRngError):  # no hidden source of randomness
        jax.eval_shape(lambda: module.apply(variables, X, SIGMA, LABELS, train=True))
    jax.eval_shape(lambda: module.apply(variables, X, SIGMA, LABELS))


def test_label_dropout_zeroes_whole_rows():
    labels = jnp.ones((1000, 3))
    drop = nn.apply(lambda net, train: drop_labels(net, labels, 0.3, train), SongUNet(8, 3))
    dropped = np.asarray(drop({}, True, rngs={"dropout": jax.random.key(0)}))
    assert set(dropped.sum(axis=1)) == {0.0, 3.0}
    assert np.mean(dropped[:, 0]) == pytest.approx(0.7, abs=0.06)
    assert drop({}, False) is labels


def test_bfloat16_lowers_the_image_path_only():
    """The mapping network stays float32, D comes back in float32 and close to the float32 result."""
    module, low = from_config(SONG | TINY), from_config(SONG | TINY, dtype=jnp.bfloat16)
    variables = random_variables(module)

    @jax.jit
    def both():
        return [m.apply(variables, X, SIGMA, LABELS, capture_intermediates=True) for m in (module, low)]

    (exact, _), (value, state) = both()
    dtypes = jax.tree.map(lambda v: v.dtype, state["intermediates"]["net"])
    assert value.dtype == jnp.float32
    assert dtypes["map_layer1"]["__call__"] == (jnp.float32,)
    assert dtypes["dec"]["8x8_in0"]["__call__"] == (jnp.bfloat16,)
    assert dtypes["dec"]["8x8_aux_conv"]["__call__"] == (jnp.bfloat16,)
    assert 0 < np.abs(value - exact).max() < 0.05 * np.abs(exact).max()


# ----------------------------------------------------------------------------------------------------
# Configurations (section 6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dropuot": 0.1}, "unknown key 'dropuot' for SongUNet; allowed: img_resolution, "),
        ({"encoder_type": "skipp"}, "encoder_type is 'skipp'; allowed: standard, skip, residual"),
        ({"decoder_type": "residual"}, "decoder_type is 'residual'; allowed: standard, skip"),
        ({"embedding_type": "sine"}, "embedding_type is 'sine'; allowed: positional, fourier"),
        ({"model_type": "UNet"}, "model_type is 'UNet'; allowed: SongUNet, DhariwalUNet"),
        ({"class_name": "VPPrecond"}, "class_name is 'VPPrecond'; allowed: EDMPrecond"),
    ],
)
def test_refusals_are_one_line_and_name_the_key(change, message):
    with pytest.raises(ValueError) as e:
        from_config(SONG | change)
    assert str(e.value).startswith(message) and "\n" not in str(e.value)


def test_missing_key_and_key_of_the_other_network():
    with pytest.raises(ValueError, match="'img_resolution' is missing"):
        from_config({"img_channels": 3})
    with pytest.raises(ValueError, match="unknown key 'encoder_type' for DhariwalUNet"):
        from_config(ADM | {"encoder_type": "standard"})


def test_defaults_of_a_released_file():
    """num_blocks and attn_resolutions are not recorded."""
    song = from_config(RELEASED["edm-cifar10-32x32-cond-vp"])
    assert (song.net.num_blocks, song.net.attn_resolutions, song.net.channel_mult) == (4, (16,), (2, 2, 2))
    adm = from_config(RELEASED["edm-imagenet-64x64-cond-adm"])
    assert (adm.net.num_blocks, adm.net.attn_resolutions) == (3, (32, 16, 8))
    assert (adm.label_dim, adm.sigma_data, adm.sigma_min, adm.sigma_max) == (1000, 0.5, 0.0, math.inf)
