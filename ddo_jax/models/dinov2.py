"""DINOv2 vision transformer without registers, for FD-DINOv2: ViT-L/14 as a rule, any size by its arguments.

Section 6 of specs/metrics.md. Parameters are called as in the released files, linear weights [in, out], the
patch kernel HWIO. Every product is float32 at precision "highest" whatever the caller set. Computed in `dtype`:
float64 is for tests.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ddo_jax.models.edm_layers import row, standardise

SIZE = 224  # of the input: FD-DINOv2 is defined at 224, the position table is resampled to fit
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
EPS = 1e-6
HIGHEST = jax.lax.Precision.HIGHEST

# Arguments of DINOv2, as the public models are built
RELEASED = {
    "dinov2_vits14": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "dinov2_vitb14": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "dinov2_vitl14": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
}


# ----------------------------------------------------------------------------------------------------
# Resampling: matrices [out, in] in float64, applied along H and W


def _cubic(x: np.ndarray, a: float) -> np.ndarray:
    """The cubic convolution kernel of Keys 1981, 0 for |x| >= 2."""
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x**2 + 1
    far = a * (((x - 5) * x + 8) * x - 4)
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def bicubic_antialiased(size: int, out: int = SIZE) -> np.ndarray:
    """Bicubic with antialias, as PIL and torch do: a = -0.5, stretched by size/out when shrinking, renormalised."""
    scale = size / out
    stretch = max(scale, 1.0)
    centre = (np.arange(out) + 0.5) * scale
    weights = _cubic((np.arange(size)[None] + 0.5 - centre[:, None]) / stretch, -0.5)
    return weights / weights.sum(axis=1, keepdims=True)


def position_resampling(table: int, grid: int) -> np.ndarray:
    """Bicubic with a = -0.75, no antialias, borders clamped: source (i + 0.5) table / (grid + 0.1) - 0.5.

    The 0.1 is a historical offset and matters. A grid of the table's own size is left alone.
    """
    if grid == table:
        return np.eye(table)
    source = (np.arange(grid) + 0.5) * table / (grid + 0.1) - 0.5
    first = np.floor(source).astype(int)
    weights = np.zeros((grid, table))
    for tap in range(-1, 3):
        index = first + tap
        np.add.at(weights, (np.arange(grid), np.clip(index, 0, table - 1)), _cubic(source - index, -0.75))
    return weights


def resample(x, rows: np.ndarray, columns: np.ndarray):
    """rows [h, H] and columns [w, W] applied to x [B, H, W, C]: [B, h, w, C]."""
    x = jnp.einsum("wW,bHWc->bHwc", columns.astype(x.dtype), x, precision=HIGHEST)
    return jnp.einsum("hH,bHwc->bhwc", rows.astype(x.dtype), x, precision=HIGHEST)


def resize(images, size: int = SIZE):
    """uint8 or float 0..255 [B, H, W, C] -> float32 [B, size, size, C]; not rounded, overshoot stays."""
    return resample(images.astype(jnp.float32), *(bicubic_antialiased(n, size) for n in images.shape[1:3]))


def normalise(x):
    """Grey levels 0..255 -> zero mean, unit deviation of ImageNet."""
    mean, std = (np.asarray(v, x.dtype)[None, None, None] for v in (MEAN, STD))
    return (x / 255 - mean) / std


# ----------------------------------------------------------------------------------------------------
# Network. x [B, T, width] -> the same shape, unless said otherwise


class Linear(nn.Module):
    """x [..., in] -> [..., features]."""

    features: int

    @nn.compact
    def __call__(self, x):
        weight = self.param("weight", nn.initializers.xavier_uniform(), (x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, self.features)
        return jnp.dot(x, weight.astype(x.dtype), precision=HIGHEST) + row(bias, x)


class LayerNorm(nn.Module):
    @nn.compact
    def __call__(self, x):
        weight = self.param("weight", nn.initializers.ones, x.shape[-1])
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1])
        return standardise(x, -1, EPS) * row(weight, x) + row(bias, x)


class LayerScale(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x * row(self.param("gamma", nn.initializers.ones, x.shape[-1]), x)


class Attention(nn.Module):
    """Columns of qkv: q, k, v, each head after head."""

    heads: int

    @nn.compact
    def __call__(self, x):
        b, t, width = x.shape
        if width % self.heads:
            raise ValueError(f"{width} channels cannot be split into {self.heads} equal heads")
        qkv = Linear(3 * width, name="qkv")(x).reshape(b, t, 3, self.heads, width // self.heads)
        q, k, v = (qkv[:, :, i] for i in range(3))
        logits = jnp.einsum("bqhd,bkhd->bhqk", q, k, precision=HIGHEST) / math.sqrt(q.shape[-1])
        x = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(logits, axis=-1), v, precision=HIGHEST)
        return Linear(width, name="proj")(x.reshape(b, t, width))


class Mlp(nn.Module):
    hidden: int

    @nn.compact
    def __call__(self, x):
        h = jax.nn.gelu(Linear(self.hidden, name="fc1")(x), approximate=False)
        return Linear(x.shape[-1], name="fc2")(h)


class Block(nn.Module):
    """x += ls1 attn(norm1 x); x += ls2 mlp(norm2 x)."""

    heads: int
    hidden: int

    @nn.compact
    def __call__(self, x):
        x = x + LayerScale(name="ls1")(Attention(self.heads, name="attn")(LayerNorm(name="norm1")(x)))
        return x + LayerScale(name="ls2")(Mlp(self.hidden, name="mlp")(LayerNorm(name="norm2")(x)))


class PatchEmbed(nn.Module):
    """x [B, H, W, 3] -> [B, H/patch, W/patch, width]."""

    width: int
    patch: int

    @nn.compact
    def __call__(self, x):
        shape = (self.patch, self.patch, x.shape[-1], self.width)
        weight = self.param("weight", nn.initializers.lecun_normal(), shape)
        bias = self.param("bias", nn.initializers.zeros, self.width)
        b, h, w, c = x.shape
        x = x.reshape(b, h // self.patch, self.patch, w // self.patch, self.patch, c)
        x = jnp.einsum("bhiwjc,ijcd->bhwd", x, weight.astype(x.dtype), precision=HIGHEST)
        return x + row(bias, x)


class DINOv2(nn.Module):
    """x: normalised [B, H, W, 3], sides multiples of the patch -> class token after the last norm [B, width].

    The names of the arguments are DINOv2's; `img_size` is that of the position table. The tokens after adding
    positions and the output of every block are sown into the collection `stages`: tokens, block_0, ...
    """

    embed_dim: int
    depth: int
    num_heads: int
    mlp_ratio: float = 4
    patch_size: int = 14
    img_size: int = 518
    dtype: Any = jnp.float32

    def _positions(self, h: int, w: int):
        """(class token's [1, 1, width], the patches' [1, h·w, width])."""
        table = self.img_size // self.patch_size
        init = nn.initializers.normal(0.02)
        embed = self.param("pos_embed", init, (1, 1 + table**2, self.embed_dim)).astype(self.dtype)
        grid = embed[:, 1:].reshape(1, table, table, -1)
        grid = resample(grid, position_resampling(table, h), position_resampling(table, w))
        return embed[:, :1], grid.reshape(1, h * w, -1)

    @nn.compact
    def __call__(self, x):
        x = PatchEmbed(self.embed_dim, self.patch_size, name="patch_embed")(x.astype(self.dtype))
        b, h, w, width = x.shape
        cls = self.param("cls_token", nn.initializers.normal(0.02), (1, 1, width)).astype(self.dtype)
        self.param("mask_token", nn.initializers.zeros, (1, width))  # in the files, of no use here
        cls_position, positions = self._positions(h, w)
        cls = jnp.broadcast_to(cls + cls_position, (b, 1, width))
        x = jnp.concatenate([cls, x.reshape(b, h * w, width) + positions], axis=1)
        self.sow("stages", "tokens", x)
        for i in range(self.depth):
            x = Block(self.num_heads, round(self.mlp_ratio * width), name=f"blocks_{i}")(x)
            self.sow("stages", f"block_{i}", x)
        return LayerNorm(name="norm")(x)[:, 0]


def features(module: DINOv2, variables, images) -> jax.Array:
    """DINOv2 features of images as they are stored.

    Args:
      module, variables: of `ddo_jax.convert.from_torch("dinov2", ...)`.
      images: uint8, or float holding 0..255, [B, H, W, 3] of any size.

    Returns:
      [B, width] float32.

    Raises:
      ValueError: not [B, H, W, 3].
    """
    if images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(f"images have shape {images.shape}: they must be [B, H, W, 3]")
    return module.apply(variables, normalise(resize(images)))
