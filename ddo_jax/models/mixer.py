"""PatchMixer: a small class-conditional denoiser of matrix products only, for pictures on a CPU.

The image is cut into patches, a token each. Blocks mix over tokens, then over channels (MLP-Mixer, Tolstikhin et al.
2021), under AdaLN as in models/mlp.py:

    h <- h + Dense_tokens(silu(Dense_tokens(ada(h)^T)))^T              # the same for every channel
    h <- h + Dense(silu(Dense(ada(h))))                                # the same for every token

What a `ResidualMLP` learns once for every place this network learns once for all: with 0.2M parameters it is the better
denoiser of 28 x 28 pictures, by far, than the other with 5.5M. Parameters and dtypes as there.
"""

import flax.linen as nn
import jax.numpy as jnp

from ddo_jax.models.edm_layers import Linear, at_least_float32, standardise
from ddo_jax.models.mlp import NEAR_ZERO, ZERO, embedding


def to_patches(x, p: int):
    """x [B,H,W,C] -> [B, (H/p)(W/p), p·p·C], row by row."""
    b, h, w, c = x.shape
    return x.reshape(b, h // p, p, w // p, p, c).swapaxes(2, 3).reshape(b, -1, p * p * c)


def from_patches(t, p: int, shape):
    """The inverse, to [B,H,W,C] = shape."""
    b, h, w, c = shape
    return t.reshape(b, h // p, w // p, p, p, c).swapaxes(2, 3).reshape(shape)


def modulated(h, scale, shift):
    """Layer norm of h [B,N,D] over channels, then AdaLN's scale and shift [B or 1, 1, D]."""
    u = standardise(h.astype(at_least_float32(h.dtype)), -1, eps=1e-6).astype(h.dtype)
    return (1 + scale) * u + shift


class MixerBlock(nn.Module):
    """h [B,N,D], emb [B or 1, E] -> [B,N,D]. tokens: hidden width over tokens; ratio: that over channels, in D."""

    tokens: int
    ratio: int

    @nn.compact
    def __call__(self, h, emb):
        n, width = h.shape[1:]
        ada = Linear(4 * width, ZERO, name="affine")(emb).astype(h.dtype)[:, None]
        scale0, shift0, scale1, shift1 = jnp.split(ada, 4, axis=-1)
        u = modulated(h, scale0, shift0).swapaxes(1, 2)
        u = nn.silu(Linear(self.tokens, name="token0")(u))
        h = h + Linear(n, ZERO, name="token1")(u).swapaxes(1, 2)
        u = nn.silu(Linear(self.ratio * width, name="dense0")(modulated(h, scale1, shift1)))
        return h + Linear(width, ZERO, name="dense1")(u)


class PatchMixer(nn.Module):
    """x [B,H,W,C], c_noise [B or 1], labels one-hot [B or 1, num_classes] -> F [B,H,W,C] in the dtype of x.

    Args of the module:
        patch: side of a patch; it must divide H and W.
        width: channels of a token, and of the embedding. blocks: of two residual branches each.
        tokens: hidden width over tokens. ratio: hidden width over channels, in widths.
        num_classes: 0 for an unconditional network, which ignores the labels.
    """

    patch: int = 4
    width: int = 64
    blocks: int = 4
    tokens: int = 96
    ratio: int = 2
    num_classes: int = 10

    @nn.compact
    def __call__(self, x, c_noise, labels, augment_labels=None, train: bool = False):
        emb = embedding(self.width, self.num_classes, c_noise, labels)
        h = Linear(self.width, name="input")(to_patches(x, self.patch))
        place = self.param("position", nn.initializers.normal(0.02), h.shape[1:])
        h = h + place.astype(h.dtype)[None]
        for i in range(self.blocks):
            h = MixerBlock(self.tokens, self.ratio, name=f"block{i}")(h, emb)
        ada = Linear(2 * self.width, ZERO, name="affine")(emb).astype(h.dtype)[:, None]
        h = modulated(h, *jnp.split(ada, 2, axis=-1))
        out = Linear(self.patch**2 * x.shape[-1], NEAR_ZERO, name="output")(h)
        return from_patches(out, self.patch, x.shape)
