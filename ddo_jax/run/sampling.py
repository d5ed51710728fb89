"""Generate a set of images into a folder of PNGs or an .npz; what is there already is not made again."""

import functools
import io
import itertools
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from PIL import Image
from tqdm import tqdm

from ddo_jax import files, sharding
from ddo_jax.core.torch_rng import TorchCpuStream, edm_streams
from ddo_jax.data.labels import balanced_labels, named_classes
from ddo_jax.errors import UserError
from ddo_jax.evaluate import image_sets, score
from ddo_jax.run import limits, load
from ddo_jax.run.checkpoint import weights_digest


class Request(NamedTuple):
    """What to generate.

    Attributes:
      checkpoint: WHAT (`ddo_jax.run.load`). seeds: [N]. labels: "balanced", "random", or classes as in "3,5".
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
      protocol: how its images are made, for records. classes: of `load.class_table`.
    """

    family: Any
    settings: Any
    params: Any
    frozen: Any
    sampler: Any
    protocol: dict
    classes: list[dict]


MOST_SEEDS = 10**8  # of one request: 0.8 GB of numbers
_SEEDS = re.compile(r"(\d{1,10})(?:-(\d{1,10}))?", re.ASCII)


def parse_seeds(text: str) -> np.ndarray:
    """Seeds of ranges and numbers, in their order.

    Raises:
      UserError: not such a text, a range that runs backwards, or a seed that is there twice.

    >>> parse_seeds("0-3,10")
    array([ 0,  1,  2,  3, 10])
    """
    matches = [_SEEDS.fullmatch(part.strip()) for part in text.split(",")]
    ranges = [(int(m[1]), int(m[2] or m[1])) for m in matches if m]
    if not all(matches) or any(last >= 2**32 for _, last in ranges):
        raise UserError(f"--seeds: {text!r}; allowed: ranges and numbers below 2^32, as in 0-49999,60000")
    for first, last in ranges:
        if first > last:
            raise UserError(f"--seeds: {first}-{last} runs backwards; write {last}-{first}")
    if sum(last - first + 1 for first, last in ranges) > MOST_SEEDS:
        raise UserError(f"--seeds: {text!r}; allowed: {MOST_SEEDS:,} seeds at a time; make the others later")
    for (_, last), (first, _) in itertools.pairwise(sorted(ranges)):
        if first <= last:
            raise UserError(f"--seeds: {text!r} has seed {first} twice; allowed: every seed once")
    return np.concatenate([np.arange(first, last + 1) for first, last in ranges])


def check_apart(ranges: list[np.ndarray]) -> None:
    """Sets of images that are compared share no image.

    Raises:
      UserError: names a seed that is in two of them.
    """
    seeds, counts = np.unique(np.concatenate(ranges), return_counts=True)
    if counts.max() > 1:
        raise UserError(
            f"--seeds: seed {seeds[counts > 1][0]} is in two ranges ({np.sum(counts > 1)} such seeds); allowed: ranges "
            "that share nothing, or their spread means nothing"
        )


def seeds_text(seeds: np.ndarray) -> str:
    """The seeds exactly, as `parse_seeds` reads them; a long list of odd ones by its ends, number and CRC-32.

    >>> seeds_text(np.array([0, 1, 2, 3, 10])), seeds_text(np.array([0, 5]))
    ('0-3,10', '0,5')
    """
    runs = np.split(seeds, np.flatnonzero(np.diff(seeds) != 1) + 1)
    if len(runs) > 100:
        crc = zlib.crc32(np.ascontiguousarray(seeds, "<i8"))
        return f"{len(seeds)} from {seeds[0]} to {seeds[-1]}, CRC {crc:08x}"
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def class_labels(rule: str, seeds: np.ndarray, num_classes: int, rng: str, table: Sequence[dict] = ()) -> np.ndarray:
    """One label a seed: by position over all classes or those named, or drawn from the seed's own stream.

    Args:
      rule: "balanced", "random", or classes by id or name, as in "3,5" or "cat". table: of `data.labels.class_table`,
        for names, and for classes of which the data had no image: they are not made.

    Raises:
      UserError: another rule.
    """
    if num_classes == 0:
        return np.zeros(len(seeds), np.int32)
    if rule == "balanced":
        present = np.array([row["id"] for row in table if row["images"] != 0])
        return balanced_labels(np.arange(len(seeds)), num_classes, present if len(table) == num_classes else None)
    if rule != "random":
        names = tuple(row["name"] for row in table if row["name"] is not None)
        wanted = named_classes(rule, num_classes, names)
        return balanced_labels(np.arange(len(seeds)), num_classes, np.array(wanted))
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
    limits.check_batch("--batch", request.batch, parts.family.image_shape, "sampling")
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
    classes = load.class_table(parts.found)
    return Generator(family, settings, parts.params, parts.frozen, guided, protocol, classes)


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


def labels_of(request: Request, seeds: np.ndarray, family, classes: Sequence[dict] = ()) -> np.ndarray:
    """One label a seed of a list of seeds, by the request's rule; classes: of `load.class_table`."""
    if request.rng == "torch-cpu" and request.labels == "random" and family.num_classes:
        return torch_labels(seeds, noise_shape(family), family.num_classes)
    return class_labels(request.labels, seeds, family.num_classes, request.rng, classes)


