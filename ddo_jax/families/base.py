"""The one seam of the project: a family is an object of pure functions, frozen and hashable.

Everything above it (fine-tuning, self-play, sampling, evaluation) never asks which family it has. A subclass of
`Family` writes the abstract methods and overrides those defaults that are not its own; tests/families/toy.py is one in
40 lines, tests/families/test_contract.py is what all of them must keep. B is the batch, K = num_classes. Labels are
int32 class ids; id == K means "no label".
"""

import abc
import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ddo_jax.convert import safetensors
from ddo_jax.core import ddo
from ddo_jax.errors import UserError

PyTree = Any
Examples = PyTree  # what `score` takes; every leaf has the batch as its first axis
Draws = PyTree  # all randomness of a paired evaluation

HALF = {"bfloat16": jnp.bfloat16, "float16": jnp.float16}  # the dtypes below float32 that a config may name

# config.sampler: how images are made, in rounds and for reports. A family refuses what is not its own.
PHASES = ("pretrain", "adapt", "ddo", "control")  # sections of a config that train
DIFFUSION_SAMPLER = dict(
    solver="heun",  # heun | dpmv3; `rho` and `s_...` are Heun's
    num_steps=18,
    sigma_min=0.002,
    sigma_max=80.0,
    rho=7.0,
    s_churn=0.0,
    s_min=0.0,
    s_max=1e30,  # "no limit"; JSON has no infinity
    s_noise=1.0,
)
VAR_SAMPLER = dict(
    cfg=0.0,  # guidance: t = cfg s / (S - 1) at scale s, so 0 and not 1 is without. Never of the fakes
    top_k=0,  # keep the k likeliest codes; 0: all. Never of the fakes
    top_p=0.0,  # keep the likeliest of this total probability; 0: all. Never of the fakes
    more_smooth=False,  # soft codes: for pictures to look at, never for FID
)
SAMPLER = DIFFUSION_SAMPLER | VAR_SAMPLER


def own_settings(sampler: Any, own: Any) -> dict:
    """The values of the keys `own` of config.sampler, as far as they are given.

    Raises:
      UserError: another key is set to what is not its default: this family's sampler would ignore it.
    """
    given = dict(sampler)
    for key in given.keys() - set(own):
        if given[key] != SAMPLER.get(key):
            raise UserError(
                f"config.sampler.{key}: {given[key]!r}; this model's sampler has no such setting, but {', '.join(own)}"
            )
    return {key: given[key] for key in own if key in given}


