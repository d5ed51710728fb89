"""Family var: the goldens' likelihoods and DDO losses through this trainer's step, tokens, fakes, guidance, files."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ddo_jax import convert
from ddo_jax.config import base
from ddo_jax.convert import safetensors, vqvae
from ddo_jax.convert.read import Released
from ddo_jax.core.ddo import Pair
from ddo_jax.errors import UserError
from ddo_jax.families import Side, from_released, get_family
from ddo_jax.families.var import released_arguments
from ddo_jax.models.vqvae import KEYS, from_config
from ddo_jax.run import step
from tests.harness import random_variables

GOLDEN = Path(__file__).parents[1] / "goldens" / "var_small.npz"
CONFIG = dict(depth=2, embed_dim=16, num_heads=2, patch_nums=(1, 2, 4), vocab_size=12, z_channels=4)
TOKENIZER = dict(vocab_size=12, z_channels=4, ch=8, ch_mult=[1, 1], num_res_blocks=1, patch_nums=[1, 2, 4])
TOKENIZER |= dict(in_channels=1, norm_groups=4)
B = 4


def write_tokenizer(path, config, quantizer=None):
    """A tokenizer file with random weights; `quantizer` replaces its quantizer's."""
    module = from_config(config)
    x = jnp.zeros((1, module.image_size, module.image_size, module.in_channels))
    variables = random_variables(module.init, x, scale=0.1, seed=1)
    params = variables["params"] | ({"quantize": quantizer} if quantizer else {})
    arrays = convert.to_torch("vqvae", config, {**variables, "params": params})
    path.write_bytes(safetensors.dumps(arrays, {"ddo_jax_kind": "vqvae", "ddo_jax_config": json.dumps(config)}))
    return str(path)


def config(vae, **model):
    c = base()
    with c.unlocked():
        c.family = "var"
        c.model.update(arch="VAR", img_resolution=8, img_channels=1, label_dim=10, levels=17, vae=vae)
        c.model.update(CONFIG | model)
    return c


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("var") / "vae.safetensors", TOKENIZER)


@pytest.fixture(scope="module")
def small(vae):
    """(family, params, frozen) with random weights whose logits are not all alike."""
    family = get_family(config(vae))
    params, _ = random_variables(family.init)
    return family, params, family.companions()


def images():
    rng = np.random.default_rng(0)
    return {"image": rng.integers(0, 17, (B, 8, 8, 1), np.uint8), "label": np.arange(B, dtype=np.int32)}


# ----------------------------------------------------------------------------------------------------
# The goldens through the family and the step


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    """(arrays, info, family, params, reference, frozen) of the golden network and its quantizer."""
    with np.load(GOLDEN) as f:
        arrays = dict(f)
    info, tokens = (json.loads(str(arrays[k])) for k in ("config", "vae/config"))
    wide = {k: v for k, v in tokens.items() if k in KEYS}
    narrow = wide | dict(ch=32, ch_mult=[1, 1], num_res_blocks=1)  # encoder and decoder do not matter here
    at = "vae/quantize."
    quantizer = {"embedding": {"weight": arrays[f"{at}embedding.weight"]}}
    for k in range(4):
        w, b = (arrays[f"{at}quant_resi.qresi_ls.{k}.{name}"] for name in ("weight", "bias"))
        quantizer[f"phi_{k}"] = {"weight": w.transpose(2, 3, 1, 0), "bias": b}
    path = write_tokenizer(tmp_path_factory.mktemp("golden") / "vae.safetensors", narrow, quantizer)
    c = base()
    names = ("num_classes", "depth", "embed_dim", "num_heads", "patch_nums", "mlp_ratio", "shared_aln", "attn_l2_norm")
    arguments = {k: info[k] for k in names} | {"vocab_size": info["V"], "z_channels": info["Cvae"]}
    state = {k.removeprefix("param/"): v for k, v in arrays.items() if k.startswith("param/")}
    with c.unlocked():
        from_released(c, Released("var", arguments, state, {}))
        c.model.update(vae=path, img_resolution=8)
    family = get_family(c)
    params, _ = family.imported(Released("var", arguments, state, {}))
    other = state | {k.removeprefix("ref/"): v for k, v in arrays.items() if k.startswith("ref/")}
    return arrays, info, c, params, family.imported(Released("var", arguments, other, {}))[0], family.companions()


