"""Generate and score: one sampler for pools, evaluations, pictures and the `sample` command.

An image is a function of (parameters, settings, its seed, its label): it has its own key, and the program
always runs at one fixed, padded micro-batch, so neither the request's size nor a restart changes it.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ddo_jax import sharding
from ddo_jax.core import frechet
from ddo_jax.data.labels import balanced_labels
from ddo_jax.errors import UserError
from ddo_jax.evaluate.features import FeatureNet

Sampler = Callable[..., Iterator[dict[str, np.ndarray]]]


class NotFinite(UserError):
    """A sample that is not a number: nothing is made of it, for as uint8 it would look like an image."""


def finite_rows(examples) -> jax.Array:
    """bool [B]: whether all floating numbers of an example are finite; every leaf has the batch first."""
    leaves = [x for x in jax.tree.leaves(examples) if jnp.issubdtype(x.dtype, jnp.floating)]
    rows = [jnp.all(jnp.isfinite(x), axis=tuple(range(1, x.ndim))) for x in leaves]
    return functools.reduce(jnp.logical_and, rows) if rows else jnp.ones(len(jax.tree.leaves(examples)[0]), bool)


def check_finite(finite: np.ndarray, seeds: np.ndarray, labels: np.ndarray) -> None:
    """Stop before an image is made of a sample that is none.

    Raises:
      NotFinite: names the first such seed.
    """
    bad = np.flatnonzero(~finite)
    if len(bad):
        i = bad[0]
        raise NotFinite(
            f"seed {seeds[i]}, label {labels[i]}: the sample is not finite ({len(bad)} of {len(finite)} images of this "
            "batch); nothing was written of them: check the sampler's settings and guidance, the dtype, the weights"
        )


class Guide(NamedTuple):
    """A second network that guides the first: D_guide + weight (D - D_guide).

    Attributes:
      family, params, frozen: of it, as `ddo_jax.load` gives them. weight: 1 switches it off.
    """

    family: Any
    params: Any
    frozen: Any
    weight: float


def make_sampler(family, settings, mesh, batch: int, streams=None, *, guide: Guide | None = None, output="images"):
    """The sampler of a run.

    Args:
      family: Family. settings: of `family.settings`. mesh: of `sharding.make_mesh`.
      batch: images per program run, over all devices.
      streams: None for JAX's own streams, or seeds -> (latents [n,H,W,C], normals [steps,n,H,W,C]) on the
        host, both float32 (`sample --rng=torch-cpu`).
      guide: a second network, or None.
      output: "images" to look at and to score; "records" to train on (`family.store`: latents stay latents).

    Returns:
      sampler(params, frozen, seeds [N], labels [N], weight=None) -> iterator of records {"image": uint8 (or float32
      latents) [n, ...], "label": int32 [n]} on the host, n <= batch, in order; `params` placed on the mesh. weight: of
      the guidance, in place of the guide's or the settings' own; all but "none" share one program. It raises
      NotFinite before it yields a batch with a sample that is not finite.
    """
    spread = sharding.batch_sharding(mesh)

    def program(params, frozen, second, labels, latents, noise):
        other = second
        if second is not None and guide is not None:
            other = (guide.family.guide(*second[0], labels), second[1])
        with sharding.rows_over(mesh):
            examples = family.sample((params, other), frozen, labels, latents, noise, settings)
        finite = finite_rows(examples)
        if output == "records":
            return family.store(frozen, examples), finite
        return {"image": family.decode(frozen, examples), "label": labels}, finite

    @jax.jit
    def seeded(params, frozen, second, seeds, labels):
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), seeds)
        latents = jax.lax.with_sharding_constraint(family.latents(keys), spread)
        return program(params, frozen, second, labels, latents, keys)

    @jax.jit
    def streamed(params, frozen, second, labels, latents, noise):  # noise [n, steps, ...]: the batch comes first
        return program(params, frozen, second, labels, latents, jnp.swapaxes(noise, 0, 1))

    def sampler(params, frozen, seeds, labels, weight=None):
        weights = _guidance(family, settings, guide, weight)
        seeds, labels = np.asarray(seeds, np.uint32), np.asarray(labels, np.int32)
        rows = sharding.own_rows(batch)
        for i in range(0, len(seeds), batch):
            n = min(batch, len(seeds) - i)
            s, y = (np.resize(x[i : i + n], batch)[rows] for x in (seeds, labels))
            if streams is None:
                record, finite = seeded(params, frozen, weights, *sharding.put_batch(mesh, (s, y)))
            else:
                latents, normals = streams(s)
                given = sharding.put_batch(mesh, (y, latents, np.swapaxes(normals, 0, 1)))
                record, finite = streamed(params, frozen, weights, *given)
            check_finite(sharding.to_host(finite)[:n], seeds[i:], labels[i:])
            yield {k: sharding.to_host(v)[:n] for k, v in record.items()}

    return sampler


def _guidance(family, settings, guide: Guide | None, weight: float | None):
    """(the guide's variables or None, weight), both traced; None where nothing, or the settings' own, guides."""
    if guide is not None:
        weight = guide.weight if weight is None else weight
        return None if weight == 1 else ((guide.params, guide.frozen), np.float32(weight))
    own = family.own_guidance and settings.cfg and weight is not None
    return (None, np.float32(weight)) if own else None


def reference(features: FeatureNet, images, batch: int = 4096) -> dict:
    """Moments of real images: {"mu", "root", "sigma"} float64; the root makes every later distance cheap.

    Args:
      features: the feature network. images: uint8 [N, H, W, C], or a source, read in parts. batch: of a part.
    """
    moments = None
    for i in range(0, len(images), batch):
        rows = slice(i, min(i + batch, len(images)))
        real = images.read(np.arange(rows.start, rows.stop))["image"] if hasattr(images, "read") else images[rows]
        part = frechet.moments_of(features.apply(real)["features"])
        moments = part if moments is None else frechet.merge(moments, part)
    mu, sigma = frechet.finalize(moments)
    return {"mu": mu, "sigma": sigma, "root": frechet.sqrt_psd(sigma)}


def score(
    features: FeatureNet, references: dict[str, dict], batches: Iterator[dict], keep: int = 0
) -> tuple[dict, np.ndarray]:
    """Fréchet distance of generated images to every reference, and their class accuracy.

    Args:
      features: the feature network. references: {name: of `reference`}.
      batches: records {"image": uint8, "label"}; streamed, never held at once. keep: see below.

    Returns:
      ({metric ("fd_x100"): distance to the first reference, metric_NAME: to the others, "accuracy": share of
      images that the network puts into their own class (if it is a classifier)}, the first `keep` images).
    """
    moments, right, n, kept = None, 0, 0, []
    for record in batches:
        kept.append(record["image"][: max(keep - n, 0)])
        vectors = features.apply(record["image"])
        part = frechet.moments_of(vectors["features"])
        moments = part if moments is None else frechet.merge(moments, part)
        n += len(record["image"])
        if "class_logits" in vectors:
            right += int(np.sum(np.argmax(vectors["class_logits"], 1) == record["label"]))
    mu, sigma = frechet.finalize(moments)
    result = {}
    for name, ref in references.items():
        distance = frechet.frechet_distance(ref["mu"], ref["sigma"], mu, sigma, root1=ref["root"])
        result[features.named(n) + (f"_{name}" if result else "")] = features.scale * distance
    if "class_logits" in vectors:
        result["accuracy"] = right / n
    return result, np.concatenate(kept)


def some_images(source, limit: int = 10_000) -> np.ndarray:
    """All images of a source, or `limit` of them, evenly spread (the classes may lie one after the other); never more
    than 2^27 values, which are compared in float64."""
    limit = min(limit, max(1, 2**27 // int(np.prod(source.image_shape))))
    indices = np.linspace(0, len(source) - 1, min(limit, len(source))).round().astype(np.int64)
    return source.read(indices)["image"]


def nearest_distance(images: np.ndarray, train: np.ndarray, levels: int) -> float:
    """Mean Euclidean distance of an image to its nearest training image, pixels in [-1, 1].

    Beside that of held-out images to the training set it tells copying (much smaller) from modelling.
    """
    scale = 2 / (levels - 1)
    a, b = (x.reshape(len(x), -1).astype(np.float64) * scale for x in (images, train))
    squared = (a**2).sum(1)[:, None] - 2 * a @ b.T + (b**2).sum(1)[None]
    return float(np.sqrt(np.maximum(squared.min(1), 0)).mean())


SEEDS = {
    "report": (0, 10**9),
    "select": (10**9, 10**9),
    "pool": (2 * 10**9, 2**32 - 2 * 10**9),
}  # {purpose: (first, number)}


def seeds_at(purpose: str, index: int, num: int, positions: np.ndarray) -> np.ndarray:
    """Seeds at positions of a generated set of `num` images. Reports use 0..num-1, num..2num-1, ... as the literature
    does; what selects (one range per round) and what trains (fakes) lives far from them.

    >>> seeds_at("pool", 1, 8, np.array([0, 7]))
    array([2000000008, 2000000015], dtype=uint32)
    """
    return (SEEDS[purpose][0] + index * num + positions).astype(np.uint32)


def seed_range(purpose: str, index: int, num: int) -> np.ndarray:
    """All seeds of one generated set.

    >>> seed_range("report", 1, 3), seed_range("select", 0, 2)
    (array([3, 4, 5], dtype=uint32), array([1000000000, 1000000001], dtype=uint32))
    """
    return seeds_at(purpose, index, num, np.arange(num))


def balanced(seeds: np.ndarray, num_classes: int, classes: np.ndarray | None = None) -> np.ndarray:
    """Strictly balanced labels of a seed range: by position; over `classes` (ids) where not all have images."""
    return balanced_labels(np.arange(len(seeds)), num_classes, classes)
