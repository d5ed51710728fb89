"""Family `edm`: EDM-preconditioned diffusion of pixels (specs/edm.md sections 9-11, specs/ddo.md section 2).

examples = {"x": float32 [B,H,W,C] in [-1, 1], "label": int32 [B]}; draws = {"sigma": [B], "eps": [B,H,W,C]}.
"""

import dataclasses

import jax
import jax.numpy as jnp

from ddo_jax.core import ddo, edm, samplers
from ddo_jax.errors import UserError
from ddo_jax.families.base import Family
from ddo_jax.models import edm as networks
from ddo_jax.models.mlp import ResidualMLP


def to_unit(image, levels: int):
    """uint8 with `levels` grey levels 0..levels-1 -> float32 in [-1, 1] (256 levels: x/127.5 - 1)."""
    return image.astype(jnp.float32) / ((levels - 1) / 2) - 1


def to_uint8(x, levels: int):
    """The inverse, rounded to nearest: trunc(clip(127.5 x + 128, 0, 255)) at 256 levels."""
    half = (levels - 1) / 2
    return jnp.clip(half * x.astype(jnp.float32) + (half + 0.5), 0, levels - 1).astype(jnp.uint8)


def build_network(model):
    """config.model -> EDMPrecond around the named architecture.

    Raises:
      UserError: unknown architecture, or an argument the network refuses.
    """
    arguments = {k: v for k, v in model.to_dict().items() if k not in ("arch", "levels") and v is not None}
    shared = {k: arguments.pop(k) for k in ("img_resolution", "img_channels", "label_dim", "sigma_data")}
    try:
        if model.arch == "mlp":
            net = ResidualMLP(num_classes=shared["label_dim"], **arguments)
            return networks.EDMPrecond(net=net, **shared)
        if model.arch in ("SongUNet", "DhariwalUNet"):
            return networks.from_config({"model_type": model.arch, **shared, **arguments})
    except (TypeError, ValueError) as e:
        raise UserError(f"config.model ({model.arch}): {e}") from None
    raise UserError(f"config.model.arch: {model.arch!r}; allowed: mlp, SongUNet, DhariwalUNet")


def heun_settings(sampler) -> samplers.HeunSettings:
    """config.sampler -> HeunSettings; its field names are the config's keys."""
    try:
        settings = samplers.HeunSettings(**dict(sampler))
        samplers.heun_schedule(settings)  # refuses what cannot be sampled with
        return settings
    except (TypeError, ValueError) as e:
        raise UserError(f"config.sampler: {e}") from None


@dataclasses.dataclass(frozen=True)
class EDM:
    """The functions of the family for one network; `make` puts them into the record.

    Attributes:
      module: EDMPrecond. levels: grey levels of the data.
      precision: of every matrix product and convolution. r is a small difference, so it is explicit.
    """

    module: networks.EDMPrecond
    levels: int
    precision: str

    @property
    def shape(self) -> tuple[int, int, int]:
        return (self.module.img_resolution, self.module.img_resolution, self.module.img_channels)

    def one_hot(self, labels):
        """[B] -> [B, K]; id == K ("no label") gives the zero row; None for unconditional networks."""
        return jax.nn.one_hot(labels, self.module.label_dim) if self.module.label_dim else None

    def apply(self, params, frozen, x, sigma, labels, **kwargs):
        with jax.default_matmul_precision(self.precision):
            return self.module.apply({"params": params, **frozen}, x, sigma, self.one_hot(labels), **kwargs)

    def inputs(self, examples, draws):
        return edm.edm_inputs(examples["x"], draws["sigma"], draws["eps"], self.module.sigma_data)

    def init(self, key):
        label = self.one_hot(jnp.zeros((1,), jnp.int32))
        variables = dict(self.module.init(key, jnp.zeros((1, *self.shape)), jnp.ones((1,)), label))
        return variables.pop("params"), variables

    def encode(self, frozen, record, key):
        return {"x": to_unit(record["image"], self.levels), "label": record["label"]}

    def decode(self, frozen, examples):
        return to_uint8(examples["x"], self.levels)

    def store(self, frozen, examples):
        return {"image": self.decode(frozen, examples), "label": examples["label"]}

    def draw(self, key, n, noise):
        key_sigma, key_eps = jax.random.split(key)
        sigma = edm.noise_level(jax.random.normal(key_sigma, (n,)), *noise)
        return {"sigma": sigma, "eps": jax.random.normal(key_eps, (n, *self.shape))}

    def score(self, params, frozen, examples, draws, **kwargs):
        """The raw network output F [B,H,W,C]."""
        x_in, c_noise, _ = self.inputs(examples, draws)
        return self.apply(params, frozen, x_in, c_noise, examples["label"], method="raw", **kwargs)

    def ratio(self, s, s_ref, examples, draws):
        return ddo.diffusion_log_ratio(s, s_ref, self.inputs(examples, draws)[2])

    def nll(self, s, examples, draws):
        """lambda(sigma) |D - x|^2 = |F - F_hat|^2, summed over pixels (specs/edm.md section 10)."""
        return jnp.sum(jnp.square(s - self.inputs(examples, draws)[2]), axis=(1, 2, 3))

    def mle_loss(self, params, frozen, examples, draws, key):
        f = self.score(params, frozen, examples, draws, train=True, rngs={"dropout": key})
        return self.nll(f, examples, draws)

    def latents(self, keys):
        return image_noise(keys, 0, self.shape)

    def sample(self, nets, frozen, labels, latents, keys, settings):
        params, guide = nets
        if guide is not None:
            raise NotImplementedError("family edm has no guidance")

        def denoise(x, sigma):
            return self.apply(params, frozen, x, sigma, labels)

        def churn(i):
            return image_noise(keys, i + 1, self.shape)

        return {"x": samplers.heun_sample(denoise, latents, settings, churn), "label": labels}


def image_noise(keys, stream, shape):
    """Unit normals [B, *shape]; stream 0 of an image's own key makes its latents, i + 1 its step i."""
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, stream), shape))(keys)


def make(config) -> Family:
    """The family for `config.model` at `config.precision`."""
    this = EDM(build_network(config.model), config.model.levels, config.precision)
    return Family(
        name="edm",
        num_classes=this.module.label_dim,
        image_shape=this.shape,
        nfe=lambda settings: settings.nfe,
        init=this.init,
        encode=this.encode,
        decode=this.decode,
        store=this.store,
        draw=this.draw,
        score=this.score,
        ratio=this.ratio,
        nll=this.nll,
        mle_loss=this.mle_loss,
        project=lambda params: params,
        latents=this.latents,
        sample=this.sample,
        settings=heun_settings,
    )