def test_likelihoods(golden):
    """Breaks if a label, a map or a token reaches the network in another place or order."""
    arrays, info, c, params, _, frozen = golden
    family = get_family(c)
    labels = arrays["tf/labels"]
    dropped = labels == info["uncond_label"]
    examples = {"tokens": jnp.asarray(arrays["tf/tokens"]), "label": jnp.where(dropped, 3, labels)}
    draws = {"dropped": jnp.asarray(dropped)}
    s = jax.jit(family.score)(params, frozen, examples, draws)
    np.testing.assert_allclose(s, arrays["tf/logp"], rtol=1e-6, atol=1e-4)
    np.testing.assert_allclose(np.mean(-s) / family.spec.stored.shape[0], arrays["tf/ce_mean"], rtol=1e-5)
    np.testing.assert_array_equal(family.version(draws), dropped)


@pytest.fixture(scope="module")
def graded(golden):
    """(variant, dropped, alpha, beta) -> ((loss, stats), gradient) of the golden pairs; compiled once a variant."""
    arrays, _, c, params, ref, frozen = golden
    labels = jnp.asarray(arrays["ddo/labels"])
    real, fake = ({"tokens": jnp.asarray(arrays[f"ddo/{k}_tokens"]), "label": labels} for k in ("real", "fake"))

    @functools.cache
    def program(variant):
        own = c.copy_and_resolve_references()
        own.ddo.dropped_row_loss = variant
        family = get_family(own)

        def loss(params, s_ref, dropped, alpha, beta):
            inputs = step.Inputs(frozen, real, fake, None, step.Hyper(alpha, beta, 1.0, (0.0, 1.0)), ref)
            return step.pair_objective(family, "ddo", params, inputs, Pair(real, fake, {"dropped": dropped}, s_ref))

        return jax.jit(jax.value_and_grad(loss, has_aux=True))

    score = jax.jit(get_family(c).score)

    def run(variant, dropped, alpha, beta, asked_before=True):
        s_ref = None
        if asked_before:
            s_ref = tuple(score(ref, frozen, rows, {"dropped": dropped}) for rows in (real, fake))
        return program(variant)(params, s_ref, dropped, alpha, beta)

    return run


