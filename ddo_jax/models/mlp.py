"""ResidualMLP: a small class-conditional denoiser of matrix products only, for digits and for tests.

    emb = silu(Dense(silu(Dense(positional(c_noise) + Dense(labels)))))       # as the mapping of SongUNet
    h <- h + Dense(silu(Dense((1 + scale) layer_norm(h) + shift)))     # AdaLN: scale, shift = Dense(emb)

Parameters are `weight` [in, out] and `bias` [out]; dtypes as in models/edm.py. It is wrapped by EDMPrecond.
"""

import math

import flax.linen as nn
import jax.numpy as jnp

from ddo_jax.models.edm_layers import Init, Linear, PositionalEmbedding, at_least_float32, standardise

ZERO = Init(weight=0.0)  # AdaLN starts as a plain layer norm
NEAR_ZERO = Init(weight=1e-5)  # F starts at 0, the mean of its target


class AdaLNBlock(nn.Module):
    """h [B, width], emb [B or 1, E] -> [B, width]: one residual branch of two Dense layers."""

    @nn.compact
    def __call__(self, h, emb):
        width = h.shape[-1]
        scale, shift = jnp.split(Linear(2 * width, ZERO, name="affine")(emb).astype(h.dtype), 2, axis=-1)
        u = standardise(h.astype(at_least_float32(h.dtype)), -1, eps=1e-6).astype(h.dtype)
        u = (1 + scale) * u + shift
        u = nn.silu(Linear(width, name="dense0")(u))
        return h + Linear(width, name="dense1")(u)


def embedding(width: int, num_classes: int, c_noise, labels):
    """[B or 1, width] of noise level and class, as the mapping of SongUNet; called in the scope of a network."""
    noise_width = width // 2
    e = PositionalEmbedding(noise_width, endpoint=True, name="map_noise")(c_noise)
    if num_classes:
        labels = labels.astype(e.dtype) * math.sqrt(num_classes)  # unit variance, as in SongUNet
        e = e + Linear(noise_width, name="map_label")(labels)
    e = nn.silu(Linear(width, name="map_layer0")(e))
    return nn.silu(Linear(width, name="map_layer1")(e))


class ResidualMLP(nn.Module):
    """x [B,H,W,C], c_noise [B or 1], labels one-hot [B or 1, num_classes] -> F [B,H,W,C] in the dtype of x.

    Args of the module:
        width: hidden and embedding width; the noise embedding has width/2.
        blocks: residual blocks. num_classes: 0 for an unconditional network, which ignores the labels.

    64,864 parameters for 8×8×1 images at the defaults. There is no augmentation input and no dropout.
    """

    width: int = 64
    blocks: int = 3
    num_classes: int = 10

    @nn.compact
    def __call__(self, x, c_noise, labels, augment_labels=None, train: bool = False):
        emb = embedding(self.width, self.num_classes, c_noise, labels)
        h = Linear(self.width, name="input")(x.reshape(x.shape[0], -1))
        for i in range(self.blocks):
            h = AdaLNBlock(name=f"block{i}")(h, emb)
        out = Linear(math.prod(x.shape[1:]), NEAR_ZERO, name="output")(nn.silu(h))
        return out.reshape(x.shape)
