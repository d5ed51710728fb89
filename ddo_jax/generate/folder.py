"""`ddo_jax.sample`: a request into a folder of PNGs or an .npz; what is there already is not made again."""

import functools

import jax
import numpy as np
from etils import epath
from tqdm import tqdm

from ddo_jax import files
from ddo_jax.errors import UserError
from ddo_jax.generate import writers
from ddo_jax.generate.request import Request, generate, guides_itself
from ddo_jax.store import load


def png_path(out: epath.Path, seed: int, subdirs: bool) -> epath.Path:
    """OUT/000123.png, or OUT/000000/000123.png with one folder a thousand seeds (specs/edm.md section 11)."""
    folder = out / f"{seed - seed % 1000:06d}" if subdirs else out
    return folder / f"{seed:06d}.png"


def is_made(out: epath.Path, seed: int) -> bool:
    """Whether the folder has the image of a seed, with folders a thousand seeds or without."""
    return any(png_path(out, seed, subdirs).exists() for subdirs in (False, True))


def same_request(request: Request, out: epath.Path) -> dict:
    """What a folder is made with, to be kept in it; a folder does not mix models, settings or label rules.

    Raises:
      UserError: the folder was made with another request (the difference is shown).
    """
    wanted = {k: v for k, v in request._asdict().items() if k not in ("seeds", "batch")}
    found = load.find(request.checkpoint)
    wanted["weights"] = load.fingerprint(found)
    if request.guidance is None and not guides_itself(load.family_of(found)):
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


def _write(records, writer, levels: int) -> int:
    """Of process 0; the others only take part in making the images. The number written."""
    if jax.process_index() == 0:
        records = writers.written(records, writer, levels)
    return sum(len(record["image"]) for record in tqdm(records, "batches", disable=None))


def to_folder(request: Request, out: epath.Path, subdirs: bool) -> int:
    """Write PNGs named by seed; those that exist are kept. The number written."""
    wanted = same_request(request, out)
    records, _, family = generate(
        request,
        skip=functools.partial(is_made, out),
        planned=functools.partial(remember, out),
    )
    if jax.process_index() == 0:
        files.write_sealed(out / "request.json", wanted)
    return _write(records, writers.FolderWriter(lambda name: png_path(out, int(name), subdirs)), family.spec.levels)


def to_npz(request: Request, out: epath.Path) -> int:
    """Write one .npz: arr_0 uint8 [N,H,W,3] as the OpenAI evaluator reads it, labels, seeds."""
    records, num, family = generate(request)
    if jax.process_index() != 0:
        return sum(len(record["image"]) for record in records)
    return _write(records, writers.NpzWriter(out, num, family.spec.image_shape), family.spec.levels)


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
