"""From a folder, zip or TFDS set to a set of equal images in EDM's zip format or as array_record.

What `python -m ddo_jax.data` does. Nothing is overwritten: the result appears under its name when it is whole.
"""

import contextlib
import dataclasses
import json
import os
import shutil
import uuid
import zipfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from ddo_jax.data import catalogue, images, labelling, sources, tree
from ddo_jax.data.crops import center_box, crop_center, crop_var
from ddo_jax.errors import UserError

BLOCK = 256  # images in work at a time
MODES = {1: "L", 3: "RGB"}
EXIF = ("apply", "ignore")


def crop_center_dhariwal(image: Image.Image, size: int) -> Image.Image:
    """ADM (Dhariwal and Nichol 2021): halve by box averages while the shorter side is at least 2 size, then
    bicubic to shorter side = size, then the central square."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    return center_box(image, size)


def no_crop(image: Image.Image, size: int) -> Image.Image:
    """Lanczos of a square image to size x size.

    Raises:
      UserError: not square.
    """
    if image.width != image.height:
        raise UserError(f"{image.width}x{image.height} is not square; set --crop={' or '.join(sorted(CROPS)[:2])}")
    return image.resize((size, size), Image.Resampling.LANCZOS)


CROPS = {"center": crop_center, "center-dhariwal": crop_center_dhariwal, "none": no_crop, "var": crop_var}


def converter(
    resolution: int | None, crop: str, channels: int, exif: str = "apply", alpha: str = "white"
) -> Callable[[bytes, str], np.ndarray]:
    """convert(file content, where) -> uint8 [H, W, C]: turned upright and colours first, then size.

    Raises:
      UserError: here for options that do not go together; in `convert` for a bad image, which is named.
    """
    if crop not in CROPS:
        raise UserError(f"--crop={crop}; allowed: {', '.join(CROPS)}")
    if exif not in EXIF:
        raise UserError(f"--exif={exif}; allowed: {', '.join(EXIF)}")
    if alpha not in images.ALPHA:
        raise UserError(f"--alpha={alpha}; allowed: {', '.join(images.ALPHA)}")
    if channels not in MODES:
        raise UserError(f"--channels={channels}; allowed: 3 (RGB) or 1 (greyscale)")
    if resolution is None and crop != "none":
        raise UserError(f"--crop={crop} needs a size; set --resolution=64 or another")
    if resolution is not None and resolution < 1:
        raise UserError(f"--resolution={resolution}; allowed: 1 or more pixels")

    note = sources.OnWhite() if alpha == "white" else None

    def convert(data: bytes, where: str) -> np.ndarray:
        image = images.convert(data, where, MODES[channels], note, turn=exif == "apply")
        if resolution is not None:
            try:
                image = CROPS[crop](image, resolution)
            except UserError as e:
                raise UserError(f"{where}: {e}") from None
        return np.asarray(image).reshape(image.height, image.width, channels)

    return convert


class Job(NamedTuple):
    """What is to be made: the path that will appear, the images, which of them, what makes them equal."""

    path: Path
    records: sources.Records
    indices: np.ndarray
    convert: Callable[[bytes, str], np.ndarray]

    @property
    def n(self) -> int:
        return len(self.indices)

    def shape(self) -> tuple[int, ...]:
        """(H, W, C) of the first image, which the others must have."""
        first = int(self.indices[0])
        return self.convert(self.records.read([first])[0][0], self.records.where(first)).shape


@dataclasses.dataclass(frozen=True)
class Options:
    """Those of `python -m ddo_jax.data`, see its --help."""

    split: str = "train"
    data_dir: str | None = None
    resolution: int | None = None
    crop: str = "none"
    channels: int = 3
    max_images: int | None = None
    exif: str = "apply"
    alpha: str = "white"


def plan(src: str, dst: str, options: Options) -> Job:
    """What is to be made, checked; nothing is made yet.

    Raises:
      UserError: an option that is not allowed, a missing or unusable SRC, a DST that exists.
    """
    o = options
    path, convert = target(dst), converter(o.resolution, o.crop, o.channels, o.exif, o.alpha)
    if o.max_images is not None and o.max_images < 1:
        raise UserError(f"--max_images={o.max_images}; allowed: 1 or more")
    records = sources.open_records(src, o.split, o.data_dir)
    return Job(path, records, first_images(records, o.max_images), convert)


def first_images(records: sources.Records, limit: int | None) -> np.ndarray:
    """Which images --max_images takes, rising: the first ones, equally many of every class while there are any."""
    if limit is None or limit >= len(records):
        return np.arange(len(records))
    labels = records.labels if records.num_classes else None
    return np.arange(limit) if labels is None else np.sort(labelling.even_order(labels)[:limit])


def converted(job: Job, finish: Callable[[np.ndarray], Any]) -> Iterator[tuple[Any, int]]:
    """(finish(pixels), label) of the images in order, made in threads; the progress bar follows who takes them.

    Raises:
      UserError: a bad image, or one of another size than the first; it is named.
    """

    def one(i: int, data: bytes, label: int) -> tuple[tuple[int, ...], Any, int]:
        pixels = job.convert(data, job.records.where(i))
        return pixels.shape, finish(pixels), label

    wanted = None
    with (
        ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as threads,
        tqdm(total=job.n, unit="image", disable=None) as bar,
    ):
        for start in range(0, job.n, BLOCK):
            block = job.indices[start : start + BLOCK].tolist()
            made = threads.map(one, block, *zip(*job.records.read(block), strict=True))
            for i, (shape, result, label) in zip(block, made, strict=True):
                wanted = wanted or shape
                if shape != wanted:
                    raise UserError(
                        f"{job.records.where(i)}: height, width, channels {shape}; allowed: {wanted} as "
                        f"{job.records.where(int(job.indices[0]))}; set --resolution and --crop"
                    )
                yield result, label
                bar.update()


def write_zip(
    path: Path,
    examples: Iterable[tuple[bytes, int]],
    num_classes: int,
    name: str = "img{:08d}.png",
    class_names: tuple[str, ...] = (),
) -> None:
    """EDM's format: stored files 00000/img00000000.png ... in order, then dataset.json with the labels.

    The names of the classes lie beside the labels, as "classes": other readers of the format do not look at it.
    """
    labels = []
    with zipfile.ZipFile(path, "x", zipfile.ZIP_STORED) as archive:
        for i, (data, label) in enumerate(examples):
            member = f"{i:08d}"[:5] + "/" + name.format(i)
            archive.writestr(zipfile.ZipInfo(member), data)  # a fixed date: equal input gives equal bytes
            labels.append([member, label])
        named = {"classes": class_names} if class_names else {}
        table = json.dumps({"labels": labels if num_classes else None} | named)
        archive.writestr(zipfile.ZipInfo(tree.LABELS), table)


def target(dst: str) -> Path:
    """The path that will appear: a .zip, or the version directory of a TFDS set.

    Raises:
      UserError: exists already, or is no name that TFDS can read.
    """
    path = Path(dst).expanduser().absolute()
    if path.suffix != ".zip":
        path = path if catalogue.VERSION.fullmatch(path.name) else path / "1.0.0"
        if not path.parent.name.isidentifier():
            raise UserError(
                f"DST {dst}: a TFDS set is <root>/<name>/<version>, name of letters, digits and _; "
                f"seen: {path.parent.name!r}; or end DST in .zip"
            )
    if path.exists():
        raise UserError(f"DST {path} exists; nothing is overwritten: take another name, or move it aside")
    return path


@contextlib.contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """Where to write what appears as `path` when the block ends well; nothing is left behind when it does not.

    Raises:
      UserError: cannot be written, or somebody else made `path` meanwhile.
    """
    base = path.parent if path.suffix == ".zip" else path.parent.parent  # TFDS reads name and version off the path
    temporary = base / f".{uuid.uuid4().hex}.tmp"
    whole = temporary / path.relative_to(base)
    try:
        whole.parent.mkdir(parents=True)
        yield whole
        if path.exists():
            raise UserError(f"DST {path} was made by somebody else meanwhile; nothing is overwritten")
        path.parent.mkdir(exist_ok=True)
        os.rename(whole, path)
    except OSError as e:
        raise UserError(f"DST {path}: {e.strerror or e}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def make(src: str, dst: str, **options) -> Path:
    """Make the set; the options are `Options`, see `python -m ddo_jax.data --help`.

    Returns:
      Its path, as `sources.open_source` takes it.

    Raises:
      UserError: what a user can mend; nothing is left behind.
    """
    job = plan(src, dst, Options(**options))
    with appearing(job.path) as path:
        examples = converted(job, images.encode_png)
        if path.suffix == ".zip":
            write_zip(path, examples, job.records.num_classes, class_names=job.records.class_names)
        else:
            names = job.records.class_names
            catalogue.write(path, examples, job.n, job.shape(), job.records.num_classes, names)
    return job.path
