"""SD-VAE: the AutoencoderKL of Stable Diffusion, between pixels and the latents of EDM2's 512x512 networks.

Section 13 of specs/edm2.md; argument and parameter names are those of diffusers, with "_0" for ".0":
"encoder.down_blocks.0.resnets.1.conv1.weight" is params["encoder"]["down_blocks_0"]["resnets_1"]["conv1"]["weight"].
Images are NHWC, kernels HWIO, linear weights [in, out]. Which range of pixels goes in and what is done with the
latents is the caller's business: EDM2 feeds [0, 1], not [-1, 1] (section 12).

Computed in float32 (float64 if the input is); matmul and convolution precision are the caller's choice.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from ddo_jax.models.edm_layers import (
    Conv,
    Init,
    Linear,
    at_least_float32,
    attention_weights,
    row,
    standardise,
    weight_and_bias,
)

EPS = 1e-6
LOGVAR_RANGE = (-30.0, 20.0)


class GroupNorm(nn.Module):
    """x [B,H,W,C] -> the same shape; statistics over H, W and the channels of a group, biased variance."""

    groups: int

    @nn.compact
    def __call__(self, x):
        channels = x.shape[-1]
        weight = self.param("weight", lambda _: jnp.ones(channels))
        bias = self.param("bias", lambda _: jnp.zeros(channels))
        h = x.reshape(x.shape[0], -1, self.groups, channels // self.groups)
        h = standardise(h, (1, 3), EPS).reshape(x.shape)
        return h * row(weight, h) + row(bias, h)


class ResnetBlock(nn.Module):
    """x [B,H,W,Ci] -> [B,H,W,features]: skip(x) + conv2(silu(norm2(conv1(silu(norm1(x))))))."""

    features: int
    groups: int

    @nn.compact
    def __call__(self, x):
        h = Conv(self.features, name="conv1")(nn.silu(GroupNorm(self.groups, name="norm1")(x)))
        h = Conv(self.features, name="conv2")(nn.silu(GroupNorm(self.groups, name="norm2")(h)))
        if x.shape[-1] != self.features:
            x = Conv(self.features, 1, name="conv_shortcut")(x)
        return x + h


class Attention(nn.Module):
    """x [B,H,W,C] -> the same shape: x plus one head of self-attention over the pixels."""

    groups: int

    @nn.compact
    def __call__(self, x):
        b, h, w, c = x.shape
        g = GroupNorm(self.groups, name="group_norm")(x).reshape(b, h * w, c)
        q, k, v = (Linear(c, name=f"to_{name}")(g) for name in "qkv")
        weights = attention_weights(q[:, :, None, :], k[:, :, None, :])[:, 0]  # one head
        return x + Linear(c, name="to_out_0")(weights @ v).reshape(x.shape)


class Downsample(nn.Module):
    """[B,H,W,C] -> [B,H/2,W/2,C]: 3x3 convolution, stride 2, zeros only at the bottom and at the right."""

    @nn.compact
    def __call__(self, x):
        weight, bias = weight_and_bias(self, (3, 3, x.shape[-1], x.shape[-1]), Init())
        layout, pad = ("NHWC", "HWIO", "NHWC"), [(0, 1), (0, 1)]
        y = jax.lax.conv_general_dilated(x, weight.astype(x.dtype), (2, 2), pad, dimension_numbers=layout)
        return y + row(bias, y)


class Resampler(nn.Module):
    """What diffusers calls downsamplers.0 and upsamplers.0: the factor 2 of a level, with a convolution `conv`."""

    up: bool

    @nn.compact
    def __call__(self, x):
        return Conv(x.shape[-1], up=True, name="conv")(x) if self.up else Downsample(name="conv")(x)


class Level(nn.Module):
    """`blocks` residual blocks, then the resampler: "down", "up" or None at the last level."""

    features: int
    groups: int
    blocks: int
    resample: str | None

    @nn.compact
    def __call__(self, x):
        for i in range(self.blocks):
            x = ResnetBlock(self.features, self.groups, name=f"resnets_{i}")(x)
        if self.resample is None:
            return x
        return Resampler(self.resample == "up", name=f"{self.resample}samplers_0")(x)


class MidBlock(nn.Module):
    """Residual block, attention, residual block at the width of x."""

    groups: int

    @nn.compact
    def __call__(self, x):
        x = ResnetBlock(x.shape[-1], self.groups, name="resnets_0")(x)
        x = Attention(self.groups, name="attentions_0")(x)
        return ResnetBlock(x.shape[-1], self.groups, name="resnets_1")(x)


class Encoder(nn.Module):
    """Image [B,H,W,C] -> [B,h,w,features]."""

    features: int
    widths: tuple[int, ...]
    blocks: int
    groups: int

    @nn.compact
    def __call__(self, x):
        x = Conv(self.widths[0], name="conv_in")(x)
        for i, width in enumerate(self.widths):
            resample = "down" if i < len(self.widths) - 1 else None
            x = Level(width, self.groups, self.blocks, resample, name=f"down_blocks_{i}")(x)
        x = MidBlock(self.groups, name="mid_block")(x)
        return Conv(self.features, name="conv_out")(nn.silu(GroupNorm(self.groups, name="conv_norm_out")(x)))


class Decoder(nn.Module):
    """Latents [B,h,w,C] -> image [B,H,W,features]. widths: from the image down, as the encoder's."""

    features: int
    widths: tuple[int, ...]
    blocks: int
    groups: int

    @nn.compact
    def __call__(self, z):
        x = Conv(self.widths[-1], name="conv_in")(z)
        x = MidBlock(self.groups, name="mid_block")(x)
        for i, width in enumerate(reversed(self.widths)):
            resample = "up" if i < len(self.widths) - 1 else None
            x = Level(width, self.groups, self.blocks + 1, resample, name=f"up_blocks_{i}")(x)
        return Conv(self.features, name="conv_out")(nn.silu(GroupNorm(self.groups, name="conv_norm_out")(x)))


