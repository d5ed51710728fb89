"""Family `var`: next-scale autoregression over the tokens of a VQ-VAE (specs/var.md sections 7 to 9).

examples = {"tokens": int32 [B,L], "label": int32 [B]}, after sampling also "f_hat", the map that they decode to;
draws = {"dropped": bool [B]}: rows that are scored, and trained, without their label. s = logp [B], the exact
log-likelihood, summed over all L tokens.
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
from ddo_jax.convert import vqvae
from ddo_jax.core import ar
from ddo_jax.errors import UserError
from ddo_jax.families.base import (
    HALF,
    VAR_SAMPLER,
    Draws,
    Examples,
    Family,
    Guidance,
    PyTree,
    Records,
    Side,
    Spec,
    own_settings,
)
from ddo_jax.families.codecs import in_parts, to_unit
from ddo_jax.models import var as networks
from ddo_jax.models.vqvae import VQVAE

TOKENIZER = "var-vae"  # of the released networks
# What config.model holds beside the arguments of the transformer; label_dim is its num_classes.
OURS = ("arch", "img_resolution", "img_channels", "label_dim", "sigma_data", "levels", "vae", "cond_drop_rate")
TOGETHER = 8  # images a device in the tokenizer: its activations at 256 x 256 are 42 MB each
OF_ROUNDS = ("dropped_row_loss", "reencode", "fakes_cfg", "cond_drop_rate")
CONFIG_KEYS = frozenset({"dtype", *(f"ddo.{key}" for key in OF_ROUNDS), *(f"sampler.{key}" for key in VAR_SAMPLER)})
MOST_CFG = 1e4  # in float32 the logits, some hundreds, times it are still numbers


class VARSettings(NamedTuple):
    """Of `sample`: as `models.var.SampleSettings`; reencode: tokens of the decoded pixels take the place of its own;
    scales: of the network, which cost one evaluation each, guided two."""

    cfg: float = 0.0
    top_k: int = 0
    top_p: float = 0.0
    more_smooth: bool = False
    reencode: bool = False
    scales: int = 1

    @property
    def solver(self) -> str:
        return "var"

    @property
    def nfe(self) -> int:
        return self.scales * (2 if self.cfg else 1)

    def record(self) -> dict:
        return {"solver": self.solver, **{k: v for k, v in self._asdict().items() if k != "scales"}}


def released_arguments(model: Any) -> dict:
    """config.model -> the arguments of the transformer."""
    return {**{k: v for k, v in model.items() if k not in OURS}, "num_classes": model["label_dim"]}


@functools.lru_cache(maxsize=8)
def tokenizer_module(vae: str, transformer: networks.VAR) -> VQVAE:
    """The module of config.model.vae; while the file is not at hand (`companions` refuses that) the released one's."""
    try:
        return vqvae.load(vae, transformer.patch_nums)[0]
    except UserError:
        t = transformer
        return VQVAE(patch_nums=t.patch_nums, vocab_size=t.vocab_size, z_channels=t.z_channels)


