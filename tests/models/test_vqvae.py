"""VAR's tokenizer: shapes and dtypes, precision, the choice of codes and phis, gradients, configurations.

Sections are those of specs/var.md.
"""

import functools
import json
from pathlib import Path

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from ddo_jax.models import vqvae
from ddo_jax.models.vqvae import VQVAE, from_config, phi_indices

CONFIG = {"vocab_size": 7, "z_channels": 3, "ch": 4, "ch_mult": [1, 2], "num_res_blocks": 1, "norm_groups": 2}
CONFIG |= {"patch_nums": [1, 2, 4], "in_channels": 1}
MODULE = from_config(CONFIG)
HIGHEST = jax.lax.Precision.HIGHEST


def random_variables(module):
    """Of the tree of `init`, whose compilation would take longer than all the tests here."""
    image = np.zeros((1, module.image_size, module.image_size, module.in_channels), np.float32)
    abstract = jax.eval_shape(module.init, jax.random.key(0), image)
    return jax.tree.map(lambda v: np.random.default_rng(v.size).normal(0, 0.3, v.shape).astype(v.dtype), abstract)


@pytest.fixture(scope="module")
def variables():
    return random_variables(MODULE)


def shapes(variables, method, *args):
    apply = lambda variables, *args: MODULE.apply(variables, *args, method=method)  # noqa: E731
    return jax.tree.map(lambda v: (v.shape, str(v.dtype)), jax.eval_shape(apply, variables, *args))


def test_sizes():
    assert (MODULE.image_size, MODULE.length) == (8, 21)
    assert (VQVAE().image_size, VQVAE().length) == (256, 680)
    assert from_config({"patch_nums": [1, 2, 3, 4, 6, 9, 13, 18, 24, 32]}).image_size == 512


@pytest.mark.slow
@pytest.mark.parametrize("given, dtype", [("float32", "float32"), ("bfloat16", "float32"), ("float64", "float64")])
def test_shapes_and_dtypes(variables, given, dtype):
    with jax.enable_x64(given == "float64"):
        images, f = (jax.ShapeDtypeStruct((5, *shape), jnp.dtype(given)) for shape in [(8, 8, 1), (4, 4, 3)])
        tokens = jax.ShapeDtypeStruct((5, 21), jnp.int32)
        map_of = ((5, 4, 4, 3), dtype)
        assert shapes(variables, "features", images) == map_of
        assert shapes(variables, "tokens", images) == ((5, 21), "int32")
        assert shapes(variables, "quantize", f) == (((5, 21), "int32"), map_of)
        assert shapes(variables, "decode", f) == shapes(variables, "decode_unclipped", f) == ((5, 8, 8, 1), dtype)
        reconstruction, vq, codes = shapes(variables, "training_loss", images)
        assert (reconstruction, vq, codes) == (((5, 8, 8, 1), dtype), ((), dtype), ((5, 21), "int32"))
        h = jax.ShapeDtypeStruct((5, 4, 3), jnp.dtype(given))
        step = lambda module, h, f: module.step(1, h, f)  # noqa: E731
        assert shapes(variables, step, h, f) == (map_of, ((5, 16, 3), dtype))
    assert shapes(variables, "f_hat", tokens) == ((5, 4, 4, 3), "float32")
    assert shapes(variables, "partial_sums", tokens) == ((3, 5, 4, 4, 3), "float32")
    assert shapes(variables, "var_input", tokens) == ((5, 20, 3), "float32")
    assert shapes(variables, "embed", tokens) == ((5, 21, 3), "float32")


def products(jaxpr):
    """(primitive, precision) of every product in a program."""
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("dot_general", "conv_general_dilated"):
            yield equation.primitive.name, equation.params["precision"]
        for inner in jaxprs_in_params(equation.params):
            yield from products(inner)


