"""EDM networks (Karras et al. 2022): SongUNet (DDPM++, NCSN++), DhariwalUNet (ADM), EDMPrecond.

Section numbers refer to specs/edm.md. Images are NHWC; parameter names are those of the released files:
"model.enc.32x32_block0.conv0.weight" is params["net"]["enc"]["32x32_block0"]["conv0"]["weight"].

Precision: the image path runs in the dtype of x and the mapping network in that of c_noise; weights are cast
where they are used. So float64 inputs give an all-float64 run and `EDMPrecond(dtype=jnp.bfloat16)` lowers the
image path alone; normalisation statistics and attention logits stay float32 even then.
"""

import dataclasses
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ddo_jax.core.edm import expand, preconditioning
from ddo_jax.models.edm_layers import (
    Conv,
    FourierEmbedding,
    GroupNorm,
    Init,
    Linear,
    PositionalEmbedding,
    at_least_float32,
    attention,
)

# ----------------------------------------------------------------------------------------------------
# U-Net block (section 3)


@dataclasses.dataclass(frozen=True)
class Style:
    """What distinguishes the blocks of the two networks (tables of sections 3 and 8)."""

    skip_scale: float
    eps: float
    adaptive: bool  # scale and shift after norm1; otherwise a shift before it
    head_width: int | None  # channels per attention head; None: one head
    resample_proj: bool  # a 1×1 convolution also in up/down skips that keep the width
    attend_everywhere: bool  # decoder attention in every block of its resolutions, or in the last one only
    init: Init
    init_last: Init  # conv1, proj, output convolution: (nearly) zero
    init_qkv: Init
    taps: tuple = (1, 1)
    remat: bool = False  # a block's activations are computed again in the backward pass


SONG = Style(
    skip_scale=math.sqrt(0.5),
    eps=1e-6,
    adaptive=False,
    head_width=None,
    resample_proj=True,
    attend_everywhere=False,
    init=Init(),
    init_last=Init(weight=1e-5),
    init_qkv=Init(weight=math.sqrt(0.2)),
)
_KAIMING = Init("kaiming_uniform", weight=math.sqrt(1 / 3), bias=math.sqrt(1 / 3))
ADM = Style(
    skip_scale=1.0,
    eps=1e-5,
    adaptive=True,
    head_width=64,
    resample_proj=False,
    attend_everywhere=True,
    init=_KAIMING,
    init_last=Init("kaiming_uniform", weight=0.0, bias=0.0),
    init_qkv=_KAIMING,
)


class UNetBlock(nn.Module):
    """Section 3. x [B,H,W,Ci], emb [B or 1, E] -> [B,H',W',features] in the dtype of x."""

    features: int
    style: Style
    up: bool = False
    down: bool = False
    attend: bool = False
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x, emb, train: bool):
        style, features = self.style, self.features
        resample = {"up": self.up, "down": self.down, "taps": style.taps}

        u = nn.silu(GroupNorm(style.eps, name="norm0")(x))
        u = Conv(features, 3, style.init, name="conv0", **resample)(u)
        affine = Linear(features * (1 + style.adaptive), style.init, name="affine")(emb)
        affine = affine.astype(x.dtype)[:, None, None, :]
        norm1 = GroupNorm(style.eps, name="norm1")
        if style.adaptive:
            scale, shift = jnp.split(affine, 2, axis=-1)
            u = nn.silu(norm1(u) * (scale + 1) + shift)
        else:
            u = nn.silu(norm1(u + affine))
        u = nn.Dropout(self.dropout, deterministic=not train)(u)
        u = Conv(features, 3, style.init_last, name="conv1")(u)

        if x.shape[-1] != features or (style.resample_proj and (self.up or self.down)):
            x = Conv(features, 1, style.init, name="skip", **resample)(x)
        elif self.up or self.down:
            x = Conv(kernel=0, name="skip", **resample)(x)
        x = (u + x) * style.skip_scale

        heads = 1 if style.head_width is None else features // style.head_width
        if self.attend and heads:  # ADM: no attention below 64 channels
            qkv = Conv(3 * features, 1, style.init_qkv, name="qkv")(GroupNorm(style.eps, name="norm2")(x))
            a = Conv(features, 1, style.init_last, name="proj")(attention(qkv, heads))
            x = (a + x) * style.skip_scale
        return x