@dataclasses.dataclass(frozen=True)
class VARFamily(Family):
    """What one network of the family is.

    Attributes:
      module: VAR, with the dtype of its matrix products in training. model: the config.model it was built from.
      precision: of float32 matrix products and convolutions. sampling: dtype of the transformer when sampling.
      dropped_row_loss: see `core.ar.var_ddo_loss`. reencode: fakes are tokens of their decoded pixels. fakes_cfg: their
      guidance. pair_drop_rate: of labels in pairs; in MLE phases it is the model's cond_drop_rate.
    """

    module: networks.VAR
    model: dict = dataclasses.field(hash=False)
    precision: str
    sampling: str
    dropped_row_loss: str
    reencode: bool
    fakes_cfg: float = 0.0
    pair_drop_rate: float = 0.1

    @functools.cached_property
    def spec(self) -> Spec:
        side = self.model["img_resolution"]
        image = (side, side, self.model["img_channels"])
        tokens = Records("tokens", (self.module.length,))
        return Spec(
            name="var",
            num_classes=self.module.num_classes,
            image_shape=image,
            levels=self.model["levels"],
            data=(Records("pixels", image), tokens),
            stored=tokens,
            guidance=Guidance("own", 0.0, "cfg", "t = cfg s / (S - 1) at scale s; 0 is none"),
            exact=True,
            config_keys=CONFIG_KEYS,
        )

    @property
    def objectives(self) -> tuple[str, ...]:
        return ("ddo", "mle", "cca")

    @property
    def compiler_options(self) -> dict:
        return {} if self.module.dtype is None else {"xla_allow_excess_precision": False}

    # -- the tokenizer ---------------------------------------------------------------------------------------

    def companions(self) -> dict:
        """{"vqvae": parameters}; checks that the file fits the transformer.

        Raises:
          UserError: see `vqvae.load`; or another codebook or size of images.
        """
        try:
            module, variables = vqvae.load(self.model["vae"], self.module.patch_nums)
        except UserError as e:
            raise UserError(f"config.model.vae: {e}") from None
        wanted = (
            self.module.vocab_size,
            self.module.z_channels,
            *(self.model[f"img_{k}"] for k in ("resolution", "channels")),
        )
        made = (module.vocab_size, module.z_channels, module.image_size, module.in_channels)
        if made != wanted:
            raise UserError(
                f"config.model.vae: {self.model['vae']} has vocab_size, z_channels, img_resolution, img_channels "
                f"{made}; allowed: {wanted}, as config.model says"
            )
        return {"vqvae": variables["params"]}

    def companion_shapes(self) -> dict:
        """Of `companions`; without its file those of the released tokenizer: a plan needs no file."""
        module = tokenizer_module(self.model["vae"], self.module)
        x = jax.ShapeDtypeStruct((1, module.image_size, module.image_size, module.in_channels), np.float32)
        return {"vqvae": jax.eval_shape(module.init, jax.random.key(0), x)["params"]}

    def tokenizer(self, frozen: PyTree, *args: Any, method: str) -> Any:
        """A method of the VQ-VAE, in float32 at `precision`."""
        module = tokenizer_module(self.model["vae"], self.module)
        with jax.default_matmul_precision(self.precision):
            return module.apply({"params": frozen["vqvae"]}, *args, method=method)

    def tokens_of(self, frozen: PyTree, pixels: jax.Array) -> jax.Array:
        """Tokens [B,L] of float pixels [B,H,W,C] in [-1, 1]."""
        return in_parts(lambda x: self.tokenizer(frozen, x, method="tokens"), pixels, TOGETHER * jax.device_count())

    def pixels_of(self, frozen: PyTree, examples: Examples) -> jax.Array:
        """Decoded images [B,H,W,C] in [-1, 1]."""
        f_hat = examples.get("f_hat")
        if f_hat is None:
            f_hat = self.tokenizer(frozen, examples["tokens"], method="f_hat")
        return in_parts(lambda f: self.tokenizer(frozen, f, method="decode"), f_hat, TOGETHER * jax.device_count())

    def round_trip(self, frozen: PyTree, examples: Examples) -> jax.Array:
        """Tokens of decoded pixels: what data have passed through, fakes must have, too (specs/ddo.md section 10)."""
        return self.tokens_of(frozen, self.pixels_of(frozen, examples))

    # -- the seam (families/base.py) -------------------------------------------------------------------------

    def init(self, key: jax.Array) -> tuple[PyTree, PyTree]:
        maps = jnp.zeros((1, self.module.length - self.module.spans[0][1], self.module.z_channels))
        return self.module.init(key, jnp.zeros((1,), jnp.int32), maps)["params"], {}

    def encode(self, frozen: PyTree, record: dict, key: jax.Array) -> Examples:
        tokens = record["image"]
        if tokens.ndim == 4:
            tokens = self.tokens_of(frozen, to_unit(tokens, self.model["levels"]))
        return {"tokens": tokens.astype(jnp.int32), "label": record["label"]}

    def decode(self, frozen: PyTree, examples: Examples) -> jax.Array:
        """uint8; truncated at 256 levels, as released (with few levels that would darken: rounded)."""
        levels = self.model["levels"]
        half = 0.0 if levels == 256 else 0.5
        return ((levels - 1) * (self.pixels_of(frozen, examples) + 1) / 2 + half).astype(jnp.uint8)

    def store(self, frozen: PyTree, examples: Examples) -> dict:
        return {"image": examples["tokens"], "label": examples["label"]}

    def draw(self, key: jax.Array, n: int, sigma_law: tuple) -> Draws:
        return {"dropped": jax.random.bernoulli(key, self.model["cond_drop_rate"], (n,))}

    def pair_draw(self, key: jax.Array, n: int, sigma_law: tuple) -> Draws:
        return {"dropped": jax.random.bernoulli(key, self.pair_drop_rate, (n,))}

    def version(self, draws: Draws) -> jax.Array:
        return draws["dropped"].astype(jnp.int32)

    def score(self, params: PyTree, frozen: PyTree, examples: Examples, draws: Draws, **kwargs: Any) -> PyTree:
        """log p [B] of the tokens given the label, or given none where it is dropped."""
        maps = self.tokenizer(frozen, examples["tokens"], method="var_input")
        labels = jnp.where(draws["dropped"], self.module.num_classes, examples["label"])
        with jax.default_matmul_precision(self.precision):
            logits: Any = self.module.apply({"params": params}, labels, maps, **kwargs)
        return ar.ar_logp(logits, examples["tokens"])

    def ratio(self, s: PyTree, s_ref: PyTree, examples: Examples, draws: Draws) -> jax.Array:
        return s - s_ref

    def nll(self, s: PyTree, examples: Examples, draws: Draws) -> jax.Array:
        return -s

    def pair_loss(self, objective: str, real: Side, fake: Side, alpha: Any, beta: Any) -> tuple[jax.Array, dict]:
        dropped = real.draws["dropped"]
        if objective == "cca":
            return ar.cca_loss(real.r, fake.r, dropped | (real.label == fake.label), lam=alpha, beta=beta)
        return ar.var_ddo_loss(
            real.r,
            fake.r,
            -real.s / self.module.length,
            dropped,
            dropped_fake=fake.draws["dropped"],
            alpha=alpha,
            beta=beta,
            dropped_row_loss=self.dropped_row_loss,
        )

    def pair_stats(self, real: Side, fake: Side) -> dict:
        """Gaps of the rows without label, which are scored as the unconditional model; cross-entropies of target and
        reference in nats a token."""
        stats = {}
        for name, side in (("real", real), ("fake", fake)):
            dropped, rows = side.draws["dropped"].astype(jnp.float32), jnp.asarray(len(side.r), jnp.float32)
            stats[f"r_{name}_dropped"] = (jnp.sum(dropped * side.r), jnp.sum(dropped))
            for kind, logp in (("ce", side.s), ("ce_ref", side.s - side.r)):
                stats[f"{kind}_{name}"] = (-jnp.sum(logp) / self.module.length, rows)
        return stats

    def mle_loss(self, params: PyTree, frozen: PyTree, examples: Examples, draws: Draws, key: jax.Array) -> jax.Array:
        """Cross-entropy a token: its mean over the L tokens, as the base model was trained (section 4.5)."""
        logp = self.score(params, frozen, examples, draws, train=True, rngs={"dropout": key})
        return -logp / self.module.length

    def decays(self, params: PyTree) -> PyTree:
        return networks.decay_mask(params)

    def sample(
        self, nets: tuple, frozen: PyTree, labels: jax.Array, latents: Any, noise: Any, settings: Any
    ) -> Examples:
        params, guide = nets
        how = networks.SampleSettings(*settings[:4])
        if guide is not None:
            how = how._replace(cfg=guide[1])
        module = self.module.clone(dtype=HALF.get(self.sampling))
        codes = jnp.arange(self.module.vocab_size)
        codebook = self.tokenizer(frozen, codes, method="embed")

        def accumulate(s: PyTree, h: jax.Array, f_hat: jax.Array) -> Any:
            return self.tokenizer(frozen, s, h, f_hat, method="step")

        with jax.default_matmul_precision(self.precision):
            tokens, f_hat = networks.sample_tokens(module, {"params": params}, labels, noise, how, codebook, accumulate)
        examples = {"tokens": tokens, "f_hat": f_hat, "label": labels}
        if not settings.reencode:
            return examples
        return {"tokens": self.round_trip(frozen, examples), "label": labels}

    def settings(self, sampler: Any) -> Any:
        """config.sampler -> VARSettings.

        Raises:
          UserError: what cannot be sampled with.
        """
        settings = VARSettings(**own_settings(sampler, VAR_SAMPLER), scales=len(self.module.patch_nums))
        if not 0 <= settings.cfg <= MOST_CFG:
            raise UserError(f"config.sampler.cfg: {settings.cfg}; allowed: 0 (no guidance) to {MOST_CFG:g}")
        if settings.top_k < 0 or not 0 <= settings.top_p <= 1:
            given = f"top_k {settings.top_k}, top_p {settings.top_p}"
            raise UserError(f"config.sampler: {given}; allowed: top_k from 0 on, top_p in [0, 1]")
        return settings

    def fake_settings(self, settings: Any) -> Any:
        return VARSettings(cfg=self.fakes_cfg, reencode=self.reencode, scales=settings.scales)

    def imported(self, released: Any) -> tuple[PyTree, PyTree]:
        if released.kind != "var":
            raise UserError(f"weights of kind {released.kind}; config.family is 'var'")
        try:
            variables = convert.from_torch("var", released_arguments(self.model), released.state_dict)[1]
        except ValueError as e:
            raise UserError(f"the weights do not fit config.model: {e}") from None
        return jax.tree.map(lambda v: np.asarray(v, np.float32), variables["params"]), {}

    def export(self, params: PyTree, frozen: PyTree) -> tuple[dict, dict]:
        arguments = released_arguments(self.model)
        ours = {k: self.model[k] for k in OURS if k in self.model}
        metadata = {"ddo_jax_config": json.dumps(arguments), "ddo_jax_tokenizer": json.dumps(ours)}
        return convert.to_torch("var", arguments, {"params": params}), {"ddo_jax_kind": "var", **metadata}

    def passes(self, settings: Any) -> int:
        return 2 if settings.cfg else 1  # cached: all scales together are one pass over L tokens