@pytest.mark.parametrize(
    "variant", ["posonly", *(pytest.param(v, marks=pytest.mark.slow) for v in ("posonly_w1", "nll"))]
)
def test_ddo_losses_and_gradients(golden, graded, variant):
    """Breaks if pairs, weights of dropped rows, alpha's division or the reference's place in the step are wrong."""
    arrays, info, *_ = golden
    cases = [x for x in info["ddo_cases"] if x["variant"] == variant]
    assert len(cases) >= 3
    for case in cases:
        dropped = jnp.asarray(arrays["ddo/dropped"] & case["drop_applied"])
        (value, stats), grads = graded(variant, dropped, case["alpha"], case["beta"])
        name = f"ddo/{case['name']}"
        np.testing.assert_allclose(value, arrays[f"{name}/loss"], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(optax.tree.norm(grads), arrays[f"{name}/grad_global_norm"], rtol=1e-4)
        logp = arrays[f"{case['logp']}logp_real"]
        np.testing.assert_allclose(stats["nll_real"][0] / stats["nll_real"][1], -logp.mean(), rtol=1e-5)


@pytest.mark.slow
def test_the_reference_inside_the_step_says_the_same(golden, graded):
    """Breaks if asking it before is another loss than asking it there."""
    arrays, *_ = golden
    dropped = jnp.asarray(arrays["ddo/dropped"])
    before, inside = (graded("posonly", dropped, 10.0, 0.02, asked_before)[0][0] for asked_before in (True, False))
    np.testing.assert_allclose(before, inside, rtol=1e-6)


def test_decay(golden):
    """Breaks if weight decay acts on what the base model was trained without."""
    _, info, c, params, *_ = golden
    family = get_family(c)
    flags = jax.tree.map(lambda on, v: np.full(np.shape(v), float(on), np.float32), family.decays(params), params)
    kept = convert.to_torch("var", released_arguments(c.model.to_dict()), {"params": flags})
    buffers = ("lvl_1L", "attn_bias_for_masking")
    decayed = {k for k, v in kept.items() if v.any() and k not in buffers}
    every = {k for k in kept if k not in buffers and not k.endswith("zero_k_bias")}
    assert every - decayed == set(info["no_weight_decay_params"])


# ----------------------------------------------------------------------------------------------------
# Tokens, fakes, guidance


def test_tokens_of_pixels_and_back(small, vae):
    """Breaks if a pool's record, or a tokenised data set, is not what the pixels gave; or the picture is another."""
    family, _, frozen = small
    examples = encoded(family, frozen)
    module, variables = vqvae.load(vae, (1, 2, 4))
    x = images()["image"].astype(np.float32) / 8 - 1
    apply = jax.jit(module.apply, static_argnames="method")
    np.testing.assert_array_equal(examples["tokens"], apply(variables, x, method="tokens"))
    stored = family.store(frozen, examples)
    assert stored["image"].shape == (B, 21) and stored["image"].dtype == family.spec.stored.dtype == np.int32
    again = family.encode(frozen, stored, jax.random.key(1))
    np.testing.assert_array_equal(again["tokens"], examples["tokens"])
    pixels = apply(variables, apply(variables, examples["tokens"], method="f_hat"), method="decode")
    np.testing.assert_array_equal(jax.jit(family.decode)(frozen, examples), np.round((np.asarray(pixels) + 1) * 8))


def encoded(family, frozen, record=None):
    return jax.jit(family.encode)(frozen, images() if record is None else record, jax.random.key(0))


def sampled(small, settings, labels=(0, 1, 2, 3), **extra):
    family, params, frozen = small
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(5), jnp.arange(len(labels)))
    nets = (params, None)
    run = jax.jit(lambda p, f, y, k: family.sample((p, None), f, y, family.latents(k), k, settings))
    return run(nets[0], frozen, jnp.asarray(labels, jnp.int32), keys)


@pytest.mark.slow
def test_an_image_depends_on_its_key_and_label_alone(small):
    """Breaks if a sample changes with the batch it is made in."""
    family = small[0]
    settings = family.settings({"cfg": 1.5, "top_k": 5, "top_p": 0.9})
    whole, part = (sampled(small, settings, labels) for labels in ((0, 1, 2, 3), (0, 1)))
    np.testing.assert_array_equal(whole["tokens"][:2], part["tokens"])
    assert len(np.unique(whole["tokens"])) > 4 and settings.nfe == 6 and family.passes(settings) == 2


@pytest.mark.slow
def test_fakes_are_unguided_and_reencoded(small, vae):
    """Breaks if guidance or filters leak into the fakes, or they are not the tokens of their own pixels."""
    family, _, frozen = small
    settings = family.fake_settings(family.settings({"cfg": 3.0, "top_k": 1, "more_smooth": True}))
    assert settings == family.fake_settings(family.settings({})) and settings[:4] == (0.0, 0, 0.0, False)
    raw = sampled(small, settings._replace(reencode=False))
    fakes = sampled(small, settings)
    module, variables = vqvae.load(vae, (1, 2, 4))
    apply = jax.jit(module.apply, static_argnames="method")
    pixels = apply(variables, raw["f_hat"], method="decode")
    np.testing.assert_array_equal(fakes["tokens"], apply(variables, pixels, method="tokens"))
    c = config(vae)
    c.ddo.reencode = False
    plain = get_family(c)
    assert not plain.fake_settings(plain.settings({})).reencode


