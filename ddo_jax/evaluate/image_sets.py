"""Sets of images, read as streams: a folder, a zip, an .npz (arr_0), a pool, a dataset."""

import dataclasses
import math
import sys
import zipfile
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ddo_jax import files, npz
from ddo_jax.data import archives, images, pool, sources, tree
from ddo_jax.data.labelling import MOST_CLASSES
from ddo_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """Images to be read in order, more than once if need be.

    Attributes:
      name, num, shape: of the set, its images, one image (H, W, C).
      levels: grey levels of its pixels. num_classes: 0 where labels are unknown.
      records: size -> iterator of {"image": uint8 [n, H, W, C], "label": int32 [n] (of subfolders where nothing
        better is known), "id": n names}, n <= size.
      content: of the file, where it is known without reading the images.
      lossy: kinds of files that lost detail ("JPEG"); filled as images are read.
    """

    name: str
    num: int
    shape: tuple[int, ...]
    levels: int
    num_classes: int
    records: Callable[[int], Iterator[dict]]
    content: str = ""
    lossy: set[str] = dataclasses.field(default_factory=set)


class Streamed(sources.EncodedSource):
    """Images that are read once: nothing is kept but the kinds of files that lost detail, in `lossy`."""

    def __init__(self, records: Any) -> None:
        self.lossy: set[str] = set()
        super().__init__(records)

    def _fits(self) -> bool:
        return False

    def _decode(self, data: bytes, i: int) -> np.ndarray:
        if kind := images.lossy_kind(data):
            self.lossy.add(kind)
        return super()._decode(data, i)


def chosen(n: int, num: int | None) -> np.ndarray:
    """Which of n images are scored: all, or a random `num` of them with seed 0, in order (the EDM tools' rule).

    Raises:
      UserError: more than there are.
    """
    if num is not None and not 2 <= num <= n:
        raise UserError(f"--num: {num}; allowed: 2 to the {n} images there are")
    order = np.arange(n)
    if num is not None and num < n:
        np.random.RandomState(0).shuffle(order)
        order = np.sort(order[:num])
    return order


def _encoded(records: Any, labelled: bool, num: int | None) -> ImageSet:
    source, indices = Streamed(records), chosen(len(records), num)

    def read(size: int) -> Iterator[dict]:
        for i in range(0, len(indices), size):
            rows = indices[i : i + size]
            names = [records.where(int(j)).rsplit("/", 1)[-1].rsplit(": ", 1)[-1] for j in rows]
            yield source.read(rows) | {"id": [name.rsplit(".", 1)[0] for name in names]}

    classes = records.num_classes if labelled else 0
    return ImageSet(records.name, len(indices), source.image_shape, 256, classes, read, lossy=source.lossy)


def of_source(source: Any, limit: int | None = None, levels: int = 256) -> ImageSet:
    """A dataset, or `limit` of its images, evenly spread (the classes may lie one after the other)."""
    indices = np.arange(len(source))
    if limit is not None and limit < len(source):
        indices = np.linspace(0, len(source) - 1, limit).round().astype(np.int64)

    def read(size: int) -> Iterator[dict]:
        for i in range(0, len(indices), size):
            yield source.read(indices[i : i + size]) | {"id": [str(j) for j in indices[i : i + size]]}

    content = f"{source.fingerprint}-{len(source)}"
    return ImageSet(source.name, len(indices), source.image_shape, levels, source.num_classes, read, content)


def first(images: ImageSet, num: int) -> ImageSet:
    """The first `num` images of a set."""

    def read(size: int) -> Iterator[dict]:
        left = num
        for record in images.records(size):
            yield {k: v[:left] for k, v in record.items()}
            left -= len(record["image"])
            if left <= 0:
                return

    return dataclasses.replace(images, num=min(num, images.num), records=read)


def _exactly(file: Any, size: int) -> bytes:
    parts = []
    while size > 0:
        part = file.read(size)
        if not part:
            raise EOFError("it ends early")
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def _npz_extra(path: Path, names: tuple[str, ...], n: int) -> np.ndarray | None:
    """The first of `names` that is an array of n integers."""
    headers = npz.headers(path)
    for name in names:
        if name in headers and headers[name].shape == (n,) and headers[name].dtype.kind in "iu":
            return npz.read(path, [name])[name]
    return None