def block_maker(style: Style, dropout: float):
    """UNetBlock of this style; `remat` changes memory, never names or results."""
    block = nn.remat(UNetBlock, static_argnums=(3,)) if style.remat else UNetBlock  # 3: train
    return partial(block, style=style, dropout=dropout)


# ----------------------------------------------------------------------------------------------------
# Encoder and decoder (sections 4.2, 4.3, 5.2)


class Encoder(nn.Module):
    """x [B,R,R,c], emb [B or 1, E] -> deepest features, list of skips in order of pushing (section 4.2)."""

    style: Style
    resolution: int
    first_width: int
    widths: tuple  # channels per level
    num_blocks: int
    attn_resolutions: tuple
    dropout: float
    wiring: str  # standard | skip | residual

    @nn.compact
    def __call__(self, x, emb, train: bool):
        style = self.style
        block = block_maker(style, self.dropout)
        down = partial(Conv, scheme=style.init, down=True, taps=style.taps)
        aux, skips = x, []
        for level, width in enumerate(self.widths):
            res = self.resolution >> level
            at = f"{res}x{res}"
            if level == 0:
                x = Conv(self.first_width, 3, style.init, name=f"{at}_conv")(x)
            else:
                x = block(x.shape[-1], down=True, name=f"{at}_down")(x, emb, train)
                if self.wiring == "skip":
                    aux = down(kernel=0, name=f"{at}_aux_down")(aux)
                    x = x + Conv(x.shape[-1], 1, style.init, name=f"{at}_aux_skip")(aux)
                elif self.wiring == "residual":
                    aux = down(x.shape[-1], 3, fused=True, name=f"{at}_aux_residual")(aux)
                    aux = x = (x + aux) / math.sqrt(2)
            skips.append(x)
            for i in range(self.num_blocks):
                attend = res in self.attn_resolutions
                x = block(width, attend=attend, name=f"{at}_block{i}")(x, emb, train)
                skips.append(x)
        return x, skips


class Decoder(nn.Module):
    """Deepest features, skips, emb -> output image, or with wiring None the last features (section 4.3)."""

    style: Style
    resolution: int
    out_channels: int
    widths: tuple
    num_blocks: int
    attn_resolutions: tuple
    dropout: float
    wiring: str | None  # standard | skip | None

    @nn.compact
    def __call__(self, x, skips, emb, train: bool):
        style, skips, out = self.style, list(skips), None
        block = block_maker(style, self.dropout)
        for level in reversed(range(len(self.widths))):
            res = self.resolution >> level
            at, here = f"{res}x{res}", x.shape[-1]
            if level == len(self.widths) - 1:
                x = block(here, attend=True, name=f"{at}_in0")(x, emb, train)  # at any resolution
                x = block(here, name=f"{at}_in1")(x, emb, train)
            else:
                x = block(here, up=True, name=f"{at}_up")(x, emb, train)
            for i in range(self.num_blocks + 1):
                attend = res in self.attn_resolutions and (style.attend_everywhere or i == self.num_blocks)
                x = jnp.concatenate([x, skips.pop()], axis=-1)
                x = block(self.widths[level], attend=attend, name=f"{at}_block{i}")(x, emb, train)
            if self.wiring == "skip" or (self.wiring == "standard" and level == 0):
                t = nn.silu(GroupNorm(style.eps, name=f"{at}_aux_norm")(x))
                t = Conv(self.out_channels, 3, style.init_last, name=f"{at}_aux_conv")(t)
                if out is not None:
                    t = t + Conv(kernel=0, up=True, taps=style.taps, name=f"{at}_aux_up")(out)
                out = t
        return x if out is None else out