@dataclasses.dataclass(frozen=True)
class Records:
    """What record["image"] may be: "pixels" (uint8), "latents" (float32) or "tokens" (int32), of a shape without B."""

    kind: str
    shape: tuple[int, ...]

    @property
    def dtype(self) -> np.dtype:
        return np.dtype({"pixels": np.uint8, "latents": np.float32, "tokens": np.int32}[self.kind])

    @property
    def nbytes(self) -> int:
        """Of one record."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class Guidance:
    """How samples can be guided: "network" (by a second one), "own" (by a setting of the sampler) or "none".

    Attributes:
      neutral: the strength that changes nothing. setting: of "own", its key in config.sampler. rule: in words.
    """

    kind: str = "none"
    neutral: float = 1.0
    setting: str = ""
    rule: str = ""


@dataclasses.dataclass(frozen=True)
class Spec:
    """The facts about a family.

    Attributes:
      name: as in config.family. num_classes: K, 0 for unconditional models. image_shape: (H, W, C), decoded.
      levels: grey levels of decoded images.
      data: what the data may hold, pixels first, what training reads fastest last. stored: what a pool keeps.
      guidance: see there. exact: its scores are likelihoods without noise: what the reference said of an example is
        kept, and asked outside the step (see `Family.version`).
      config_keys: dotted keys of the config that it reads beside config.model and those that every run has; a key that
        only some families have, and this one does not claim, is refused.
    """

    name: str
    num_classes: int
    image_shape: tuple[int, int, int]
    levels: int
    data: tuple[Records, ...]
    stored: Records
    guidance: Guidance = Guidance()
    exact: bool = False
    config_keys: frozenset[str] = frozenset()

    @property
    def works_on_pixels(self) -> bool:
        """Whether there is no autoencoder or tokenizer between images and network."""
        return self.stored.kind == "pixels"

    def kind(self, shape: tuple[int, ...]) -> str | None:
        """Of data with such records; None if the family does not take them."""
        return next((r.kind for r in self.data if r.shape == tuple(shape)), None)


class Side(NamedTuple):
    """The real or the fake examples of a batch, n of them, after both networks.

    Attributes:
      r: log-ratio [n], nats. s: the target's score, as `Family.score` gives it. label: int32 [n]. draws: see there.
    """

    r: jax.Array
    s: PyTree
    label: jax.Array
    draws: Draws


class Family(abc.ABC):
    """A likelihood-based generator."""

    # -- facts ------------------------------------------------------------------------------------------------

    @property
    @abc.abstractmethod
    def spec(self) -> Spec:
        """See `Spec`."""

    @property
    def objectives(self) -> tuple[str, ...]:
        """What a round can train by: "ddo", "mle", and "cca" (wrong labels for fakes) where `pair_loss` has it."""
        return ("ddo", "mle")

    @property
    def compiler_options(self) -> dict:
        """Of programs whose scores are compared, for `jax.jit`: in half precision XLA may otherwise keep more digits in
        one program than in another, and r is not 0 at the reference."""
        return {}

    # -- parameters -------------------------------------------------------------------------------------------

    @abc.abstractmethod
    def init(self, key: jax.Array) -> tuple[PyTree, PyTree]:
        """(params, frozen). frozen: the network's buffers: no gradient, optimizer or EMA."""

    def companions(self) -> dict:
        """The rest of frozen: weights of other files that the config names (autoencoder, tokenizer)."""
        return {}

    def companion_shapes(self) -> dict:
        """Their shapes as far as training needs them, without the files."""
        return {}

    def project(self, params: PyTree, objective: str) -> PyTree:
        """What is executed in place of params: EDM2's forced weight normalisation, else the identity. Never
        differentiated. objective: "mle" or "ddo"; only what it executes is projected."""
        return params

    def decays(self, params: PyTree) -> PyTree:
        """Tree of bools: what weight decay acts on."""
        return jax.tree.map(lambda v: v.ndim > 1, params)

    # -- examples ---------------------------------------------------------------------------------------------

    @abc.abstractmethod
    def encode(self, frozen: PyTree, record: dict, key: jax.Array) -> Examples:
        """record = {"image": one of `Spec.data` or what `store` made [B,...], "label": int32 [B]} -> examples.

        key: what is random in it (a sample of a posterior).
        """

    @abc.abstractmethod
    def decode(self, frozen: PyTree, examples: Examples) -> jax.Array:
        """uint8 images [B,H,W,C], quantised like the data."""

    @abc.abstractmethod
    def store(self, frozen: PyTree, examples: Examples) -> dict:
        """The record kept in a pool (latents stay latents); `encode` reads it back."""

    def augment(self, examples: Examples, key: jax.Array) -> Examples:
        """Random transforms of an MLE phase, the network being told; never DDO."""
        return examples

    # -- likelihood -------------------------------------------------------------------------------------------

    @abc.abstractmethod
    def draw(self, key: jax.Array, n: int, sigma_law: tuple) -> Draws:
        """All randomness of n paired evaluations, shared by target and reference, real and fake row i.

        sigma_law = (P_mean, P_std), traced, of diffusion; tokens draw whose label is dropped.
        """

    def pair_draw(self, key: jax.Array, n: int, sigma_law: tuple) -> Draws:
        """`draw` for the pairs of real and fake examples, where that differs from MLE."""
        return self.draw(key, n, sigma_law)

    def version(self, draws: Draws) -> jax.Array:
        """int32 [B] in {0, 1}: which of its two scores (with and without label) an example has; of exact families."""
        return jnp.zeros(jax.tree.leaves(draws)[0].shape[0], jnp.int32)

    @abc.abstractmethod
    def score(self, params: PyTree, frozen: PyTree, examples: Examples, draws: Draws) -> PyTree:
        """F [B,...] of diffusion, logp [B] of exact families. Deterministic: dropout and augmentation off."""

    @abc.abstractmethod
    def ratio(self, s: PyTree, s_ref: PyTree, examples: Examples, draws: Draws) -> jax.Array:
        """r [B] float32 = log p_theta - log p_ref."""

    @abc.abstractmethod
    def nll(self, s: PyTree, examples: Examples, draws: Draws) -> jax.Array:
        """-log p_theta [B], up to a constant: the divergence alarm while DDO runs."""

    @abc.abstractmethod
    def mle_loss(self, params: PyTree, frozen: PyTree, examples: Examples, draws: Draws, key: jax.Array) -> jax.Array:
        """loss [B] of pretraining and control: as nll (or nll a token), but with dropout and augmentation as
        configured, drawn from key."""

    def pair_loss(self, objective: str, real: Side, fake: Side, alpha: Any, beta: Any) -> tuple[jax.Array, dict]:
        """(loss, stats of `ddo.ddo_loss`) of a batch. objective: of `objectives`."""
        return ddo.ddo_loss(real.r, fake.r, alpha=alpha, beta=beta)

    def pair_stats(self, real: Side, fake: Side) -> dict:
        """More to log of a batch: {name: (sum, count)}; no gradient flows through."""
        return {}

    # -- samples ----------------------------------------------------------------------------------------------

    @abc.abstractmethod
    def settings(self, sampler: Any) -> Any:
        """config.sampler (mapping) -> hashable settings of `sample`, with `.nfe` (network evaluations of one sample),
        `.solver` and `.record()` (a dict, for protocols).

        Raises:
          UserError: what cannot be sampled with.
        """

    def fake_settings(self, settings: Any) -> Any:
        """Those of a round's fakes: the reference as it is, without guidance (but where the family's own config says
        otherwise) and without filters."""
        return settings

    def passes(self, settings: Any) -> int:
        """What a sample costs in forward passes of `score`, for estimates."""
        return settings.nfe

    def strength(self, settings: Any) -> float:
        """Of the family's own guidance under these settings; neutral where it has none."""
        g = self.spec.guidance
        return getattr(settings, g.setting) if g.kind == "own" else g.neutral

    def latents(self, keys: jax.Array) -> jax.Array:
        """Starting noise [B,...] of the sampler, one independent stream an image; [B,0] where there is none."""
        return jnp.zeros((len(keys), 0))

    @abc.abstractmethod
    def sample(
        self, nets: tuple, frozen: PyTree, labels: jax.Array, latents: Any, noise: Any, settings: Any
    ) -> Examples:
        """Examples of labels [B].

        nets = (params, None), or (params, (guide, weight)) with the weight traced; with own guidance (params, (None,
        weight)) where it is not the settings'. noise: one key an image [B], or the sampler's own normals
        [steps, B, ...] made elsewhere. settings: of `settings`.
        """

    def guide(self, params: PyTree, frozen: PyTree, labels: jax.Array) -> Any:
        """This network as the guide of another one, for `sample`.

        Raises:
          UserError: it cannot be one.
        """
        raise UserError(f"a network of family {self.spec.name} is no guide of another one")

    # -- files ------------------------------------------------------------------------------------------------

    def imported(self, released: Any) -> tuple[PyTree, PyTree]:
        """(params, frozen) of a released checkpoint of this architecture (`ddo_jax.convert.read`).

        Raises:
          UserError: of another one.
        """
        raise UserError(f"weights of kind {released.kind}: family {self.spec.name} reads no files of others")

    def export(self, params: PyTree, frozen: PyTree) -> tuple[dict, dict]:
        """({name: array}, metadata): the weights under their released names."""
        return safetensors.flatten(params), {"ddo_jax_kind": self.spec.name}
