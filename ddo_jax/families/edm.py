"""Family `edm`: EDM-preconditioned diffusion of pixels (specs/edm.md sections 9-11)."""

import dataclasses
import json
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from ddo_jax import convert
from ddo_jax.convert import mlp
from ddo_jax.core import augment as augmentation
from ddo_jax.errors import UserError
from ddo_jax.families.base import Draws, Examples, Family, PyTree
from ddo_jax.families.codecs import Pixels
from ddo_jax.families.diffusion import Diffusion
from ddo_jax.models import edm as networks


def released_arguments(model: Any) -> dict:
    """config.model -> the constructor arguments as a released file records them ("model_type", ...)."""
    given = {k: v for k, v in model.items() if k not in ("arch", "levels") and v is not None}
    return {"model_type": model["arch"], **given}


def model_config(arguments: dict) -> dict:
    """The inverse: a released file's arguments as config.model (8-bit images)."""
    kept = {k: v for k, v in arguments.items() if k not in ("model_type", "use_fp16", "sigma_min", "sigma_max")}
    return {"arch": arguments["model_type"], "levels": 256, "sigma_data": 0.5, "label_dim": 0, **kept}


def build_network(model: Any, remat: bool = False) -> networks.EDMPrecond:
    """config.model (a mapping) -> EDMPrecond around the named architecture.

    Raises:
      UserError: unknown architecture, or an argument the network refuses.
    """
    ours = model["arch"] in mlp.NETWORKS
    if not ours and model["arch"] not in networks.NETWORKS:
        allowed = ", ".join([*mlp.NETWORKS, *networks.NETWORKS])
        raise UserError(f"config.model.arch: {model['arch']!r}; allowed: {allowed}")
    arguments = released_arguments(model)
    try:
        return mlp.from_config(arguments) if ours else networks.from_config(arguments, remat=remat)
    except (TypeError, ValueError) as e:
        raise UserError(f"config.model ({model['arch']}): {e}") from None


@dataclasses.dataclass(frozen=True)
class EDM(Diffusion):
    """See Diffusion.

    Attributes:
      augment_p: probability of EDM's augmentation in MLE phases; 0 switches it off.
    """

    augment_p: float = 0.0

    name = "edm"
    config_keys = Diffusion.config_keys | {"data.augment"}

    @property
    def kind(self) -> str:
        """Of its files."""
        return "mlp" if self.model["arch"] in mlp.NETWORKS else "edm"

    def augment(self, examples: Examples, key: jax.Array) -> Examples:
        """EDM's pipeline (specs/edm.md section 13): the images are transformed, the network is told how."""
        if not self.augment_p:
            return examples
        n = examples["x"].shape[0]
        images, labels = augmentation.augment(examples["x"], augmentation.draw(key, n, self.augment_p))
        return {**examples, "x": images, "augment": labels}

    def score(self, params: PyTree, frozen: PyTree, examples: Examples, draws: Draws, **kwargs: Any) -> PyTree:
        x_in, c_noise, _ = self.inputs(examples, draws)
        told = examples.get("augment")
        return self.apply(self.module, params, frozen, x_in, c_noise, examples["label"], told, method="raw", **kwargs)

    def imported(self, released: Any) -> tuple[PyTree, PyTree]:
        if released.kind != self.kind:
            raise UserError(f"weights of kind {released.kind}; config.model.arch is {self.model['arch']!r}")
        try:
            variables = dict(convert.from_torch(self.kind, released_arguments(self.model), released.state_dict)[1])
        except ValueError as e:
            raise UserError(f"the weights do not fit config.model: {e}") from None
        variables = jax.tree.map(lambda v: np.asarray(v, np.float32), variables)  # float16 of averages rebuilt later
        return variables.pop("params"), variables

    def export(self, params: PyTree, frozen: PyTree) -> tuple[dict, dict]:
        arguments = released_arguments(self.model)
        arrays = convert.to_torch(self.kind, arguments, {"params": params, **frozen})
        levels = {} if self.model["levels"] == 256 else {"ddo_jax_levels": str(self.model["levels"])}
        return arrays, {"ddo_jax_kind": self.kind, "ddo_jax_config": json.dumps(arguments), **levels}


def configure(config: Any, released: Any) -> None:
    """Set config.model and config.sampler to those of a released EDM checkpoint (specs/edm.md section 11)."""
    config.model = ConfigDict(model_config(released.config))
    levels = str(released.extras.get("metadata", {}).get("ddo_jax_levels", 256))
    config.model.levels = int(levels) if levels.isdecimal() and 2 <= int(levels) <= 256 else 256
    resolution, network = released.config["img_resolution"], released.config["model_type"]
    if network == "DhariwalUNet":  # ImageNet-64: 511 NFE
        config.sampler.update(num_steps=256, s_churn=40.0, s_min=0.05, s_max=50.0, s_noise=1.003)
    else:  # FFHQ and AFHQv2: 79 NFE; CIFAR-10: 35 NFE
        config.sampler.update(num_steps=40 if resolution == 64 else 18)


def make(config: Any) -> Family:
    """The family for `config.model` at `config.precision`.

    Raises:
      UserError: an argument the network refuses, or augmentation of a network that cannot be told.
    """
    model = config.model.to_dict()
    augment_p = config.data.augment
    if augment_p and not model.get("augment_dim"):
        raise UserError(f"config.data.augment: {augment_p}; allowed: 0 unless model.augment_dim = 9")
    module = build_network(model, config.remat)
    codec = Pixels((module.img_resolution, module.img_resolution, module.img_channels), model["levels"])
    return EDM(module, codec, model, config.precision, config.eval.dtype, augment_p)
