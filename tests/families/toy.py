"""A family in one file: a diagonal Gaussian of pixels for each class, with an exact likelihood. The worked example."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ddo_jax.families import Family, Records, Spec
from ddo_jax.families.codecs import to_uint8, to_unit


class Settings(NamedTuple):
    solver, nfe = "toy", 1

    def record(self):
        return {"solver": self.solver}


@dataclasses.dataclass(frozen=True)
class Toy(Family):
    side: int
    classes: int
    levels: int

    @property
    def spec(self):
        pixels = Records("pixels", (self.side, self.side, 1))
        return Spec("toy", self.classes, pixels.shape, self.levels, (pixels,), pixels)

    def init(self, key):
        shape = (max(self.classes, 1) + 1, *self.spec.image_shape)  # the last row: no label
        return {"mean": 0.1 * jax.random.normal(key, shape), "log_std": jnp.zeros(shape)}, {}

    def encode(self, frozen, record, key):
        return {"x": to_unit(record["image"], self.levels), "label": record["label"]}

    def decode(self, frozen, examples):
        return to_uint8(examples["x"], self.levels)

    def store(self, frozen, examples):
        return {"image": self.decode(frozen, examples), "label": examples["label"]}

    def draw(self, key, n, sigma_law):
        return {"none": jnp.zeros((n,))}

    def score(self, params, frozen, examples, draws):
        mean, log_std = params["mean"][examples["label"]], params["log_std"][examples["label"]]
        return -jnp.sum(0.5 * jnp.square((examples["x"] - mean) * jnp.exp(-log_std)) + log_std, axis=(1, 2, 3))

    def ratio(self, s, s_ref, examples, draws):
        return s - s_ref

    def nll(self, s, examples, draws):
        return -s

    def mle_loss(self, params, frozen, examples, draws, key):
        return -self.score(params, frozen, examples, draws)

    def settings(self, sampler):
        return Settings()

    def sample(self, nets, frozen, labels, latents, noise, settings):
        params, _ = nets
        eps = jax.vmap(lambda key: jax.random.normal(key, self.spec.image_shape))(noise)
        return {"x": params["mean"][labels] + jnp.exp(params["log_std"][labels]) * eps, "label": labels}


def make(config):
    return Toy(config.model.img_resolution, config.model.label_dim, config.model.levels)
