"""FID-Inception files: four namings, exact coverage, byte-equal round trips (specs/metrics.md section 4)."""

from pathlib import Path

import jax
import numpy as np
import pytest

from ddo_jax.convert import from_torch, layout, to_torch
from ddo_jax.convert.inception import NAMINGS, detect, names
from ddo_jax.models.inception import Inception, layer_names

GOLDENS = Path(__file__).parents[1] / "goldens"
with np.load(GOLDENS / "inception_random.npz") as f:
    NAMES = f["param_names"].tolist()
    SHAPES = [tuple(map(int, shape.split("x"))) for shape in f["param_shapes"].tolist()]


def filled(naming, gamma=1):
    """A state dict in which no two numbers of an array are the same, gamma apart."""
    state = {}
    for i, (name, (path, shape)) in enumerate(names(naming).items()):
        array = np.arange(np.prod(shape), dtype=np.float32).reshape(shape) + i
        state[name] = np.full(shape, gamma, np.float32) if path[-1] == "gamma" else array
    return state


def same(a, b):
    return all(x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes() for x, y in zip(a, b, strict=1))


def test_names_and_shapes_of_the_torch_file():
    expected = dict(zip(NAMES, SHAPES, strict=True))
    assert list(layout("inception", {}).items()) == list(expected.items())  # 472, in order
    assert len(layer_names()) == 94 and sum(np.prod(s) for s in SHAPES) == 23_885_392


@pytest.mark.parametrize("naming, count", [("torch", 472), ("tf", 472), ("nvidia", 378), ("mixed", 472)])
def test_round_trip_is_byte_equal_and_in_order(naming, count):
    state = filled(naming)
    assert len(state) == count and detect(state) == naming
    _, variables = from_torch("inception", {}, dict(reversed(state.items())))
    back = to_torch("inception", {"naming": naming}, variables)
    assert list(back) == list(state) and same(back.values(), state.values())
    assert all(v.flags.c_contiguous for v in (*back.values(), *jax.tree.leaves(variables)))


def test_all_namings_hold_the_same_network():
    """TF and NVIDIA names, written out by hand here for one layer of each kind of block (table of 4.3)."""
    state = filled("torch")
    _, variables = from_torch("inception", {}, state)
    table = {
        "Conv2d_1a_3x3": ("conv", "conv"),
        "Conv2d_4a_3x3": ("conv_4", "conv_4"),
        "Mixed_5b.branch1x1": ("mixed/conv", "mixed.conv"),
        "Mixed_5d.branch3x3dbl_3": ("mixed_2/tower_1/conv_2", "mixed_2.tower_1.conv_2"),
        "Mixed_6a.branch3x3dbl_1": ("mixed_3/tower/conv", "mixed_3.tower.conv"),
        "Mixed_6d.branch1x1": ("mixed_6/conv", "mixed_6.conv"),
        "Mixed_6e.branch7x7dbl_5": ("mixed_7/tower_1/conv_4", "mixed_7.tower_1.conv_4"),
        "Mixed_6e.branch_pool": ("mixed_7/tower_2/conv", "mixed_7.tower_2.conv"),
        "Mixed_7a.branch7x7x3_4": ("mixed_8/tower_1/conv_3", "mixed_8.tower_1.conv_3"),
        "Mixed_7b.branch3x3_2b": ("mixed_9/tower/mixed/conv_1", "mixed_9.tower_mixed_conv_1"),
        "Mixed_7c.branch3x3dbl_3a": ("mixed_10/tower_1/mixed/conv", "mixed_10.tower_1_mixed_conv"),
        "Mixed_7c.branch_pool": ("mixed_10/tower_2/conv", "mixed_10.tower_2_conv"),
    }
    tf, nvidia, mixed = (to_torch("inception", {"naming": naming}, variables) for naming in ("tf", "nvidia", "mixed"))
    for layer, (scope, path) in table.items():
        weight, mean = state[f"{layer}.conv.weight"], state[f"{layer}.bn.running_mean"]
        np.testing.assert_array_equal(tf[f"{scope}/conv2d_params"], weight.transpose(2, 3, 1, 0))
        np.testing.assert_array_equal(tf[f"{scope}/batchnorm/moving_mean"], mean)
        np.testing.assert_array_equal(nvidia[f"layers.{path}.weight"], weight)
        np.testing.assert_array_equal(nvidia[f"layers.{path}.mean"], mean)
        np.testing.assert_array_equal(mixed[f"layers.{path}.conv.weight"], weight)
        np.testing.assert_array_equal(mixed[f"layers.{path}.bn.running_mean"], mean)
    np.testing.assert_array_equal(tf["softmax/weights"], state["fc.weight"].T)
    np.testing.assert_array_equal(nvidia["output.weight"], state["fc.weight"])
    for other in (tf, nvidia, mixed):
        _, again = from_torch("inception", {}, other)
        assert same(jax.tree.leaves(again), jax.tree.leaves(variables))