def test_what_only_the_rounds_have(vae):
    """Breaks if the published rate of dropped labels, or guidance of the fakes, reaches MLE or nothing at all."""
    c = config(vae)
    c.ddo.update(fakes_cfg=1.0, cond_drop_rate=0.75)
    family, key = get_family(c), jax.random.key(0)
    assert family.fake_settings(family.settings({"cfg": 3.0}))[:4] == (1.0, 0, 0.0, False)
    rates = [float(np.mean(draw(key, 10_000, (0.0, 1.0))["dropped"])) for draw in (family.draw, family.pair_draw)]
    np.testing.assert_allclose(rates, [0.1, 0.75], atol=0.02)
    for key, value, words in (
        ("fakes_cfg", -1.0, "allowed: 0 .no guidance. to"),
        ("cond_drop_rate", 1.0, "0 to below 1"),
    ):
        wrong = config(vae)
        wrong.ddo[key] = value
        with pytest.raises(UserError, match=f"config.ddo.{key}: {value}; {'allowed: ' * (key[0] == 'c')}{words}"):
            get_family(wrong)


def test_pair_statistics(vae):
    """Breaks if gaps of dropped rows mix with the others', or the reference's cross-entropy is not logp - r."""
    family = get_family(config(vae))
    logp, r = jnp.array([[-21.0, -42.0], [-63.0, -84.0]]), jnp.array([[2.0, -1.0], [4.0, -3.0]])
    draws = {"dropped": jnp.array([False, True])}
    stats = family.pair_stats(*(Side(r[:, i], logp[:, i], jnp.zeros(2, jnp.int32), draws) for i in (0, 1)))
    means = {k: float(total / count) for k, (total, count) in stats.items()}
    n = family.spec.stored.shape[0]
    expected = {"r_real_dropped": 4.0, "r_fake_dropped": -3.0, "ce_real": 42 / n, "ce_fake": 63 / n}
    expected |= {"ce_ref_real": 45 / n, "ce_ref_fake": 61 / n}
    assert means.keys() == expected.keys()
    np.testing.assert_allclose([means[k] for k in expected], list(expected.values()), rtol=1e-6)


@pytest.mark.slow
def test_greedy_guidance_moves_the_tokens(small):
    """Breaks if cfg is ignored, or 1 is taken for "off"."""
    family = small[0]
    tokens = [sampled(small, family.settings({"cfg": cfg, "top_k": 1}))["tokens"] for cfg in (0.0, 1.0, 8.0)]
    assert (tokens[0] != tokens[2]).any() and (tokens[0][:, 0] == tokens[2][:, 0]).all()  # the first scale: never
    assert [family.settings({"cfg": cfg}).nfe for cfg in (0.0, 1.0)] == [3, 6]


@pytest.mark.slow
def test_smooth_images_are_not_those_of_the_tokens(small):
    """Breaks if more_smooth decodes the tokens, which it draws and does not use."""
    family, _, frozen = small
    examples = sampled(small, family.settings({"more_smooth": True}))
    pixels = jax.jit(family.pixels_of)
    hard = pixels(frozen, {k: v for k, v in examples.items() if k != "f_hat"})
    assert jnp.abs(pixels(frozen, examples) - hard).max() > 1e-3


@pytest.mark.slow
def test_dropped_labels(small):
    """Breaks if the rate is another, or a dropped row still sees its label."""
    family, params, frozen = small
    draws = family.draw(jax.random.key(0), 10_000, (0.0, 1.0))
    assert 0.08 < np.mean(draws["dropped"]) < 0.12
    examples = encoded(family, frozen)
    other = {**examples, "label": (examples["label"] + 1) % 10}
    score = jax.jit(family.score)
    for dropped in (True, False):
        rows = {"dropped": jnp.full((B,), dropped)}
        a, b = (score(params, frozen, e, rows) for e in (examples, other))
        assert np.array_equal(a, b) == dropped
    key = jax.random.key(0)
    np.testing.assert_allclose(jax.jit(family.mle_loss)(params, frozen, examples, rows, key), -a / 21, rtol=1e-6)