@pytest.mark.slow
@pytest.mark.parametrize("using_znorm", [False, True])
def test_precision_of_the_quantizer_is_not_the_callers(using_znorm):
    """TF32 would flip codes. Forward, and for the codes and phis backward."""
    module = from_config(CONFIG | {"using_znorm": using_znorm})
    variables = random_variables(module)
    f, tokens = np.ones((2, 4, 4, 3), np.float32), np.zeros((2, 21), np.int32)
    h = np.ones((2, 4, 3), np.float32)

    def gradient(params):
        return module.apply({"params": params}, f, method=lambda m, f: m.quantizer.straight_through(f)[1])

    def apply(method, *args):
        return lambda variables: module.apply(variables, *args, method=method)

    programs = [apply("quantize", f), apply("f_hat", tokens), apply("var_input", tokens)]
    programs.append(apply(lambda m: m.step(1, h, f)))
    programs.append(lambda variables: jax.grad(gradient)(variables["params"]))
    with jax.default_matmul_precision("bfloat16"):
        for program in programs:
            found = list(products(jax.make_jaxpr(program)(variables).jaxpr))
            assert {name for name, _ in found} == {"dot_general", "conv_general_dilated"}
            assert all(precision == (HIGHEST, HIGHEST) for _, precision in found)
        encoder = list(products(jax.make_jaxpr(apply("features", np.ones((2, 8, 8, 1), np.float32)))(variables).jaxpr))
        assert encoder and all(precision != (HIGHEST, HIGHEST) for _, precision in encoder)


def with_codes(variables, codes):
    params = variables["params"] | {"quantize": {**variables["params"]["quantize"], "embedding": {"weight": codes}}}
    return {"params": params}


@pytest.mark.parametrize("using_znorm", [False, True])
def test_nearest_code(variables, using_znorm):
    """The first of equals; by angle the length of a code does not count, nor its sign of zero."""
    codes = np.asarray([[9, 9, 9], [0, 1, 0], [0, 3, 0], [0, 1, 0], [1, 0, 0], [0, 0, 0], [0, 0, -2]], np.float32)
    v = np.asarray([[0, 2.5, 0], [0, 0.9, 0.1], [0, 0, -9], [0, 0, 0], [0.1, 0.1, 0.1]], np.float32)
    module = from_config(CONFIG | {"using_znorm": using_znorm})
    found = module.apply(with_codes(variables, codes), v, method=lambda m, v: m.quantizer.nearest(v))
    np.testing.assert_array_equal(found, [1, 1, 6, 0, 0] if using_znorm else [2, 1, 6, 5, 5])
    embedded = module.apply(with_codes(variables, codes), found, method="embed")
    np.testing.assert_array_equal(embedded, codes[found])  # as it is stored, not normalised


def test_phi_of_every_scale():
    """With four phis from the reference; the ties of the released ten scales are part of the format."""
    with np.load(Path(__file__).parents[1] / "goldens" / "interp_small.npz") as f:
        table = json.loads(str(f["config"]))["phi_table_K4"]
    assert len(table) == 13
    for scales, phis in table.items():
        assert list(phi_indices(int(scales), 4)) == phis
    assert phi_indices(10, 4) == (0, 0, 1, 1, 1, 2, 2, 3, 3, 3)
    assert phi_indices(5, 2) == (0, 0, 0, 1, 1) and phi_indices(3, 1) == (0, 0, 0) and phi_indices(3, 0) == (0, 1, 2)
    assert phi_indices(15, 4) == tuple(sorted(phi_indices(15, 4))) and set(phi_indices(15, 4)) == {0, 1, 2, 3}


@pytest.mark.parametrize("shared, count", [(0, 3), (1, 1), (2, 2), (4, 4)])
def test_every_phi_is_in_the_tree_and_the_right_one_is_used(shared, count):
    module = from_config(CONFIG | {"share_quant_resi": shared, "quant_resi": -1.0})  # |-1|: phi is the convolution
    variables = random_variables(module)
    quantize = dict(variables["params"]["quantize"])
    assert quantize.keys() == {"embedding", *(f"phi_{k}" for k in range(count))}
    for k in range(count):  # phi_k gives the constant k + 1
        weight = np.zeros_like(quantize[f"phi_{k}"]["weight"])
        quantize[f"phi_{k}"] = {"weight": weight, "bias": np.full(3, k + 1, np.float32)}
    params = variables["params"] | {"quantize": quantize}
    sums = module.apply({"params": params}, np.zeros((1, 21), np.int32), method="partial_sums")
    np.testing.assert_array_equal(sums[:, 0, 0, 0, 0], np.cumsum([k + 1 for k in phi_indices(3, shared)]))


