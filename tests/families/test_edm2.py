"""Family edm2: pixels and latents of the goldens, projection, guidance, files; r at the start of a round."""

import functools
import json
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddo_jax import convert, sharding
from ddo_jax.config import base
from ddo_jax.convert import safetensors
from ddo_jax.convert.read import Released
from ddo_jax.errors import UserError
from ddo_jax.families import codecs, from_released, get_family
from ddo_jax.families.codecs import Latents, in_parts, to_uint8, to_unit
from ddo_jax.models import edm2 as networks
from ddo_jax.run import rounds

GOLDENS = Path(__file__).parents[1] / "goldens"
B = 4
SMALL = dict(model_channels=8, channel_mult=(1,), num_blocks=1, attn_resolutions=(8,), channels_per_head=8)


def config(**model):
    c = base()
    with c.unlocked():
        c.family = "edm2"
        c.model.update(arch="UNet", img_resolution=8, img_channels=1, label_dim=10, levels=17)
        c.model.update(SMALL | model)
    return c


@functools.cache
def family(label_dim=10):
    return get_family(config(label_dim=label_dim))


@functools.cache
def variables(label_dim=10):
    params, frozen = jax.jit(family(label_dim).init)(jax.random.key(0))
    return jax.tree.map(lambda v: v if v.ndim else jnp.ones(()), params), frozen  # gains: 0 at the start of training


def batch():
    rng = np.random.default_rng(0)
    record = {"image": jnp.asarray(rng.integers(0, 17, (B, 8, 8, 1), np.uint8)), "label": jnp.arange(B)}
    examples = family().encode({}, record, jax.random.key(1))
    return examples, family().draw(jax.random.key(2), B, (-0.8, 1.6))


# ----------------------------------------------------------------------------------------------------
# Records


@pytest.fixture(scope="module")
def vae_golden():
    with np.load(GOLDENS / "sdvae_small.npz") as f:
        return dict(f)


def nhwc(v):
    return np.ascontiguousarray(np.moveaxis(v, -3, -1))


@pytest.fixture(scope="module")
def latents(vae_golden, tmp_path_factory):
    """(codec, frozen) around the golden autoencoder, read from a file."""
    state = {k.removeprefix("param/"): v for k, v in vae_golden.items() if k.startswith("param/")}
    path = tmp_path_factory.mktemp("vae") / "vae.safetensors"
    metadata = {"ddo_jax_kind": "sdvae", "ddo_jax_config": str(vae_golden["config"])}
    path.write_bytes(safetensors.dumps(state, metadata))
    codec = Latents(str(path), (32, 32, 3), (4, 4, 4), (5.81, 3.25, 0.12, -2.15), (4.17, 4.62, 3.71, 3.28), 0.5, 256)
    return codec, codec.companions()


def test_constants_of_the_encoder(latents, vae_golden):
    np.testing.assert_allclose(latents[0].scale.ravel(), vae_golden["edm2/scale"], rtol=1e-6)
    np.testing.assert_allclose(latents[0].bias.ravel(), vae_golden["edm2/bias"], rtol=1e-6)


def test_latents_of_a_data_set(latents, vae_golden):
    """Breaks if the posterior is not sampled, the statistics are swapped, or the scale is applied to one of two."""
    codec, frozen = latents
    raw = nhwc(vae_golden["edm2/raw_for_final"])
    key = jax.random.key(3)
    noise = np.asarray(jax.random.normal(key, (2, 4, 4, 4)))
    mean, std = np.split(raw, 2, -1)
    expected = (mean + std * noise) * codec.scale + codec.bias
    np.testing.assert_allclose(codec.encode(frozen, jnp.asarray(raw), key), expected, atol=1e-6)
    final = nhwc(vae_golden["edm2/final_latents"])  # with the golden's own noise
    given = codec.scaled(mean + std * nhwc(vae_golden["edm2/noise"]))
    np.testing.assert_allclose(given, final, atol=1e-5 * np.abs(final).max())


def test_pixels_are_encoded_from_0_to_1(latents, vae_golden):
    codec, frozen = latents
    images, key = nhwc(vae_golden["in/image_u8"]), jax.random.key(3)
    raw = nhwc(vae_golden["edm2/raw_latents"])
    ours = codec.encode(frozen, jnp.asarray(images), key)
    np.testing.assert_allclose(ours, codec.encode(frozen, jnp.asarray(raw), key), atol=2e-5)


def test_decoded_images(latents, vae_golden):
    codec, frozen = latents
    ours = np.asarray(codec.decode(frozen, jnp.asarray(nhwc(vae_golden["edm2/decode_in"]))))
    expected = nhwc(vae_golden["edm2/decode_u8"])
    difference = np.abs(ours.astype(int) - expected)
    assert difference.max() <= 1 and (difference > 0).mean() <= 1e-3


