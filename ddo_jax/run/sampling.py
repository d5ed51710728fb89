"""Generate a set of images into a folder of PNGs or an .npz; what is there already is not made again."""

import functools
import io
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from PIL import Image
from tqdm import tqdm

from ddo_jax import files, sharding
from ddo_jax.core.torch_rng import TorchCpuStream, edm_streams
from ddo_jax.data.labels import balanced_labels
from ddo_jax.errors import UserError
from ddo_jax.evaluate import score
from ddo_jax.run import load
from ddo_jax.run.checkpoint import weights_digest


class Request(NamedTuple):
    """What to generate.

    Attributes:
      checkpoint: WHAT (`ddo_jax.run.load`). seeds: [N]. labels: "balanced", "random" or a class id.
      batch: images per program run. sampler: overrides of the checkpoint's sampler settings.
      rng: "jax" or "torch-cpu". dtype: of the image path. precision: of matrix products.
      guide: WHAT of a second network, or None. guidance: its weight, 1 being none; of a VAR, which guides itself, its
        cfg, 0 being none; None: none, of a VAR the checkpoint's own.
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

    def family(self, found):
        """The family of what `load.find` found, as the request wants it.

        Raises:
          UserError: an autoencoder for a network of pixels.
        """
        wanted = {"eval.dtype": self.dtype, "precision": self.precision}
        family = load.family_of(found, **wanted)
        if self.vae is None:
            return family
        if len(family.record_shapes) == 1:
            raise UserError(f"--vae: {self.vae}; allowed for models of latents or tokens, and this one works on pixels")
        return load.family_of(found, **wanted, **{"model.vae": self.vae})


class Generator(NamedTuple):
    """A model that is ready to sample: what `open_generator` makes of a request.

    Attributes:
      family, settings, params, frozen: of the main network. sampler: of `score.make_sampler`.
      protocol: how its images are made, for records.
    """

    family: Any
    settings: Any
    params: Any
    frozen: Any
    sampler: Any
    protocol: dict


def parse_seeds(text: str) -> np.ndarray:
    """
    >>> parse_seeds("0-3,10")
    array([ 0,  1,  2,  3, 10])
    """
    try:
        parts = [[int(x) for x in part.split("-")] for part in text.split(",")]
        seeds = np.concatenate([np.arange(p[0], p[-1] + 1) for p in parts if len(p) <= 2 or 1 / 0])
    except (ValueError, ZeroDivisionError):
        seeds = np.array([])
    if seeds.size == 0 or seeds.min() < 0 or seeds.max() >= 2**32:
        raise UserError(f"--seeds: {text!r}; allowed: ranges and numbers below 2^32, as in 0-49999,60000")
    return seeds


def class_labels(rule: str, seeds: np.ndarray, num_classes: int, rng: str) -> np.ndarray:
    """One label a seed: by position, drawn from the seed's own stream, or one class for all.

    Raises:
      UserError: another rule.
    """
    if num_classes == 0:
        return np.zeros(len(seeds), np.int32)
    if rule == "balanced":
        return balanced_labels(np.arange(len(seeds)), num_classes)
    if rule.isdigit() and int(rule) < num_classes:
        return np.full(len(seeds), int(rule), np.int32)
    if rule != "random":
        raise UserError(f"--labels: {rule!r}; allowed: balanced, random, or a class 0-{num_classes - 1}")
    if rng == "jax":
        return np.array([np.random.default_rng((int(s), 1)).integers(num_classes) for s in seeds], np.int32)
    raise AssertionError("torch-cpu labels come with the latents")


def torch_labels(seeds: np.ndarray, shape, num_classes: int) -> np.ndarray:
    """The released sampler's random labels: the draw after the latents."""
    labels = np.zeros(len(seeds), np.int32)
    for i, seed in enumerate(seeds):
        stream = TorchCpuStream(int(seed))
        stream.normal(shape)
        labels[i] = stream.integer(num_classes)
    return labels


def open_guide(request: Request, main, mesh) -> score.Guide | None:
    """The request's second network, or None.

    Raises:
      UserError: the networks do not fit together.
    """
    if main.own_guidance and request.guide is not None:
        raise UserError(f"--guide: {request.guide}; a VAR takes no second network, --guidance alone guides it")
    if not main.own_guidance and request.guide is None and request.guidance not in (None, 1):
        raise UserError(f"--guide=None with --guidance={request.guidance}: set --guide=WHAT, too")
    if request.guide is None:
        return None
    found = load.find(request.guide)
    family = request.family(found)
    here, there = ((f.record_shapes, f.num_classes) for f in (main, family))
    if here[0] != there[0] or there[1] not in (0, here[1]):
        raise UserError(
            f"--guide: {request.guide} has records {there[0]} and {there[1]} classes; allowed: {here[0]} and "
            f"{here[1]} or 0, as the main network"
        )
    params, frozen = load.parameters(found, family, mesh)
    return score.Guide(family, params, frozen, float(request.guidance))


