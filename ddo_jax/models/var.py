"""VAR (Tian et al. 2024): a transformer that predicts an image's token maps scale by scale.

Section numbers refer to specs/var.md. Parameter names are those of the released files with "_0" for ".0":
"blocks.0.ada_lin.1.weight" is params["blocks_0"]["ada_lin_1"]["weight"]; linear weights are [in, out], embeddings
as released. The files' buffers (levels, mask, zero key bias) are not stored here, they follow from the sizes.

B rows, S scales of sides p_s, L = sum p_s^2 tokens, V codes of width z, C channels, D blocks, H heads of C/H. Label
id N = num_classes means "no label"; whose label is dropped is the caller's business, nothing here is random but drop
path. The tokenizer is not imported either: `sample_tokens` takes what it needs of it as arguments.

Precision (section 11): embeddings, norms, q/k normalisation, softmax and logits are float32 (float64 if the
parameters are); `VAR(dtype=jnp.bfloat16)` lowers the other products, and in `__call__` the residual stream.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ddo_jax import sharding
from ddo_jax.core import ar
from ddo_jax.models.edm_layers import at_least_float32, multiply, row, standardise

LOG_MAX_SCALE = math.log(100)

# ----------------------------------------------------------------------------------------------------
# Layers (sections 4.3, 5)


def normal(key, shape, std):
    """Normal draws; std: number, or array of the same rank. The reference cuts off at an absolute ±2: dozens of std."""
    draws = jax.random.normal(key, shape)
    return draws * jnp.asarray(std, draws.dtype)


class Linear(nn.Module):
    """x [..., in] -> [..., features] in the dtype of x.

    stds: initial standard deviations of the columns of the weight, one for each of len(stds) equal parts.
    """

    features: int
    stds: tuple[float, ...]
    use_bias: bool = True

    @nn.compact
    def __call__(self, x):
        shape = (x.shape[-1], self.features)
        std = np.repeat(self.stds, self.features // len(self.stds))[None]
        weight = self.param("weight", normal, shape, std)
        y = multiply(x, weight)
        if not self.use_bias:
            return y
        return y + row(self.param("bias", lambda _: jnp.zeros(self.features)), y)


class Embedding(nn.Module):
    """Ids of any shape -> [..., features]; an id that does not exist gives NaN, which shows."""

    rows: int
    features: int
    std: float

    @nn.compact
    def __call__(self, ids):
        weight = self.param("weight", normal, (self.rows, self.features), self.std)
        return jnp.take(weight.astype(at_least_float32(weight.dtype)), ids, axis=0, mode="fill", fill_value=jnp.nan)


@dataclasses.dataclass(frozen=True)
class Style:
    """What all blocks of a network share."""

    heads: int
    hidden: int  # of the MLP
    depth: int
    eps: float
    l2_norm: bool
    shared_aln: bool
    std: float  # of initial weights
    adaln: float  # factors on initial AdaLN weights: of scales and shifts,
    adaln_gamma: float  # and of the residual gains
    drop_path: float  # of the last block
    dtype: Any  # of matrix products

    @property
    def adaln_factors(self) -> tuple[float, ...]:
        """Of γ1, γ2, s1, s2, t1, t2."""
        return (self.adaln_gamma,) * 2 + (self.adaln,) * 4

    @property
    def out_std(self) -> float:
        """Of the layers that end in the residual stream."""
        return self.std / math.sqrt(2 * self.depth)


def modulate(x, eps: float, scale, shift):
    """LN(x)·(1 + scale) + shift: x [B,l,C], scale and shift [B,C], in their dtype (float32 at least)."""
    normed = standardise(x.astype(scale.dtype), -1, eps)
    return normed * (1 + scale[:, None]) + shift[:, None]


def unit(x):
    """x / max(|x|, 1e-12) over the last axis, finite gradient at 0."""
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x), -1, keepdims=True), 1e-24))


class Attention(nn.Module):
    """x [B,l,C], mask [l,l] or None, past -> [B,l,C], past and present (k, v), each [B,t,H,C/H]; None if past is.

    past: keys (normalised) and values of the tokens before x, which all queries see.
    """

    style: Style

    @nn.compact
    def __call__(self, x, mask, past):
        style, (b, length, c) = self.style, x.shape
        wide = at_least_float32(x.dtype)
        qkv = Linear(3 * c, (style.std,), use_bias=False, name="mat_qkv")(x)
        q_bias, v_bias = (self.param(name, lambda _: jnp.zeros(c)) for name in ("q_bias", "v_bias"))
        bias = jnp.stack([q_bias, jnp.zeros_like(q_bias), v_bias]).reshape(-1)  # keys have none
        q, k, v = jnp.moveaxis((qkv + row(bias, qkv)).reshape(b, length, 3, style.heads, -1), 2, 0)
        if style.l2_norm:
            log_scale = self.param("scale_mul_1H11", lambda _: jnp.full((1, style.heads, 1, 1), math.log(4)))
            scale = jnp.exp(jnp.minimum(log_scale.astype(wide), LOG_MAX_SCALE)).reshape(1, 1, -1, 1)
            q, k = unit(q.astype(wide)) * scale, unit(k.astype(wide))
        else:
            q = q * (0.25 / math.sqrt(q.shape[-1]))  # not 1/sqrt
        q, k = q.astype(x.dtype), k.astype(x.dtype)
        if past is not None:
            past = k, v = [jnp.concatenate([before, now], axis=1) for before, now in zip(past, (k, v), strict=True)]
        logits = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=wide)
        if mask is not None:
            logits = jnp.where(mask[None, None], logits, -jnp.inf)
        weights = jax.nn.softmax(logits, axis=-1).astype(x.dtype)
        out = jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(b, length, c)
        return Linear(c, (style.out_std,), name="proj")(out), past


class MLP(nn.Module):
    """x [B,l,C] -> [B,l,C]."""

    style: Style

    @nn.compact
    def __call__(self, x):
        h = nn.gelu(Linear(self.style.hidden, (self.style.std,), name="fc1")(x), approximate=True)
        return Linear(x.shape[-1], (self.style.out_std,), name="fc2")(h)


class Block(nn.Module):
    """x [B,l,C] -> x in its dtype, past (as `Attention`).

    ada: SiLU(cond) [B,C], or with shared AdaLN the six modulations [B,6C] that all blocks start from.
    """

    style: Style
    index: int = 0

    @nn.compact
    def __call__(self, x, ada, mask, past, train: bool):
        style, (b, _, c) = self.style, x.shape
        wide = at_least_float32(x.dtype)
        if not style.shared_aln:
            ada = Linear(6 * c, tuple(style.std * f for f in style.adaln_factors), name="ada_lin_1")(ada)
        ada = ada.astype(wide).reshape(b, 6, c)
        if style.shared_aln:
            std = np.reshape(style.adaln_factors, (1, 1, 6, 1)) / math.sqrt(c)
            ada = ada + self.param("ada_gss", normal, (1, 1, 6, c), std)[0].astype(wide)
        gain1, gain2, scale1, scale2, shift1, shift2 = jnp.moveaxis(ada, 1, 0)

        h = modulate(x, style.eps, scale1, shift1).astype(style.dtype or wide)
        h, past = Attention(style, name="attn")(h, mask, past)
        x = x + self.drop_path(gain1[:, None] * h.astype(wide), train).astype(x.dtype)
        h = modulate(x, style.eps, scale2, shift2).astype(style.dtype or wide)
        h = MLP(style, name="ffn")(h)
        x = x + self.drop_path(gain2[:, None] * h.astype(wide), train).astype(x.dtype)
        return x, past

    def drop_path(self, x, train: bool):
        """Rows of x are zeroed at the block's rate, the others divided by what remains."""
        keep = 1 - self.style.drop_path * self.index / max(self.style.depth - 1, 1)
        if not train or keep == 1:
            return x
        kept = jax.random.bernoulli(self.make_rng("dropout"), keep, (x.shape[0], 1, 1))
        return jnp.where(kept, x / keep, 0)


