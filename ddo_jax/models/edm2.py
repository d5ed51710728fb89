"""EDM2 networks (Karras et al. 2024): the magnitude-preserving U-Net and its preconditioning.

Section numbers refer to specs/edm2.md. Images are NHWC, kernels HWIO, linear weights [in, out]; parameter names
are those of the released files: "unet.enc.64x64_block0.conv_res0.weight" is
params["unet"]["enc"]["64x64_block0"]["conv_res0"]["weight"].

The forward pass always applies the evaluation-mode formula: it normalises every weight, with gradient. Forced
weight normalisation, the training mode of the reference, is `project` on the parameter tree: outside
differentiation, before the step, on target and DDO reference alike.

Precision: as ddo_jax.models.edm. Weights, gains, noise and label embeddings stay float32 until they meet the
image path; `EDM2Precond(dtype=jnp.float16)` lowers the image path alone.
"""

import dataclasses
import math
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ddo_jax.core.edm import expand, preconditioning
from ddo_jax.models.edm import check_choice, zeros_if_none
from ddo_jax.models.edm_layers import (
    at_least_float32,
    attention_weights,
    convolve,
    downsample,
    multiply,
    split_qkv,
    upsample,
)

EPS = 1e-4

# ----------------------------------------------------------------------------------------------------
# Magnitude-preserving operations (section 2)


def normalize(x, axes):
    """x / (ε + rms of x over `axes`), in the dtype of x; statistics in float32 at least.

    The gradient flows through the rms and is finite where x is all zero.
    """
    wide = at_least_float32(x.dtype)
    mean_square = jnp.mean(jnp.square(x.astype(wide)), axes, keepdims=True)
    nonzero = mean_square > 0
    rms = jnp.where(nonzero, jnp.sqrt(jnp.where(nonzero, mean_square, 1)), 0)
    return x / (rms + EPS).astype(x.dtype)


def pixel_norm(x):
    """`normalize` over the channels."""
    return normalize(x, -1)


def normalize_weight(weight):
    """`normalize` per output channel; weight [..., in, out]."""
    return normalize(weight, tuple(range(weight.ndim - 1)))


def mp_silu(x):
    return nn.silu(x) / 0.596


def mp_sum(a, b, t: float):
    """((1−t)·a + t·b) / sqrt((1−t)² + t²)."""
    norm = math.hypot(1 - t, t)
    return a * ((1 - t) / norm) + b * (t / norm)


def mp_cat(a, b, t: float):
    """[a, b] on the channel axis, such that b contributes with weight t whatever the widths."""
    width_a, width_b = a.shape[-1], b.shape[-1]
    scale = math.sqrt(width_a + width_b) / math.hypot(1 - t, t)
    parts = a * (scale * (1 - t) / math.sqrt(width_a)), b * (scale * t / math.sqrt(width_b))
    return jnp.concatenate(parts, axis=-1)


def resample(x, mode: str):
    """2×2 mean, nearest neighbour or nothing: mode "down", "up", "keep". x [B,H,W,C]."""
    if mode == "keep":
        return x
    return downsample(x, (1, 1), 0) if mode == "down" else upsample(x, (1, 1), 0)


class MPFourier(nn.Module):
    """u [B] -> √2·cos(u ⊗ freqs + phases) [B, width]; both vectors are buffers: stored, never trained."""

    width: int

    @nn.compact
    def __call__(self, u):
        def first(draw):
            return lambda: 2 * math.pi * draw(self.make_rng("params"), (self.width,))

        freqs = self.variable("buffers", "freqs", first(jax.random.normal)).value.astype(u.dtype)
        phases = self.variable("buffers", "phases", first(jax.random.uniform)).value.astype(u.dtype)
        return math.sqrt(2) * jnp.cos(u[:, None] * freqs[None, :] + phases[None, :])


