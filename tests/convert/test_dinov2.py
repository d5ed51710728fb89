"""DINOv2 state dicts: byte-equal round trips, exact coverage, the released names (specs/metrics.md section 6)."""

from pathlib import Path

import jax
import numpy as np
import pytest

from ddo_jax.convert import from_torch, layout, to_torch
from ddo_jax.models.dinov2 import RELEASED

GOLDENS = Path(__file__).parents[1] / "goldens"
CONFIG = {"embed_dim": 48, "depth": 3, "num_heads": 3}


def filled():
    shapes = layout("dinov2", CONFIG).items()
    return {k: np.arange(np.prod(s), dtype=np.float32).reshape(s) + i for i, (k, s) in enumerate(shapes)}


def section6(width, depth):
    """Names and shapes of a released file, from the specification alone and not from the module."""
    names = {"cls_token": (1, 1, width), "pos_embed": (1, 1370, width), "mask_token": (1, width)}
    layers = {"patch_embed.proj": {"weight": (width, 3, 14, 14), "bias": (width,)}}
    norm = {"weight": (width,), "bias": (width,)}

    def linear(ci, co):
        return {"weight": (co, ci), "bias": (co,)}

    for i in range(depth):
        block = {
            "norm1": norm,
            "attn.qkv": linear(width, 3 * width),
            "attn.proj": linear(width, width),
            "ls1": {"gamma": (width,)},
            "norm2": norm,
            "mlp.fc1": linear(width, 4 * width),
            "mlp.fc2": linear(4 * width, width),
            "ls2": {"gamma": (width,)},
        }
        layers |= {f"blocks.{i}.{name}": leaves for name, leaves in block.items()}
    layers["norm"] = norm
    return names | {f"{at}.{leaf}": shape for at, leaves in layers.items() for leaf, shape in leaves.items()}


@pytest.mark.parametrize("name", RELEASED)
def test_released_names_and_shapes(name):
    """Shapes only: nothing of these sizes is allocated."""
    config = RELEASED[name]
    shapes = layout("dinov2", config)
    assert list(shapes.items()) == list(section6(config["embed_dim"], config["depth"]).items())
    if name == "dinov2_vitl14":
        numbers = sum(int(np.prod(shape)) for shape in shapes.values())
        assert numbers == 304_368_640
        assert 0 < 1_217_586_395 - 4 * numbers < 200_000  # the released file: float32 and its table of contents


def test_names_and_shapes_of_the_golden():
    with np.load(GOLDENS / "dinov2_tiny.npz") as f:
        shapes = [tuple(map(int, shape.split("x"))) for shape in f["param_shapes"].tolist()]
        assert list(layout("dinov2", CONFIG).items()) == list(zip(f["param_names"].tolist(), shapes, strict=True))


def test_round_trip_is_byte_equal_and_in_order():
    state = filled()
    module, variables = from_torch("dinov2", CONFIG, dict(reversed(state.items())))
    back = to_torch("dinov2", CONFIG, variables)
    assert list(back) == list(state)
    for key, value in state.items():
        assert back[key].dtype == value.dtype and back[key].shape == value.shape, key
        assert back[key].tobytes() == value.tobytes() and back[key].flags.c_contiguous, key
    abstract = jax.eval_shape(module.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 28, 28, 3), np.float32))
    shapes = jax.tree.map(lambda v: (v.shape, v.dtype), variables)
    assert shapes == {"params": jax.tree.map(lambda v: (v.shape, v.dtype), abstract["params"])}
    qkv = variables["params"]["blocks_1"]["attn"]["qkv"]["weight"]
    np.testing.assert_array_equal(qkv, state["blocks.1.attn.qkv.weight"].T)


def test_every_mistake_is_named():
    state = filled()
    key = "blocks.2.attn.qkv.weight"
    mistakes = {
        f"{key}: missing; expected shape [144, 48]": {k: v for k, v in state.items() if k != key},
        f"{key}: shape [48, 144]; expected [144, 48]": state | {key: state[key].T},
        "register_tokens: shape [1, 4, 48]; this configuration has no": state
        | {"register_tokens": np.ones((1, 4, 48))},
        "blocks.3.ls1.gamma: shape [48]; this configuration has no": state | {"blocks.3.ls1.gamma": np.ones(48)},
    }
    for message, wrong in mistakes.items():
        with pytest.raises(ValueError) as e:
            from_torch("dinov2", CONFIG, wrong)
        assert str(e.value).startswith(message) and "\n" not in str(e.value)
    params = from_torch("dinov2", CONFIG, state)[1]["params"]
    with pytest.raises(ValueError, match="^mask_token: missing"):
        to_torch("dinov2", CONFIG, {"params": {k: v for k, v in params.items() if k != "mask_token"}})
    with pytest.raises(ValueError, match=r"^extra: shape \[2\]; this configuration has no such"):
        to_torch("dinov2", CONFIG, {"params": params | {"extra": np.ones(2)}})
    with pytest.raises(ValueError, match="^config of DINOv2: .*'widht'"):
        layout("dinov2", CONFIG | {"widht": 3})
    with pytest.raises(ValueError, match="^config of DINOv2: .*'depth'"):
        layout("dinov2", {"embed_dim": 48, "num_heads": 3})
    with pytest.raises(ValueError, match="^48 channels cannot be split into 5 equal heads"):
        layout("dinov2", CONFIG | {"num_heads": 5})
