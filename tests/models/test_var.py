"""VAR: sizes, initial weights, what sees what, precision, sampling. tests/parity has the numbers of the reference.

Sections are those of specs/var.md.
"""

import math
from functools import partial

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddo_jax.core.ar import ar_logp
from ddo_jax.models import var
from ddo_jax.models.var import VAR_PRESETS, SampleSettings, from_config, sample_tokens

CONFIG = {"num_classes": 3, "depth": 2, "embed_dim": 8, "num_heads": 2, "patch_nums": [1, 2, 3], "vocab_size": 5}
CONFIG |= {"z_channels": 2}
MODULE = from_config(CONFIG)
N = 3


def inputs(module, rows=2, dtype=np.float32):
    rng = np.random.default_rng(0)
    maps = rng.standard_normal((rows, module.length - module.spans[0][1], module.z_channels)).astype(dtype)
    return np.arange(rows, dtype=np.int32) % (module.num_classes + 1), maps


def abstract(module):
    return jax.eval_shape(module.init, jax.random.key(0), *inputs(module, 1))


def weights(module, std=0.3):
    """Of the tree of `init`, without its compilation."""
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda v: jnp.asarray(rng.normal(0, std, v.shape), v.dtype), abstract(module))


# ----------------------------------------------------------------------------------------------------
# Sizes (section 4.1)

PUBLISHED = {
    "var-d16": (310_283_520, 680),
    "var-d20": (600_917_136, 680),
    "var-d24": (1_033_399_360, 680),
    "var-d30": (2_010_020_356, 680),
    "var-d36": (2_353_893_904, 2240),
}


@pytest.mark.parametrize("name", VAR_PRESETS)
def test_preset_sizes(name):
    """Shapes only: nothing of these sizes is allocated."""
    module = from_config(VAR_PRESETS[name])
    count = sum(math.prod(v.shape) for v in jax.tree.leaves(abstract(module)))
    assert (count, module.length) == PUBLISHED[name]
    assert module.drop_path_rate == pytest.approx(0.1 * module.depth / 24) and module.embed_dim == 64 * module.num_heads


def test_spans_and_levels():
    assert MODULE.spans == ((0, 1), (1, 5), (5, 14)) and MODULE.length == 14
    assert MODULE.levels.tolist() == [0] + [1] * 4 + [2] * 9


@pytest.mark.parametrize(
    "change, message",
    [
        ({"width": 3}, "unknown key 'width' for VAR; allowed: num_classes, depth, .*init_head"),
        ({"dtype": "bfloat16"}, "unknown key 'dtype'"),
        ({"num_heads": 3}, "num_heads is 3; allowed: divisors of embed_dim, 8"),
        ({"depth": 0}, "depth: 0; allowed: whole numbers from 1"),
        ({"vocab_size": 5.0}, "vocab_size: 5.0; allowed: whole numbers"),
        ({"patch_nums": []}, r"patch_nums is \[\]; allowed: a list with the side of every scale"),
        ({"patch_nums": [1, "2"]}, "patch_nums: '2'; allowed: whole numbers"),
    ],
)
def test_other_values_are_refused(change, message):
    with pytest.raises(ValueError, match=message) as e:
        from_config(CONFIG | change)
    assert "\n" not in str(e.value)


# ----------------------------------------------------------------------------------------------------
# Initial weights (section 5)


