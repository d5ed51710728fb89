"""FID-Inception: the Inception-v3 of December 2015 that FID, sFID, IS, KID and precision/recall are defined by.

Section numbers refer to specs/metrics.md. Frozen: all arrays, batch statistics too, live in `params`. Images are
NHWC, kernels HWIO. Every product is float32 at precision "highest" whatever the caller set: TF32 alone moves
the features by 1.7 % (section 2). Computed in `dtype`: float64 is for tests.
"""

import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

SIZE, FEATURES, CLASSES, SPATIAL = 299, 2048, 1008, 7  # SPATIAL: channels of the sFID map
HIGHEST = jax.lax.Precision.HIGHEST
EPS = 1e-3

# Section 2, line by line. "name HxW[/2][ valid]:channels" is a convolution, " > " a chain, " | " two ends of it,
# avg and max 3x3 pools of stride 1, max/2 of stride 2. Stride 2 is VALID always. {n} is the parameter of a block.
_POOL3 = "branch3x3dbl_1 1x1:64 > branch3x3dbl_2 3x3:96 > branch3x3dbl_3 3x3"
BLOCKS = {
    "A": (
        "branch1x1 1x1:64",
        "branch5x5_1 1x1:48 > branch5x5_2 5x5:64",
        f"{_POOL3}:96",
        "avg > branch_pool 1x1:{n}",
    ),
    "B": ("branch3x3 3x3/2:384", f"{_POOL3}/2:96", "max/2"),
    "C": (
        "branch1x1 1x1:192",
        "branch7x7_1 1x1:{n} > branch7x7_2 1x7:{n} > branch7x7_3 7x1:192",
        "branch7x7dbl_1 1x1:{n} > branch7x7dbl_2 7x1:{n} > branch7x7dbl_3 1x7:{n} > branch7x7dbl_4 7x1:{n}"
        " > branch7x7dbl_5 1x7:192",
        "avg > branch_pool 1x1:192",
    ),
    "D": (
        "branch3x3_1 1x1:192 > branch3x3_2 3x3/2:320",
        "branch7x7x3_1 1x1:192 > branch7x7x3_2 1x7:192 > branch7x7x3_3 7x1:192 > branch7x7x3_4 3x3/2:192",
        "max/2",
    ),
    "E": (
        "branch1x1 1x1:320",
        "branch3x3_1 1x1:384 > branch3x3_2a 1x3:384 | branch3x3_2b 3x1:384",
        "branch3x3dbl_1 1x1:448 > branch3x3dbl_2 3x3:384 > branch3x3dbl_3a 1x3:384 | branch3x3dbl_3b 3x1:384",
        "{n} > branch_pool 1x1:192",
    ),
}
# (name, convolution) or (name, pool) or (name, block letter, its parameter)
STAGES = (
    ("Conv2d_1a_3x3", "3x3/2:32"),
    ("Conv2d_2a_3x3", "3x3 valid:32"),
    ("Conv2d_2b_3x3", "3x3:64"),
    ("MaxPool_1", "max/2"),
    ("Conv2d_3b_1x1", "1x1 valid:80"),
    ("Conv2d_4a_3x3", "3x3 valid:192"),
    ("MaxPool_2", "max/2"),
    ("Mixed_5b", "A", 32),
    ("Mixed_5c", "A", 64),
    ("Mixed_5d", "A", 64),
    ("Mixed_6a", "B", None),
    ("Mixed_6b", "C", 128),
    ("Mixed_6c", "C", 160),
    ("Mixed_6d", "C", 160),
    ("Mixed_6e", "C", 192),
    ("Mixed_7a", "D", None),
    ("Mixed_7b", "E", "avg"),
    ("Mixed_7c", "E", "max"),
)
_CONV = re.compile(r"(\w+) (\d)x(\d)(/2)?( valid)?:(\d+)")


def layer_names() -> tuple[str, ...]:
    """The 94 convolutions by their names in the torch file (section 4.1), in its order."""
    names = []
    for stage, kind, *_ in STAGES:
        if kind in BLOCKS:
            names += [f"{stage}.{name}" for chain in BLOCKS[kind] for name in re.findall(r"(\w+) \dx\d", chain)]
        elif "x" in kind.removeprefix("max"):
            names.append(stage)
    return tuple(names)


# ----------------------------------------------------------------------------------------------------
# Input path (section 3)


def tf1_indices(size: int, out: int = SIZE):
    """Of one axis of the TF1 bilinear resize: lo, hi int32 [out] and t float32 [out] (section 3.1)."""
    scale = np.float32(size) / np.float32(out)
    s = np.arange(out, dtype=np.float32) * scale
    lo = np.floor(s).astype(np.int32)
    return lo, np.minimum(lo + 1, size - 1), s - lo.astype(np.float32)


def tf1_resize(images, out: int = SIZE):
    """`tf.image.resize_bilinear` of TF1: asymmetric, no antialiasing, not rounded (section 3.1).

        out = x[lo] + (x[hi] - x[lo]) t      along W, then along H

    images: uint8 or float [B, H, W, C], 0..255 -> float32 [B, out, out, C].
    """
    x = images.astype(jnp.float32)
    for axis in (2, 1):
        if x.shape[axis] == out:
            continue  # the identity
        lo, hi, t = tf1_indices(x.shape[axis], out)
        first, second = jnp.take(x, lo, axis, mode="clip"), jnp.take(x, hi, axis, mode="clip")
        step = (second - first) * t.reshape([-1 if i == axis else 1 for i in range(4)])
        # the select keeps compilers from one fused multiply-add, which rounds otherwise: bit for bit as TF
        x = first + jnp.where(step == step, step, jnp.float32(np.nan))
    return x