# ----------------------------------------------------------------------------------------------------
# The two networks (sections 4, 5)


def drop_labels(module: nn.Module, labels, rate: float, train: bool):
    """Zero whole label rows with probability `rate` (section 4.1); train mode only."""
    if not (train and rate):
        return labels
    keep = jax.random.bernoulli(module.make_rng("dropout"), 1 - rate, (labels.shape[0], 1))
    return labels * keep.astype(labels.dtype)


def zeros_if_none(v, width: int, dtype):
    """v [B, width] in `dtype`; None becomes zeros [1, width], so that every parameter is declared."""
    return jnp.zeros((1, width), dtype) if v is None else v.astype(dtype)


def check_choice(name: str, value: str, allowed: Sequence[str]):
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; allowed: {', '.join(allowed)}")


class SongUNet(nn.Module):
    """DDPM++ and NCSN++ (section 4). x [B,R,R,C], c_noise [B or 1], labels [B or 1, L] -> F [B,R,R,C]."""

    img_resolution: int
    img_channels: int
    label_dim: int = 0
    augment_dim: int = 0
    model_channels: int = 128
    channel_mult: tuple = (1, 2, 2, 2)
    channel_mult_emb: int = 4
    num_blocks: int = 4
    attn_resolutions: tuple = (16,)
    dropout: float = 0.10
    label_dropout: float = 0.0
    embedding_type: str = "positional"
    channel_mult_noise: int = 1
    encoder_type: str = "standard"
    decoder_type: str = "standard"
    resample_filter: tuple = (1, 1)
    remat: bool = False

    def __post_init__(self):
        check_choice("embedding_type", self.embedding_type, ("positional", "fourier"))
        check_choice("encoder_type", self.encoder_type, ("standard", "skip", "residual"))
        check_choice("decoder_type", self.decoder_type, ("standard", "skip"))
        super().__post_init__()

    @nn.compact
    def __call__(self, x, c_noise, labels, augment_labels=None, train: bool = False):
        m = self.model_channels
        noise_width, emb_width = m * self.channel_mult_noise, m * self.channel_mult_emb
        if self.embedding_type == "positional":
            e = PositionalEmbedding(noise_width, endpoint=True, name="map_noise")(c_noise)
        else:
            e = FourierEmbedding(noise_width, name="map_noise")(c_noise)
        cos, sin = jnp.split(e, 2, axis=1)
        e = jnp.concatenate([sin, cos], axis=1)  # swapped in this network only
        if self.label_dim:
            labels = drop_labels(self, labels.astype(e.dtype), self.label_dropout, train)
            e = e + Linear(noise_width, name="map_label")(labels * math.sqrt(self.label_dim))
        if self.augment_dim:
            augment_labels = zeros_if_none(augment_labels, self.augment_dim, e.dtype)
            e = e + Linear(noise_width, use_bias=False, name="map_augment")(augment_labels)
        e = nn.silu(Linear(emb_width, name="map_layer0")(e))
        emb = nn.silu(Linear(emb_width, name="map_layer1")(e))

        style = dataclasses.replace(SONG, taps=tuple(self.resample_filter), remat=self.remat)
        widths = tuple(m * mult for mult in self.channel_mult)
        shared = (widths, self.num_blocks, tuple(self.attn_resolutions), self.dropout)
        resolution = self.img_resolution
        encoder = Encoder(style, resolution, m, *shared, wiring=self.encoder_type, name="enc")
        decoder = Decoder(style, resolution, self.img_channels, *shared, wiring=self.decoder_type, name="dec")
        x, skips = encoder(x, emb, train)
        return decoder(x, skips, emb, train)