def test_fakes_stay_latents(latents):
    """Breaks if a fake loses more than rounding on its way through the pool, or gets posterior noise."""
    codec, frozen = latents
    x = jax.random.normal(jax.random.key(0), (3, 4, 4, 4)) * 0.5
    stored = codec.store(x)
    assert stored.dtype == jnp.float32 and stored.shape == (3, 4, 4, 4)
    np.testing.assert_allclose(codec.encode(frozen, stored, jax.random.key(1)), x, atol=1e-6)


def test_rgb(vae_golden):
    encoded = to_unit(jnp.asarray(nhwc(vae_golden["rgb/encode_in"])), 256)
    np.testing.assert_allclose(encoded, nhwc(vae_golden["rgb/encode_out"]), atol=1e-6)
    np.testing.assert_array_equal(to_uint8(jnp.asarray(vae_golden["rgb/decode_in"]), 256), vae_golden["rgb/decode_out"])


def test_parts_of_a_batch_come_back_in_order():
    x = jnp.arange(24.0).reshape(12, 2)
    for rows in (2, 4, 5, 12):
        np.testing.assert_array_equal(in_parts(lambda v: v * 2, x, rows), x * 2)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"latent_shape": (8, 8, 4)}, r"makes latents \(4, 4, 4\)"),
        ({"image_shape": (32, 32, 1)}, r"images \(32, 32, 1\)"),
        ({"vae": "no-such-vae"}, "no-such-vae: no such file"),
    ],
)
def test_an_autoencoder_that_does_not_fit_is_refused(latents, change, words):
    codec = codecs.Latents(**{**vars(latents[0]), **change})
    with pytest.raises(UserError, match=words):
        codec.companions()


# ----------------------------------------------------------------------------------------------------
# The network in its family


@pytest.mark.slow
def test_projection_goes_by_the_objective():
    """Breaks if DDO touches the logvar head, or pre-training does not."""
    params = jax.tree.map(lambda v: v * 3, variables()[0])
    ddo, mle = (family().project(params, objective) for objective in ("ddo", "mle"))
    weight = params["logvar_linear"]["weight"]
    np.testing.assert_array_equal(ddo["logvar_linear"]["weight"], weight)
    np.testing.assert_allclose(mle["logvar_linear"]["weight"], networks.normalize_weight(weight), rtol=1e-6)
    assert not np.allclose(ddo["unet"]["out_conv"]["weight"], params["unet"]["out_conv"]["weight"])


@pytest.mark.slow
def test_r_is_zero_at_the_start_of_a_round():
    """Breaks if the reference is not projected: r is then a constant below 0 for every example."""
    fam, (params, frozen) = family(), variables()
    params = jax.tree.map(lambda v: v * 0.9 if v.ndim else v, params)  # as averaging leaves them
    start, reference = (make() for make in rounds.anchors(fam, sharding.make_mesh(), lambda: params))
    examples, draws = batch()

    @jax.jit
    def ratio(params, ref):
        s, s_ref = (fam.score(p, frozen, examples, draws) for p in (fam.project(params, "ddo"), ref))
        return fam.ratio(s, s_ref, examples, draws)

    assert not np.asarray(ratio(start, reference)).any()
    assert np.abs(np.asarray(ratio(params, params))).min() > 1e-4  # what the anchors are for
    again = fam.project(fam.project(start, "ddo"), "ddo")  # later projections change nothing
    assert np.abs(np.asarray(ratio(again, reference))).max() < 1e-4


@pytest.mark.slow
def test_guidance_with_an_unconditional_network():
    """Breaks if the guide does not reach the sampler, its own weights are not used, or weight 1 is not no guidance."""
    fam, (params, frozen), second = family(), variables(), variables(0)
    labels, keys, c = jnp.array([1, 2]), jax.random.split(jax.random.key(1), 2), base()
    c.sampler.update(num_steps=2)
    settings = fam.settings(c.sampler)

    @functools.partial(jax.jit, static_argnums=1)
    def sample(second, weight):
        guide = None if weight is None else (family(0).guide(*second, labels), weight)
        return fam.sample((params, guide), frozen, labels, fam.latents(keys), keys, settings)["x"]

    plain, guided = sample(second, None), sample(second, 1.5)
    assert not np.allclose(plain, guided, atol=1e-3)
    other = jax.tree.map(lambda v: v if v.ndim else 2 * v, second)  # its gains
    assert not np.allclose(sample(other, 1.5), guided, atol=1e-3)
    np.testing.assert_array_equal(sample(second, 1), plain)