def test_the_parts_agree(variables):
    """f_hat of the loop, of its tokens, and of sampling scale by scale; and what the scales after it see."""
    f = np.random.default_rng(1).normal(size=(2, 4, 4, 3)).astype(np.float32)

    def everything(module, f):
        tokens, f_hat = module.quantize(f)
        stepped, maps = jnp.zeros_like(f), []
        for s, (start, end) in enumerate([(0, 1), (1, 5), (5, 21)]):
            stepped, following = module.step(s, module.embed(tokens[:, start:end]), stepped)
            maps.append(following)
        sums = module.partial_sums(tokens)
        return f_hat, module.f_hat(tokens), stepped, sums, maps[:2], module.var_input(tokens)

    f_hat, *others, sums, maps, inputs = jax.jit(lambda f: MODULE.apply(variables, f, method=everything))(f)
    for other in (*others, sums[-1]):
        np.testing.assert_allclose(other, f_hat, atol=1e-6)
    np.testing.assert_allclose(inputs, jnp.concatenate(maps, axis=1), atol=1e-6)
    quarters = np.asarray(sums[0]).reshape(2, 2, 2, 2, 2, 3).mean((2, 4))  # rows, then columns
    np.testing.assert_allclose(inputs[:, :4], quarters.reshape(2, 4, 3), atol=1e-6)
    np.testing.assert_allclose(inputs[:, 4:], sums[1].reshape(2, 16, 3), atol=1e-6)


@pytest.mark.slow
def test_gradients_of_training(variables):
    """The decoder's gradient passes to f as if f_hat were f; codes and phis learn from the vq loss alone."""
    f = np.random.default_rng(1).normal(size=(2, 4, 4, 3)).astype(np.float32)
    weights = np.random.default_rng(2).normal(size=f.shape).astype(np.float32)

    def outputs(params, f):
        out, vq, _ = MODULE.apply({"params": params}, f, method=lambda m, f: m.quantizer.straight_through(f))
        return jnp.sum(out * weights), vq

    jacobian = jax.jit(jax.jacrev(outputs, argnums=(0, 1)))
    (of_params, of_f), (vq_params, vq_f) = jacobian(variables["params"], f)
    np.testing.assert_array_equal(of_f, weights)
    assert all(not np.any(v) for v in jax.tree.leaves(of_params))
    assert all(np.any(v) for k, v in vq_params["quantize"].items() for v in v.values() if k != "phi_1")
    sums = MODULE.apply(variables, f, method=lambda m, f: m.quantizer.encode(f)[1])
    expected = 0.25 * np.mean([2 * (f - f_hat) / f.size for f_hat in sums], axis=0)  # beta = 1/4, and no other term
    np.testing.assert_allclose(vq_f, expected, rtol=1e-5, atol=1e-9)


def test_images_do_not_mix(variables):
    """The statistics of a group are of one image."""
    rng = np.random.default_rng(0)
    x = rng.random((2, 8, 8, 1), np.float32)
    reconstruct = jax.jit(lambda x: MODULE.apply(variables, x))
    other = reconstruct(np.stack([x[0], 3 * x[1] + 1]))
    np.testing.assert_array_equal(reconstruct(x)[0], other[0])
    assert np.abs(reconstruct(x)[1] - other[1]).max() > 1e-3
    assert np.abs(other).max() <= 1