class DhariwalUNet(nn.Module):
    """ADM (section 5). x [B,R,R,C], c_noise [B or 1], labels [B or 1, L] -> F [B,R,R,C]."""

    img_resolution: int
    img_channels: int
    label_dim: int = 0
    augment_dim: int = 0
    model_channels: int = 192
    channel_mult: tuple = (1, 2, 3, 4)
    channel_mult_emb: int = 4
    num_blocks: int = 3
    attn_resolutions: tuple = (32, 16, 8)
    dropout: float = 0.10
    label_dropout: float = 0.0
    remat: bool = False

    @nn.compact
    def __call__(self, x, c_noise, labels, augment_labels=None, train: bool = False):
        m, emb_width = self.model_channels, self.model_channels * self.channel_mult_emb
        e = PositionalEmbedding(m, endpoint=False, name="map_noise")(c_noise)
        if self.augment_dim:
            augment_labels = zeros_if_none(augment_labels, self.augment_dim, e.dtype)
            e = e + Linear(m, ADM.init_last, use_bias=False, name="map_augment")(augment_labels)
        e = nn.silu(Linear(emb_width, ADM.init, name="map_layer0")(e))
        e = Linear(emb_width, ADM.init, name="map_layer1")(e)
        if self.label_dim:
            labels = drop_labels(self, labels.astype(e.dtype), self.label_dropout, train)
            init = Init("kaiming_normal", weight=math.sqrt(self.label_dim))  # N(0, 1) entries
            e = e + Linear(emb_width, init, use_bias=False, name="map_label")(labels)
        emb = nn.silu(e)

        widths = tuple(m * mult for mult in self.channel_mult)
        shared = (widths, self.num_blocks, tuple(self.attn_resolutions), self.dropout)
        style = dataclasses.replace(ADM, remat=self.remat)
        encoder = Encoder(style, self.img_resolution, widths[0], *shared, wiring="standard", name="enc")
        decoder = Decoder(style, self.img_resolution, self.img_channels, *shared, wiring=None, name="dec")
        x, skips = encoder(x, emb, train)
        x = nn.silu(GroupNorm(ADM.eps, name="out_norm")(decoder(x, skips, emb, train)))
        return Conv(self.img_channels, 3, ADM.init_last, name="out_conv")(x)


# ----------------------------------------------------------------------------------------------------
# Preconditioning (section 9)


class EDMPrecond(nn.Module):
    """D = c_skip·x + c_out·F(c_in·x, ln(σ)/4) around any network of this package (section 9.1).

    Args of the module:
        net: ``net(x, c_noise, labels, augment_labels=None, train=False) -> F``.
        dtype: compute dtype of the image path inside `net`; None: that of x (float32, or float64 if x is).
    """

    net: nn.Module
    img_resolution: int
    img_channels: int
    label_dim: int = 0
    sigma_data: float = 0.5
    sigma_min: float = 0.0
    sigma_max: float = math.inf
    dtype: Any = None

    def __call__(self, x, sigma, labels=None, augment_labels=None, *, train: bool = False):
        """Denoised image D [B,R,R,C], float32 (float64 if x is).

        Args:
            x: noisy image [B,R,R,C]. sigma: noise level, scalar or [B]; a scalar is embedded only once.
            labels: one-hot float [B,L]; None means one row of zeros. augment_labels: [B,A] or None (≡ zeros).
            train: dropout on, with the rng collection "dropout".
        """
        x = x.astype(at_least_float32(x.dtype))
        sigma = jnp.asarray(sigma, x.dtype).reshape(-1)
        c_skip, c_out, c_in, c_noise = preconditioning(sigma, self.sigma_data)
        f = self.raw(expand(c_in, x.ndim) * x, c_noise, labels, augment_labels, train=train)
        return expand(c_skip, x.ndim) * x + expand(c_out, x.ndim) * f

    def raw(self, x_in, c_noise, labels=None, augment_labels=None, *, train: bool = False):
        """Raw output F [B,R,R,C] for x_in = c_in·x and c_noise = ln(σ)/4 [B or 1] (section 10.2)."""
        wide = at_least_float32(x_in.dtype)
        c_noise = jnp.asarray(c_noise, wide).reshape(-1)
        labels = zeros_if_none(labels, self.label_dim, wide) if self.label_dim else None
        x_in = x_in.astype(self.dtype or wide)
        return self.net(x_in, c_noise, labels, augment_labels, train=train).astype(wide)