def of_npz(path: Path, num: int | None = None) -> ImageSet:
    """arr_0 of an .npz, read from the file as it is needed: such files have 10 GB.

    Raises:
      UserError: damaged, or arr_0 is not uint8 [N, H, W, 1 or 3]; here or while it is read.
    """
    try:
        there = npz.names(path)
        if "arr_0" not in there:
            raise UserError(f"{path}: no arr_0 among {', '.join(there[:9])}; it must hold the images")
        with npz.reading(), npz.opened(path) as archive, archive.open("arr_0.npy") as file:
            member = npz.header(archive, "arr_0", file)
            content = f"{archive.getinfo('arr_0.npy').CRC:08x}"
        fits = len(member.shape) == 4 and member.shape[0] and member.shape[3] in (1, 3)
        if member.dtype != np.uint8 or not fits or member.fortran:
            order = " in Fortran order" if member.fortran else ""
            raise UserError(
                f"{path}: arr_0 is {member.dtype} {member.shape}{order}; allowed: uint8 (N, H, W, 3) or (N, H, W, 1)"
            )
        n = member.shape[0]
        labels, seeds = _npz_extra(path, ("labels", "arr_1"), n), _npz_extra(path, ("seeds",), n)
    except (npz.Damaged, OSError) as e:
        raise UserError(f"{path}: damaged or no .npz ({e}); restore the file") from None
    if labels is not None and not 0 <= labels.min() <= labels.max() < MOST_CLASSES:
        raise UserError(f"{path}: labels from {labels.min()} to {labels.max()}; allowed: 0 to {MOST_CLASSES - 1:,}")
    indices = chosen(n, num)
    wanted = np.zeros(n, bool)
    wanted[indices] = True

    def read(size: int) -> Iterator[dict]:
        try:
            with npz.reading(), npz.opened(path) as archive, archive.open("arr_0.npy") as file:
                npz.header(archive, "arr_0", file)
                for i in range(0, n, size):
                    count = min(size, n - i)
                    data = _exactly(file, count * math.prod(member.shape[1:]))
                    rows = np.flatnonzero(wanted[i : i + count])
                    if len(rows):
                        pixels = np.frombuffer(data, np.uint8).reshape(count, *member.shape[1:])
                        record = {"image": pixels[rows], "id": [_id(seeds, i + j) for j in rows]}
                        yield record | ({} if labels is None else {"label": labels[i + rows].astype(np.int32)})
        except npz.Damaged as e:
            raise UserError(f"{path}: arr_0 is damaged ({e}); restore the file") from None

    classes = 0 if labels is None else int(labels.max()) + 1
    return ImageSet(f"npz:{path.name}", len(indices), member.shape[1:], 256, classes, read, content)


def _id(seeds: np.ndarray | None, i: Any) -> str:
    return f"{int(i if seeds is None else seeds[i]):06d}"


def of_pool(directory: Path, num: int | None = None, levels: int = 256) -> ImageSet:
    """The chunks of a pool, one at a time.

    Raises:
      UserError: a damaged chunk, latents instead of images, or chunks of different shapes.
    """
    paths = files.matching(directory, "chunk-*.npz")
    first, labels = pool.read_chunk(paths[0])
    if first.dtype != np.uint8 or first.ndim != 4:
        raise UserError(
            f"{paths[0]}: {first.dtype} {first.shape}; a pool of latents cannot be scored, only uint8 images"
        )
    counts, classes = [], 0
    for path in paths:
        labels = pool.read_labels(path)
        counts.append(len(labels))
        classes = max(classes, int(labels.max(initial=0)) + 1)
    starts = np.cumsum([0, *counts])
    indices = chosen(int(starts[-1]), num)

    def read(size: int) -> Iterator[dict]:
        for path, start, end in zip(paths, starts[:-1], starts[1:], strict=True):
            pixels, labels = pool.read_chunk(path)
            if pixels.shape[1:] != first.shape[1:] or pixels.dtype != np.uint8:
                raise UserError(f"{path}: {pixels.dtype} {pixels.shape[1:]}; allowed: uint8 {first.shape[1:]}")
            rows = indices[(indices >= start) & (indices < end)] - start
            for i in range(0, len(rows), size):
                part = rows[i : i + size]
                yield {"image": pixels[part], "label": labels[part], "id": [_id(None, start + j) for j in part]}

    return ImageSet(f"pool:{directory.name}", len(indices), first.shape[1:], levels, classes, read)


def is_npz(path: Path) -> bool:
    """Whether a file is an .npz, by its content: a zip of .npy members."""
    try:
        return bool(npz.names(path))
    except npz.Damaged:
        return False


def open_images(what: str, num: int | None = None, pool_levels: int = 256) -> ImageSet:
    """A set of images by path.

    Args:
      what: a folder (any depth), a zip, an .npz with arr_0, a pool. num: only so many (see `chosen`).
      pool_levels: grey levels of a pool, which does not record them.

    Raises:
      UserError: nothing usable there; names what is wrong, here or while it is read.
    """
    path = Path(what).expanduser()
    if path.is_dir():
        if files.matching(path, "chunk-*.npz"):
            return of_pool(path, num, pool_levels)
        records = archives.FolderRecords(path, "train", labelled=False)
        return _encoded(records, (path / tree.LABELS).exists(), num)
    if not path.exists():
        raise UserError(f"--images: {what}: no such folder or file; allowed: a folder, zip, npz or pool of images")
    if is_npz(path):
        return of_npz(path, num)
    images_of_zip = archives.ZipRecords(path, "train", labelled=False)  # first: it names what is wrong with a file
    with zipfile.ZipFile(path) as archive:
        labelled = tree.LABELS in archive.namelist()
    return _encoded(images_of_zip, labelled, num)


def stored(name: str, shape: tuple[int, ...], lossy: Collection[str], reference: tuple[int, ...] | None) -> dict:
    """What of the images' own size and files a number depends on, for its protocol; a word on stderr if unusual.

    Args:
      name, shape, lossy: of the scored set. reference: shape of the reference's images, or None if not known.
    """
    found = {"size": "x".join(map(str, shape))}
    if reference is not None and tuple(reference[:2]) != tuple(shape[:2]):
        found["size"] += f", the reference's {'x'.join(map(str, reference))}"
        print(f"note: {name}: images of {found['size']}: sizes differ, and resizing shows in scores", file=sys.stderr)
    if lossy:
        found["files"] = f"lossy: {', '.join(sorted(lossy))}"
        text = f"note: {name}: {found['files']}: compression changes distances; keep samples as PNG or .npz"
        print(text, file=sys.stderr)
    return found