class HeadNorm(nn.Module):
    """LN(x)·(1 + s) + t with (s, t) of SiLU(cond) [B,C]; float32 at least."""

    style: Style

    @nn.compact
    def __call__(self, x, ada):
        c, wide = x.shape[-1], at_least_float32(x.dtype)
        ada = Linear(2 * c, (self.style.std * self.style.adaln,), name="ada_lin_1")(ada)
        return modulate(x, self.style.eps, *jnp.split(ada.astype(wide), 2, axis=-1))


# ----------------------------------------------------------------------------------------------------
# Network (sections 4.2, 4.4, 4.6)

SCALES_256 = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
SCALES_512 = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)


class VAR(nn.Module):
    """Logits of image tokens given a class and the coarser scales. The defaults are VAR-d16.

        logits = module.apply(variables, labels, var_input)                                          # [B, L, V]
        logits, past = module.apply(variables, s, labels, maps, past, method="step")                 # [B, p_s^2, V]

    Args of the module:
        num_classes: N. depth: D. embed_dim: C. num_heads: H. patch_nums: sides p_s of the scales, coarse to fine.
        vocab_size: V. z_channels: z. mlp_ratio: width of the MLP over C. norm_eps: of every LayerNorm.
        shared_aln: one AdaLN layer for all blocks. attn_l2_norm: queries and keys of unit length, learned scales.
        drop_path_rate: of the last block, from 0 in the first; where train=True only.
        init_adaln, init_adaln_gamma, init_head: factors on initial weights (section 5).
        dtype: of matrix products; None: float32. remat: compute the blocks again in the backward pass.
    """

    num_classes: int = 1000
    depth: int = 16
    embed_dim: int = 1024
    num_heads: int = 16
    patch_nums: tuple[int, ...] = SCALES_256
    vocab_size: int = 4096
    z_channels: int = 32
    mlp_ratio: float = 4.0
    norm_eps: float = 1e-6
    shared_aln: bool = False
    attn_l2_norm: bool = True
    drop_path_rate: float = 0.0
    init_adaln: float = 0.5
    init_adaln_gamma: float = 1e-5
    init_head: float = 0.02
    dtype: Any = None
    remat: bool = False

    @property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """(first, end) of the tokens of each scale."""
        ends = np.cumsum([p * p for p in self.patch_nums]).tolist()
        return tuple(zip([0, *ends[:-1]], ends, strict=True))

    @property
    def length(self) -> int:
        """L, the tokens of an image."""
        return self.spans[-1][1]

    @property
    def levels(self) -> np.ndarray:
        """[L] int: the scale of each token."""
        return np.repeat(np.arange(len(self.patch_nums)), np.square(self.patch_nums))

    def setup(self):
        c, std = self.embed_dim, math.sqrt(1 / (3 * self.embed_dim))
        style = Style(
            heads=self.num_heads,
            hidden=round(c * self.mlp_ratio),
            depth=self.depth,
            eps=self.norm_eps,
            l2_norm=self.attn_l2_norm,
            shared_aln=self.shared_aln,
            std=std,
            adaln=self.init_adaln,
            adaln_gamma=self.init_adaln_gamma,
            drop_path=self.drop_path_rate,
            dtype=self.dtype,
        )
        self.pos_start = self.param("pos_start", normal, (1, self.spans[0][1], c), std)
        self.pos_1LC = self.param("pos_1LC", normal, (1, self.length, c), std)
        self.word_embed = Linear(c, (std,))
        self.class_emb = Embedding(self.num_classes + 1, c, std)
        self.lvl_embed = Embedding(len(self.patch_nums), c, std)
        if self.shared_aln:
            self.shared_ada_lin_1 = Linear(6 * c, (std,))
        block = nn.remat(Block, static_argnums=(5,)) if self.remat else Block  # 5: train
        self.blocks = [block(style, i) for i in range(self.depth)]
        self.head_nm = HeadNorm(style)
        self.head = Linear(self.vocab_size, (std * self.init_head,))

    def __call__(self, labels, var_input, *, train: bool = False):
        """Teacher-forced logits [B, L, V], float32: those at token i are of token i, computed from coarser scales.

        Args:
            labels: int [B], N for "no label". var_input: [B, L - p_0^2, z], the tokenizer's maps of coarser scales.
            train: drop path on, with the rng collection "dropout"; for training the base model, never in DDO.
        """
        cond = sharding.rows(self.class_emb(labels))
        wide = cond.dtype
        x = jnp.concatenate([self.start(cond), self.word_embed(var_input.astype(wide))], axis=1)
        x = sharding.rows((x + self.pos()).astype(self.dtype or wide))
        levels = jnp.asarray(self.levels)
        mask = levels[:, None] >= levels[None, :]
        return self.body(x, cond, mask, None, train)[0]

    def step(self, s: int, labels, maps, past):
        """Logits of one scale [B, p_s^2, V], float32, given keys and values of the scales before.

        Args:
            s: scale, a Python int. labels: int [B].
            maps: [B, p_s^2, z], the tokenizer's map for this scale. past: of the step before. Both None at s = 0.

        Returns:
            logits, past: a list over the blocks of (keys, values), each [B, tokens so far, H, C/H].
        """
        first, end = self.spans[s]
        cond = sharding.rows(self.class_emb(labels))
        x = self.start(cond) if s == 0 else self.word_embed(maps.astype(cond.dtype))
        if s == 0:
            nothing = jnp.zeros((len(labels), 0, self.num_heads, self.embed_dim // self.num_heads))
            past = [(nothing.astype(self.dtype or cond.dtype),) * 2] * self.depth
        return self.body(x + self.pos()[:, first:end], cond, None, past, False)  # residual not lowered (section 11)

    def start(self, cond):
        """Inputs of the first scale, [B, p_0^2, C]: the class for every token."""
        return cond[:, None] + self.pos_start.astype(cond.dtype)

    def pos(self):
        """Embedding of level and position, [1, L, C]."""
        level = self.lvl_embed(jnp.asarray(self.levels))[None]
        return level + self.pos_1LC.astype(level.dtype)

    def body(self, x, cond, mask, past, train: bool):
        """Blocks and head."""
        wide = cond.dtype
        ada = shared = nn.silu(cond).astype(self.dtype or wide)
        if self.shared_aln:
            shared = self.shared_ada_lin_1(ada)
        now = []
        for i, block in enumerate(self.blocks):
            x, kept = block(sharding.rows(x), shared, mask, None if past is None else past[i], train)
            now.append(kept)
        x = self.head_nm(x, ada)
        return sharding.rows(self.head(x.astype(self.dtype or wide)).astype(wide)), now


_NO_DECAY = ("pos_1LC", "pos_start", "lvl_embed", "ada_gss", "scale_mul")


def decay_mask(params):
    """Tree of bools: which parameters weight decay acts on (section 9); all but biases, positions, levels, scales."""

    def one(path, v):
        names = [key.key for key in path]
        return v.ndim > 1 and not names[-1].endswith("bias") and not any(part in n for part in _NO_DECAY for n in names)

    return jax.tree_util.tree_map_with_path(one, params)


# ----------------------------------------------------------------------------------------------------
# Sampling (section 7)


class SampleSettings(NamedTuple):
    """How to sample.

    Attributes:
        cfg: guidance at the finest scale, growing linearly from 0 at the coarsest. 0, not 1, is without guidance;
            may be traced (then the rows without label are always computed).
        top_k: keep the k likeliest codes; 0: all. top_p: keep the likeliest of this total probability; 0: all.
        more_smooth: embed a soft mixture of codes; for pictures to look at, never for FID.
    """

    cfg: float = 0.0
    top_k: int = 0
    top_p: float = 0.0
    more_smooth: bool = False


def sample_tokens(module: VAR, variables, labels, noise, settings: SampleSettings, codebook, accumulate):
    """Images as tokens, and the feature maps that decode to them.

    Args:
        module, variables: the transformer. labels: int32 [B], N for "no label".
        noise: one key an image [B], on which (with its label) alone the image depends; or the draws themselves,
            standard Gumbel noise [B, L, V].
        codebook: [V, z]. accumulate: of the tokenizer, (s, h [B, p_s^2, z], f_hat [B, P, P, z]) -> (f_hat, map
            [B, p_{s+1}^2, z] for the next scale or None).

    Returns:
        tokens int32 [B, L], f_hat [B, P, P, z]. With more_smooth f_hat is not that of the tokens.

    All scales are meant to be one compiled program. One call draws the noise of all: on a CPU the generator takes a
    second to compile, and would at every scale.
    """
    n, scales, side = labels.shape[0], len(module.patch_nums), module.patch_nums[-1]
    guided = isinstance(settings.cfg, jax.Array) or settings.cfg != 0
    rows = jnp.concatenate([labels, jnp.full_like(labels, module.num_classes)]) if guided else labels
    past = maps = None
    if noise.ndim == 1:
        noise = jax.vmap(lambda key: jax.random.gumbel(key, (module.length, module.vocab_size)))(noise)
    f_hat, tokens = jnp.zeros((n, side, side, codebook.shape[-1]), codebook.dtype), []
    for s, (first, end) in enumerate(module.spans):
        logits, past = module.apply(variables, s, rows, maps, past, method="step")
        if guided:
            logits = ar.guidance(logits[:n], logits[n:], settings.cfg * ar.progress(s, scales))
        logits = ar.filter_logits(logits, settings.top_k, settings.top_p)
        gumbel = noise[:, first:end].astype(logits.dtype)
        ids = ar.draw(logits, gumbel)
        if settings.more_smooth:
            h = ar.smooth_probs(logits, gumbel, ar.progress(s, scales)).astype(codebook.dtype) @ codebook
        else:
            h = jnp.take(codebook, ids, axis=0)
        f_hat, maps = accumulate(s, h, f_hat)
        if guided and maps is not None:
            maps = jnp.concatenate([maps, maps])
        tokens.append(ids)
    return jnp.concatenate(tokens, axis=1), f_hat


# ----------------------------------------------------------------------------------------------------
# Configurations (section 4.1)

_SIZES = ("num_classes", "depth", "embed_dim", "num_heads", "vocab_size", "z_channels")


def from_config(config: dict, dtype=None, remat: bool = False) -> VAR:
    """The module for constructor arguments; missing ones take the defaults of `VAR`.

    Raises:
        ValueError: unknown key, or a size that makes no network.
    """
    allowed = [f.name for f in dataclasses.fields(VAR) if f.name not in ("parent", "name", "dtype", "remat")]
    if unknown := sorted(set(config) - set(allowed)):
        raise ValueError(f"unknown key {unknown[0]!r} for VAR; allowed: {', '.join(allowed)}")
    sides = config.get("patch_nums", SCALES_256)
    if not isinstance(sides, list | tuple) or not sides:
        raise ValueError(f"patch_nums is {sides!r}; allowed: a list with the side of every scale")
    module = VAR(**{**config, "patch_nums": tuple(sides)}, dtype=dtype, remat=remat)
    sizes = [(name, getattr(module, name)) for name in _SIZES] + [("patch_nums", side) for side in sides]
    for name, size in sizes:
        if type(size) is not int or size < 1:
            raise ValueError(f"{name}: {size!r}; allowed: whole numbers from 1")
    if module.embed_dim % module.num_heads:
        raise ValueError(f"num_heads is {module.num_heads}; allowed: divisors of embed_dim, {module.embed_dim}")
    return module


def _preset(depth: int, gamma: float, **others) -> dict:
    config = {"depth": depth, "embed_dim": 64 * depth, "num_heads": depth, "drop_path_rate": 0.1 * depth / 24}
    return {**config, "init_adaln_gamma": gamma, **others}


VAR_PRESETS = {
    "var-d16": _preset(16, 1e-3),
    "var-d20": _preset(20, 1e-3),
    "var-d24": _preset(24, 1e-4),
    "var-d30": _preset(30, 1e-5),
    "var-d36": _preset(36, 5e-6, patch_nums=SCALES_512, shared_aln=True),
}