def normalise(x):
    """Grey levels 0..255 -> [-1, 0.9922] (section 3.2)."""
    return (x - 128) * 0.0078125


# ----------------------------------------------------------------------------------------------------
# Network


def _window(x, stride: int, initial, op):
    padding = "SAME" if stride == 1 else "VALID"
    return jax.lax.reduce_window(x, np.asarray(initial, x.dtype), op, (1, 3, 3, 1), (1, stride, stride, 1), padding)


def _average(x):
    """3x3 mean over the pixels really covered: 4 in a corner, 6 on an edge, 9 inside."""
    rows, columns = (np.convolve(np.ones(n), np.ones(3), "same") for n in x.shape[1:3])
    count = np.outer(rows, columns).astype(x.dtype)
    return _window(x, 1, 0, jax.lax.add) / count[None, :, :, None]


POOLS = {
    "avg": _average,
    "max": lambda x: _window(x, 1, -np.inf, jax.lax.max),
    "max/2": lambda x: _window(x, 2, -np.inf, jax.lax.max),
}


class Conv(nn.Module):
    """Convolution without bias, batch norm of stored statistics, ReLU: [B,H,W,Ci] -> [B,H',W',features]."""

    features: int
    kernel: tuple[int, int]
    stride: int = 1
    padding: str = "SAME"

    @nn.compact
    def __call__(self, x):
        shape = (*self.kernel, x.shape[-1], self.features)
        weight = self.param("weight", nn.initializers.he_normal(), shape).astype(x.dtype)
        x = jax.lax.conv_general_dilated(
            x,
            weight,
            (self.stride, self.stride),
            self.padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision=HIGHEST,
        )
        first = {"gamma": 1.0, "beta": 0.0, "mean": 0.0, "var": 1.0}
        gamma, beta, mean, var = (
            self.param(name, nn.initializers.constant(value), self.features).astype(x.dtype)[None, None, None]
            for name, value in first.items()
        )
        return jax.nn.relu((x - mean) * (gamma / jnp.sqrt(var + EPS)) + beta)


def _layer(step: str, x):
    """One step of the table, as a submodule of the module that is being called."""
    if step in POOLS:
        return POOLS[step](x)
    name, height, width, stride, valid, features = _CONV.fullmatch(step).groups()
    padding = "VALID" if stride or valid else "SAME"
    return Conv(int(features), (int(height), int(width)), 2 if stride else 1, padding, name=name)(x)


class Block(nn.Module):
    """One mixed block: the branches of BLOCKS[kind] side by side."""

    kind: str
    n: Any

    @nn.compact
    def __call__(self, x):
        outputs = []
        for chain in BLOCKS[self.kind]:
            *steps, ends = chain.format(n=self.n).split(" > ")
            h = x
            for step in steps:
                h = _layer(step, h)
            outputs += [_layer(end, h) for end in ends.split(" | ")]
        return jnp.concatenate(outputs, axis=-1)


class Linear(nn.Module):
    """`weight` [in, out] and `bias` [out]. The Inception Score is defined WITHOUT the bias (section 2)."""

    features: int

    @nn.compact
    def __call__(self, x):
        weight = self.param("weight", nn.initializers.lecun_normal(), (x.shape[-1], self.features))
        self.param("bias", nn.initializers.zeros, self.features)
        return jnp.dot(x, weight.astype(x.dtype), precision=HIGHEST)


class Inception(nn.Module):
    """x: normalised [B, 299, 299, 3] -> {"pool3" [B, 2048], "spatial" [B, 2023], "logits_unbiased" [B, 1008]}.

    Every stage is sown into the collection `stages` as after_NAME.
    """

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        x, outputs = x.astype(self.dtype), {}
        for name, kind, *n in STAGES:
            if kind in BLOCKS:
                x = Block(kind, *n, name=name)(x)
            else:
                x = _layer(kind if kind in POOLS else f"{name} {kind}", x)
            self.sow("stages", f"after_{name}", x)
            if name == "Mixed_6d":  # its first branch; NHWC order, as OpenAI's mu_s and sigma_s
                outputs["spatial"] = x[..., :SPATIAL].reshape(x.shape[0], -1)
        outputs["pool3"] = jnp.mean(x, axis=(1, 2))
        outputs["logits_unbiased"] = Linear(CLASSES, name="fc")(outputs["pool3"])
        return outputs


def features(variables, images) -> dict[str, jax.Array]:
    """Everything the metrics need, of images as they are stored.

    Args:
      variables: of `ddo_jax.convert.from_torch("inception", ...)`.
      images: uint8, or float holding 0..255, [B, H, W, 3] of any size. Quantised before, see section 3.2.

    Returns:
      {"pool3": [B, 2048], "spatial": [B, 2023] (17·17 pixels x 7 channels, channels last),
      "logits_unbiased": [B, 1008]}, float32.

    Raises:
      ValueError: not [B, H, W, 3].
    """
    if images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(f"images have shape {images.shape}: they must be [B, H, W, 3]")
    return Inception().apply(variables, normalise(tf1_resize(images)))
