"""Layers of the EDM networks: linear, convolution with resampling, norm, embeddings, attention.

Section numbers refer to specs/edm.md. Images are NHWC, kernels HWIO, linear weights [in, out]; parameters are
called `weight` and `bias` as in the released files. Every layer computes in the dtype of its input and casts
its weights where it uses them; normalisation statistics and attention logits are float32 at least.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ddo_jax import sharding

# ----------------------------------------------------------------------------------------------------
# Initialisation (section 8)


class Init(NamedTuple):
    """weight = draw·weight, bias = draw·bias, both with the fans of the weight."""

    mode: str = "xavier_uniform"
    weight: float = 1.0
    bias: float = 0.0


def draw(key, mode: str, gain: float, shape: Sequence[int], fans: tuple[int, int]):
    """One float32 array of the base distribution `mode` with fans (in, out), times `gain` (section 8)."""
    if not gain:
        return jnp.zeros(shape)  # most biases: spares the compilation of a random draw
    fan_in, fan_out = fans
    family, law = mode.split("_")
    gain *= {"xavier": math.sqrt(2 / (fan_in + fan_out)), "kaiming": math.sqrt(1 / fan_in)}[family]
    if law == "normal":
        return gain * jax.random.normal(key, shape)
    return math.sqrt(3) * gain * jax.random.uniform(key, shape, minval=-1.0, maxval=1.0)


def weight_and_bias(module: nn.Module, shape: Sequence[int], scheme: Init, use_bias: bool = True):
    """Declare `weight` [..., in, out] and `bias` [out] (or None) in the scope of `module`."""
    fans = math.prod(shape[:-1]), shape[-1] * math.prod(shape[:-2])
    weight = module.param("weight", lambda key: draw(key, scheme.mode, scheme.weight, shape, fans))
    if not use_bias:
        return weight, None
    return weight, module.param("bias", lambda key: draw(key, scheme.mode, scheme.bias, shape[-1:], fans))


# ----------------------------------------------------------------------------------------------------
# Layers (section 2)


def at_least_float32(dtype):
    """The dtype for statistics and logits: float32, or float64 in a float64 run."""
    return np.promote_types(dtype, np.float32)  # NumPy's rule: jnp.promote_types refuses in strict mode


def row(v, like):
    """v [C] as [1, ..., 1, C] in the rank and dtype of `like`."""
    return v.astype(like.dtype).reshape((1,) * (like.ndim - 1) + (-1,))


def standardise(x, axes, eps: float):
    """Zero mean, unit biased variance over `axes`; two passes, as E[x²] − E[x]² loses digits (section 17)."""
    centred = x - jnp.mean(x, axes, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), axes, keepdims=True) + eps)


def group_count(channels: int) -> int:
    """Section 2.3."""
    groups = min(32, channels // 4)
    if groups < 1 or channels % groups:
        raise ValueError(f"{channels} channels cannot be normalised in {groups} equal groups")
    return groups


class GroupNorm(nn.Module):
    """Section 2.3. x [B,H,W,C] -> same shape and dtype; statistics in float32 at least."""

    eps: float

    @nn.compact
    def __call__(self, x):
        channels = x.shape[-1]
        groups = group_count(channels)
        weight = self.param("weight", lambda _: jnp.ones(channels))
        bias = self.param("bias", lambda _: jnp.zeros(channels))
        h = x.astype(at_least_float32(x.dtype)).reshape(x.shape[0], -1, groups, channels // groups)
        h = standardise(h, (1, 3), self.eps).reshape(x.shape)
        return (h * row(weight, h) + row(bias, h)).astype(x.dtype)


def multiply(x, weight):
    """x [..., in] @ weight [in, out], in the dtype of x."""
    return x @ sharding.whole(weight.astype(x.dtype))


class Linear(nn.Module):
    """Section 2.1. x [B, in] -> [B, features] in the dtype of x."""

    features: int
    scheme: Init = Init()
    use_bias: bool = True

    @nn.compact
    def __call__(self, x):
        weight, bias = weight_and_bias(self, (x.shape[-1], self.features), self.scheme, self.use_bias)
        y = multiply(x, weight)
        return y if bias is None else y + row(bias, y)


def filter_axis(x, axis: int, taps, pad: int, *, stride: int = 1, dilation: int = 1):
    """Correlate one axis with `taps`, after inserting dilation−1 zeros between samples, `pad` on each side.

    Sums of strided slices instead of a depthwise convolution: same numbers, cheap to compile and to fuse.
    """
    edges = [(0, 0, 0)] * x.ndim
    edges[axis] = (pad, pad, dilation - 1)
    x = jax.lax.pad(x, jnp.zeros((), x.dtype), edges)
    last = stride * ((x.shape[axis] - len(taps)) // stride) + 1
    return sum(f * jax.lax.slice_in_dim(x, k, k + last, stride, axis) for k, f in enumerate(taps))


def downsample(x, taps, pad: int):
    """Depthwise filter of sum 1, stride 2 (section 2.2): [B,H,W,C] -> [B,H/2,W/2,C] for pad = (n−1)//2."""
    taps = [f / sum(taps) for f in taps]
    for axis in (1, 2):
        x = filter_axis(x, axis, taps, pad, stride=2)
    return x