@pytest.mark.parametrize("shared", [False, True])
def test_initial_deviations(monkeypatch, shared):
    """Every unit draw replaced by 1: weights become their standard deviation, and nothing random is compiled."""
    monkeypatch.setattr(jax.random, "normal", lambda key, shape: jnp.ones(shape))
    module = from_config(CONFIG | {"shared_aln": shared, "init_adaln_gamma": 1e-3})
    params = jax.jit(module.init)(jax.random.key(0), *inputs(module))["params"]
    c, std, depth = 8, math.sqrt(1 / 24), 2
    adaln = np.repeat([1e-3, 1e-3, 0.5, 0.5, 0.5, 0.5], c)
    out, zero, full = std / math.sqrt(2 * depth), 0.0, std
    expected = {"pos_start": full, "pos_1LC": full, "class_emb/weight": full, "lvl_embed/weight": full}
    expected |= {"word_embed/weight": full, "word_embed/bias": zero, "head/weight": 0.02 * std, "head/bias": zero}
    expected |= {"head_nm/ada_lin_1/weight": std / 2, "head_nm/ada_lin_1/bias": zero}
    if shared:
        expected |= {"shared_ada_lin_1/weight": full, "shared_ada_lin_1/bias": zero}
    for i in range(depth):
        block = {"attn/q_bias": zero, "attn/v_bias": zero, "attn/scale_mul_1H11": math.log(4), "attn/proj/bias": zero}
        block |= {"attn/mat_qkv/weight": full, "attn/proj/weight": out}
        block |= {"ffn/fc1/weight": full, "ffn/fc1/bias": zero, "ffn/fc2/weight": out, "ffn/fc2/bias": zero}
        if shared:
            block |= {"ada_gss": adaln.reshape(1, 1, 6, c) / math.sqrt(c)}
        else:
            block |= {"ada_lin_1/weight": std * adaln[None], "ada_lin_1/bias": zero}
        expected |= {f"blocks_{i}/{k}": v for k, v in block.items()}
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    assert flat.keys() == expected.keys()
    for name, value in flat.items():
        np.testing.assert_allclose(value, np.broadcast_to(expected[name], value.shape), rtol=1e-6, err_msg=name)


@pytest.mark.slow
def test_initial_draws():
    """Normal and not cut at two standard deviations; no two arrays alike."""
    module = from_config(CONFIG | {"embed_dim": 48})
    params = jax.jit(module.init)(jax.random.key(0), *inputs(module))["params"]
    a, b = (np.asarray(params[f"blocks_{i}"]["attn"]["mat_qkv"]["weight"]) for i in range(2))
    for v in (a, b):
        assert abs(v.mean()) < 0.05 / 12 and v.std() == pytest.approx(1 / 12, rel=0.04)
        assert 3 / 12 < np.abs(v).max() < 6 / 12
    assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.05


# ----------------------------------------------------------------------------------------------------
# What sees what (sections 4.3, 4.4)


@pytest.fixture(scope="module")
def forward():
    apply = jax.jit(MODULE.apply)
    return partial(apply, weights(MODULE))


def test_a_scale_sees_itself_and_the_coarser_ones(forward):
    labels, maps = inputs(MODULE)
    out = forward(labels, maps)
    assert out.shape == (2, 14, 5) and out.dtype == jnp.float32
    for token, (first, end) in [(0, (1, 5)), (3, (1, 5)), (4, (5, 14)), (12, (5, 14))]:  # maps begin at scale 1
        changed = maps.copy()
        changed[0, token] += 1
        moved = np.abs(np.asarray(forward(labels, changed) - out)).max(-1) > 1e-6
        assert not moved[1].any() and not moved[0, :first].any()
        assert moved[0, first:].all(), f"token {token} of {(first, end)}"


def test_labels(forward):
    labels, maps = inputs(MODULE)
    out = forward(labels, maps)
    other = forward(np.array([N, labels[1]], np.int32), maps)
    assert np.abs(np.asarray(out - other))[0].max(-1).min() > 1e-4  # every token
    np.testing.assert_array_equal(out[1], other[1])
    beyond = np.asarray(forward(np.array([N + 1, 0], np.int32), maps))
    assert np.isnan(beyond[0]).all() and np.isfinite(beyond[1]).all()  # no such class: it shows


def test_scales_above_100_are_clamped_with_zero_gradient(forward):
    labels, maps = inputs(MODULE)
    params = weights(MODULE)["params"]

    def with_scale(g):
        attn = params["blocks_0"]["attn"] | {"scale_mul_1H11": g}
        changed = params | {"blocks_0": params["blocks_0"] | {"attn": attn}}
        return forward.func({"params": changed}, labels, maps)

    high = jnp.array([5.0, 9.0]).reshape(1, 2, 1, 1)
    top = jnp.full((1, 2, 1, 1), math.log(100))
    np.testing.assert_allclose(with_scale(high), with_scale(top), atol=1e-5)
    g = jnp.array([5.0, 1.0]).reshape(1, 2, 1, 1)
    gradient = jax.grad(lambda g: jnp.sum(with_scale(g) ** 2))(g).ravel()
    assert gradient[0] == 0 and abs(gradient[1]) > 1e-5


