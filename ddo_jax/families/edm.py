"""Family `edm`: EDM-preconditioned diffusion of pixels (specs/edm.md sections 9-11, specs/ddo.md section 2).

examples = {"x": float32 [B,H,W,C] in [-1, 1], "label": int32 [B]}; draws = {"sigma": [B], "eps": [B,H,W,C]}.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from ddo_jax import convert
from ddo_jax.convert import safetensors
from ddo_jax.core import augment as augmentation
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


def released_arguments(model) -> dict:
    """config.model -> the constructor arguments as a released file records them ("model_type", ...)."""
    given = {k: v for k, v in model.items() if k not in ("arch", "levels") and v is not None}
    return {"model_type": model["arch"], **given}


def model_config(arguments: dict) -> dict:
    """The inverse: a released file's arguments as config.model (8-bit images)."""
    kept = {k: v for k, v in arguments.items() if k not in ("model_type", "use_fp16", "sigma_min", "sigma_max")}
    return {"arch": arguments["model_type"], "levels": 256, "sigma_data": 0.5, "label_dim": 0, **kept}


def build_network(model) -> networks.EDMPrecond:
    """config.model (a mapping) -> EDMPrecond around the named architecture.

    Raises:
      UserError: unknown architecture, or an argument the network refuses.
    """
    if model["arch"] not in ("mlp", "SongUNet", "DhariwalUNet"):
        raise UserError(f"config.model.arch: {model['arch']!r}; allowed: mlp, SongUNet, DhariwalUNet")
    arguments = released_arguments(model)
    try:
        if model["arch"] != "mlp":
            return networks.from_config(arguments)
        shared = {k: arguments.pop(k) for k in ("img_resolution", "img_channels", "label_dim", "sigma_data")}
        arguments.pop("model_type")
        return networks.EDMPrecond(net=ResidualMLP(num_classes=shared["label_dim"], **arguments), **shared)
    except (TypeError, ValueError) as e:
        raise UserError(f"config.model ({model['arch']}): {e}") from None


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
      module: EDMPrecond. model: the config.model that it was built from.
      precision: of every matrix product and convolution. r is a small difference, so it is explicit.
      sampling: dtype of the image path when sampling ("float32" or "bfloat16").
      augment_p: probability of EDM's augmentation in MLE phases; 0 switches it off.
    """

    module: networks.EDMPrecond
    model: dict
    precision: str
    sampling: str
    augment_p: float

    @property
    def levels(self) -> int:
        return self.model["levels"]

    @property
    def shape(self) -> tuple[int, int, int]:
        return (self.module.img_resolution, self.module.img_resolution, self.module.img_channels)

    def one_hot(self, labels):
        """[B] -> [B, K]; id == K ("no label") gives the zero row; None for unconditional networks."""
        return jax.nn.one_hot(labels, self.module.label_dim) if self.module.label_dim else None

    def apply(self, module, params, frozen, x, sigma, labels, *args, **kwargs):
        with jax.default_matmul_precision(self.precision):
            return module.apply({"params": params, **frozen}, x, sigma, self.one_hot(labels), *args, **kwargs)

    def inputs(self, examples, draws):
        return edm.edm_inputs(examples["x"], draws["sigma"], draws["eps"], self.module.sigma_data)

    def init(self, key):
        label = self.one_hot(jnp.zeros((1,), jnp.int32))
        variables = dict(self.module.init(key, jnp.zeros((1, *self.shape)), jnp.ones((1,)), label))
        return variables.pop("params"), variables

    def encode(self, frozen, record, key):
        return {"x": to_unit(record["image"], self.levels), "label": record["label"]}

    def augment(self, examples, key):
        """EDM's pipeline (specs/edm.md section 13): the images are transformed, the network is told how."""
        if not self.augment_p:
            return examples
        n = examples["x"].shape[0]
        images, labels = augmentation.augment(examples["x"], augmentation.draw(key, n, self.augment_p))
        return {**examples, "x": images, "augment": labels}

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
        told = examples.get("augment")
        return self.apply(self.module, params, frozen, x_in, c_noise, examples["label"], told, method="raw", **kwargs)

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

    def sample(self, nets, frozen, labels, latents, noise, settings):
        params, guide = nets
        if guide is not None:
            raise UserError("family edm has no guidance; allowed: a guide for families edm2 and var")
        module = self.module.clone(dtype=jnp.bfloat16) if self.sampling == "bfloat16" else self.module

        def denoise(x, sigma):
            return self.apply(module, params, frozen, x, sigma, labels).astype(x.dtype)

        def churn(i):
            keyed = jnp.issubdtype(noise.dtype, jax.dtypes.prng_key)
            return image_noise(noise, i + 1, self.shape) if keyed else noise[i]

        return {"x": samplers.heun_sample(denoise, latents, settings, churn), "label": labels}

    def imported(self, released):
        if self.model["arch"] == "mlp" or released.kind != "edm":
            raise UserError(f"weights of kind {released.kind}; config.model.arch is {self.model['arch']!r}")
        try:
            variables = dict(convert.from_torch("edm", released_arguments(self.model), released.state_dict)[1])
        except ValueError as e:
            raise UserError(f"the weights do not fit config.model: {e}") from None
        return variables.pop("params"), variables

    def export(self, params, frozen):
        if self.model["arch"] == "mlp":
            return safetensors.flatten(params), {"ddo_jax_kind": "mlp"}
        arguments = released_arguments(self.model)
        arrays = convert.to_torch("edm", arguments, {"params": params, **frozen})
        return arrays, {"ddo_jax_kind": "edm", "ddo_jax_config": json.dumps(arguments)}


def configure(config, released) -> None:
    """Set config.model and config.sampler to those of a released EDM checkpoint (specs/edm.md section 11)."""
    config.model = ConfigDict(model_config(released.config))
    resolution, network = released.config["img_resolution"], released.config["model_type"]
    if network == "DhariwalUNet":  # ImageNet-64: 511 NFE
        config.sampler.update(num_steps=256, s_churn=40.0, s_min=0.05, s_max=50.0, s_noise=1.003)
    else:  # FFHQ and AFHQv2: 79 NFE; CIFAR-10: 35 NFE
        config.sampler.update(num_steps=40 if resolution == 64 else 18)


def image_noise(keys, stream, shape):
    """Unit normals [B, *shape]; stream 0 of an image's own key makes its latents, i + 1 its step i."""
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, stream), shape))(keys)


def make(config) -> Family:
    """The family for `config.model` at `config.precision`.

    Raises:
      UserError: an argument the network refuses, or augmentation of a network that cannot be told.
    """
    model = config.model.to_dict()
    augment_p = config.data.augment
    if augment_p and not model.get("augment_dim"):
        raise UserError(f"config.data.augment: {augment_p}; allowed: 0 unless model.augment_dim = 9")
    this = EDM(build_network(model), model, config.precision, config.eval.dtype, augment_p)
    return Family(
        name="edm",
        num_classes=this.module.label_dim,
        image_shape=this.shape,
        nfe=lambda settings: settings.nfe,
        init=this.init,
        encode=this.encode,
        augment=this.augment,
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
        imported=this.imported,
        export=this.export,
    )
