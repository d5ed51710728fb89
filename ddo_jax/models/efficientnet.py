"""EfficientNet-Lite0 (Tan and Le 2019; the Lite variant without squeeze-and-excitation, ReLU6): a second opinion.

A feature space of photographs that is small enough for a CPU and free to use (Apache-2.0, 17 MB from PyPI): 1280
numbers after the last average. It is nobody's FID; distances in it are compared with their like only.

Parameters are named as in the released file, batch statistics are among them: everything is frozen. Images are NHWC,
kernels HWIO. Products are float32 at precision "highest".
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from ddo_jax.core.stats.resample import bicubic_matrix

EPS = 1e-3
STRIDE, LEAST, MOST = 32, 64, 224  # pixels a side that images are given: see `side`; it was trained at 224
STEM, FEATURES, CLASSES = 32, 1280, 1000
# (kernel, stride, expansion, channels, repeats): strides are of the first repeat
STAGES = ((3, 1, 1, 16, 1), (3, 2, 6, 24, 2), (5, 2, 6, 40, 2), (3, 2, 6, 80, 3), (5, 1, 6, 112, 3), (5, 2, 6, 192, 4))
STAGES += ((3, 1, 6, 320, 1),)


def _taps(x, k: int, s: int) -> list:
    """The k^2 shifted views of x [B,H,W,C] that a convolution of stride s sums, [B,H/s,W/s,C], padded as TensorFlow's
    SAME."""
    h, w = x.shape[1:3]
    oh, ow = -(-h // s), -(-w // s)
    ph, pw = (max((o - 1) * s + k - n, 0) for o, n in ((oh, h), (ow, w)))
    x = jnp.pad(x, ((0, 0), (ph // 2, ph - ph // 2), (pw // 2, pw - pw // 2), (0, 0)))
    spans = [slice(i, i + (oh - 1) * s + 1, s) for i in range(k)], [slice(j, j + (ow - 1) * s + 1, s) for j in range(k)]
    return [x[:, rows, columns] for rows in spans[0] for columns in spans[1]]


class Conv(nn.Module):
    """x [B,H,W,C] -> [B,H/stride,W/stride,O]; depthwise: every channel by itself.

    Written as sums of shifted images and matrix products: 600 images/s on two CPU cores, 65 with XLA's convolutions.
    """

    channels: int
    kernel: int = 1
    stride: int = 1
    depthwise: bool = False

    @nn.compact
    def __call__(self, x):
        groups = x.shape[-1] if self.depthwise else 1
        shape = (self.kernel, self.kernel, x.shape[-1] // groups, self.channels)
        weight = self.param("weight", nn.initializers.lecun_normal(), shape)
        taps = _taps(x, self.kernel, self.stride)
        if self.depthwise:
            weights = weight.reshape(-1, self.channels)
            return sum(tap * weights[i][None, None, None] for i, tap in enumerate(taps))
        return jnp.dot(jnp.concatenate(taps, -1), weight.reshape(-1, self.channels), precision="highest")


class Norm(nn.Module):
    """Batch norm by the statistics of training."""

    @nn.compact
    def __call__(self, x):
        c = x.shape[-1:]
        zeros, ones = nn.initializers.zeros, nn.initializers.ones
        weight, bias = self.param("weight", ones, c), self.param("bias", zeros, c)
        mean, var = self.param("running_mean", zeros, c), self.param("running_var", ones, c)
        scale = weight / jnp.sqrt(var + EPS)
        return x * scale[None, None, None] + (bias - mean * scale)[None, None, None]


class Block(nn.Module):
    """x -> x: expansion, depthwise convolution, projection; a residual where the shape stays."""

    kernel: int
    stride: int
    expansion: int
    channels: int

    @nn.compact
    def __call__(self, x):
        width = self.expansion * x.shape[-1]
        h = x
        if self.expansion > 1:
            h = nn.relu6(Norm(name="_bn0")(Conv(width, name="_expand_conv")(h)))
        h = Conv(width, self.kernel, self.stride, depthwise=True, name="_depthwise_conv")(h)
        h = nn.relu6(Norm(name="_bn1")(h))
        h = Norm(name="_bn2")(Conv(self.channels, name="_project_conv")(h))
        return x + h if h.shape == x.shape else h


class EfficientNetLite0(nn.Module):
    """x: normalised [B,H,W,3] -> (features [B,1280], logits [B,1000])."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu6(Norm(name="_bn0")(Conv(STEM, 3, 2, name="_conv_stem")(x)))
        index = 0
        for kernel, stride, expansion, channels, repeats in STAGES:
            for i in range(repeats):
                x = Block(kernel, 1 if i else stride, expansion, channels, name=f"_blocks_{index}")(x)
                index += 1
        x = nn.relu6(Norm(name="_bn1")(Conv(FEATURES, name="_conv_head")(x)))
        features = x.mean((1, 2))
        weight = self.param("_fc_weight", nn.initializers.lecun_normal(), (FEATURES, CLASSES))
        bias = self.param("_fc_bias", nn.initializers.zeros, (CLASSES,))
        return features, jnp.dot(features, weight, precision="highest") + bias[None]


def side(n: int) -> int:
    """Pixels a side that images of side n are given: the next multiple of 32, within 64 and 224 (work grows with the
    square).

    >>> [side(n) for n in (8, 28, 65, 512)]
    [64, 64, 96, 224]
    """
    return min(max(-(-n // STRIDE) * STRIDE, LEAST), MOST)


def resized(images, size: int):
    """Bicubic, antialiased, float32 [B,H,W,3] -> [B,size,size,3], not rounded."""
    rows, columns = (jnp.asarray(bicubic_matrix(n, size), jnp.float32) for n in images.shape[1:3])
    x = jnp.einsum("oh,bhwc->bowc", rows, images.astype(jnp.float32), precision="highest")
    return jnp.einsum("ow,bhwc->bhoc", columns, x, precision="highest")


def features(variables, images) -> jax.Array:
    """float32 [B,1280] of uint8 images [B,H,W,3] of any size.

    Raises:
      ValueError: not [B,H,W,3].
    """
    if images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(f"images have shape {images.shape}: they must be [B, H, W, 3]")
    x = (jnp.clip(resized(images, side(max(images.shape[1:3]))), 0, 255) - 127) / 128
    return EfficientNetLite0().apply(variables, x)[0]