def test_cca_counts_neighbours_of_one_class_as_positive(small):
    """Breaks if a wrong label that happens to be right is pushed away."""
    family = small[0]
    draws = {"dropped": jnp.array([False, False])}
    matched = Side(jnp.full(2, 1.0), jnp.zeros(2), jnp.array([3, 3]), draws)
    rolled = Side(jnp.full(2, 2.0), jnp.zeros(2), jnp.array([3, 4]), draws)
    loss, stats = family.pair_loss("cca", matched, rolled, 10.0, 0.5)
    fakes = [np.log1p(np.exp(-1.0)), 10 * np.log1p(np.exp(1.0))]
    expected = (np.log1p(np.exp(-0.5)) + np.mean(fakes)) / 10
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(stats["loss_fake"][0], sum(fakes) / 10, rtol=1e-5)


@pytest.mark.slow
def test_half_precision_keeps_likelihoods_in_float32(vae, small):
    """Breaks if bfloat16 is not what runs, or log-likelihoods are summed in it."""
    c = config(vae)
    c.dtype = "bfloat16"
    family, (_, params, frozen) = get_family(c), small
    examples = encoded(family, frozen)
    draws = family.draw(jax.random.key(0), B, (0.0, 1.0))
    lowered = jax.jit(family.score).lower(params, frozen, examples, draws)
    text, s = lowered.as_text(), lowered.compile()(params, frozen, examples, draws)
    exact = jax.jit(small[0].score)(params, frozen, examples, draws)
    assert family.compiler_options == {"xla_allow_excess_precision": False} and not small[0].compiler_options
    assert "dot_general" in text and "bf16" in text and s.dtype == jnp.float32
    assert (s != exact).all() and np.allclose(s, exact, rtol=0.05)


# ----------------------------------------------------------------------------------------------------
# Files, errors


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(arch="UNet"), "config.model.arch: 'UNet'; allowed for family var: VAR"),
        (dict(num_heads=3), "config.model: num_heads is 3; allowed: divisors of embed_dim, 16"),
        (dict(width=3), "unknown key 'width' for VAR"),
        (dict(cond_drop_rate=1.0), "config.model.cond_drop_rate: 1.0; allowed: 0 to below 1"),
    ],
)
def test_models_that_are_refused(vae, change, words):
    with pytest.raises(UserError, match=words):
        get_family(config(vae, **change))


def test_tokenizers_that_are_refused(vae, tmp_path):
    """Breaks if a run starts on a tokenizer of another codebook or image size, or on none."""
    for change in (dict(vocab_size=13), dict(img_resolution=16), dict(img_channels=3)):
        with pytest.raises(UserError, match=r"config.model.vae: .* has vocab_size, .* allowed: \(1[23], 4, "):
            get_family(config(vae, **change)).companions()
    with pytest.raises(UserError, match="config.model.vae: .*no such file"):
        get_family(config(str(tmp_path / "none.safetensors"))).companions()


def test_fakes_are_the_reference_as_it_is(vae):
    """Breaks if the guidance or the filters of evaluations reach the fakes that a round is trained on."""
    family = get_family(config(vae))
    settings = family.settings({"cfg": 3.0, "top_k": 5, "top_p": 0.9, "more_smooth": True})
    assert family.fake_settings(settings)[:5] == (0.0, 0, 0.0, False, True)
    assert (settings.nfe, family.fake_settings(settings).nfe) == (6, 3)


def test_settings_that_are_refused(small):
    """Breaks if a key of the diffusion samplers, or nonsense, is ignored."""
    family = small[0]
    for given, words in (
        (
            {"num_steps": 20},
            "config.sampler.num_steps: 20; this model's sampler has no such setting, but cfg",
        ),
        ({"cfg": -1.0}, "config.sampler.cfg: -1.0; allowed: 0"),
        ({"top_p": 2.0}, "top_p 2.0; allowed"),
    ):
        with pytest.raises(UserError, match=words):
            family.settings(given)
    with pytest.raises(UserError, match="no guide of another one"):
        family.guide(None, None, None)
