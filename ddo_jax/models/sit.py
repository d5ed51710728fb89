"""SiT (Ma et al. 2024): a transformer that answers the velocity of a straight path from noise to data.

Section numbers refer to specs/sit.md. Parameter names are those of the released files with "_0" for ".0":
"blocks.0.attn.qkv.weight" is params["blocks_0"]["attn"]["qkv"]["weight"]; linear weights are [in, out], the patch
convolution is one, [p·p·C, W], the label table is as released. `pos_embed` is a buffer.

B rows, T tokens of p x p pixels, W channels, D blocks, H heads of W/H. Label id K = num_classes means "no label".

Precision: embeddings, norms, modulations, softmax and the residual stream are float32 (float64 if the parameters are);
`SiT(dtype=jnp.bfloat16)` lowers the products, for sampling. On a GPU their attention is then cuDNN's.
"""

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ddo_jax import sharding
from ddo_jax.models.edm_layers import Init, Linear, at_least_float32
from ddo_jax.models.mixer import from_patches, to_patches
from ddo_jax.models.var import Embedding, modulate
from ddo_jax.models.var import Linear as NormalLinear

FREQUENCIES = 256  # features of t
EPS = 1e-6  # of layer norms
STD = 0.02  # of the label table and the embedding of t (section 2)
ZERO = Init(weight=0.0)
CONVENTIONS = ("sit", "repa")  # "repa": t = 0 is data, the answer is eps - x


