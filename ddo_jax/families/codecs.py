"""What a record of the data is to a diffusion network: pixels, or latents of an SD-VAE (specs/edm2.md section 12).

A codec turns stored arrays into the x that the network sees (float32, standard deviation about sigma_data) and back.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ddo_jax.convert import sdvae
from ddo_jax.errors import UserError
from ddo_jax.families.base import PyTree, Records

TOGETHER = 4  # images a device: the VAE's activations at 512 x 512 are 0.1 GB each


def to_unit(image: Any, levels: int) -> jax.Array:
    """uint8 with `levels` grey levels 0..levels-1 -> float32 in [-1, 1] (256 levels: x/127.5 - 1)."""
    return image.astype(jnp.float32) / ((levels - 1) / 2) - 1


def to_uint8(x: jax.Array, levels: int) -> jax.Array:
    """The inverse, rounded to nearest: trunc(clip(127.5 x + 128, 0, 255)) at 256 levels."""
    half = (levels - 1) / 2
    return jnp.clip(half * x.astype(jnp.float32) + (half + 0.5), 0, levels - 1).astype(jnp.uint8)


@dataclasses.dataclass(frozen=True)
class Pixels:
    """x = pixels in [-1, 1].

    Attributes:
      image_shape: (H, W, C). levels: grey levels of the data; samples are quantised to them.
    """

    image_shape: tuple[int, int, int]
    levels: int

    @property
    def stored(self) -> Records:
        return Records("pixels", self.image_shape)

    @property
    def data(self) -> tuple[Records, ...]:
        return (self.stored,)

    def companions(self) -> dict:
        return {}

    def encode(self, frozen: PyTree, image: jax.Array, key: jax.Array) -> jax.Array:
        return to_unit(image, self.levels)

    def store(self, x: jax.Array) -> jax.Array:
        return to_uint8(x, self.levels)

    def decode(self, frozen: PyTree, x: jax.Array) -> jax.Array:
        return to_uint8(x, self.levels)


@dataclasses.dataclass(frozen=True)
class Latents:
    """x = (latent - mean) / std * final_std of the posterior's samples; a fresh sample at every use of a real image.

    A record is uint8 pixels (encoded as they are needed), [h,w,2C] raw posterior means and standard deviations
    (EDM2's data sets), or [h,w,C] raw latents (fakes, kept as the sampler made them).

    Attributes:
      vae: WHAT of the autoencoder; it is not read before it is needed. image_shape: (H, W, 3) of decoded images.
      latent_shape: (h, w, C). mean, std: of raw latents, a channel each. final_std: of x. levels: of the images.
    """

    vae: str
    image_shape: tuple[int, int, int]
    latent_shape: tuple[int, int, int]
    mean: tuple
    std: tuple
    final_std: float
    levels: int

    @property
    def stored(self) -> Records:
        return Records("latents", self.latent_shape)

    @property
    def data(self) -> tuple[Records, ...]:
        h, w, c = self.latent_shape
        return (Records("pixels", self.image_shape), Records("latents", (h, w, 2 * c)))

    @property
    def scale(self) -> np.ndarray:
        """float32 [1,1,1,C]."""
        return np.float32(self.final_std) / np.asarray(self.std, np.float32)[None, None, None]

    @property
    def bias(self) -> np.ndarray:
        return -np.asarray(self.mean, np.float32)[None, None, None] * self.scale

    def companions(self) -> dict:
        """{"vae": parameters}; checks that the file fits the shapes.

        Raises:
          UserError: see `sdvae.load`; or another reduction or number of channels.
        """
        module, variables = self._autoencoder()
        (height, width, channels), factor = self.image_shape, module.downscale
        made = (height // factor, width // factor, module.latent_channels)
        if made != self.latent_shape or channels != module.in_channels:
            raise UserError(
                f"config.model.vae: {self.vae} makes latents {made} of images {self.image_shape}; allowed: "
                f"{self.latent_shape}, the network's; set model.image_size, model.img_resolution, model.img_channels"
            )
        return {"vae": variables["params"]}

    def _autoencoder(self) -> tuple:
        try:
            return sdvae.load(self.vae)
        except UserError as e:
            raise UserError(f"config.model.vae: {e}") from None

    def _apply(self, frozen: PyTree, x: jax.Array, method: str) -> jax.Array:
        return self._autoencoder()[0].apply({"params": frozen["vae"]}, x, method=method)

    def encode(self, frozen: PyTree, image: jax.Array, key: jax.Array) -> jax.Array:
        channels = self.latent_shape[-1]
        if image.dtype == jnp.uint8:  # to [0, 1], not [-1, 1]: released networks depend on it
            pixels = image.astype(jnp.float32) / (self.levels - 1)
            mean, std = in_parts(lambda p: self._apply(frozen, p, "encode"), pixels, TOGETHER * jax.device_count())
        elif image.shape[-1] == 2 * channels:
            mean, std = jnp.split(image, 2, axis=-1)
        else:
            return self.scaled(image)
        return self.scaled(mean + std * jax.random.normal(key, mean.shape))

    def scaled(self, raw: jax.Array) -> jax.Array:
        return raw * self.scale + self.bias

    def store(self, x: jax.Array) -> jax.Array:
        return (x.astype(jnp.float32) - self.bias) / self.scale

    def decode(self, frozen: PyTree, x: jax.Array) -> jax.Array:
        """uint8; truncated at 256 levels, as released (with few levels that would darken: rounded)."""
        y = in_parts(lambda z: self._apply(frozen, z, "decode"), self.store(x), TOGETHER * jax.device_count())
        half = 0.0 if self.levels == 256 else 0.5
        return ((self.levels - 1) * jnp.clip(y, 0, 1) + half).astype(jnp.uint8)


def in_parts(fn: Callable, x: jax.Array, rows: int) -> jax.Array:
    """fn(x), an array or several, with at most `rows` of the batch at a time; every device keeps its own rows."""
    rows = math.gcd(len(x), rows) if len(x) > rows else len(x)
    parts = len(x) // rows
    if parts == 1:
        return fn(x)
    made = jax.lax.map(fn, jnp.swapaxes(x.reshape(rows, parts, *x.shape[1:]), 0, 1))
    return jax.tree.map(lambda y: jnp.swapaxes(y, 0, 1).reshape(len(x), *y.shape[2:]), made)
