"""What the `sample` and `evaluate` commands ask for, and the generator that answers it."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from ddo_jax import limits, sharding
from ddo_jax.core.torch_rng import edm_streams
from ddo_jax.errors import UserError
from ddo_jax.families.base import Family
from ddo_jax.generate.labels import class_labels, torch_labels
from ddo_jax.generate.sampler import Guide, make_sampler
from ddo_jax.store import load
from ddo_jax.store.checkpoint import weights_digest


class Request(NamedTuple):
    """What to generate.

    Attributes:
      checkpoint: WHAT (`ddo_jax.store.load`). seeds: [N]. labels: "balanced", "random", or classes as in "3,5".
      batch: images per program run. sampler: overrides of the checkpoint's sampler settings.
      rng: "jax" or "torch-cpu". dtype: of the image path. precision: of matrix products.
      guide: WHAT of a second network, or None. guidance: its weight, 1 being none; of a family that guides itself (VAR,
        by cfg) its own strength, 0 being none; None: none, of such a family the checkpoint's own.
      vae: WHAT of another autoencoder or tokenizer than the checkpoint names, or None.
    """

    checkpoint: str
    seeds: np.ndarray
    labels: str = "balanced"
    batch: int = 64
    sampler: dict = {}
    rng: str = "jax"
    dtype: str = "float32"
    precision: str = "highest"
    guide: str | None = None
    guidance: float | None = None
    vae: str | None = None

    def family(self, found) -> Family:
        """The family of what `load.find` found, as the request wants it.

        Raises:
          UserError: an autoencoder for a network of pixels.
        """
        wanted = {"eval.dtype": self.dtype, "precision": self.precision}
        family = load.family_of(found, **wanted)
        if self.vae is None:
            return family
        if family.spec.works_on_pixels:
            raise UserError(f"--vae: {self.vae}; allowed for models of latents or tokens, and this one works on pixels")
        return load.family_of(found, **wanted, **{"model.vae": self.vae})


class Generator(NamedTuple):
    """A model that is ready to sample: what `open_generator` makes of a request.

    Attributes:
      family, settings, params, frozen: of the main network. sampler: of `sampler.make_sampler`.
      protocol: how its images are made, for records. classes: of `load.class_table`.
    """

    family: Family
    settings: Any
    params: Any
    frozen: Any
    sampler: Any
    protocol: dict
    classes: list[dict]

    def images(self, seeds: np.ndarray, labels: np.ndarray) -> Iterator[dict]:
        """Records {"image" uint8 [n,H,W,C], "label" [n], "seed" [n], "id": names of files} on the host, in order."""
        at = 0
        for record in self.sampler(self.params, self.frozen, seeds, labels):
            own = seeds[at : at + len(record["image"])]
            at += len(own)
            yield record | {"seed": own, "id": [f"{seed:06d}" for seed in own]}


class Parts(NamedTuple):
    """What all generators of one request share: the networks, loaded once.

    Attributes:
      found: of `load.find`. family, params, frozen: of the main network. guide: a second one, or None.
    """

    found: Any
    family: Family
    mesh: Any
    params: Any
    frozen: Any
    guide: Guide | None


def guides_itself(family: Family) -> bool:
    return family.spec.guidance.kind == "own"


def open_guide(request: Request, main: Family, mesh) -> Guide | None:
    """The request's second network, or None.

    Raises:
      UserError: the networks do not fit together.
    """
    if guides_itself(main) and request.guide is not None:
        raise UserError(
            f"--guide: {request.guide}; a {main.spec.name} takes no second network, --guidance alone guides it"
        )
    if not guides_itself(main) and request.guide is None and request.guidance not in (None, main.spec.guidance.neutral):
        raise UserError(f"--guide=None with --guidance={request.guidance}: set --guide=WHAT, too")
    if request.guide is None:
        return None
    found = load.find(request.guide)
    family = request.family(found)
    here, there = main.spec, family.spec
    if here.data != there.data or there.num_classes not in (0, here.num_classes):
        shapes = [tuple(r.shape for r in spec.data) for spec in (there, here)]
        raise UserError(
            f"--guide: {request.guide} has records {shapes[0]} and {there.num_classes} classes; allowed: {shapes[1]} "
            f"and {here.num_classes} or 0, as the main network"
        )
    params, frozen = load.parameters(found, family, mesh)
    return Guide(family, params, frozen, float(request.guidance))


def load_parts(request: Request) -> Parts:
    """The networks of a request.

    Raises:
      UserError: what cannot be loaded.
    """
    found = load.find(request.checkpoint)
    family, mesh = request.family(found), sharding.make_mesh(1)
    if not sum(noise_shape(family)) and request.rng != "jax":
        raise UserError(
            f"--rng: {request.rng!r}; allowed for a {family.spec.name}: jax, whose draws have no released counterpart"
        )
    params, frozen = load.parameters(found, family, mesh)
    frozen = load.complete(family, mesh, frozen)
    return Parts(found, family, mesh, params, frozen, open_guide(request, family, mesh))


def guidance_record(request: Request, parts: Parts, settings) -> dict | None:
    """How the images of a request are guided, for records; None: they are not."""
    family, g = parts.family, parts.family.spec.guidance
    if guides_itself(family):
        strength = family.strength(settings)
        if strength == g.neutral:
            return None
        return {g.setting: strength, "rule": g.rule}
    if parts.guide is None or request.guidance == g.neutral:
        return None
    return {"weight": request.guidance, "guide": request.guide, "weights": weights_digest(parts.guide.params)}


def open_generator(request: Request, parts: Parts | None = None, sampler=None) -> Generator:
    """Load the network (and its guide) of a request and make its sampler.

    Args:
      parts: of `load_parts`, where several generators share their networks. sampler: of another generator of them
        that differs in the weight of its guidance only, and is compiled already.

    Raises:
      UserError: what cannot be loaded or sampled.
    """
    parts = parts or load_parts(request)
    family, guide, streams = parts.family, parts.guide, None
    limits.check_batch("--batch", request.batch, family.spec.image_shape, "sampling")
    g = family.spec.guidance
    own = {g.setting: request.guidance} if guides_itself(family) and request.guidance is not None else {}
    settings = load.settings_of(parts.found, family, request.sampler | own)
    if request.rng == "torch-cpu":

        def streams(seeds):
            shape, classes = noise_shape(family), family.spec.num_classes
            latents, _, normals = edm_streams(seeds, shape, classes, settings.num_steps)
            return latents, normals

    if sampler is None:
        sampler = make_sampler(family, settings, parts.mesh, request.batch, streams, guide=guide)
    guidance = guidance_record(request, parts, settings)
    protocol = {
        "checkpoint": request.checkpoint,
        "weights": weights_digest(parts.params),
        "sampler": settings.record(),
        "nfe": settings.nfe * (2 if guidance and guide is not None else 1),
        "guidance": guidance,
        "rng": request.rng,
        "dtype": request.dtype,
        "precision": request.precision,
    }
    strength = family.strength(settings)
    weight = request.guidance if guide is not None else None if strength == g.neutral else strength
    classes = load.class_table(parts.found)
    bound = functools.partial(sampler, weight=weight)
    return Generator(family, settings, parts.params, parts.frozen, bound, protocol, classes)


def sweep(request: Request, key: str, values: list):
    """(value, generator) for every value of a sampler setting, or of "guidance": the strengths share one program.

    Raises:
      UserError: as `open_generator`; a value that this sampler does not take.
    """
    if key == "guidance" and request.guidance is not None:
        raise UserError(f"--guidance: {request.guidance}; --sweep gives its values, leave it out")
    weight = 2.0 if key == "guidance" and request.guide is not None else request.guidance  # any but none: to be loaded
    parts, shared, made = load_parts(request._replace(guidance=weight)), None, []
    for value in values:
        guided = key == "guidance" and value != parts.family.spec.guidance.neutral
        if key == "guidance":
            asked = request._replace(guidance=value)
        else:
            asked = request._replace(sampler=request.sampler | {key: value})
        if guided and not guides_itself(parts.family) and parts.guide is None:
            raise UserError(f"--sweep: guidance={value:g} needs --guide=WHAT, a second network")
        model = open_generator(asked, parts, shared if guided else None)
        if guided:
            shared = model.sampler.func
        made.append((value, model))
    return made


def noise_shape(family: Family) -> tuple[int, ...]:
    """Of one image's starting noise: that of x, which is smaller than the image where x are latents; (0,): none."""
    return jax.eval_shape(lambda: family.latents(jax.random.split(jax.random.key(0), 1))).shape[1:]


def labels_of(request: Request, seeds: np.ndarray, family: Family, classes: Sequence[dict] = ()) -> np.ndarray:
    """One label a seed of a list of seeds, by the request's rule; classes: of `load.class_table`."""
    if request.rng == "torch-cpu" and request.labels == "random" and family.spec.num_classes:
        return torch_labels(seeds, noise_shape(family), family.spec.num_classes)
    return class_labels(request.labels, seeds, family.spec.num_classes, request.rng, classes)


def generate(
    request: Request, skip: Callable | None = None, planned: Callable | None = None
) -> tuple[Iterator[dict], int, Family]:
    """(records of `Generator.images`, their number, the family) of a request.

    Args:
      skip: seed -> whether its image exists already; or None.
      planned: told all (seeds, labels) before the first image is made; or None.
    """
    model = open_generator(request)
    labels = labels_of(request, request.seeds, model.family, model.classes)
    if planned is not None and model.family.spec.num_classes:
        planned(request.seeds, labels)
    wanted = np.array([i for i, seed in enumerate(request.seeds) if skip is None or not skip(int(seed))], np.int64)
    return model.images(request.seeds[wanted], labels[wanted]), len(wanted), model.family
