"""The one seam of the project: a family is a frozen record of pure functions.

Everything above it (fine-tuning, self-play, sampling, evaluation) never asks which family it has.
B is the batch, K = num_classes. Labels are int32 class ids; id == K means "no label".
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

PyTree = Any
Examples = PyTree  # what `score` takes; every leaf has the batch as its first axis
Draws = PyTree  # all randomness of a paired evaluation


@dataclasses.dataclass(frozen=True)
class Family:
    """What self-play needs to know of a likelihood-based generator.

    Attributes:
      name: "edm", ...
      num_classes: K, 0 for unconditional models.
      image_shape: (H, W, C) of a decoded image.
      levels: grey levels of decoded images.
      record_shapes: shapes of record["image"] that `encode` takes, without the batch: pixels, or raw latents.
      nfe: network evaluations of one sample under settings: settings -> int.
      init: key -> (params, frozen). frozen: the network's buffers: no gradient, optimizer or EMA.
      companions: () -> the rest of frozen: weights of other files that the config names (autoencoder, tokenizer).
      encode: (frozen, record, key) -> examples. record = {"image": uint8 (or float32 latents) [B,...], "label":
        int32 [B]}; key: what is random in it (a posterior sample).
      augment: (examples, key) -> examples: random transforms of an MLE phase, the network being told; never DDO.
      decode: (frozen, examples) -> uint8 images [B,H,W,C], quantised like the data.
      store: (frozen, examples) -> the record kept in a pool (latents stay latents); `encode` reads it back.
      draw: (key, n, noise) -> draws, shared by target and reference, real and fake row i.
        noise = (P_mean, P_std), traced, for diffusion.
      score: (params, frozen, examples, draws) -> s. Deterministic: dropout and augmentation off.
      ratio: (s, s_ref, examples, draws) -> r [B] float32 = log p_theta - log p_ref.
      nll: (s, examples, draws) -> -log p_theta [B], up to a constant: the divergence alarm while DDO runs.
      mle_loss: (params, frozen, examples, draws, key) -> loss [B]; pretraining and control: as nll, but
        with dropout and augmentation as configured, drawn from key.
      project: (params, objective) -> params: EDM2's forced weight normalisation, else the identity. objective
        "mle" or "ddo": only what it executes is projected. Never differentiated.
      latents: keys [B] -> the sampler's starting noise, one independent stream per image.
      guide: (params, frozen, labels) -> this network as the guide of another one, for `sample`.
      sample: (nets, frozen, labels, latents, noise, settings) -> examples. nets = (params, None) or (params,
        (guide, weight)); noise: one key an image [B], or the sampler's own normals [steps, B, ...] made elsewhere.
      settings: sampler config (mapping) -> hashable settings of `sample`.
      imported: released -> (params, frozen): a released checkpoint of this architecture.
      export: (params, frozen) -> ({name: array}, metadata): the weights under their released names.
    """

    name: str
    num_classes: int
    image_shape: tuple[int, int, int]
    levels: int
    record_shapes: tuple
    nfe: Callable[[Any], int]
    init: Callable[[jax.Array], tuple[PyTree, PyTree]]
    companions: Callable[[], dict]
    encode: Callable[[PyTree, PyTree, jax.Array], Examples]
    augment: Callable[[Examples, jax.Array], Examples]
    decode: Callable[[PyTree, Examples], jax.Array]
    store: Callable[[PyTree, Examples], PyTree]
    draw: Callable[[jax.Array, int, tuple], Draws]
    score: Callable[[PyTree, PyTree, Examples, Draws], PyTree]
    ratio: Callable[[PyTree, PyTree, Examples, Draws], jax.Array]
    nll: Callable[[PyTree, Examples, Draws], jax.Array]
    mle_loss: Callable[[PyTree, PyTree, Examples, Draws, jax.Array], jax.Array]
    project: Callable[[PyTree, str], PyTree]
    latents: Callable[[jax.Array], jax.Array]
    guide: Callable[[PyTree, PyTree, jax.Array], Any]
    sample: Callable[..., Examples]
    settings: Callable[[Any], Any]
    imported: Callable[[Any], tuple[PyTree, PyTree]]
    export: Callable[[PyTree, PyTree], tuple[dict, dict]]