def configure(config: Any, released: Any) -> None:
    """Set config.model and config.sampler to those of a released VAR: the released tokenizer, no guidance, no filters.

    Raises:
      UserError: what our own metadata say of the tokenizer is not JSON.
    """
    given: dict[str, Any] = {k: v for k, v in released.config.items() if k != "num_classes"}
    given["patch_nums"] = tuple(given["patch_nums"])
    side = 16 * given["patch_nums"][-1]
    model = {"arch": "VAR", "img_resolution": side, "img_channels": 3, "levels": 256, "sigma_data": 0.5}
    model |= {"label_dim": released.config["num_classes"], "vae": TOKENIZER, "cond_drop_rate": 0.1}
    if ours := released.extras.get("metadata", {}).get("ddo_jax_tokenizer"):
        try:
            model |= {k: v for k, v in json.loads(ours).items() if k in OURS}
        except (ValueError, AttributeError):
            raise UserError("metadata ddo_jax_tokenizer is not a JSON object; write the file again") from None
    config.model = ConfigDict(model | given)
    config.sampler.update(VAR_SAMPLER)


def make(config: Any) -> Family:
    """The family for `config.model`.

    Raises:
      UserError: an argument the network refuses.
    """
    model = config.model.to_dict()
    if model["arch"] != "VAR":
        raise UserError(f"config.model.arch: {model['arch']!r}; allowed for family var: VAR")
    model = {"vae": TOKENIZER, "cond_drop_rate": 0.1, **model}
    ddo, rate = config.ddo, model["cond_drop_rate"]
    pair_rate = rate if ddo.cond_drop_rate is None else ddo.cond_drop_rate
    for key, value in (("model", rate), ("ddo", pair_rate)):
        if not 0 <= value < 1:
            raise UserError(f"config.{key}.cond_drop_rate: {value}; allowed: 0 to below 1")
    if not 0 <= ddo.fakes_cfg <= MOST_CFG:
        raise UserError(f"config.ddo.fakes_cfg: {ddo.fakes_cfg}; allowed: 0 (no guidance) to {MOST_CFG:g}")
    try:
        module = networks.from_config(released_arguments(model), HALF.get(config.dtype), config.remat)
    except (TypeError, ValueError) as e:
        raise UserError(f"config.model: {e}") from None
    how = (config.precision, config.eval.dtype, ddo.dropped_row_loss, ddo.reencode, float(ddo.fakes_cfg), pair_rate)
    return VARFamily(module, model, *how)
