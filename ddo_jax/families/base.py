"""The one seam of the project: a family is a frozen record of pure functions.

Everything above it (fine-tuning, self-play, sampling, evaluation) never asks which family it has.
B is the batch, K = num_classes. Labels are int32 class ids; id == K means "no label".
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ddo_jax.errors import UserError

PyTree = Any
Examples = PyTree  # what `score` takes; every leaf has the batch as its first axis
Draws = PyTree  # all randomness of a paired evaluation

HALF = {"bfloat16": jnp.bfloat16, "float16": jnp.float16}  # the dtypes below float32 that a config may name

# config.sampler: how images are made, in rounds and for reports. A family refuses what is not its own.
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


def own_settings(sampler, own: dict, foreign: dict) -> dict:
    """The values of `own` keys of config.sampler.

    Raises:
      UserError: a `foreign` key is set, which this family's sampler would ignore.
    """
    given = dict(sampler)
    for key, default in foreign.items():
        if given.get(key, default) != default:
            raise UserError(
                f"config.sampler.{key}: {given[key]!r}; this model's sampler has no such setting, but {', '.join(own)}"
            )
    return {key: given[key] for key in own if key in given}


@dataclasses.dataclass(frozen=True)
class Family:
    """What self-play needs to know of a likelihood-based generator.

    Attributes:
      name: "edm", ...
      num_classes: K, 0 for unconditional models.
      image_shape: (H, W, C) of a decoded image.
      levels: grey levels of decoded images.
      record_shapes: shapes of record["image"] that `encode` takes, without the batch: pixels, raw latents, tokens.
      objectives: of a round's training: "ddo", "mle", and "cca" (wrong labels for fakes) where the family has it.
      compiler_options: of programs whose scores are compared, for `jax.jit`: in half precision XLA may otherwise keep
        more digits in one program than in another, and r is not 0 at the reference.
      own_guidance: its sampler guides itself, by a setting (VAR's cfg), and takes no second network.
      nfe: network evaluations of one sample under settings: settings -> int.
      passes: what a sample costs in forward passes of `score`, for estimates: settings -> int.
      init: key -> (params, frozen). frozen: the network's buffers: no gradient, optimizer or EMA.
      companions: () -> the rest of frozen: weights of other files that the config names (autoencoder, tokenizer).
      companion_shapes: () -> their shapes as far as training needs them, without the files.
      encode: (frozen, record, key) -> examples. record = {"image": uint8 (or float32 latents, int32 tokens) [B,...],
        "label": int32 [B]}; key: what is random in it (a posterior sample).
      augment: (examples, key) -> examples: random transforms of an MLE phase, the network being told; never DDO.
      decode: (frozen, examples) -> uint8 images [B,H,W,C], quantised like the data.
      store: (frozen, examples) -> the record kept in a pool (latents stay latents); `encode` reads it back.
      draw: (key, n, noise) -> draws, shared by target and reference, real and fake row i.
        noise = (P_mean, P_std), traced, for diffusion; tokens: whose label is dropped.
      version: None: every draw asks the reference anew, at the same noise as the target, inside the step. Or draws ->
        int32 [B] in {0, 1}: which of the two scores an example can have; then encoded examples are exact, the
        reference is asked outside the step, and what it said is kept.
      score: (params, frozen, examples, draws) -> s. Deterministic: dropout and augmentation off.
      ratio: (s, s_ref, examples, draws) -> r [B] float32 = log p_theta - log p_ref.
      nll: (s, examples, draws) -> -log p_theta [B], up to a constant: the divergence alarm while DDO runs.
      pair_loss: (objective, r [B,2], logp_real [B], labels [B,2], draws, alpha, beta) -> (loss, stats of
        `ddo.ddo_loss`); column 0 is real, 1 fake. logp_real = -nll, for losses that train some rows by MLE.
      mle_loss: (params, frozen, examples, draws, key) -> loss [B]; pretraining and control: as nll (or nll a token),
        but with dropout and augmentation as configured, drawn from key.
      decays: params -> tree of bools: what weight decay acts on.
      project: (params, objective) -> params: EDM2's forced weight normalisation, else the identity. objective
        "mle" or "ddo": only what it executes is projected. Never differentiated.
      latents: keys [B] -> the sampler's starting noise, one independent stream per image.
      guide: (params, frozen, labels) -> this network as the guide of another one, for `sample`.
      sample: (nets, frozen, labels, latents, noise, settings) -> examples. nets = (params, None) or (params,
        (guide, weight)), the weight traced; with own guidance (params, (None, weight)) where it is not the settings'.
        noise: one key an image [B], or the sampler's own normals [steps, B, ...] made elsewhere.
      settings: sampler config (mapping) -> hashable settings of `sample`.
      fake_settings: settings -> those of a round's fakes: the reference as it is, without guidance or filters.
      imported: released -> (params, frozen): a released checkpoint of this architecture.
      export: (params, frozen) -> ({name: array}, metadata): the weights under their released names.
    """

    name: str
    num_classes: int
    image_shape: tuple[int, int, int]
    levels: int
    record_shapes: tuple
    objectives: tuple[str, ...]
    compiler_options: dict
    own_guidance: bool
    nfe: Callable[[Any], int]
    passes: Callable[[Any], int]
    init: Callable[[jax.Array], tuple[PyTree, PyTree]]
    companions: Callable[[], dict]
    companion_shapes: Callable[[], dict]
    encode: Callable[[PyTree, PyTree, jax.Array], Examples]
    augment: Callable[[Examples, jax.Array], Examples]
    decode: Callable[[PyTree, Examples], jax.Array]
    store: Callable[[PyTree, Examples], PyTree]
    draw: Callable[[jax.Array, int, tuple], Draws]
    version: Callable[[Draws], jax.Array] | None
    score: Callable[[PyTree, PyTree, Examples, Draws], PyTree]
    ratio: Callable[[PyTree, PyTree, Examples, Draws], jax.Array]
    nll: Callable[[PyTree, Examples, Draws], jax.Array]
    pair_loss: Callable[..., tuple[jax.Array, dict]]
    mle_loss: Callable[[PyTree, PyTree, Examples, Draws, jax.Array], jax.Array]
    decays: Callable[[PyTree], PyTree]
    project: Callable[[PyTree, str], PyTree]
    latents: Callable[[jax.Array], jax.Array]
    guide: Callable[[PyTree, PyTree, jax.Array], Any]
    sample: Callable[..., Examples]
    settings: Callable[[Any], Any]
    fake_settings: Callable[[Any], Any]
    imported: Callable[[Any], tuple[PyTree, PyTree]]
    export: Callable[[PyTree, PyTree], tuple[dict, dict]]

    def record_dtype(self, shape: tuple[int, ...]) -> np.dtype:
        """Of record["image"]: pixels are uint8, tokens int32, latents float32."""
        if shape == self.image_shape:
            return np.dtype(np.uint8)
        return np.dtype(np.int32 if len(shape) == 1 else np.float32)