def generate(
    request: Request, skip: Callable | None = None, planned: Callable | None = None
) -> tuple[Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]], int]:
    """(iterator of (seeds, labels, images uint8 [n,H,W,C]), grey levels) of a request.

    Args:
      skip: seed -> whether its image exists already; or None.
      planned: told all (seeds, labels) before the first image is made; or None.
    """
    model = open_generator(request)
    labels = labels_of(request, request.seeds, model.family, model.classes)
    if planned is not None and model.family.num_classes:
        planned(request.seeds, labels)
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


def is_made(out: epath.Path, seed: int) -> bool:
    """Whether the folder has the image of a seed, with folders a thousand seeds or without."""
    return any(png_path(out, seed, subdirs).exists() for subdirs in (False, True))


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
    have = _kept_request(out)
    old = (have or {}).pop("first_seed", None)  # of a folder that does not know the labels of its seeds
    if old is not None and old != int(request.seeds[0]) and not (out / LABELS).exists():
        raise UserError(f"--out: {out} was made with seeds from {old} on; take another folder for other seeds")
    if have is not None:  # what an older version did not ask for had the value that is now the default
        have = {k: v for k, v in Request._field_defaults.items() if k in wanted} | {"guidance": 1.0} | have
    if have is not None and have != wanted:
        changed = [f"{k}: {have.get(k)} -> {wanted.get(k)}" for k in {**have, **wanted} if have.get(k) != wanted.get(k)]
        raise UserError(f"--out: {out} was made with another request ({'; '.join(changed)}); take another folder")
    return wanted


def _kept_request(out: epath.Path) -> dict | None:
    """What a folder was made with; None of a new one.

    Raises:
      UserError: it cannot be read.
    """
    try:
        return files.read_sealed(out / "request.json")
    except files.Damaged as e:
        raise UserError(f"--out: {e}; put back a copy, or take another folder") from None


LABELS = "labels.json"  # of the images in a folder: {seed: label}


def remember(out: epath.Path, seeds: np.ndarray, labels: np.ndarray) -> None:
    """Keep the labels of a folder's seeds in it: balanced labels go by position, so another list may give others.

    Raises:
      UserError: an image that is there has another label; or the file is no such table.
    """
    try:
        have = {int(seed): int(label) for seed, label in (files.read_json(out / LABELS) or {}).items()}
    except (ValueError, TypeError, AttributeError):
        raise UserError(f"{out / LABELS}: not a table of seeds and labels; take another folder") from None
    plan = dict(zip(seeds.tolist(), labels.tolist(), strict=True))
    for seed, label in plan.items():
        if have.get(seed, label) != label and is_made(out, seed):
            raise UserError(
                f"--out: {out} has seed {seed} with label {have[seed]}, these --seeds give it {label} (balanced labels "
                "go by the position in the list); take another folder, or list the seeds as before"
            )
    if jax.process_index() == 0:
        files.write_json(out / LABELS, {**have, **plan})


def to_folder(request: Request, out: epath.Path, subdirs: bool) -> int:
    """Write PNGs named by seed; those that exist are kept. The number written."""
    wanted = same_request(request, out)
    pieces, levels = generate(
        request,
        skip=functools.partial(is_made, out),
        planned=functools.partial(remember, out),
    )
    if jax.process_index() == 0:
        files.write_sealed(out / "request.json", wanted)
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
    """Write one .npz: arr_0 uint8 [N,H,W,3] as the OpenAI evaluator reads it, labels, seeds."""
    pieces, levels = generate(request)
    parts = list(tqdm(pieces, "batches", disable=None))
    seeds, labels, images = (np.concatenate(x) for x in zip(*parts, strict=True))
    buffer = io.BytesIO()
    np.savez(buffer, arr_0=image_sets.in_colour(full_range(images, levels)), labels=labels, seeds=seeds)
    if jax.process_index() == 0:
        files.write_bytes(out, buffer.getvalue())
    return len(seeds)


OF_A_RUN = ("config.json", "inputs.json", "result.json", "claim.json", "metrics.jsonl", "best.json")


def check_no_run(out: epath.Path) -> None:
    """Images do not go between the files of a run, or of one of its tasks.

    Raises:
      UserError: `out` is such a folder.
    """
    found = [name for name in OF_A_RUN if (out / name).exists()]
    if found or out.name in ("checkpoints", "snapshots") and out.exists():
        what = f"{found[0]} is in it" if found else "it holds checkpoints"
        raise UserError(f"--out: {out} belongs to a run ({what}); take another folder")


def run(request: Request, out: str, subdirs: bool) -> int:
    """Generate into `out` (.npz, or a folder).

    Raises:
      UserError: what cannot be loaded, sampled or written.
    """
    target = epath.Path(out)
    try:
        if target.suffix == ".npz":
            if target.exists():
                raise UserError(f"--out: {out} exists; take another name, or move it aside")
            target.parent.mkdir(parents=True, exist_ok=True)
            return to_npz(request, target)
        check_no_run(target)
        target.mkdir(parents=True, exist_ok=True)
        return to_folder(request, target, subdirs)
    except OSError as e:
        raise UserError(f"--out: {out}: {e.strerror or e}; must name a folder or .npz that can be written") from None