class Parts(NamedTuple):
    """What all generators of one request share: the networks, loaded once.

    Attributes:
      found: of `load.find`. family, params, frozen: of the main network. guide: a second one, or None.
    """

    found: Any
    family: Any
    mesh: Any
    params: Any
    frozen: Any
    guide: score.Guide | None


def load_parts(request: Request) -> Parts:
    """The networks of a request.

    Raises:
      UserError: what cannot be loaded.
    """
    found = load.find(request.checkpoint)
    family, mesh = request.family(found), sharding.make_mesh(1)
    if family.own_guidance and request.rng != "jax":
        raise UserError(f"--rng: {request.rng!r}; allowed for a VAR: jax, whose draws have no released counterpart")
    params, frozen = load.parameters(found, family, mesh)
    frozen = load.complete(family, mesh, frozen)
    return Parts(found, family, mesh, params, frozen, open_guide(request, family, mesh))


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
    own = {"cfg": request.guidance} if family.own_guidance and request.guidance is not None else {}
    settings = load.settings_of(parts.found, family, request.sampler | own)
    if request.rng == "torch-cpu":

        def streams(seeds):
            latents, _, normals = edm_streams(seeds, noise_shape(family), family.num_classes, settings.num_steps)
            return latents, normals

    if sampler is None:
        sampler = score.make_sampler(family, settings, parts.mesh, request.batch, streams, guide=guide)
    if family.own_guidance:
        weight = settings.cfg or None
        guidance = weight and {"cfg": weight, "rule": "t = cfg s / (S - 1) at scale s; 0 is none"}
    else:
        weight = None if guide is None or request.guidance == 1 else request.guidance
        guidance = weight and {"weight": weight, "guide": request.guide, "weights": weights_digest(guide.params)}
    protocol = {
        "checkpoint": request.checkpoint,
        "weights": weights_digest(parts.params),
        "sampler": {"solver": settings.solver, **settings._asdict()},
        "nfe": family.nfe(settings) * (2 if weight and guide is not None else 1),
        "guidance": guidance,
        "rng": request.rng,
        "dtype": request.dtype,
        "precision": request.precision,
    }
    guided = functools.partial(sampler, weight=request.guidance if guide is not None else weight)
    return Generator(family, settings, parts.params, parts.frozen, guided, protocol)


def sweep(request: Request, key: str, values: list):
    """(value, generator) for every value of a sampler setting, or of "guidance": the strengths share one program.

    Raises:
      UserError: as `open_generator`; a value that this sampler does not take.
    """
    if key == "guidance" and request.guidance is not None:
        raise UserError(f"--guidance: {request.guidance}; --sweep gives its values, leave it out")
    weight = 2.0 if key == "guidance" and request.guide is not None else request.guidance  # any but none: to be loaded
    parts, shared, made = load_parts(request._replace(guidance=weight)), None, []
    none = 0 if parts.family.own_guidance else 1
    for value in values:
        if key == "guidance":
            asked = request._replace(guidance=value)
        else:
            asked = request._replace(sampler=request.sampler | {key: value})
        if key == "guidance" and value != none and not parts.family.own_guidance and parts.guide is None:
            raise UserError(f"--sweep: guidance={value:g} needs --guide=WHAT, a second network")
        guided = key == "guidance" and value != none
        model = open_generator(asked, parts, shared if guided else None)
        if guided:
            shared = model.sampler.func
        made.append((value, model))
    return made


def noise_shape(family) -> tuple[int, ...]:
    """Of one image's starting noise: that of x, which is smaller than the image where x are latents."""
    return jax.eval_shape(lambda: family.latents(jax.random.split(jax.random.key(0), 1))).shape[1:]


def labels_of(request: Request, seeds: np.ndarray, family) -> np.ndarray:
    """One label a seed of a list of seeds, by the request's rule."""
    if request.rng == "torch-cpu" and request.labels == "random" and family.num_classes:
        return torch_labels(seeds, noise_shape(family), family.num_classes)
    return class_labels(request.labels, seeds, family.num_classes, request.rng)