def test_queries_of_length_zero_have_finite_gradients():
    x = jnp.zeros((2, 3)).at[0, 0].set(2.0)
    np.testing.assert_allclose(var.unit(x)[0], [1, 0, 0])
    assert np.isfinite(jax.grad(lambda v: jnp.sum(var.unit(v) ** 2))(x)).all()


# ----------------------------------------------------------------------------------------------------
# Steps, memory, precision


def stepped(module, variables, labels, maps):
    """Logits of all scales by cached steps."""
    past, out = None, []
    for s, (first, end) in enumerate(module.spans):
        given = None if s == 0 else maps[:, first - module.spans[0][1] : end - module.spans[0][1]]
        logits, past = module.apply(variables, s, labels, given, past, method="step")
        out.append(logits)
    return jnp.concatenate(out, axis=1)


@pytest.mark.parametrize(
    "change", [{"shared_aln": True, "attn_l2_norm": False}, {"patch_nums": [2, 3]}, {"patch_nums": [1]}], ids=str
)
def test_cached_steps_give_the_teacher_forced_logits(change):
    """Here more tokens than one at the coarsest scale; the goldens have the rest."""
    module = from_config(CONFIG | change)
    variables = weights(module)
    labels, maps = inputs(module, 3)
    full, cached = jax.jit(lambda v: (module.apply(v, labels, maps), stepped(module, v, labels, maps)))(variables)
    np.testing.assert_allclose(full, cached, atol=1e-5)
    assert full.std() > 0.1


@pytest.mark.slow
def test_rematerialisation_changes_nothing_but_memory():
    labels, maps = inputs(MODULE)
    variables, gradients, text = weights(MODULE), [], []
    for remat in (False, True):
        module = from_config(CONFIG, remat=remat)
        traced = jax.jit(jax.grad(lambda v, module=module: jnp.sum(jnp.sin(module.apply(v, labels, maps))))).trace(
            variables
        )
        gradients.append(traced.lower().compile()(variables))
        text.append(str(traced.jaxpr))
    assert jax.tree.structure(gradients[0]) == jax.tree.structure(gradients[1])
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), *gradients)
    assert text[1].count("remat") == MODULE.depth and "remat" not in text[0]


@pytest.mark.slow
def test_bfloat16_lowers_the_products_only():
    labels, maps = inputs(MODULE)
    variables, low = weights(MODULE), from_config(CONFIG, dtype=jnp.bfloat16)
    full, half = jax.jit(lambda v: (MODULE.apply(v, labels, maps), low.apply(v, labels, maps)))(variables)
    assert half.dtype == jnp.float32
    assert 1e-4 < np.abs(np.asarray(full - half)).max() < 0.1 * np.abs(np.asarray(full)).max()
    gradient = jax.eval_shape(jax.grad(lambda v: jnp.sum(low.apply(v, labels, maps))), variables)
    assert {v.dtype for v in jax.tree.leaves(gradient)} == {jnp.dtype(jnp.float32)}

    jaxpr = str(jax.make_jaxpr(low.apply)(variables, labels, maps))
    lines = jaxpr.splitlines()
    for op, dtype in [("exp", "f32"), ("logistic", "f32"), ("rsqrt", "f32"), ("tanh", "bf16")]:
        results = [line.split(" = ")[0] for line in lines if f" = {op} " in line or f" = {op}[" in line]
        assert results and all(f":{dtype}[" in r for r in results), op
    products = [line for line in lines if " = dot_general[" in line]
    wide = [line for line in products if ":f32[" in line.split(" = ")[0]]
    assert len(products) == 2 * 7 + 2 + 1  # seven a block; the first inputs and logits of attention are float32
    assert len(wide) == 2 + 1