class AutoencoderKL(nn.Module):
    """Images <-> a Gaussian over latents of 1/`downscale` their height and width. The defaults are sd-vae-ft-mse.

        mean, std = module.apply(variables, images, method="encode")
        images = module.apply(variables, z, method="decode")

    Args of the module: as diffusers names them; block_out_channels are the widths of the levels, image first.
    """

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32

    @property
    def downscale(self) -> int:
        """Pixels per latent along height and width: 2^(levels - 1)."""
        return 2 ** (len(self.block_out_channels) - 1)

    def setup(self):
        shared = self.block_out_channels, self.layers_per_block, self.norm_num_groups
        self.encoder = Encoder(2 * self.latent_channels, *shared)
        self.decoder = Decoder(self.out_channels, *shared)
        self.quant_conv = Conv(2 * self.latent_channels, 1)
        self.post_quant_conv = Conv(self.latent_channels, 1)

    def __call__(self, images):
        """The reconstruction from the posterior mean; touches every parameter, so `init` uses it."""
        return self.decode(self.encode(images)[0])

    def encode(self, images):
        """The posterior of the latents: (mean, std), std = exp(clip(logvar, -30, 20) / 2).

        Args:
            images: float [B,H,W,in_channels]; H and W multiples of `downscale` if the decoder is to give them back.

        Returns:
            mean, std: [B,h,w,latent_channels] each, float32 (float64 if images are), not scaled in any way.

        Raises:
            ValueError: integer pixels, or another number of channels.
        """
        x = self._checked(images, "images", self.in_channels)
        mean, logvar = jnp.split(self.quant_conv(self.encoder(x)), 2, axis=-1)
        return mean, jnp.exp(0.5 * jnp.clip(logvar, *LOGVAR_RANGE))

    def decode(self, z):
        """Images [B,H,W,out_channels] of latents z [B,h,w,latent_channels], float32 (float64 if z is); not clipped.

        Raises:
            ValueError: integer latents, or another number of channels.
        """
        return self.decoder(self.post_quant_conv(self._checked(z, "z", self.latent_channels)))

    def _checked(self, x, name: str, channels: int):
        if not jnp.issubdtype(x.dtype, jnp.floating):  # whose 0..255 nobody would notice
            raise ValueError(f"{name}: dtype {x.dtype}; allowed: floating point, pixels scaled by the caller")
        if x.ndim != 4 or x.shape[-1] != channels:
            raise ValueError(f"{name}: shape {x.shape}; allowed: [B, H, W, {channels}]")
        return x.astype(at_least_float32(x.dtype))


# ----------------------------------------------------------------------------------------------------
# Configurations

_SIZES = ("in_channels", "out_channels", "latent_channels", "layers_per_block", "norm_num_groups")
# The only values that we implement; for the block types, of every entry
_FIXED = {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "down_block_types": "DownEncoderBlock2D",
    "up_block_types": "UpDecoderBlock2D",
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "mid_block_add_attention": True,
}
# Nothing that the network computes with
_BOOKKEEPING = {"_diffusers_version", "_name_or_path", "sample_size", "scaling_factor", "shift_factor", "force_upcast"}
_BOOKKEEPING |= {"latents_mean", "latents_std"}


def from_config(config: dict) -> AutoencoderKL:
    """The module for diffusers' config.json; missing arguments take the defaults of `AutoencoderKL`.

    scaling_factor and its like describe other people's use of the latents and are passed over.

    Raises:
        ValueError: unknown key, a value that we do not implement, or widths that the groups do not divide.
    """
    config = {k: v for k, v in config.items() if k not in _BOOKKEEPING}
    for key, value in _FIXED.items():
        seen = config.pop(key, value)
        if any(v != value for v in (seen if isinstance(seen, list | tuple) else [seen])):
            raise ValueError(f"{key} is {seen!r}; allowed: {value!r}")
    if unknown := sorted(set(config) - {*_SIZES, "block_out_channels"}):
        allowed = ", ".join([*_SIZES, "block_out_channels"])
        raise ValueError(f"unknown key {unknown[0]!r} for AutoencoderKL; allowed: {allowed}")
    widths = config.get("block_out_channels", AutoencoderKL.block_out_channels)
    if not isinstance(widths, list | tuple) or not widths:
        raise ValueError(f"block_out_channels is {widths!r}; allowed: a list with one width a level")
    module = AutoencoderKL(**{**config, "block_out_channels": tuple(widths)})
    sizes = [(name, getattr(module, name)) for name in _SIZES] + [("block_out_channels", width) for width in widths]
    for name, size in sizes:
        if type(size) is not int or size < 1:
            raise ValueError(f"{name}: {size!r}; allowed: whole numbers from 1")
    for width in widths:
        if width % module.norm_num_groups:
            raise ValueError(f"norm_num_groups is {module.norm_num_groups}; allowed: divisors of the width {width}")
    return module