def generate(request: Request, skip=None) -> tuple[Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]], int]:
    """(iterator of (seeds, labels, images uint8 [n,H,W,C]), grey levels) of a request.

    Args:
      skip: seed -> whether its image exists already; or None.
    """
    model = open_generator(request)
    labels = labels_of(request, request.seeds, model.family)
    wanted = np.array([i for i, seed in enumerate(request.seeds) if skip is None or not skip(int(seed))], np.int64)

    def pieces():
        seeds, chosen = request.seeds[wanted], labels[wanted]
        at = 0
        for record in model.sampler(model.params, model.frozen, seeds, chosen):
            n = len(record["image"])
            yield seeds[at : at + n], record["label"], record["image"]
            at += n

    return pieces(), model.family.levels


def png_path(out: epath.Path, seed: int, subdirs: bool) -> epath.Path:
    """OUT/000123.png, or OUT/000000/000123.png with one folder a thousand seeds (specs/edm.md section 11)."""
    folder = out / f"{seed - seed % 1000:06d}" if subdirs else out
    return folder / f"{seed:06d}.png"


def full_range(images: np.ndarray, levels: int) -> np.ndarray:
    """Fewer than 256 grey levels are spread over 0..255, as every file of images has them."""
    return images if levels == 256 else np.round(images * (255 / (levels - 1))).astype(np.uint8)


def encode(image: np.ndarray, levels: int) -> bytes:
    """PNG of one image."""
    full = full_range(image, levels)
    buffer = io.BytesIO()
    Image.fromarray(full.squeeze(-1) if full.shape[-1] == 1 else full).save(buffer, format="PNG")
    return buffer.getvalue()


def same_request(request: Request, out: epath.Path) -> dict:
    """What a folder is made with, to be kept in it; a folder does not mix models, settings or label rules.

    Raises:
      UserError: the folder was made with another request (the difference is shown).
    """
    wanted = {k: v for k, v in request._asdict().items() if k not in ("seeds", "batch")}
    found = load.find(request.checkpoint)
    wanted["weights"] = load.fingerprint(found)
    if request.guidance is None and not load.family_of(found).own_guidance:
        wanted["guidance"] = 1.0  # none
    if request.guide is not None:
        wanted["guide_weights"] = load.fingerprint(load.find(request.guide))
    if request.labels == "balanced":  # labels go by the position in the list of seeds
        wanted["first_seed"] = int(request.seeds[0])
    have = files.read_json(out / "request.json")
    if have is not None:  # what an older version did not ask for had the value that is now the default
        have = {k: v for k, v in Request._field_defaults.items() if k in wanted} | {"guidance": 1.0} | have
    if have is not None and have != wanted:
        changed = [f"{k}: {have.get(k)} -> {wanted.get(k)}" for k in {**have, **wanted} if have.get(k) != wanted.get(k)]
        raise UserError(f"--out: {out} was made with another request ({'; '.join(changed)}); take another folder")
    return wanted


def to_folder(request: Request, out: epath.Path, subdirs: bool) -> int:
    """Write PNGs named by seed; those that exist are kept. The number written."""
    wanted = same_request(request, out)
    pieces, levels = generate(request, skip=lambda seed: png_path(out, seed, subdirs).exists())
    if jax.process_index() == 0:
        files.write_json(out / "request.json", wanted)
    written = 0
    for seeds, _, images in tqdm(pieces, "batches", disable=None):
        if jax.process_index() == 0:
            for seed, image in zip(seeds, images, strict=True):
                path = png_path(out, int(seed), subdirs)
                path.parent.mkdir(parents=True, exist_ok=True)
                files.write_bytes(path, encode(image, levels))
        written += len(seeds)
    return written


def to_npz(request: Request, out: epath.Path) -> int:
    """Write one .npz: arr_0 uint8 [N,H,W,C] as the OpenAI evaluator reads it, labels, seeds."""
    pieces, levels = generate(request)
    parts = list(tqdm(pieces, "batches", disable=None))
    seeds, labels, images = (np.concatenate(x) for x in zip(*parts, strict=True))
    buffer = io.BytesIO()
    np.savez(buffer, arr_0=full_range(images, levels), labels=labels, seeds=seeds)
    if jax.process_index() == 0:
        files.write_bytes(out, buffer.getvalue())
    return len(seeds)


def run(request: Request, out: str, subdirs: bool) -> int:
    """Generate into `out` (.npz, or a folder).

    Raises:
      UserError: what cannot be loaded, sampled or written.
    """
    target = epath.Path(out)
    try:
        if target.suffix == ".npz":
            if target.exists():
                raise UserError(f"--out: {out} exists; remove it or take another name")
            target.parent.mkdir(parents=True, exist_ok=True)
            return to_npz(request, target)
        target.mkdir(parents=True, exist_ok=True)
        return to_folder(request, target, subdirs)
    except OSError as e:
        raise UserError(f"--out: {out}: {e.strerror or e}; must name a folder or .npz that can be written") from None