def test_both_solvers_are_in_the_settings():
    c, fam = base(), family()
    assert fam.settings(c.sampler).nfe == 35 and fam.settings(c.sampler).grid == "float32"
    c.sampler.update(solver="dpmv3", num_steps=25)
    assert fam.settings(c.sampler).nfe == 25
    for change, words in (({"num_steps": 200}, "config.sampler"), ({"s_churn": 1.0}, "adds no noise")):
        spoiled = base()
        spoiled.sampler.update(solver="dpmv3", **change)
        with pytest.raises(UserError, match=words):
            fam.settings(spoiled.sampler)


@pytest.mark.slow
def test_float16_sampling_keeps_the_state_in_float32():
    c = config()
    c.eval.dtype = "float16"
    half, (params, frozen) = get_family(c), variables()
    x, sigma, labels = jnp.ones((2, 8, 8, 1)), jnp.ones(2), jnp.array([0, 1])
    low, full = (f.guide(params, frozen, labels)(x, sigma) for f in (half, family()))
    assert low.dtype == jnp.float32 and 0 < np.abs(low - full).max() < 2e-2


@pytest.mark.slow
def test_rematerialisation_changes_no_gradient_and_less_is_kept():
    examples, draws = batch()
    params, frozen = variables()
    c = config()
    c.remat = True
    gradients, kept = [], []
    for fam in (family(), get_family(c)):

        def loss(p, fam=fam):
            return jnp.sum(fam.score(p, frozen, examples, draws) ** 2)

        gradients.append(jax.jit(jax.grad(loss))(params))
        residuals = jax.eval_shape(lambda p, loss=loss: jax.vjp(loss, p)[1], params)
        kept.append(sum(v.size for v in jax.tree.leaves(residuals)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(a).max()), *gradients)
    assert kept[1] < 0.5 * kept[0]


# ----------------------------------------------------------------------------------------------------
# Files


def test_released_file_and_back():
    """float16 is widened at once; the export has the released names and makes the same family again."""
    with np.load(GOLDENS / "edm2_small.npz") as f:
        golden = dict(f)
    state = {k.removeprefix("param/"): v for k, v in golden.items() if k.startswith("param/")}
    half = {k: v.astype(np.float16) for k, v in state.items()}
    released = Released("edm2", json.loads(str(golden["config"])), half, {"dtypes": {}})
    c = base()
    from_released(c, released)
    fam = get_family(c)
    params, frozen = fam.imported(released)
    assert {v.dtype for v in jax.tree.leaves((params, frozen))} == {np.dtype(np.float32)}
    assert c.sampler.num_steps == 32 and c.sampler.solver == "heun"
    arrays, metadata = fam.export(params, frozen)
    assert list(arrays) == list(convert.layout("edm2", released.config))
    for name, value in arrays.items():
        np.testing.assert_array_equal(value, half[name].astype(np.float32))
    again = base()
    from_released(again, Released("edm2", json.loads(metadata["ddo_jax_config"]), arrays, {"metadata": metadata}))
    assert get_family(again).spec == fam.spec


def test_few_grey_levels_survive_a_file():
    """Breaks if a network of pixels with 17 levels comes back with 256."""
    arrays, metadata = family().export(*jax.tree.map(np.asarray, variables()))
    c = base()
    from_released(c, Released("edm2", json.loads(metadata["ddo_jax_config"]), arrays, {"metadata": metadata}))
    assert get_family(c).spec == family().spec


def test_the_encoders_constants_come_from_the_file():
    arguments = {"img_resolution": 8, "img_channels": 4, "label_dim": 10, **SMALL}
    scale, bias = [0.2, 0.25, 0.5, 1.0], [0.1, 0.0, -0.1, 0.2]
    released = SimpleNamespace(
        kind="edm2", config=arguments, extras={"encoder": {"vae_name": "x", "scale": scale, "bias": bias}}
    )
    c = base()
    from_released(c, released)
    codec = codecs.Latents("", (64, 64, 3), (8, 8, 4), tuple(c.model.latent_mean), tuple(c.model.latent_std), 0.5, 256)
    np.testing.assert_allclose(codec.scale.ravel(), scale, rtol=1e-6)
    np.testing.assert_allclose(codec.bias.ravel(), bias, rtol=1e-6, atol=1e-9)
    assert [r.shape for r in get_family(c).spec.data] == [(64, 64, 3), (8, 8, 8)]


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda c: c.model.update(chanel_mult=(1,)), "chanel_mult"),
        (lambda c: c.model.update(vae="x", latent_mean=(1.0, 2.0)), "latent_mean"),
        (lambda c: c.model.update(vae="x", latent_mean=(0.0,), latent_std=(0.0,)), "latent_std.*above 0"),
        (lambda c: c.model.update(arch="SongUNet"), "'SongUNet'; allowed for family edm2: UNet"),
    ],
)
def test_wrong_arguments_are_user_errors(change, words):
    c = config()
    with c.unlocked():
        change(c)
    with pytest.raises(UserError, match=words):
        get_family(c)
