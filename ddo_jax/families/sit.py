"""Family `sit`: flow matching of pixels or of SD-VAE latents by a transformer (specs/sit.md).

examples = {"x": float32 [B,H,W,C], pixels in [-1, 1] or scaled latents, "label": int32 [B]};
draws = {"t": [B], "eps": [B,H,W,C]}, logit t = -log sigma; s = the velocity v [B,H,W,C].
"""

import dataclasses
import functools
import json
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from ddo_jax import convert
from ddo_jax.convert import sdvae
from ddo_jax.core import edm, flow, flow_samplers, predictions
from ddo_jax.errors import UserError
from ddo_jax.families import codecs, diffusion
from ddo_jax.families.base import (
    DIFFUSION_SAMPLER,
    HALF,
    Draws,
    Examples,
    Family,
    Guidance,
    PyTree,
    Records,
    Spec,
    own_settings,
)
from ddo_jax.models import sit as networks
from ddo_jax.models.sdvae import AutoencoderKL

SD_VAE, LATENT_SCALE = "sd-vae-ft-ema", 0.18215  # of the released networks (section 2); EDM2's latents have another
TIMES = ("logit-normal", "uniform")
# config.model -> the constructor's names. What else it holds, and its defaults:
RENAMED = {"img_resolution": "input_size", "img_channels": "in_channels", "label_dim": "num_classes"}
OURS = {
    "weight": "edm",  # of the log-ratio: edm | x | velocity (section 4)
    "mle_time": "uniform",  # the law of t in MLE phases: uniform | logit-normal, by the phase's p_mean, p_std
    "pair_time": "logit-normal",  # of the rounds
    "guidance_channels": 0,  # guided are the first so many; 0: all
    "vae": "",  # WHAT of the autoencoder; "": pixels
    "latent_scale": LATENT_SCALE,
    "image_size": 0,  # of decoded images; 0: eight times the latents'
    "image_channels": 3,
}
NOT_ARGUMENTS = {"arch", "levels", *OURS}
SAMPLER = {**DIFFUSION_SAMPLER, "cfg": 0.0}
MOST_CFG = 1e4  # as of VARs: far beyond any use, and finite in float32


class SiTSettings(NamedTuple):
    """how: FlowSettings, HeunSettings or DPMSettings. cfg: guidance, 1 is none."""

    how: Any
    cfg: float = 1.0

    @property
    def solver(self) -> str:
        return self.how.solver

    @property
    def num_steps(self) -> int:
        return self.how.num_steps

    @property
    def nfe(self) -> int:
        return self.how.nfe * (1 if self.cfg == 1 else 2)

    def record(self) -> dict:
        return {**self.how.record(), "cfg": self.cfg}


def released_arguments(model: Any) -> dict:
    """config.model -> the constructor's arguments."""
    return {RENAMED.get(k, k): v for k, v in model.items() if k not in NOT_ARGUMENTS}


def model_config(arguments: dict) -> dict:
    """The inverse, for 8-bit pixels."""
    ours = {theirs: mine for mine, theirs in RENAMED.items()}
    return {"arch": "SiT", "levels": 256, "sigma_data": 0.5, **{ours.get(k, k): v for k, v in arguments.items()}}


@functools.lru_cache(maxsize=8)
def autoencoder_module(vae: str) -> AutoencoderKL:
    """The module of config.model.vae; while the file is not at hand (`companions` refuses that) Stable Diffusion's."""
    try:
        return sdvae.load(vae)[0]
    except UserError:
        return AutoencoderKL()


@dataclasses.dataclass(frozen=True)
class FlowLatents(codecs.Latents):
    """x = 0.18215 z of Stable Diffusion's latents z, whose pixels are in [-1, 1].

    Real images come as pixels: a zip of latents says nothing of its encoding, and ours (EDM2's) is from [0, 1].
    """

    @property
    def data(self) -> tuple[Records, ...]:
        return super().data[:1]

    def companion_shapes(self) -> dict:
        """Of `companions`: a plan needs no file."""
        x = jax.ShapeDtypeStruct((1, *self.image_shape), np.float32)
        return {"vae": jax.eval_shape(autoencoder_module(self.vae).init, jax.random.key(0), x)["params"]}

    def _apply(self, frozen: PyTree, x: jax.Array, method: str) -> Any:
        return autoencoder_module(self.vae).apply({"params": frozen["vae"]}, x, method=method)

    def encode(self, frozen: PyTree, image: jax.Array, key: jax.Array) -> jax.Array:
        if image.dtype != jnp.uint8:
            return super().encode(frozen, image, key)
        rows = codecs.TOGETHER * jax.device_count()
        pixels = codecs.to_unit(image, self.levels)
        mean, std = codecs.in_parts(lambda p: self._apply(frozen, p, "encode"), pixels, rows)
        return self.scaled(mean + std * jax.random.normal(key, mean.shape))

    def decode(self, frozen: PyTree, x: jax.Array) -> jax.Array:
        rows = codecs.TOGETHER * jax.device_count()
        y = codecs.in_parts(lambda z: self._apply(frozen, z, "decode"), self.store(x), rows)
        return codecs.to_uint8(y, self.levels)


