"""One sampler for pools, evaluations, pictures and the `sample` command.

An image is a function of (parameters, settings, its seed, its label): it has its own key, and the program
always runs at one fixed, padded micro-batch, so neither the request's size nor a restart changes it.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ddo_jax import preemption, sharding
from ddo_jax.errors import UserError

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
            if i:  # what was yielded has been used
                preemption.check()
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
        return None if weight == family.spec.guidance.neutral else ((guide.params, guide.frozen), np.float32(weight))
    g = family.spec.guidance
    own = g.kind == "own" and family.strength(settings) != g.neutral and weight is not None
    return (None, np.float32(weight)) if own else None