class MPConv(nn.Module):
    """Linear layer (kernel 0) or k×k convolution with a normalised weight, no bias. x [..., in] -> [..., features].

    The weight is prepared in float32 at least, whatever its dtype, and then cast to that of x.
    """

    features: int
    kernel: int = 0

    @nn.compact
    def __call__(self, x, gain=None):
        """gain: scalar array or None (1)."""
        shape = (self.kernel,) * 2 * (self.kernel > 0) + (x.shape[-1], self.features)
        weight = self.param("weight", lambda key: jax.random.normal(key, shape))
        wide = np.promote_types(at_least_float32(weight.dtype), x.dtype)
        scale = 1 / math.sqrt(math.prod(shape[:-1]))
        if gain is not None:
            scale = gain.astype(wide) * scale
        weight = (normalize_weight(weight.astype(wide)) * scale).astype(x.dtype)
        return convolve(x, weight, self.kernel // 2) if self.kernel else multiply(x, weight)


def project(params, *, logvar: bool = False):
    """Forced weight normalisation Π: every stored weight normalised once (section 2). Never differentiated.

    Args:
        params: the "params" collection of an EDM2Precond, or any part of it. Scalars (gains) are left as they are.
        logvar: project the logvar head too: where the loss asks for it, in pre-training but not in DDO.

    Returns:
        Tree of the same structure and dtypes. Twice applied it is a fixed point to float32 resolution.
    """

    def one(path, v):
        names = [key.key for key in path]
        if names[-1] != "weight" or ("logvar_linear" in names and not logvar):
            return v
        return jax.lax.stop_gradient(normalize_weight(jnp.asarray(v)))

    return jax.tree_util.tree_map_with_path(one, params)


# ----------------------------------------------------------------------------------------------------
# Block (section 3)


@dataclasses.dataclass(frozen=True)
class Style:
    """What all blocks of a network share."""

    channels_per_head: int = 64
    dropout: float = 0.0
    res_balance: float = 0.3
    attn_balance: float = 0.3
    clip_act: float | None = 256
    remat: bool = False  # a block's activations are computed again in the backward pass


def cosine_attention(qkv, heads: int):
    """Self-attention over pixels with q, k and v normalised per head: [B,H,W,3C] -> [B,H,W,C]."""
    q, k, v = normalize(split_qkv(qkv, heads), -1)
    a = jnp.einsum("bhqk,bkhd->bqhd", attention_weights(q, k), v)
    return a.reshape(*qkv.shape[:3], -1)


class Block(nn.Module):
    """x [B,H,W,Ci], emb [B or 1, E] -> [B,H',W',features] in the dtype of x. flavor: enc | dec."""

    features: int
    flavor: str
    style: Style
    mode: str = "keep"  # keep | down | up
    attend: bool = False

    @nn.compact
    def __call__(self, x, emb, train: bool):
        style, features = self.style, self.features
        x = resample(x, self.mode)
        skip = MPConv(features, 1, name="conv_skip") if x.shape[-1] != features else lambda v: v
        if self.flavor == "enc":
            x = pixel_norm(skip(x))

        y = MPConv(features, 3, name="conv_res0")(mp_silu(x))
        gain = self.param("emb_gain", lambda _: jnp.zeros(()))
        c = MPConv(features, name="emb_linear")(emb, gain) + 1
        y = mp_silu(y * c.astype(y.dtype)[:, None, None, :])
        y = nn.Dropout(style.dropout, deterministic=not train)(y)
        y = MPConv(features, 3, name="conv_res1")(y)

        if self.flavor == "dec":
            x = skip(x)
        x = mp_sum(x, y, style.res_balance)

        heads = features // style.channels_per_head if self.attend else 0
        if heads:  # none below channels_per_head channels
            if features % heads:
                raise ValueError(f"{features} channels cannot be split over {heads} heads equally")
            qkv = MPConv(3 * features, 1, name="attn_qkv")(x)
            y = MPConv(features, 1, name="attn_proj")(cosine_attention(qkv, heads))
            x = mp_sum(x, y, style.attn_balance)
        return x if style.clip_act is None else jnp.clip(x, -style.clip_act, style.clip_act)


def block_maker(style: Style, flavor: str):
    """Block of this style and flavor; `remat` changes memory, never names or results."""
    block = nn.remat(Block, static_argnums=(3,)) if style.remat else Block  # 3: train
    return partial(block, flavor=flavor, style=style)


# ----------------------------------------------------------------------------------------------------
# U-Net (section 4)


class Encoder(nn.Module):
    """x [B,R,R,c+1], emb [B or 1, E] -> every output, in the order of pushing."""

    style: Style
    resolution: int
    widths: tuple  # channels per level
    num_blocks: int
    attn_resolutions: tuple

    @nn.compact
    def __call__(self, x, emb, train: bool):
        block, skips = block_maker(self.style, "enc"), []
        for level, width in enumerate(self.widths):
            res = self.resolution >> level
            at = f"{res}x{res}"
            if level == 0:
                x = MPConv(width, 3, name=f"{at}_conv")(x)
            else:
                x = block(x.shape[-1], mode="down", name=f"{at}_down")(x, emb, train)
            skips.append(x)
            for i in range(self.num_blocks):
                x = block(width, attend=res in self.attn_resolutions, name=f"{at}_block{i}")(x, emb, train)
                skips.append(x)
        return skips


class Decoder(nn.Module):
    """Outputs of the encoder, emb -> last features [B,R,R,widths[0]]."""

    style: Style
    resolution: int
    widths: tuple
    num_blocks: int
    attn_resolutions: tuple
    concat_balance: float

    @nn.compact
    def __call__(self, skips, emb, train: bool):
        skips = list(skips)
        block, x = block_maker(self.style, "dec"), skips[-1]
        for level in reversed(range(len(self.widths))):
            res = self.resolution >> level
            at, here = f"{res}x{res}", x.shape[-1]
            if level == len(self.widths) - 1:
                x = block(here, attend=True, name=f"{at}_in0")(x, emb, train)  # at any resolution
                x = block(here, name=f"{at}_in1")(x, emb, train)
            else:
                x = block(here, mode="up", name=f"{at}_up")(x, emb, train)
            for i in range(self.num_blocks + 1):
                x = mp_cat(x, skips.pop(), self.concat_balance)
                attend = res in self.attn_resolutions
                x = block(self.widths[level], attend=attend, name=f"{at}_block{i}")(x, emb, train)
        return x


class UNet(nn.Module):
    """x [B,R,R,C], c_noise [B or 1], labels [B or 1, label_dim] (or None without labels) -> F [B,R,R,C]."""

    img_resolution: int
    img_channels: int
    label_dim: int = 0
    model_channels: int = 192
    channel_mult: tuple = (1, 2, 3, 4)
    channel_mult_noise: int | None = None
    channel_mult_emb: int | None = None
    num_blocks: int = 3
    attn_resolutions: tuple = (16, 8)
    label_balance: float = 0.5
    concat_balance: float = 0.5
    channels_per_head: int = 64
    dropout: float = 0.0
    res_balance: float = 0.3
    attn_balance: float = 0.3
    clip_act: float | None = 256
    remat: bool = False

    @property
    def widths(self) -> tuple:
        """Channels per level."""
        return tuple(self.model_channels * mult for mult in self.channel_mult)

    @nn.compact
    def __call__(self, x, c_noise, labels=None, train: bool = False):
        emb = self.embedding(c_noise, labels)
        style = Style(**{f.name: getattr(self, f.name) for f in dataclasses.fields(Style)})
        shared = (style, self.img_resolution, self.widths, self.num_blocks, tuple(self.attn_resolutions))
        x = jnp.concatenate([x, jnp.ones_like(x[..., :1])], axis=-1)
        skips = Encoder(*shared, name="enc")(x, emb, train)
        x = Decoder(*shared, self.concat_balance, name="dec")(skips, emb, train)
        gain = self.param("out_gain", lambda _: jnp.zeros(()))
        return MPConv(self.img_channels, 3, name="out_conv")(x, gain)

    def embedding(self, c_noise, labels):
        """[B or 1, E] in the dtype of c_noise; all-zero labels are not special."""
        noise_mult, emb_mult, m = self.channel_mult_noise, self.channel_mult_emb, self.model_channels
        noise_width = self.widths[0] if noise_mult is None else m * noise_mult
        emb_width = max(self.widths) if emb_mult is None else m * emb_mult
        emb = MPConv(emb_width, name="emb_noise")(MPFourier(noise_width, name="emb_fourier")(c_noise))
        if self.label_dim:
            labels = labels.astype(emb.dtype) * math.sqrt(self.label_dim)
            emb = mp_sum(emb, MPConv(emb_width, name="emb_label")(labels), self.label_balance)
        return mp_silu(emb)


# ----------------------------------------------------------------------------------------------------
# Preconditioning (section 5)


class EDM2Precond(nn.Module):
    """D = c_skip·x + c_out·F(c_in·x, ln(σ)/4) around a UNet, and the logvar head of pre-training.

    Args of the module:
        dtype: compute dtype of the image path inside `unet`; None: that of x (float32, or float64 if x is).
    """

    unet: UNet
    sigma_data: float = 0.5
    logvar_channels: int = 128
    dtype: Any = None

    img_resolution = property(lambda self: self.unet.img_resolution)
    img_channels = property(lambda self: self.unet.img_channels)
    label_dim = property(lambda self: self.unet.label_dim)

    def setup(self):
        self.logvar_fourier = MPFourier(self.logvar_channels)
        self.logvar_linear = MPConv(1)

    def __call__(self, x, sigma, labels=None, *, train: bool = False):
        """Denoised image D [B,R,R,C], float32 (float64 if x is).

        Args:
            x: noisy image [B,R,R,C]. sigma: noise level, scalar or [B]; a scalar is embedded only once.
            labels: one-hot float [B or 1, K]; None means one row of zeros. Ignored by unconditional networks.
            train: dropout on, with the rng collection "dropout". Weights are not projected: see `project`.
        """
        x = x.astype(at_least_float32(x.dtype))
        sigma = jnp.asarray(sigma, x.dtype).reshape(-1)
        c_skip, c_out, c_in, c_noise = preconditioning(sigma, self.sigma_data)
        if self.is_initializing():
            self.logvar(sigma)
        f = self.raw(expand(c_in, x.ndim) * x, c_noise, labels, train=train)
        return expand(c_skip, x.ndim) * x + expand(c_out, x.ndim) * f

    def raw(self, x_in, c_noise, labels=None, *, train: bool = False):
        """Raw output F [B,R,R,C] for x_in = c_in·x and c_noise = ln(σ)/4 [B or 1]."""
        wide = at_least_float32(x_in.dtype)
        c_noise = jnp.asarray(c_noise, wide).reshape(-1)
        labels = zeros_if_none(labels, self.label_dim, wide) if self.label_dim else None
        x_in = x_in.astype(self.dtype or wide)
        return self.unet(x_in, c_noise, labels, train=train).astype(wide)

    def logvar(self, sigma):
        """Log variance [B,1,1,1] of the pre-training loss at σ, scalar or [B]; never in half precision."""
        sigma = jnp.asarray(sigma)
        sigma = sigma.astype(at_least_float32(sigma.dtype)).reshape(-1)
        return self.logvar_linear(self.logvar_fourier(jnp.log(sigma) / 4))[:, :, None, None]


# ----------------------------------------------------------------------------------------------------
# Configurations (section 6)


def from_config(config: dict, dtype=None, remat: bool = False) -> EDM2Precond:
    """The module for a released file's constructor arguments; missing ones take the defaults of sections 3-5.

    `use_fp16` is accepted and not acted upon: precision is the caller's choice, through `dtype`. `remat`: keep only
    the inputs of the blocks for the backward pass, and compute the rest again.
    """
    config = dict(config)
    check_choice("class_name", config.pop("class_name", "Precond"), ("Precond",))
    config.pop("use_fp16", None)
    outer = {k: config.pop(k) for k in ("sigma_data", "logvar_channels") if k in config}
    allowed = [f.name for f in dataclasses.fields(UNet) if f.name not in ("parent", "name", "remat")]
    if unknown := sorted(set(config) - set(allowed)):
        raise ValueError(f"unknown key {unknown[0]!r} for EDM2; allowed: {', '.join(allowed)}")
    if missing := [k for k in ("img_resolution", "img_channels", "label_dim") if k not in config]:
        raise ValueError(f"key {missing[0]!r} is missing; EDM2 needs img_resolution, img_channels, label_dim")
    unet = UNet(**{k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}, remat=remat)
    return EDM2Precond(unet, dtype=dtype, **outer)


_WIDTHS = {"xxs": 64, "xs": 128, "s": 192, "m": 256, "l": 320, "xl": 384, "xxl": 448}


def _preset(img_channels: int, size: str, label_dim: int = 1000) -> dict:
    width = _WIDTHS[size]
    config = {"img_resolution": 64, "img_channels": img_channels, "label_dim": label_dim, "model_channels": width}
    return {**config, "dropout": 0.1 if width >= _WIDTHS["m"] else 0.0, "use_fp16": True}


PRESETS = {
    **{f"edm2-img512-{size}": _preset(4, size) for size in _WIDTHS},
    **{f"edm2-img512-{size}-uncond": _preset(4, size, label_dim=0) for size in ("xs", "s")},
    **{f"edm2-img64-{size}": _preset(3, size) for size in ("xs", "s", "m", "l", "xl")},
}
