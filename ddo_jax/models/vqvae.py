"""The multi-scale VQ-VAE of VAR: images <-> tokens of growing maps, and the maps that VAR's transformer takes.

specs/var.md sections 1-3 and 6. A feature map f [B,P,P,z] is described by S maps of tokens with sides
p_0 < ... < p_{S-1} = P (`patch_nums`), each for what the coarser ones left over:

    f_hat = sum_s phi(up_s(E[tokens_s]))      up_s: bicubic p_s -> P,   phi(h) = (1 - rho) h + rho conv3x3(h)

Tokens [B,L] are the maps in order of s, row-major each; L = sum p_s^2. Names are the released ones with "_0" for ".0":
"encoder.down.1.block.0.conv1.weight" is params["encoder"]["down_1"]["block_0"]["conv1"]["weight"]; only the phis are
params["quantize"]["phi_0"] ... in every sharing. Images are NHWC in [-1, 1], kernels HWIO.

Computed in float32 (float64 if the input is). Encoder and decoder use the caller's matmul precision; everything between
f and tokens is at the highest whatever the caller's is, as TF32 would flip codes (section 11).
"""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ddo_jax.core.stats.resample import area_matrix, bicubic_matrix
from ddo_jax.models.edm_layers import Conv, Init, at_least_float32, attention_weights, convolve, row, weight_and_bias
from ddo_jax.models.sdvae import GroupNorm

TORCH = Init("kaiming_uniform", 3**-0.5, 3**-0.5)  # weight and bias uniform in +-1/sqrt(fan_in) (section 3)
HIGHEST = jax.lax.Precision.HIGHEST

# ----------------------------------------------------------------------------------------------------
# Encoder and decoder (section 2)


class ResBlock(nn.Module):
    """x [B,H,W,Ci] -> [B,H,W,features]: shortcut(x) + conv2(silu(norm2(conv1(silu(norm1(x))))))."""

    features: int
    groups: int

    @nn.compact
    def __call__(self, x):
        h = Conv(self.features, 3, TORCH, name="conv1")(nn.silu(GroupNorm(self.groups, name="norm1")(x)))
        h = Conv(self.features, 3, TORCH, name="conv2")(nn.silu(GroupNorm(self.groups, name="norm2")(h)))
        if x.shape[-1] != self.features:
            x = Conv(self.features, 1, TORCH, name="nin_shortcut")(x)
        return x + h


class Attention(nn.Module):
    """x [B,H,W,C] -> the same shape: x plus one head of self-attention over the pixels."""

    groups: int

    @nn.compact
    def __call__(self, x):
        b, h, w, c = x.shape
        qkv = Conv(3 * c, 1, TORCH, name="qkv")(GroupNorm(self.groups, name="norm")(x))
        q, k, v = jnp.split(qkv.reshape(b, h * w, 3 * c), 3, axis=-1)
        weights = attention_weights(q[:, :, None, :], k[:, :, None, :])[:, 0]  # one head
        return x + Conv(c, 1, TORCH, name="proj_out")((weights @ v).reshape(x.shape))


class StridedConv(nn.Module):
    """[B,H,W,C] -> [B,H/2,W/2,C]: 3x3 convolution, stride 2, zeros only at the bottom and at the right."""

    @nn.compact
    def __call__(self, x):
        weight, bias = weight_and_bias(self, (3, 3, x.shape[-1], x.shape[-1]), TORCH)
        layout, pad = ("NHWC", "HWIO", "NHWC"), [(0, 1), (0, 1)]
        y = jax.lax.conv_general_dilated(x, weight.astype(x.dtype), (2, 2), pad, dimension_numbers=layout)
        return y + row(bias, y)


class Resampler(nn.Module):
    """The factor 2 of a level: repeated pixels and a convolution, or a strided convolution; called `conv` by both."""

    up: bool

    @nn.compact
    def __call__(self, x):
        return (Conv(x.shape[-1], 3, TORCH, up=True, name="conv") if self.up else StridedConv(name="conv"))(x)


class Level(nn.Module):
    """`blocks` residual blocks, each followed by attention if `attend`; then the resampler: "up", "down" or None."""

    features: int
    groups: int
    blocks: int
    attend: bool
    resample: str | None

    @nn.compact
    def __call__(self, x):
        for j in range(self.blocks):
            x = ResBlock(self.features, self.groups, name=f"block_{j}")(x)
            if self.attend:
                x = Attention(self.groups, name=f"attn_{j}")(x)
        return x if self.resample is None else Resampler(self.resample == "up", name=f"{self.resample}sample")(x)