@pytest.mark.slow
def test_initialisation():
    """Convolutions and biases uniform in +-1/sqrt(fan_in), codes N(0,1), norms 1 and 0 (section 3)."""
    level = vqvae.Level(8, 4, blocks=1, attend=True, resample="down")
    params = jax.jit(level.init)(jax.random.key(0), np.zeros((1, 4, 4, 8), np.float32))["params"]
    module = from_config(CONFIG | {"vocab_size": 400})
    f = np.zeros((1, 4, 4, 3), np.float32)
    quantizer = jax.jit(functools.partial(module.init, method="quantize"))(jax.random.key(0), f)
    assert quantizer["buffers"]["quantize"]["ema_vocab_hit_SV"].shape == (3, 400)
    flat = flax.traverse_util.flatten_dict({**params, **quantizer["params"]}, sep="/")
    assert len(flat) == 14 + 2 + 9
    codes = flat.pop("quantize/embedding/weight")
    assert abs(codes.std() - 1) < 0.1 and abs(codes.mean()) < 0.1
    for name, v in flat.items():
        layer = name.rpartition("/")[0]
        if "norm" in layer:
            np.testing.assert_array_equal(v, 1 if name.endswith("weight") else 0)
        else:
            bound = flat[f"{layer}/weight"][..., 0].size ** -0.5
            assert np.abs(v).max() <= bound and (v.size < 60 or np.abs(v).max() > 0.9 * bound), name


@pytest.mark.parametrize(
    "method, x, message",
    [
        ("tokens", np.zeros((1, 8, 8, 1), np.uint8), "images: dtype uint8; allowed: floating point"),
        ("features", np.zeros((1, 8, 4, 1), np.float32), r"images: shape \(1, 8, 4, 1\); allowed: \[B, 8, 8, 1\]"),
        ("training_loss", np.zeros((8, 8, 1), np.float32), r"images: shape \(8, 8, 1\); allowed: \[B, 8, 8, 1\]"),
        ("quantize", np.zeros((1, 4, 4, 2), np.float32), r"f: shape \(1, 4, 4, 2\); allowed: \[B, 4, 4, 3\]"),
        ("decode", np.zeros((1, 2, 2, 3), np.float32), r"f_hat: shape .*; allowed: \[B, 4, 4, 3\]"),
        ("f_hat", np.zeros((1, 21), np.float32), r"tokens: float32 \(1, 21\); allowed: integers \[B, 21\]"),
        ("var_input", np.zeros((1, 20), np.int32), r"tokens: int32 \(1, 20\); allowed: integers \[B, 21\]"),
        ("partial_sums", np.zeros(21, np.int32), r"tokens: int32 \(21,\); allowed"),
    ],
)
def test_wrong_inputs_are_named(variables, method, x, message):
    with pytest.raises(ValueError, match=message):
        shapes(variables, method, x)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"widths": [1]}, "unknown key 'widths' for VQVAE; allowed: vocab_size, .*using_znorm"),
        ({"vocab_size": 0}, "vocab_size is 0; allowed: whole numbers from 1"),
        ({"num_res_blocks": 2.0}, "num_res_blocks is 2.0; allowed: whole numbers"),
        ({"z_channels": True}, "z_channels is True; allowed: whole numbers"),
        ({"ch_mult": []}, r"ch_mult is \[\]; allowed: a list of whole numbers"),
        ({"ch_mult": 2}, "ch_mult is 2; allowed: a list of whole numbers"),
        ({"patch_nums": None}, "patch_nums is None; allowed: a list of whole numbers"),
        ({"patch_nums": [1, "x"]}, r"patch_nums is \[1, 'x'\]; allowed: a list of whole numbers"),
        ({"patch_nums": [4]}, r"patch_nums is \(4,\); allowed: two or more sides, rising"),
        ({"patch_nums": [1, 4, 2]}, r"patch_nums is \(1, 4, 2\); allowed: two or more sides, rising"),
        ({"quant_conv_ks": 2}, "quant_conv_ks is 2; allowed: odd numbers"),
        ({"quant_resi": "a"}, "quant_resi is 'a'; allowed: a number"),
        ({"share_quant_resi": -1}, "share_quant_resi is -1; allowed: whole numbers; 0 is one a scale"),
        ({"using_znorm": 1}, "using_znorm is 1; allowed: True, False"),
        ({"norm_groups": 8}, "norm_groups is 8; allowed: divisors of the width 4"),
    ],
)
def test_other_values_are_refused(change, message):
    with pytest.raises(ValueError, match=message) as e:
        from_config(CONFIG | change)
    assert "\n" not in str(e.value)


def test_missing_values_are_the_released_ones():
    assert from_config({}) == VQVAE() and VQVAE().norm_groups == 32
