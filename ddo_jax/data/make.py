"""From a folder, zip or TFDS set to a set of equal images in EDM's zip format or as array_record.

What `python -m ddo_jax.data` does. Nothing is overwritten: the result appears under its name when it is whole.
"""

import json
import os
import shutil
import uuid
import zipfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from ddo_jax.data import archives, catalogue, images, sources
from ddo_jax.errors import UserError

BLOCK = 256  # images in work at a time
MODES = {1: "L", 3: "RGB"}


def center_box(image: Image.Image, size: int) -> Image.Image:
    """The central size x size pixels; an odd rest stays at the right and at the bottom."""
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def crop_center(image: Image.Image, size: int) -> Image.Image:
    """EDM: the central square, then Lanczos to size x size."""
    return center_box(image, min(image.size)).resize((size, size), Image.Resampling.LANCZOS)


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


CROPS = {"center": crop_center, "center-dhariwal": crop_center_dhariwal, "none": no_crop}


def converter(resolution: int | None, crop: str, channels: int) -> Callable[[bytes, str], np.ndarray]:
    """convert(file content, where) -> uint8 [H, W, C]: colours first (alpha is dropped), then size.

    Raises:
      UserError: here for options that do not go together; in `convert` for a bad image, which is named.
    """
    if crop not in CROPS:
        raise UserError(f"--crop={crop}; allowed: {', '.join(CROPS)}")
    if channels not in MODES:
        raise UserError(f"--channels={channels}; allowed: 3 (RGB) or 1 (greyscale)")
    if resolution is None and crop != "none":
        raise UserError(f"--crop={crop} needs a size; set --resolution=64 or another")
    if resolution is not None and resolution < 1:
        raise UserError(f"--resolution={resolution}; allowed: 1 or more pixels")

    def convert(data: bytes, where: str) -> np.ndarray:
        image = images.open_image(data, where)[0].convert(MODES[channels])
        if resolution is not None and image.size != (resolution, resolution):
            try:
                image = CROPS[crop](image, resolution)
            except UserError as e:
                raise UserError(f"{where}: {e}") from None
        return np.asarray(image).reshape(image.height, image.width, channels)

    return convert


def converted(records: sources.Records, n: int, convert) -> Iterator[tuple[np.ndarray, bytes, int]]:
    """(pixels, PNG, label) of the first n images in order, made in threads.

    Raises:
      UserError: a bad image, or one of another size than the first; it is named.
    """

    def one(i: int, data: bytes, label: int) -> tuple[np.ndarray, bytes, int]:
        pixels = convert(data, records.where(i))
        return pixels, images.encode_png(pixels), label

    shape = None
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as threads:
        for start in tqdm(range(0, n, BLOCK), f"{n} images, in {BLOCK}s", disable=None):
            block = list(range(start, min(start + BLOCK, n)))
            for i, made in zip(block, threads.map(one, block, *zip(*records.read(block), strict=True)), strict=True):
                shape = shape or made[0].shape
                if made[0].shape != shape:
                    raise UserError(
                        f"{records.where(i)}: height, width, channels {made[0].shape}; allowed: {shape} as "
                        f"{records.where(0)}; set --resolution and --crop"
                    )
                yield made


def write_zip(path: Path, examples: Iterable[tuple[bytes, int]], num_classes: int) -> None:
    """EDM's format: stored PNGs 00000/img00000000.png ... in order, then dataset.json with the labels."""
    labels = []
    with zipfile.ZipFile(path, "x", zipfile.ZIP_STORED) as archive:
        for i, (png, label) in enumerate(examples):
            name = f"{i:08d}"[:5] + f"/img{i:08d}.png"
            archive.writestr(zipfile.ZipInfo(name), png)  # a fixed date: equal input gives equal bytes
            labels.append([name, label])
        table = json.dumps({"labels": labels if num_classes else None})
        archive.writestr(zipfile.ZipInfo(archives.LABELS), table)


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
        raise UserError(f"DST {path} exists; nothing is overwritten: remove it or take another name")
    return path


def make(
    src: str,
    dst: str,
    *,
    split: str = "train",
    data_dir: str | None = None,
    resolution: int | None = None,
    crop: str = "none",
    channels: int = 3,
    max_images: int | None = None,
) -> Path:
    """Make the set; see `python -m ddo_jax.data --help`.

    Returns:
      Its path, as `sources.open_source` takes it.

    Raises:
      UserError: what a user can mend; nothing is left behind.
    """
    path, convert = target(dst), converter(resolution, crop, channels)
    if max_images is not None and max_images < 1:
        raise UserError(f"--max_images={max_images}; allowed: 1 or more")
    records = sources.open_records(src, split, data_dir)
    n = min(len(records), max_images or len(records))
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex}.tmp"
    if path.suffix != ".zip":  # TFDS reads name and version off the last two parts
        temporary = path.parent.parent / f".{uuid.uuid4().hex}.tmp"
    try:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        made = converted(records, n, convert)
        if path.suffix == ".zip":
            write_zip(temporary, (example[1:] for example in made), records.num_classes)
            whole = temporary
        else:
            shape = convert(records.read([0])[0][0], records.where(0)).shape
            whole = temporary / path.parent.name / path.name
            catalogue.write(whole, (example[1:] for example in made), n, shape, records.num_classes)
        if path.exists():
            raise UserError(f"DST {path} was made by somebody else meanwhile; nothing is overwritten")
        path.parent.mkdir(exist_ok=True)
        os.rename(whole, path)
    except OSError as e:
        raise UserError(f"DST {path}: {e.strerror or e}") from None
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        temporary.unlink(missing_ok=True)
    return path