class Middle(nn.Module):
    """Residual block, attention, residual block at the width of x."""

    groups: int

    @nn.compact
    def __call__(self, x):
        x = ResBlock(x.shape[-1], self.groups, name="block_1")(x)
        x = Attention(self.groups, name="attn_1")(x)
        return ResBlock(x.shape[-1], self.groups, name="block_2")(x)


class Encoder(nn.Module):
    """Images [B,H,W,C] -> [B,h,w,features]. widths: of conv_in, then of the levels from the image down."""

    features: int
    widths: tuple[int, ...]
    blocks: int
    groups: int

    @nn.compact
    def __call__(self, x):
        first, *levels = self.widths
        x = Conv(first, 3, TORCH, name="conv_in")(x)
        for i, width in enumerate(levels):
            last = i == len(levels) - 1
            x = Level(width, self.groups, self.blocks, last, None if last else "down", name=f"down_{i}")(x)
        x = Middle(self.groups, name="mid")(x)
        x = nn.silu(GroupNorm(self.groups, name="norm_out")(x))
        return Conv(self.features, 3, TORCH, name="conv_out")(x)


class Decoder(nn.Module):
    """f_hat [B,h,w,z] -> images [B,H,W,features]; levels are numbered as the encoder's: up_0 has the image's size."""

    features: int
    widths: tuple[int, ...]
    blocks: int
    groups: int

    @nn.compact
    def __call__(self, x):
        _, *levels = self.widths
        x = Conv(levels[-1], 3, TORCH, name="conv_in")(x)
        x = Middle(self.groups, name="mid")(x)
        for i, width in reversed(list(enumerate(levels))):
            attend, resample = i == len(levels) - 1, "up" if i else None
            x = Level(width, self.groups, self.blocks + 1, attend, resample, name=f"up_{i}")(x)
        x = nn.silu(GroupNorm(self.groups, name="norm_out")(x))
        return Conv(self.features, 3, TORCH, name="conv_out")(x)


# ----------------------------------------------------------------------------------------------------
# Quantizer (section 3)

# Which of 4 phis a scale uses, by the number of scales. Some scales lie exactly between two phis, where rounding in
# float64 decides: s = 2 and s = 7 of the released 10.
_FOUR_PHIS = "03 023 0123 01223 001233 0012233 00112233 001122233 0011122333 00011222333 000111222333 0001112222333"
_FOUR_PHIS = {len(digits): tuple(map(int, digits)) for digits in [*_FOUR_PHIS.split(), "00011112222333"]}


def phi_indices(scales: int, shared: int) -> tuple[int, ...]:
    """The phi of every scale: 0, 1 ... of `shared` ones; shared = 0: each scale has its own (section 3)."""
    if shared == 0:
        return tuple(range(scales))
    if shared == 4 and scales in _FOUR_PHIS:
        return _FOUR_PHIS[scales]
    edge = (1 / 3 if shared == 4 else 1 / 2) / shared
    ticks = np.linspace(edge, 1 - edge, shared)
    return tuple(int(np.argmin(np.abs(ticks - s / (scales - 1)))) for s in range(scales))


class Phi(nn.Module):
    """h [B,P,P,z] -> the same shape: (1 - ratio) h + ratio conv3x3(h)."""

    ratio: float

    @nn.compact
    def __call__(self, h):
        weight, bias = weight_and_bias(self, (3, 3, h.shape[-1], h.shape[-1]), TORCH)
        with jax.default_matmul_precision("highest"):
            y = convolve(h, weight, 1)
        return (1 - self.ratio) * h + self.ratio * (y + row(bias, y))


class Embedding(nn.Module):
    """The codebook: `weight` [V,z]."""

    codes: int
    width: int

    def setup(self):
        self.weight = self.param("weight", lambda key: jax.random.normal(key, (self.codes, self.width)))


def resample(x, matrix: np.ndarray):
    """x [B,p,p,z] -> [B,q,q,z] by a matrix [q,p] of `ddo_jax.core.stats.resample`, along both sides."""
    m = jnp.asarray(matrix, x.dtype)
    return jnp.einsum("ip,bpqc,jq->bijc", m, x, m, precision=HIGHEST)


def unit(v):
    """v / |v| along the last axis; 0 stays 0."""
    return v / jnp.maximum(jnp.linalg.norm(v, axis=-1, keepdims=True), 1e-12)