def build_codec(model: dict) -> codecs.Pixels | FlowLatents:
    """How records become x."""
    side, channels = model["img_resolution"], model["img_channels"]
    given = OURS | model
    if not given["vae"]:
        return codecs.Pixels((side, side, channels), model["levels"])
    scale = given["latent_scale"]
    if not scale > 0 or (given["vae"] == SD_VAE and scale != LATENT_SCALE):  # another scale is another network's
        allowed = LATENT_SCALE if given["vae"] == SD_VAE else f"above 0, as SiT's {LATENT_SCALE}"
        raise UserError(f"config.model.latent_scale: {scale}; allowed with vae {given['vae']!r}: {allowed}")
    size = given["image_size"] or 8 * side
    image, zero, std = (size, size, given["image_channels"]), (0.0,) * channels, (1.0,) * channels
    return FlowLatents(given["vae"], image, (side, side, channels), zero, std, scale, model["levels"])


@dataclasses.dataclass(frozen=True)
class SiTFamily(diffusion.Diffusion):
    """See Diffusion.

    Attributes:
      weight: of the log-ratio, see `core.flow.flow_weight`. mle_time, pair_time: of `TIMES`. guidance_channels: see
        `core.flow_samplers.flow_guided`.
    """

    weight: str = "edm"
    mle_time: str = "uniform"
    pair_time: str = "logit-normal"
    guidance_channels: int = 0

    name = "sit"
    config_keys = diffusion.Diffusion.config_keys | {"sampler.cfg"}

    @functools.cached_property
    def spec(self) -> Spec:
        channels = self.guidance_channels or self.module.in_channels
        rule = f"v_none + cfg (v - v_none), the first {channels} channels; 1 is none"
        return dataclasses.replace(super().spec, guidance=Guidance("own", 1.0, "cfg", rule))

    def velocity(
        self, params: PyTree, frozen: PyTree, x: jax.Array, t: jax.Array, labels: jax.Array, dtype: Any = None
    ) -> jax.Array:
        """v [B,H,W,C] at (x, t)."""
        module = self.module.clone(dtype=dtype) if dtype else self.module
        buffers = {k: v for k, v in frozen.items() if k != "vae"}
        with jax.default_matmul_precision(self.precision):
            return module.apply({"params": params, **buffers}, x, t, labels)

    # -- the seam (families/base.py) -----------------------------------------------------------------------

    def init(self, key: jax.Array) -> tuple[PyTree, PyTree]:
        variables = dict(self.module.init(key, jnp.zeros((1, *self.shape)), jnp.ones((1,)), jnp.zeros((1,), jnp.int32)))
        return variables.pop("params"), variables

    def companion_shapes(self) -> dict:
        return self.codec.companion_shapes() if isinstance(self.codec, FlowLatents) else {}

    def decays(self, params: PyTree) -> PyTree:
        """All matrices but the label table."""
        return jax.tree_util.tree_map_with_path(lambda path, v: v.ndim > 1 and path[0].key != "y_embedder", params)

    def _draws(self, key: jax.Array, n: int, sigma_law: tuple, law: str) -> Draws:
        key_t, key_eps = jax.random.split(key)
        if law == "uniform":
            t = jax.random.uniform(key_t, (n,))
        else:
            t = flow.time_of(edm.noise_level(jax.random.normal(key_t, (n,)), *sigma_law))
        return {"t": t, "eps": jax.random.normal(key_eps, (n, *self.shape))}

    def draw(self, key: jax.Array, n: int, sigma_law: tuple) -> Draws:
        return self._draws(key, n, sigma_law, self.mle_time)

    def pair_draw(self, key: jax.Array, n: int, sigma_law: tuple) -> Draws:
        return self._draws(key, n, sigma_law, self.pair_time)

    def inputs(self, examples: Examples, draws: Draws) -> tuple[jax.Array, jax.Array]:
        """(x_t, u)."""
        return flow.flow_inputs(examples["x"], draws["t"], draws["eps"])

    def score(self, params: PyTree, frozen: PyTree, examples: Examples, draws: Draws, **kwargs: Any) -> PyTree:
        """The velocity v [B,H,W,C]."""
        return self.velocity(params, frozen, self.inputs(examples, draws)[0], draws["t"], examples["label"])

    def weights(self, draws: Draws) -> jax.Array:
        """[B], of squared errors of v; a t of 0, which a uniform draw may be, counts as the least that is not."""
        t = jnp.maximum(draws["t"], jnp.finfo(jnp.float32).eps)
        return flow.flow_weight(self.weight, t, self.module.sigma_data)

    def ratio(self, s: PyTree, s_ref: PyTree, examples: Examples, draws: Draws) -> jax.Array:
        return predictions.prediction_log_ratio(s, s_ref, self.inputs(examples, draws)[1], self.weights(draws))

    def nll(self, s: PyTree, examples: Examples, draws: Draws) -> jax.Array:
        """w |v - u|^2, summed over elements."""
        error = jnp.square(s - self.inputs(examples, draws)[1])
        return self.weights(draws) * jnp.sum(error, axis=(1, 2, 3))

    def mle_loss(self, params: PyTree, frozen: PyTree, examples: Examples, draws: Draws, key: jax.Array) -> jax.Array:
        """Mean square of v - u, whatever the weight of the ratio; labels dropped as the network was built for."""
        labels = examples["label"]
        if self.module.class_dropout_prob and self.module.num_classes:
            dropped = jax.random.bernoulli(key, self.module.class_dropout_prob, labels.shape)
            labels = jnp.where(dropped, self.module.num_classes, labels)
        v = self.score(params, frozen, {**examples, "label": labels}, draws)
        return jnp.mean(jnp.square(v - self.inputs(examples, draws)[1]), axis=(1, 2, 3))

    def guide(self, params: PyTree, frozen: PyTree, labels: jax.Array) -> Any:
        """D(z, sigma) by t = 1 / (1 + sigma): what the samplers of diffusion, and networks to be guided, take."""
        dtype = HALF.get(self.sampling)

        def denoise(z: jax.Array, sigma: jax.Array) -> jax.Array:
            t = flow.time_of(sigma)
            x_t = z * t.reshape(-1, *(1,) * (z.ndim - 1))
            return flow.flow_denoised(self.velocity(params, frozen, x_t, t, labels, dtype), x_t, t)

        return denoise

    def settings(self, sampler: Any) -> SiTSettings:
        """config.sampler -> how to sample. Solvers: of flows euler, flow_heun, sde; through sigma = (1 - t) / t those
        of diffusion, heun and dpmv3.

        Raises:
          UserError: what cannot be sampled with.
        """
        given = own_settings(sampler, SAMPLER)
        cfg = float(given.pop("cfg", 0.0)) or 1.0  # unset: none
        if not 0 < cfg <= MOST_CFG:
            raise UserError(f"config.sampler.cfg: {cfg}; allowed: above 0, up to {MOST_CFG:g}; 1 is none, and so is 0")
        solver, steps = given.get("solver", "heun"), given.get("num_steps", DIFFUSION_SAMPLER["num_steps"])
        if solver not in flow_samplers.SOLVERS:
            if cfg != 1 and self.guidance_channels:
                raise UserError(
                    f"config.sampler.cfg: {cfg} with solver {solver!r} and config.model.guidance_channels; allowed: "
                    f"{', '.join(flow_samplers.SOLVERS)}, or guidance_channels = 0: the others guide all channels"
                )
            try:
                return SiTSettings(super().settings(given), cfg)
            except UserError as e:
                raise UserError(f"{e}; or {', '.join(flow_samplers.SOLVERS)}") from None
        least = 2 if solver == "sde" else 1
        if not least <= steps <= diffusion.MOST_STEPS:
            raise UserError(
                f"config.sampler.num_steps: {steps}; allowed: {least} to {diffusion.MOST_STEPS:,} with {solver}"
            )
        return SiTSettings(flow_samplers.FlowSettings(solver, int(steps)), cfg)

    def fake_settings(self, settings: SiTSettings) -> SiTSettings:
        return settings._replace(cfg=1.0)

    def sample(
        self, nets: tuple, frozen: PyTree, labels: jax.Array, latents: Any, noise: Any, settings: SiTSettings
    ) -> Examples:
        params, guide = nets
        scale = None if settings.cfg == 1 and guide is None else settings.cfg if guide is None else guide[1]
        none = jnp.full_like(labels, self.module.num_classes)
        if not isinstance(settings.how, flow_samplers.FlowSettings):
            guided = None if scale is None else (self.guide(params, frozen, none), scale)
            return super().sample((params, guided), frozen, labels, latents, noise, settings.how)
        dtype, channels = HALF.get(self.sampling), self.guidance_channels or self.module.in_channels

        def velocity(x: jax.Array, t: jax.Array) -> jax.Array:
            if scale is None:
                return self.velocity(params, frozen, x, t, labels, dtype).astype(x.dtype)
            x2, t2, both = (jnp.concatenate(pair) for pair in ((x, x), (t, t), (labels, none)))
            labelled, unlabelled = jnp.split(self.velocity(params, frozen, x2, t2, both, dtype).astype(x.dtype), 2)
            return flow_samplers.flow_guided(labelled, unlabelled, scale, channels)

        def fresh(i: Any) -> jax.Array:
            keyed = jnp.issubdtype(noise.dtype, jax.dtypes.prng_key)
            return diffusion.image_noise(noise, i + 1, self.shape) if keyed else noise[i]

        return {"x": flow_samplers.flow_sample(velocity, latents, settings.how, fresh), "label": labels}

    # -- files ----------------------------------------------------------------------------------------------

    def imported(self, released: Any) -> tuple[PyTree, PyTree]:
        if released.kind != "sit":
            raise UserError(f"weights of kind {released.kind}; config.family is 'sit'")
        try:
            variables = dict(convert.from_torch("sit", released_arguments(self.model), released.state_dict)[1])
        except ValueError as e:
            raise UserError(f"the weights do not fit config.model: {e}") from None
        variables = jax.tree.map(lambda v: np.asarray(v, np.float32), variables)
        return variables.pop("params"), variables

    def export(self, params: PyTree, frozen: PyTree) -> tuple[dict, dict]:
        arguments = released_arguments(self.model)
        buffers = {k: v for k, v in frozen.items() if k != "vae"}
        arrays = convert.to_torch("sit", arguments, {"params": params, **buffers})
        ours = {k: self.model[k] for k in ("levels", *OURS) if k in self.model}
        metadata = {"ddo_jax_config": json.dumps(arguments), "ddo_jax_flow": json.dumps(ours)}
        return arrays, {"ddo_jax_kind": "sit", **metadata}