def test_variables_have_the_tree_of_init():
    module, variables = from_torch("inception", {}, filled("nvidia"))
    x = jax.ShapeDtypeStruct((1, 299, 299, 3), np.float32)
    abstract = jax.eval_shape(module.init, jax.random.key(0), x)
    shapes = jax.tree.map(lambda v: (v.shape, v.dtype), variables)
    assert isinstance(module, Inception)
    assert shapes == {"params": jax.tree.map(lambda v: (v.shape, v.dtype), abstract["params"])}


def test_gamma_may_be_left_out_but_only_by_all():
    state = filled("torch")
    bare = {name: v for name, v in state.items() if not name.endswith(".bn.weight")}
    assert len(bare) == 378
    counters = {f"{layer}.bn.num_batches_tracked": np.int64(1) for layer in layer_names()}
    _, variables = from_torch("inception", {}, bare | counters)
    assert same(jax.tree.leaves(variables), jax.tree.leaves(from_torch("inception", {}, state)[1]))
    one = {name: v for name, v in state.items() if name != "Mixed_6a.branch3x3.bn.weight"}
    with pytest.raises(ValueError, match=r"^Mixed_6a.branch3x3.bn.weight: missing; expected shape \[384\]$"):
        from_torch("inception", {}, one)
    _, variables = from_torch("inception", {}, filled("torch", gamma=2))
    with pytest.raises(ValueError, match="^params/Conv2d_1a_3x3/gamma: not 1; naming 'nvidia' has no place for it$"):
        to_torch("inception", {"naming": "nvidia"}, variables)


def test_every_mistake_is_named():
    state = filled("nvidia")
    key, first = "layers.mixed_9.tower_mixed_conv.weight", "layers.conv.weight"
    mistakes = {
        f"{key}: missing; expected shape [384, 384, 1, 3]": {k: v for k, v in state.items() if k != key},
        f"{first}: shape [3, 3, 3, 32]; expected [32, 3, 3, 3]": state | {first: state[first].transpose(1, 2, 3, 0)},
        "AuxLogits.x: shape [2]; naming 'nvidia' has no such": state | {"AuxLogits.x": np.ones(2)},
        "layers.conv.gamma: shape [32]; naming 'nvidia' has no": state | {"layers.conv.gamma": np.ones(32)},
        "output.bias: shape [1000]; expected [1008]": state | {"output.bias": np.ones(1000)},
        "no FID-Inception: none of its 1 names is known, the first is 'x'": {"x": np.ones(2)},
        "no FID-Inception: none of its 0 names is known, the first is None": {},
    }
    for message, wrong in mistakes.items():
        with pytest.raises(ValueError) as e:
            from_torch("inception", {}, wrong)
        assert str(e.value).startswith(message) and "\n" not in str(e.value)
    with pytest.raises(ValueError, match=f"naming is 'keras'; allowed: {', '.join(NAMINGS)}"):
        from_torch("inception", {"naming": "keras"}, state)
    with pytest.raises(ValueError, match="config of FID-Inception: unknown key 'name'; allowed: 'naming'"):
        from_torch("inception", {"name": "tf"}, state)
    with pytest.raises(ValueError, match=r"^conv/conv2d_params: missing"):
        from_torch("inception", {"naming": "tf"}, state)
    _, variables = from_torch("inception", {}, state)
    with pytest.raises(ValueError, match=r"^params/extra: shape \[2\]; FID-Inception has no such parameter"):
        to_torch("inception", {}, {"params": variables["params"] | {"extra": np.ones(2)}})
    with pytest.raises(ValueError, match=r"^params/fc/weight: missing; expected shape \[2048, 1008\]"):
        to_torch("inception", {}, {"params": {k: v for k, v in variables["params"].items() if k != "fc"}})