def positions(side: int, width: int, dtype=np.float32) -> np.ndarray:
    """[1, side², width]: sines and cosines of the column in the first half of the width, of the row in the second."""
    omega = 10000.0 ** (-np.arange(width // 4) / (width / 4))
    angles = np.arange(side)[:, None] * omega[None]
    one = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)  # [side, W/2]
    column, row = np.broadcast_to(one[None], (side, side, width // 2)), np.repeat(one[:, None], side, axis=1)
    return np.concatenate([column, row], axis=-1).reshape(1, side * side, width).astype(dtype)


def time_features(t):
    """[B] in [0, 1] -> [B, 256]: cosines, then sines; t is not scaled."""
    half = FREQUENCIES // 2
    angles = t[:, None] * jnp.asarray(10000.0 ** (-np.arange(half) / half), t.dtype)[None]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class TimeEmbedder(nn.Module):
    """t [B] -> [B,W]."""

    width: int

    @nn.compact
    def __call__(self, t):
        h = nn.silu(NormalLinear(self.width, (STD,), name="mlp_0")(time_features(t)))
        return NormalLinear(self.width, (STD,), name="mlp_2")(h)


class LabelEmbedder(nn.Module):
    """ids [B] -> [B,W]; an id that does not exist gives NaN, which shows."""

    rows: int
    width: int

    @nn.compact
    def __call__(self, ids):
        return Embedding(self.rows, self.width, STD, name="embedding_table")(ids)


class PatchEmbedder(nn.Module):
    """x [B,S,S,C] -> [B,T,W]."""

    patch: int
    width: int

    @nn.compact
    def __call__(self, x):
        return Linear(self.width, name="proj")(to_patches(x, self.patch))


class Attention(nn.Module):
    """x [B,T,W] -> [B,T,W] in the dtype of x; every token sees all."""

    heads: int

    @nn.compact
    def __call__(self, x):
        b, length, width = x.shape
        qkv = Linear(3 * width, name="qkv")(x).reshape(b, length, 3, self.heads, -1)
        q, k, v = jnp.moveaxis(qkv, 2, 0)
        return Linear(width, name="proj")(attend(q, k, v).reshape(b, length, width))


def cudnn_attends(dtype, head_width: int, device) -> bool:
    """Whether cuDNN's fused attention takes this: half precision, widths it has, NVIDIA from Ampere on."""
    capability = str(getattr(device, "compute_capability", ""))  # "9.0"; AMD's are no numbers
    new = capability.replace(".", "").isdigit() and float(capability) >= 8
    return new and np.dtype(dtype).itemsize == 2 and head_width % 8 == 0 and head_width <= 128


def attend(q, k, v):
    """softmax(q kᵀ/√d) v of [B,T,H,d]: softmax in float32 at least; cuDNN's where products are of half precision."""
    if cudnn_attends(q.dtype, q.shape[-1], jax.devices()[0]):
        return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
    logits = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=at_least_float32(q.dtype))
    weights = jax.nn.softmax(logits / math.sqrt(q.shape[-1]), axis=-1).astype(q.dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v)


class MLP(nn.Module):
    """x [B,T,W] -> [B,T,W]."""

    hidden: int

    @nn.compact
    def __call__(self, x):
        h = nn.gelu(Linear(self.hidden, name="fc1")(x), approximate=True)
        return Linear(x.shape[-1], name="fc2")(h)


class Block(nn.Module):
    """x [B,T,W], SiLU(c) [B,W] -> x; dtype: of the products, None: that of x."""

    heads: int
    hidden: int
    dtype: Any

    @nn.compact
    def __call__(self, x, c):
        low = self.dtype or x.dtype
        ada = Linear(6 * x.shape[-1], ZERO, name="adaLN_modulation_1")(c.astype(low)).astype(x.dtype)
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(ada, 6, axis=-1)
        h = Attention(self.heads, name="attn")(modulate(x, EPS, scale1, shift1).astype(low))
        x = x + gate1[:, None] * h.astype(x.dtype)
        h = MLP(self.hidden, name="mlp")(modulate(x, EPS, scale2, shift2).astype(low))
        return x + gate2[:, None] * h.astype(x.dtype)


class FinalLayer(nn.Module):
    """x [B,T,W], SiLU(c) [B,W] -> [B,T,features]."""

    features: int

    @nn.compact
    def __call__(self, x, c):
        shift, scale = jnp.split(Linear(2 * x.shape[-1], ZERO, name="adaLN_modulation_1")(c), 2, axis=-1)
        return Linear(self.features, ZERO, name="linear")(modulate(x, EPS, scale, shift))


class SiT(nn.Module):
    """Velocity of noisy data given a class. The defaults are SiT-XL/2.

        v = module.apply(variables, x_t, t, labels)          # [B,S,S,C], [B], int [B] -> [B,S,S,C]

    t = 0 is noise, t = 1 is data, v answers x - eps, whatever the convention of the weights.

    Args of the module:
        input_size: S. patch_size: p. in_channels: C. hidden_size: W. depth: D. num_heads: H.
        mlp_ratio: width of the MLP over W. num_classes: K. class_dropout_prob: of labels in training the base model;
            the caller drops them. learn_sigma: the output has 2C channels, of which the last C are thrown away.
        convention: of the weights, see `CONVENTIONS`.
        sigma_data: of the data, for weights and samplers. dtype: of matrix products; None: float32.
        remat: compute the blocks again in the backward pass.
    """

    input_size: int = 32
    patch_size: int = 2
    in_channels: int = 4
    hidden_size: int = 1152
    depth: int = 28
    num_heads: int = 16
    mlp_ratio: float = 4.0
    num_classes: int = 1000
    class_dropout_prob: float = 0.1
    learn_sigma: bool = True
    convention: str = "sit"
    sigma_data: float = 0.5
    dtype: Any = None
    remat: bool = False

    # What the samplers and encoders of diffusion ask a network.
    @property
    def img_resolution(self) -> int:
        return self.input_size

    @property
    def img_channels(self) -> int:
        return self.in_channels

    @property
    def label_dim(self) -> int:
        return self.num_classes

    def setup(self):
        width, side = self.hidden_size, self.input_size // self.patch_size
        self.pos_embed = self.variable("buffers", "pos_embed", lambda: jnp.asarray(positions(side, width)))
        self.x_embedder = PatchEmbedder(self.patch_size, width)
        self.t_embedder = TimeEmbedder(width)
        self.y_embedder = LabelEmbedder(self.num_classes + 1, width)
        block = nn.remat(Block) if self.remat else Block
        hidden = int(width * self.mlp_ratio)
        self.blocks = [block(self.num_heads, hidden, self.dtype) for _ in range(self.depth)]
        self.final_layer = FinalLayer(self.patch_size**2 * self.in_channels * (2 if self.learn_sigma else 1))

    def __call__(self, x, t, labels):
        wide = at_least_float32(x.dtype)
        x, t = x.astype(wide), t.astype(wide)
        if self.convention == "repa":
            return -self.released(x, 1 - t, labels)
        return self.released(x, t, labels)

    def released(self, x, t, labels):
        """What the weights answer, in their own convention."""
        h = sharding.rows(self.x_embedder(x) + self.pos_embed.value.astype(x.dtype))
        c = nn.silu(self.t_embedder(t) + self.y_embedder(labels).astype(x.dtype))
        for block in self.blocks:
            h = block(sharding.rows(h), c)
        out = self.final_layer(h, c)
        channels = out.shape[-1] // self.patch_size**2
        return sharding.rows(from_patches(out, self.patch_size, (*x.shape[:3], channels))[..., : self.in_channels])


_SIZES = ("input_size", "patch_size", "in_channels", "hidden_size", "depth", "num_heads")


def from_config(config: dict, dtype=None, remat: bool = False) -> SiT:
    """The module for constructor arguments; missing ones take the defaults of `SiT`.

    Raises:
        ValueError: unknown key, or a size that makes no network.
    """
    allowed = [f.name for f in dataclasses.fields(SiT) if f.name not in ("parent", "name", "dtype", "remat")]
    if unknown := sorted(set(config) - set(allowed)):
        raise ValueError(f"unknown key {unknown[0]!r} for SiT; allowed: {', '.join(allowed)}")
    module = SiT(**config, dtype=dtype, remat=remat)
    for name in _SIZES:
        if type(size := getattr(module, name)) is not int or size < 1:
            raise ValueError(f"{name}: {size!r}; allowed: whole numbers from 1")
    if type(module.num_classes) is not int or module.num_classes < 0:
        raise ValueError(f"num_classes: {module.num_classes!r}; allowed: whole numbers from 0")
    if module.input_size % module.patch_size:
        raise ValueError(f"patch_size is {module.patch_size}; allowed: divisors of input_size, {module.input_size}")
    if module.hidden_size % module.num_heads or module.hidden_size % 4:
        raise ValueError(
            f"hidden_size is {module.hidden_size}; allowed: multiples of 4 and of num_heads, {module.num_heads}"
        )
    if module.convention not in CONVENTIONS:
        raise ValueError(f"convention is {module.convention!r}; allowed: {', '.join(CONVENTIONS)}")
    return module


SIT_PRESETS = {
    f"sit-{size}-2": {"hidden_size": width, "depth": depth, "num_heads": heads}
    for size, width, depth, heads in (("s", 384, 12, 6), ("b", 768, 12, 12), ("l", 1024, 24, 16), ("xl", 1152, 28, 16))
}
HEADS = {p["hidden_size"]: p["num_heads"] for p in SIT_PRESETS.values()}  # which no shape shows