class Quantizer(nn.Module):
    """Feature maps f [B,P,P,z] <-> tokens [B,L]. The arguments are those of `VQVAE`, `ratio` is |quant_resi|."""

    patch_nums: tuple[int, ...]
    vocab_size: int
    z_channels: int
    ratio: float
    shared: int
    using_znorm: bool
    beta: float

    def setup(self):
        scales = len(self.patch_nums)
        self.embedding = Embedding(self.vocab_size, self.z_channels)
        self.phi = [Phi(self.ratio) for _ in range(self.shared or scales)]
        if self.is_initializing():  # counts of usage, read by nobody: kept for the round trip of released files
            self.variable("buffers", "ema_vocab_hit_SV", jnp.zeros, (scales, self.vocab_size))

    def embed(self, tokens):
        """Codes [...,z] of tokens [...], float32 (float64 if the codebook is)."""
        weight = self.embedding.weight
        return jnp.asarray(weight, at_least_float32(weight.dtype))[tokens]

    def nearest(self, v):
        """Tokens [...] of the codes nearest to v [...,z], the first of equals; by angle if `using_znorm`."""
        codes = self.embedding.weight.astype(v.dtype)
        if self.using_znorm:
            return jnp.argmax(jnp.matmul(unit(v), unit(codes).T, precision=HIGHEST), axis=-1).astype(jnp.int32)
        inner = jnp.matmul(v, codes.T, precision=HIGHEST)
        squares = jnp.sum(jnp.square(codes), axis=-1).reshape((1,) * (v.ndim - 1) + (-1,))
        distance = jnp.sum(jnp.square(v), axis=-1, keepdims=True) + squares - 2 * inner
        return jnp.argmin(distance, axis=-1).astype(jnp.int32)

    def contribution(self, s: int, h):
        """What embeddings h [B,p_s^2,z] of scale s add to f_hat: phi(up_s(h)) [B,P,P,z]."""
        p, side = self.patch_nums[s], self.patch_nums[-1]
        h = h.reshape(h.shape[0], p, p, self.z_channels)
        if s < len(self.patch_nums) - 1:
            h = resample(h, bicubic_matrix(p, side))
        return self.phi[phi_indices(len(self.patch_nums), self.shared)[s]](h)

    def pooled(self, s: int, f):
        """What scale s sees of f [B,P,P,z]: its area averages [B,p_s^2,z]; at the last scale f itself."""
        if s < len(self.patch_nums) - 1:
            f = resample(f, area_matrix(self.patch_nums[-1], self.patch_nums[s]))
        return f.reshape(f.shape[0], -1, self.z_channels)

    def encode(self, f):
        """(tokens [B,L], [f_hat after scale s, for every s]) of f [B,P,P,z]."""
        if self.is_initializing():
            for phi in self.phi:  # some may serve no scale
                phi(f)
        rest, f_hat, tokens, sums = f, jnp.zeros_like(f), [], []
        for s in range(len(self.patch_nums)):
            tokens.append(self.nearest(self.pooled(s, rest)))
            h = self.contribution(s, self.embed(tokens[-1]).astype(f.dtype))
            f_hat, rest = f_hat + h, rest - h
            sums.append(f_hat)
        return jnp.concatenate(tokens, axis=1), sums

    def partial_sums(self, tokens):
        """[f_hat after scale s, for every s] of tokens [B,L]."""
        ends = list(itertools.accumulate(p * p for p in self.patch_nums))
        parts = jnp.split(tokens, ends[:-1], axis=1)
        return list(itertools.accumulate(self.contribution(s, self.embed(part)) for s, part in enumerate(parts)))

    def straight_through(self, f):
        """(f_hat in value and f in gradient, vq loss, tokens [B,L]) of f [B,P,P,z] (section 3, "Training loss")."""
        constant = jax.lax.stop_gradient
        tokens, sums = self.encode(constant(f))
        to_encoder = [jnp.mean(jnp.square(constant(f_hat) - f)) for f_hat in sums]
        to_codes = [jnp.mean(jnp.square(f_hat - constant(f))) for f_hat in sums]
        vq = (self.beta * sum(to_encoder) + sum(to_codes)) / len(sums)
        return constant(sums[-1] - f) + f, vq, tokens


# ----------------------------------------------------------------------------------------------------
# The tokenizer