def test_bfloat16_residual_is_float32_when_sampling():
    low, (labels, maps) = from_config(CONFIG, dtype=jnp.bfloat16), inputs(MODULE)

    def residual(*args, method):
        def blocks(variables):
            return low.apply(variables, *args, method=method, capture_intermediates=True)[1]["intermediates"]

        return jax.eval_shape(blocks, abstract(low))["blocks_1"]["__call__"][0][0].dtype

    assert residual(0, labels, None, None, method="step") == jnp.float32
    assert residual(labels, maps, method="__call__") == jnp.bfloat16


@pytest.mark.slow
def test_float64():
    with jax.enable_x64(True):
        variables = jax.tree.map(lambda v: v.astype(jnp.float64), weights(MODULE))
        labels, maps = inputs(MODULE, dtype=np.float64)
        f = jax.jit(lambda v: (MODULE.apply(v, labels, maps), stepped(MODULE, v, labels, maps)))
        full, cached = f(variables)
        assert full.dtype == cached.dtype == jnp.float64
        np.testing.assert_allclose(full, cached, atol=1e-13)


# ----------------------------------------------------------------------------------------------------
# Drop path (section 4.3)


@pytest.mark.slow
def test_drop_path():
    """Off unless training; whole rows, the first block never, expectation kept."""
    module = from_config(CONFIG | {"drop_path_rate": 0.5})
    variables = weights(module)
    labels, maps = (np.repeat(v[:1], 64, axis=0) for v in inputs(module, 1))

    @jax.jit
    def train(key):
        apply = partial(module.apply, train=True, capture_intermediates=True, rngs={"dropout": key})
        out, state = apply(variables, labels, maps)
        return out, [state["intermediates"][f"blocks_{i}"]["__call__"][0][0] for i in range(2)]

    np.testing.assert_array_equal(
        module.apply(variables, labels[:1], maps[:1]), MODULE.apply(variables, labels[:1], maps[:1])
    )
    jaxprs = [str(jax.make_jaxpr(m.apply)(variables, labels, maps)) for m in (module, MODULE)]
    assert jaxprs[0] == jaxprs[1]
    out, (first, second) = train(jax.random.key(0))
    assert np.ptp(np.asarray(first), axis=0).max() == 0  # rate 0 in the first block
    kinds, counts = np.unique(np.asarray(second[:, 0, 0]).round(5), return_counts=True)
    assert len(kinds) == 4 and counts.min() >= 6  # two sub-layers, each dropped or not, a quarter of the rows each
    np.testing.assert_array_equal(out, train(jax.random.key(0))[0])
    assert (np.asarray(out) != np.asarray(train(jax.random.key(1))[0])).any()


def test_drop_path_rates_and_scale():
    style = var.Style(2, 8, 5, 1e-6, True, False, 1.0, 0.5, 1.0, 0.4, None)
    x = jnp.ones((4000, 1, 1))
    for index, rate in [(0, 0.0), (2, 0.2), (4, 0.4)]:
        y = np.asarray(
            var.Block(style, index).apply({}, x, True, method="drop_path", rngs={"dropout": jax.random.key(0)})
        )
        assert abs((y == 0).mean() - rate) < 0.03
        np.testing.assert_allclose(y[y != 0], 1 / (1 - rate), rtol=1e-6)


# ----------------------------------------------------------------------------------------------------
# Sampling (section 7)


def accumulate(module, s, h, f_hat):
    """A tokenizer in three lines: every map is nearest-neighbour enlarged, the next input is a corner of the sum."""
    p, side = module.patch_nums[s], module.patch_nums[-1]
    at = np.arange(side) * p // side
    f_hat = f_hat + h.reshape(len(h), p, p, -1)[:, at][:, :, at]
    if s == len(module.patch_nums) - 1:
        return f_hat, None
    q = module.patch_nums[s + 1]
    return f_hat, f_hat[:, :q, :q].reshape(len(h), q * q, -1)


CODES = np.random.default_rng(2).normal(0, 1, (5, 2)).astype(np.float32)