def configure(config: Any, released: Any) -> None:
    """Set config.model and config.sampler to those of a released SiT: four channels are latents of Stable Diffusion.

    Raises:
      UserError: what our own metadata say is not JSON.
    """
    model = model_config(released.config)
    if ours := released.extras.get("metadata", {}).get("ddo_jax_flow"):
        try:
            model |= {k: v for k, v in json.loads(ours).items() if k == "levels" or k in OURS}
        except (ValueError, AttributeError):
            raise UserError("metadata ddo_jax_flow is not a JSON object; write the file again") from None
    elif model["img_channels"] == 4:
        model |= {"vae": SD_VAE, "sigma_data": 1.0}
    config.model = ConfigDict(model)
    config.sampler.update(solver="sde", num_steps=250)  # the published default for the best scores (section 3)


def make(config: Any) -> Family:
    """The family for `config.model` at `config.precision`.

    Raises:
      UserError: an argument the network or the family refuses.
    """
    model = config.model.to_dict()
    if model["arch"] != "SiT":
        raise UserError(f"config.model.arch: {model['arch']!r}; allowed for family sit: SiT")
    given = OURS | model
    for key, allowed in (("weight", flow.WEIGHTS), ("mle_time", TIMES), ("pair_time", TIMES)):
        if given[key] not in allowed:
            raise UserError(f"config.model.{key}: {given[key]!r}; allowed: {', '.join(allowed)}")
    try:
        module = networks.from_config(released_arguments(model), remat=config.remat)
    except (TypeError, ValueError) as e:
        raise UserError(f"config.model: {e}") from None
    if not 0 <= given["guidance_channels"] <= module.in_channels:
        raise UserError(
            f"config.model.guidance_channels: {given['guidance_channels']}; allowed: 0 to {module.in_channels}"
        )
    chosen = (given[key] for key in ("weight", "mle_time", "pair_time", "guidance_channels"))
    return SiTFamily(module, build_codec(model), model, config.precision, config.eval.dtype, *chosen)