def upsample(x, taps, pad: int):
    """Transposed depthwise filter of sum 4 (section 2.2): [B,H,W,C] -> [B,2H,2W,C] for pad = (n−1)//2.

    The taps are symmetric, so transposing leaves a correlation; outside the image are zeros, no clamping.
    """
    taps = [2 * f / sum(taps) for f in taps]
    for axis in (1, 2):
        x = filter_axis(x, axis, taps, len(taps) - 1 - pad, dilation=2)
    return x


def convolve(x, weight, pad: int):
    """Cross-correlation of x [B,H,W,Ci] with weight [k,k,Ci,Co], stride 1, `pad` zeros on each side."""
    layout = ("NHWC", "HWIO", "NHWC")
    kernel = sharding.whole(weight.astype(x.dtype), "tpu")  # XLA gathers it itself on GPUs, where this costs memory
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), [(pad, pad)] * 2, dimension_numbers=layout)


class Conv(nn.Module):
    """Convolution with optional resampling (section 2.2). kernel = 0: resampling only, no parameters.

    Normally resample, then convolve. `fused` moves the filter's padding to the convolution, which differs at
    the borders (the encoder's aux_residual). x [B,H,W,Ci] -> [B,H',W',features] in the dtype of x.
    """

    features: int = 0
    kernel: int = 3
    scheme: Init = Init()
    up: bool = False
    down: bool = False
    taps: tuple = (1, 1)
    fused: bool = False

    @nn.compact
    def __call__(self, x):
        half, p = self.kernel // 2, (len(self.taps) - 1) // 2
        weight = bias = None
        if self.kernel:
            shape = (self.kernel, self.kernel, x.shape[-1], self.features)
            weight, bias = weight_and_bias(self, shape, self.scheme)
        if self.fused and self.up:
            x = convolve(upsample(x, self.taps, max(p - half, 0)), weight, max(half - p, 0))
        elif self.fused and self.down:
            x = downsample(convolve(x, weight, half + p), self.taps, 0)
        else:
            if self.up:
                x = upsample(x, self.taps, p)
            if self.down:
                x = downsample(x, self.taps, p)
            if self.kernel:
                x = convolve(x, weight, half)
        return x if bias is None else x + row(bias, x)


class PositionalEmbedding(nn.Module):
    """Section 2.4. c [B] -> [B, width], cosines first, in the dtype of c."""

    width: int
    endpoint: bool

    def __call__(self, c):
        half = self.width // 2
        freqs = (1 / 10000) ** (np.arange(half) / (half - self.endpoint))
        phase = c[:, None] * jnp.asarray(freqs, c.dtype)[None, :]
        return jnp.concatenate([jnp.cos(phase), jnp.sin(phase)], axis=1)


class FourierEmbedding(nn.Module):
    """Section 2.4. c [B] -> [B, width], cosines first; `freqs` [width/2]: a buffer, stored, never trained."""

    width: int

    @nn.compact
    def __call__(self, c):
        def first():
            return 16 * jax.random.normal(self.make_rng("params"), (self.width // 2,))

        freqs = self.variable("buffers", "freqs", first).value
        # 2π·freqs is rounded before the product with c: phases reach hundreds of radians (section 17)
        phase = c[:, None] * (2 * math.pi * freqs.astype(c.dtype))[None, :]
        return jnp.concatenate([jnp.cos(phase), jnp.sin(phase)], axis=1)


def split_qkv(qkv, heads: int):
    """Channel (head·d + c)·3 + j is component c of (q, k, v)[j] (section 2.5): three [B,HW,heads,d]."""
    b, h, w, c3 = qkv.shape
    return jnp.moveaxis(qkv.reshape(b, h * w, heads, c3 // (3 * heads), 3), -1, 0)


def attention_weights(q, k):
    """softmax over k of q·k/√d, at least in float32 (section 2.5): [B,Q,h,d], [B,K,h,d] -> [B,h,Q,K]."""
    wide = at_least_float32(q.dtype)
    k = k / math.sqrt(k.shape[-1])  # in the network's precision, as the reference does
    logits = jnp.einsum("bqhd,bkhd->bhqk", q.astype(wide), k.astype(wide))
    return jax.nn.softmax(logits, axis=-1).astype(q.dtype)


def attention(qkv, heads: int):
    """Self-attention over pixels in row-major order (section 2.5, steps 2-5): [B,H,W,3C] -> [B,H,W,C]."""
    q, k, v = split_qkv(qkv, heads)
    a = jnp.einsum("bhqk,bkhd->bqhd", attention_weights(q, k), v)
    return a.reshape(*qkv.shape[:3], -1)