class VQVAE(nn.Module):
    """Images <-> tokens. The defaults are the released vae_ch160v4096z32 at 256x256.

        tokens = module.apply(variables, images, method="tokens")                                     # [B,L] int32
        images = module.apply(variables, module.apply(variables, tokens, method="f_hat"), method="decode")

    Attributes: as the released constructor calls them.
        vocab_size, z_channels: codes in the codebook, and their width.
        ch, ch_mult, num_res_blocks: the levels of encoder and decoder have ch * ch_mult channels, image first.
        quant_conv_ks: kernel of the convolutions between the networks and f.
        quant_resi: ratio of phi's convolution; its absolute value counts.
        share_quant_resi: number of phis; 0: one for every scale.
        using_znorm: nearest codes by angle; else by distance.
        beta: weight of the encoder's part in the vq loss.
        patch_nums: sides of the maps of tokens, rising.
        in_channels: of the images.
        norm_groups: groups of every GroupNorm; 32 in released networks.
    """

    vocab_size: int = 4096
    z_channels: int = 32
    ch: int = 160
    ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_res_blocks: int = 2
    quant_conv_ks: int = 3
    quant_resi: float = 0.5
    share_quant_resi: int = 4
    using_znorm: bool = False
    beta: float = 0.25
    patch_nums: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
    in_channels: int = 3
    norm_groups: int = 32

    @property
    def image_size(self) -> int:
        """Pixels along a side."""
        return self.patch_nums[-1] * 2 ** (len(self.ch_mult) - 1)

    @property
    def length(self) -> int:
        """L, the number of tokens."""
        return sum(p * p for p in self.patch_nums)

    def setup(self):
        network = (self.ch, *(self.ch * m for m in self.ch_mult)), self.num_res_blocks, self.norm_groups
        self.encoder = Encoder(self.z_channels, *network)
        self.decoder = Decoder(self.in_channels, *network)
        sizes = self.patch_nums, self.vocab_size, self.z_channels
        phi = abs(self.quant_resi), self.share_quant_resi
        self.quantizer = Quantizer(*sizes, *phi, self.using_znorm, self.beta, name="quantize")
        self.quant_conv = Conv(self.z_channels, self.quant_conv_ks, TORCH)
        self.post_quant_conv = Conv(self.z_channels, self.quant_conv_ks, TORCH)

    def __call__(self, images):
        """The reconstruction [B,H,W,C] in [-1, 1]; touches every parameter, so `init` uses it."""
        return self.decode(self.quantize(self.features(images))[1])

    def features(self, images):
        """f [B,P,P,z] of images, before quantization.

        Args:
            images: float [B,H,W,in_channels] in [-1, 1]; H = W = `image_size`.

        Raises:
            ValueError: integer pixels, or another shape.
        """
        shape = (self.image_size, self.image_size, self.in_channels)
        return self.quant_conv(self.encoder(_checked(images, "images", shape)))

    def quantize(self, f):
        """(tokens [B,L] int32, f_hat [B,P,P,z]) of f [B,P,P,z]."""
        tokens, sums = self.quantizer.encode(self._map(f, "f"))
        return tokens, sums[-1]

    def tokens(self, images):
        """Tokens [B,L] int32 of images [B,H,W,in_channels] in [-1, 1]."""
        return self.quantize(self.features(images))[0]

    def embed(self, tokens):
        """Codes [...,z] of tokens [...]."""
        return self.quantizer.embed(tokens)

    def partial_sums(self, tokens):
        """f_hat after every scale, [S,B,P,P,z]: decoded, a preview from coarse to fine. tokens: [B,L]."""
        return jnp.stack(self.quantizer.partial_sums(self._sequence(tokens)))

    def f_hat(self, tokens):
        """f_hat [B,P,P,z] of tokens [B,L]."""
        return self.quantizer.partial_sums(self._sequence(tokens))[-1]

    def var_input(self, tokens):
        """What VAR's transformer takes for tokens [B,L]: [B, L - p_0^2, z].

        For scale s >= 1 the area averages, at its own size, of f_hat of the scales before it.
        """
        sums = self.quantizer.partial_sums(self._sequence(tokens))[:-1]
        return jnp.concatenate([self.quantizer.pooled(s + 1, f_hat) for s, f_hat in enumerate(sums)], axis=1)

    def step(self, s: int, h, f_hat):
        """Scale s of sampling: adds its embeddings to f_hat and gives the transformer's next input.

        Args:
            s: 0 ... S-1, a Python int. h: [B, p_s^2, z], `embed` of the tokens of scale s.
            f_hat: [B,P,P,z] of the scales before; zeros for s = 0.

        Returns:
            f_hat: [B,P,P,z] with scale s. next: [B, p_{s+1}^2, z]; None at the last scale.
        """
        f_hat = self._map(f_hat, "f_hat")
        f_hat = f_hat + self.quantizer.contribution(s, h.astype(f_hat.dtype))
        return f_hat, None if s == len(self.patch_nums) - 1 else self.quantizer.pooled(s + 1, f_hat)

    def decode_unclipped(self, f_hat):
        """Images [B,H,W,in_channels] of f_hat [B,P,P,z]; beyond [-1, 1] where the network goes there."""
        return self.decoder(self.post_quant_conv(self._map(f_hat, "f_hat")))

    def decode(self, f_hat):
        """Images [B,H,W,in_channels] in [-1, 1] of f_hat [B,P,P,z], float32 (float64 if f_hat is)."""
        return jnp.clip(self.decode_unclipped(f_hat), -1, 1)

    def training_loss(self, images):
        """What a tokenizer is trained with, but for the error of the reconstruction, which is the caller's choice.

            vq = 1/S sum_s [ beta mean((sg(f_hat_s) - f)^2) + mean((f_hat_s - sg(f))^2) ]

        Args:
            images: float [B,H,W,in_channels] in [-1, 1].

        Returns:
            reconstruction: [B,H,W,in_channels], not clipped; its gradient passes to the encoder as if f_hat were f.
            vq: scalar, the mean over images, positions, channels and scales. tokens: [B,L] int32.
        """
        f_hat, vq, tokens = self.quantizer.straight_through(self.features(images))
        return self.decode_unclipped(f_hat), vq, tokens

    def _map(self, f, name: str):
        return _checked(f, name, (self.patch_nums[-1], self.patch_nums[-1], self.z_channels))

    def _sequence(self, tokens):
        if not jnp.issubdtype(tokens.dtype, jnp.integer) or tokens.ndim != 2 or tokens.shape[1] != self.length:
            raise ValueError(f"tokens: {tokens.dtype} {tokens.shape}; allowed: integers [B, {self.length}]")
        return tokens