def sampler(module, codes, **settings):
    @jax.jit
    def sample(variables, labels, noise):
        how = SampleSettings(**settings)
        return sample_tokens(module, variables, labels, noise, how, codes, partial(accumulate, module))

    return sample


def keys(seeds):
    return jax.vmap(jax.random.key)(np.asarray(seeds, np.uint32))


def test_an_image_depends_on_its_key_and_label_alone():
    sample, variables = sampler(MODULE, CODES, cfg=1.5, top_k=4, top_p=0.95), weights(MODULE)
    labels = np.array([0, 1, 2, 3], np.int32)
    tokens, f_hat = sample(variables, labels, keys([7, 8, 9, 10]))
    assert tokens.shape == (4, 14) and tokens.dtype == jnp.int32 and f_hat.shape == (4, 3, 3, 2)
    order = np.array([2, 0, 3, 1])
    others, f_others = sample(variables, labels[order], keys([7, 8, 9, 10])[order])
    np.testing.assert_array_equal(others, tokens[order])
    np.testing.assert_allclose(f_others, f_hat[order], atol=1e-6)
    alone, _ = sample(variables, np.array([0, 2, 2, 2], np.int32), keys([7, 1, 2, 3]))
    np.testing.assert_array_equal(alone[0], tokens[0])
    assert (np.asarray(alone[1:]) != np.asarray(tokens[1:])).any(1).all()


def test_without_guidance_no_unconditional_row_is_computed():
    labels, noise = np.zeros(3, np.int32), keys([0, 1, 2])
    variables = weights(MODULE)
    rows = {}
    for cfg in (0.0, 0.1):
        text = str(jax.make_jaxpr(sampler(MODULE, CODES, cfg=cfg))(variables, labels, noise))
        rows[cfg] = "f32[6,9,8]" in text, "f32[3,9,8]" in text
    assert rows == {0.0: (False, True), 0.1: (True, False)}


@pytest.mark.slow
def test_given_noise_is_that_of_the_keys_and_more_smooth_changes_the_maps():
    variables, labels = weights(MODULE), np.array([0, 1], np.int32)
    noise = jnp.stack([jax.random.gumbel(key, (14, 5)) for key in keys([3, 4])])
    tokens, f_hat = sampler(MODULE, CODES)(variables, labels, keys([3, 4]))
    soft, f_soft = sampler(MODULE, CODES, more_smooth=True)(variables, labels, noise)
    np.testing.assert_array_equal(tokens[:, :1], soft[:, :1])
    assert np.isfinite(f_soft).all() and np.abs(np.asarray(f_soft - f_hat)).max() > 1e-3
    np.testing.assert_array_equal(sampler(MODULE, CODES)(variables, labels, noise)[0], tokens)


@pytest.mark.slow
def test_samples_have_the_likelihood_that_the_model_gives_them():
    """All 32 images of 1 + 4 tokens over two codes: their frequencies are exp(logp), which sums to 1."""
    module = from_config(CONFIG | {"patch_nums": [1, 2], "vocab_size": 2, "depth": 1})
    variables, codes = weights(module, 0.7), CODES[:2]
    every = np.indices((2,) * 5).reshape(5, 32).T.astype(np.int32)
    label = 1

    def likelihood(tokens):
        h = jnp.take(codes, tokens[:, :1], axis=0)
        _, maps = accumulate(module, 0, h, jnp.zeros((len(tokens), 2, 2, 2)))
        return ar_logp(module.apply(variables, jnp.full(len(tokens), label), maps), tokens)

    p = np.exp(np.asarray(jax.jit(likelihood)(every), np.float64))
    assert p.sum() == pytest.approx(1, abs=1e-5) and p.max() < 0.6
    n = 20_000
    tokens, _ = sampler(module, codes)(variables, np.full(n, label, np.int32), keys(range(n)))
    seen = np.bincount(np.asarray(tokens) @ 2 ** np.arange(4, -1, -1), minlength=32)
    chi2 = np.sum((seen - n * p) ** 2 / (n * p))
    assert chi2 < 62  # 31 degrees of freedom: 0.1 %
