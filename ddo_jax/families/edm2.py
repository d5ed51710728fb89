"""Family `edm2`: the magnitude-preserving networks, of pixels or of SD-VAE latents (specs/edm2.md)."""

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from ddo_jax import convert
from ddo_jax.errors import UserError
from ddo_jax.families.base import Draws, Examples, Family, PyTree
from ddo_jax.families.codecs import Latents, Pixels
from ddo_jax.families.diffusion import Diffusion
from ddo_jax.models import edm2 as networks

# Of raw SD-VAE latents on ImageNet-512 (section 12); final latents have standard deviation 0.5.
LATENT_MEAN, LATENT_STD, FINAL_STD = (5.81, 3.25, 0.12, -2.15), (4.17, 4.62, 3.71, 3.28), 0.5
SD_VAE = "sd-vae-ft-mse"
OURS = ("arch", "levels", "vae", "image_size", "image_channels", "latent_mean", "latent_std")  # not the network's


def released_arguments(model: Any) -> dict:
    """config.model -> the constructor arguments as a released file records them."""
    return {k: v for k, v in model.items() if k not in OURS}


def build_codec(model: Any) -> Pixels | Latents:
    """How records become x: config.model.vae names the autoencoder of a latent model, "" means pixels."""
    side, channels = model["img_resolution"], model["img_channels"]
    if not model.get("vae"):
        return Pixels((side, side, channels), model["levels"])
    mean, std = (tuple(model.get(f"latent_{k}", v)) for k, v in (("mean", LATENT_MEAN), ("std", LATENT_STD)))
    for name, value in (("latent_mean", mean), ("latent_std", std)):
        if len(value) != channels:
            raise UserError(f"config.model.{name}: {value}; allowed: {channels} numbers, one a channel of the latents")
    if min(std) <= 0:
        raise UserError(f"config.model.latent_std: {std}; allowed: numbers above 0")
    size = model.get("image_size", 8 * side)
    image = (size, size, model.get("image_channels", 3))
    return Latents(model["vae"], image, (side, side, channels), mean, std, FINAL_STD, model["levels"])


@dataclasses.dataclass(frozen=True)
class EDM2(Diffusion):
    """See Diffusion."""

    name = "edm2"
    heun_grid = "float32"

    def mle_loss(self, params: PyTree, frozen: PyTree, examples: Examples, draws: Draws, key: jax.Array) -> jax.Array:
        """Uncertainty-weighted: |F - F_hat|^2 / exp(logvar) + CHW logvar, summed over elements (section 8)."""
        nll = super().mle_loss(params, frozen, examples, draws, key)
        variables = {"params": params, **{k: v for k, v in frozen.items() if k != "vae"}}
        with jax.default_matmul_precision(self.precision):
            logvar = self.module.apply(variables, draws["sigma"], method="logvar").reshape(-1)
        return nll / jnp.exp(logvar) + float(np.prod(self.shape)) * logvar

    def project(self, params: PyTree, objective: str) -> PyTree:
        """Forced weight normalisation; the logvar head is executed in pre-training only (section 2)."""
        return networks.project(params, logvar=objective == "mle")

    def imported(self, released: Any) -> tuple[PyTree, PyTree]:
        if released.kind != "edm2":
            raise UserError(f"weights of kind {released.kind}; config.family is 'edm2'")
        try:
            variables = dict(convert.from_torch("edm2", released_arguments(self.model), released.state_dict)[1])
        except ValueError as e:
            raise UserError(f"the weights do not fit config.model: {e}") from None
        # float16 in released files: all to float32 before any use, gains and Fourier buffers too (section 5)
        variables = jax.tree.map(lambda v: np.asarray(v, np.float32), variables)
        return variables.pop("params"), variables

    def export(self, params: PyTree, frozen: PyTree) -> tuple[dict, dict]:
        arguments = released_arguments(self.model)
        buffers = {k: v for k, v in frozen.items() if k != "vae"}
        arrays = convert.to_torch("edm2", arguments, {"params": params, **buffers})
        metadata = {"ddo_jax_kind": "edm2", "ddo_jax_config": json.dumps(arguments)}
        if isinstance(self.codec, Latents) or self.codec.levels != 256:
            metadata["ddo_jax_encoder"] = json.dumps({k: self.model[k] for k in OURS if k in self.model})
        return arrays, metadata


def configure(config: Any, released: Any) -> None:
    """Set config.model and config.sampler to those of a released EDM2 checkpoint.

    The encoder's constants come from the file; one without them is taken for ImageNet-512's if it has 4 channels.

    Raises:
      UserError: what our own metadata say of the encoder is not JSON.
    """
    given = {k: v for k, v in released.config.items() if k not in ("class_name", "use_fp16")}
    kept = {k: v for k, v in given.items() if v is not None or k == "clip_act"}  # None there: no clipping
    model = {"arch": "UNet", "levels": 256, "sigma_data": 0.5, "label_dim": 0, **kept}
    model |= _encoder(released.extras, kept["img_channels"])
    config.model = ConfigDict(model)
    config.sampler.update(solver="heun", num_steps=32, s_churn=0.0)  # 63 NFE


def _encoder(extras: dict, channels: int) -> dict:
    """The part of config.model that says how records become x; {} for pixels."""
    ours = extras.get("metadata", {}).get("ddo_jax_encoder")
    if ours:
        try:
            return {k: v for k, v in json.loads(ours).items() if k in OURS}
        except (ValueError, AttributeError):
            raise UserError("metadata ddo_jax_encoder is not a JSON object; write the file again") from None
    if channels != 4:
        return {}
    encoder = extras.get("encoder") or {}
    if encoder.get("scale") is None or encoder.get("bias") is None:
        return {"vae": SD_VAE}
    scale, bias = (np.asarray(encoder[k], np.float64) for k in ("scale", "bias"))
    return {"vae": SD_VAE, "latent_std": (FINAL_STD / scale).tolist(), "latent_mean": (-bias / scale).tolist()}


def make(config: Any) -> Family:
    """The family for `config.model` at `config.precision`.

    Raises:
      UserError: an argument the network refuses.
    """
    model = config.model.to_dict()
    if model["arch"] != "UNet":
        raise UserError(f"config.model.arch: {model['arch']!r}; allowed for family edm2: UNet")
    try:
        module = networks.from_config(released_arguments(model), remat=config.remat)
    except (TypeError, ValueError) as e:
        raise UserError(f"config.model: {e}") from None
    return EDM2(module, build_codec(model), model, config.precision, config.eval.dtype)