def _checked(x, name: str, shape: tuple[int, ...]):
    if not jnp.issubdtype(x.dtype, jnp.floating):  # whose 0..255 nobody would notice
        raise ValueError(f"{name}: dtype {x.dtype}; allowed: floating point")
    if x.ndim != 4 or x.shape[1:] != shape:
        raise ValueError(f"{name}: shape {x.shape}; allowed: [B, {', '.join(map(str, shape))}]")
    return x.astype(at_least_float32(x.dtype))


# ----------------------------------------------------------------------------------------------------
# Configurations

_SIZES = ("vocab_size", "z_channels", "ch", "num_res_blocks", "quant_conv_ks", "in_channels", "norm_groups")
_LISTS = ("ch_mult", "patch_nums")
KEYS = (*_SIZES, *_LISTS, "quant_resi", "beta", "share_quant_resi", "using_znorm")


def from_config(config: dict) -> VQVAE:
    """The module for the arguments of `VQVAE`; missing ones take its defaults.

    Raises:
        ValueError: unknown key, or a value that makes no tokenizer.
    """
    if unknown := sorted(set(config) - set(KEYS)):
        raise ValueError(f"unknown key {unknown[0]!r} for VQVAE; allowed: {', '.join(KEYS)}")
    values = {key: config.get(key, getattr(VQVAE, key)) for key in KEYS}

    def need(key: str, allowed: str, ok: bool):
        if not ok:
            raise ValueError(f"{key} is {values[key]!r}; allowed: {allowed}")

    for key in _SIZES:
        need(key, "whole numbers from 1", _is_size(values[key]))
    for key in _LISTS:
        need(key, "a list of whole numbers from 1", _are_sizes(values[key]))
        values[key] = tuple(values[key])
    for key in ("quant_resi", "beta"):
        need(key, "a number", type(values[key]) in (int, float))
    need("using_znorm", "True, False", type(values["using_znorm"]) is bool)
    need("share_quant_resi", "whole numbers; 0 is one a scale", _is_size(values["share_quant_resi"], least=0))
    need("quant_conv_ks", "odd numbers", values["quant_conv_ks"] % 2 == 1)
    sides = values["patch_nums"]
    need("patch_nums", "two or more sides, rising", len(sides) > 1 and list(sides) == sorted(set(sides)))
    for width in (values["ch"] * m for m in values["ch_mult"]):
        need("norm_groups", f"divisors of the width {width}", width % values["norm_groups"] == 0)
    return VQVAE(**values)


def _is_size(value, least: int = 1) -> bool:
    return type(value) is int and value >= least


def _are_sizes(value) -> bool:
    return isinstance(value, list | tuple) and len(value) > 0 and all(map(_is_size, value))