# ----------------------------------------------------------------------------------------------------
# Configurations (section 6)

NETWORKS = {"SongUNet": SongUNet, "DhariwalUNet": DhariwalUNet}


def from_config(config: dict, dtype=None, remat: bool = False) -> EDMPrecond:
    """The module for a released file's constructor arguments; missing ones take the defaults of section 6.

    `use_fp16` is accepted and not acted upon: precision is the caller's choice, through `dtype`. `remat`: keep only
    the inputs of the blocks for the backward pass, and compute the rest again.
    """
    config = dict(config)
    check_choice("class_name", config.pop("class_name", "EDMPrecond"), ("EDMPrecond",))
    model_type = config.pop("model_type", "DhariwalUNet")
    check_choice("model_type", model_type, tuple(NETWORKS))
    config.pop("use_fp16", None)
    outer = {k: config.pop(k) for k in ("sigma_data", "sigma_min", "sigma_max") if k in config}
    network = NETWORKS[model_type]
    allowed = [f.name for f in dataclasses.fields(network) if f.name not in ("parent", "name", "remat")]
    if unknown := sorted(set(config) - set(allowed)):
        raise ValueError(f"unknown key {unknown[0]!r} for {model_type}; allowed: {', '.join(allowed)}")
    if missing := [k for k in ("img_resolution", "img_channels") if k not in config]:
        raise ValueError(f"key {missing[0]!r} is missing; {model_type} needs img_resolution, img_channels")
    net = network(**{k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}, remat=remat)
    return EDMPrecond(net, net.img_resolution, net.img_channels, net.label_dim, dtype=dtype, **outer)


_SONG = {
    "model_type": "SongUNet",
    "img_channels": 3,
    "augment_dim": 9,
    "model_channels": 128,
    "use_fp16": False,
}
_CIFAR = {**_SONG, "img_resolution": 32, "channel_mult": [2, 2, 2], "dropout": 0.13}
_FFHQ = {**_SONG, "img_resolution": 64, "label_dim": 0, "channel_mult": [1, 2, 2, 2], "dropout": 0.05}
_AFHQ = {**_FFHQ, "dropout": 0.25}
_VP = {
    "embedding_type": "positional",
    "channel_mult_noise": 1,
    "encoder_type": "standard",
    "decoder_type": "standard",
    "resample_filter": [1, 1],
}
_VE = {
    "embedding_type": "fourier",
    "channel_mult_noise": 2,
    "encoder_type": "residual",
    "decoder_type": "standard",
    "resample_filter": [1, 3, 3, 1],
}

RELEASED = {
    "edm-cifar10-32x32-cond-vp": {**_CIFAR, **_VP, "label_dim": 10},
    "edm-cifar10-32x32-uncond-vp": {**_CIFAR, **_VP, "label_dim": 0},
    "edm-cifar10-32x32-cond-ve": {**_CIFAR, **_VE, "label_dim": 10},
    "edm-cifar10-32x32-uncond-ve": {**_CIFAR, **_VE, "label_dim": 0},
    "edm-ffhq-64x64-uncond-vp": {**_FFHQ, **_VP},
    "edm-ffhq-64x64-uncond-ve": {**_FFHQ, **_VE},
    "edm-afhqv2-64x64-uncond-vp": {**_AFHQ, **_VP},
    "edm-afhqv2-64x64-uncond-ve": {**_AFHQ, **_VE},
    "edm-imagenet-64x64-cond-adm": {
        "model_type": "DhariwalUNet",
        "img_resolution": 64,
        "img_channels": 3,
        "label_dim": 1000,
        "augment_dim": 0,
        "model_channels": 192,
        "channel_mult": [1, 2, 3, 4],
        "dropout": 0.10,
        "use_fp16": True,
    },
}
