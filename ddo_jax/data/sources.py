"""Where real images come from: `open_source(name, split, directory)`.

    digits            scikit-learn's 8x8 digits, prepared on first use
    zip:PATH          EDM's format: PNGs (EDM2: or .npy latents) and dataset.json, or subfolders    (or just PATH.zip)
    folder:PATH       images or latents; one subfolder a class, or dataset.json                     (or just PATH)
    idx:DIR           MNIST's format, plain or gzip: MNIST, Fashion-MNIST                            (see `idx`)
    tfds:NAME         a prepared TFDS set: cifar10, imagenet_resized/64x64, the path of a set

Latents are the posterior of a VAE, mean then standard deviation (see `latents`), as float32 [H, W, 2 C].

Images are read as they are stored (on white where they are transparent, see `images`) and must be equal in size, unless
a rule of `crops` makes them so: photographs, ImageNet's JPEGs.

A source is random access by integer array, so the position of a run in its data is one integer.
"""

import dataclasses
import functools
import math
import os
import threading
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np
from etils import epath
from tqdm import tqdm

from ddo_jax import files
from ddo_jax.data import archives, catalogue, crops, idx, images, latents, tree
from ddo_jax.errors import UserError

CACHE_BYTES = 2**30  # sets up to this many bytes, decoded, are decoded once and kept
THREADS = min(16, os.cpu_count() or 1)
PIECE = 32  # images that a thread reads at a time
LARGE_PIECE = 4  # the same of ImageNet's JPEGs, some 10 ms each: a batch of 64 keeps all threads busy
BLOCK = 1024  # images decoded between two moves of the progress bar


class Source(Protocol):
    """What the pipeline, the evaluation and the checks ask of a set of images.

    Attributes:
      name: names the set in every record, without the place where it lies.
      num_classes: 0 without labels (all labels are then 0).
      class_names: of the classes, by id; () where nobody named them.
      class_counts: images of every class, int64 [num_classes]; None where the set is too large to look.
      image_shape: (H, W, C).
      dtype: of the images: uint8, or float32 for latents.
      max_level: the largest pixel value there is, or can be where the set is too large to look; 0 for latents.
      fingerprint: eight hex digits over the content.
      random_crop: whether `read` takes draws: an example then is not the same at every visit.
    """

    name: str
    num_classes: int
    class_names: tuple[str, ...]
    class_counts: np.ndarray | None
    image_shape: tuple[int, ...]
    dtype: np.dtype
    max_level: int
    fingerprint: str
    random_crop: bool

    def __len__(self) -> int: ...

    def read(self, indices: np.ndarray, draws: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """{"image": uint8 (or float32 latents) [N, H, W, C], "label": int32 [N]} of int [N].

        Args:
          draws: float64 [N, 3], uniform in [0, 1): what a random crop is made of (`crops.crop_var`), for randomness is
            the pipeline's. None: nothing is random. Sources without random crops refuse draws.
        """


class Records(Protocol):
    """Encoded images or latents; safe to read from several threads."""

    name: str
    num_classes: int
    class_names: tuple[str, ...]
    latents: bool
    labels: np.ndarray | None  # int32 [N]; None where the set is too large to look
    fingerprint: str

    def __len__(self) -> int: ...

    def where(self, i: int) -> str:
        """Names image i in an error."""

    def read(self, indices: list[int]) -> list[tuple[bytes, int]]:
        """(file content, label) of each."""


def count_classes(labels: np.ndarray | None, num_classes: int) -> np.ndarray | None:
    """`Source.class_counts` of labels."""
    return None if labels is None else np.bincount(labels, minlength=num_classes)[:num_classes]


def refuse_draws(name: str, draws: np.ndarray | None) -> None:
    if draws is not None:
        raise ValueError(f"{name}: read without draws; nothing is random in images of a fixed size")


@dataclasses.dataclass(frozen=True)
class ArraySource:
    """Examples held in memory: image uint8 (or float32 latents) [N, ...], label int32 [N]."""

    random_crop: ClassVar[bool] = False
    name: str
    images: np.ndarray
    labels: np.ndarray
    num_classes: int
    class_names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.images)

    @property
    def class_counts(self) -> np.ndarray:
        return count_classes(self.labels, self.num_classes)

    @property
    def image_shape(self) -> tuple[int, ...]:
        return self.images.shape[1:]

    @property
    def dtype(self) -> np.dtype:
        return self.images.dtype

    @property
    def max_level(self) -> int:
        return int(self.images.max()) if self.dtype == np.uint8 else 0

    @property
    def fingerprint(self) -> str:
        """CRC-32 of the content, eight hex digits: names the data in every record."""
        crc = zlib.crc32(np.ascontiguousarray(self.images))
        return f"{zlib.crc32(np.ascontiguousarray(self.labels), crc):08x}"

    def read(self, indices: np.ndarray, draws: np.ndarray | None = None) -> dict[str, np.ndarray]:
        refuse_draws(self.name, draws)
        return {"image": self.images[indices], "label": self.labels[indices]}


def in_threads(threads: ThreadPoolExecutor, n: int, piece: int, work: Callable[[range], None]) -> None:
    """work(rows) for pieces of range(n).

    Raises:
      Exception: what a thread raised.
    """
    list(threads.map(work, [range(start, min(start + piece, n)) for start in range(0, n, piece)]))


class OnWhite:
    """Says once that images of a set are not kept as they are stored: an `images.Note`."""

    def __init__(self) -> None:
        self._said, self._lock = False, threading.Lock()

    def __call__(self, where: str, seen: str) -> None:
        with self._lock:
            if not self._said:
                tree.warn(f"{where}: {seen}: shown on white, as all such images of the set")
            self._said = True


Decode = Callable[[bytes, str], np.ndarray]  # (content of a file, where it lies) -> one example


class EncodedSource:
    """Images or latents decoded as they are read; all at the first read, and kept, if they fit into 1 GiB.

    Args:
      decode: of a file's content; None: as `records` holds it, on white where it is transparent. rule: what decode does
        beside that, in words; part of name and fingerprint.

    Raises:
      UserError: here of the first image, in `read` of any: damaged, or not of the size and mode of the first.
    """

    random_crop = False

    def __init__(self, records: Records, decode: Decode | None = None, rule: str = ""):
        self._records, self._lock, self._cache = records, threading.Lock(), None
        self._threads, self._rule = ThreadPoolExecutor(THREADS), rule
        self.name, self.num_classes, self.class_names = records.name, records.num_classes, records.class_names
        self.name += rule and f", {rule}"
        default = latents.decode if records.latents else functools.partial(images.decode, note=OnWhite())
        self._decoder = decode or default
        first = self._decoder(records.read([0])[0][0], records.where(0))
        self.image_shape, self.dtype = first.shape, first.dtype

    def __len__(self) -> int:
        return len(self._records)

    @functools.cached_property
    def class_counts(self) -> np.ndarray | None:
        return count_classes(self._records.labels, self.num_classes)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Of the stored images and the rule: a reference's statistics are kept by it."""
        return _ruled(self._records.fingerprint, self._rule)

    @functools.cached_property
    def max_level(self) -> int:
        if self.dtype != np.uint8:
            return 0
        return int(self._whole()[0].max()) if self._fits() else 255

    def read(self, indices: np.ndarray, draws: np.ndarray | None = None) -> dict[str, np.ndarray]:
        refuse_draws(self.name, draws)
        indices = np.asarray(indices)
        if self._fits():
            pixels, labels = self._whole()
            return {"image": pixels[indices], "label": labels[indices]}
        pixels, labels = self._empty(len(indices))
        self._decode_into(indices, pixels, labels)
        return {"image": pixels, "label": labels}

    def _fits(self) -> bool:
        return len(self) * math.prod(self.image_shape) * self.dtype.itemsize <= CACHE_BYTES

    def _whole(self) -> tuple[np.ndarray, np.ndarray]:
        with self._lock:
            if self._cache is None:
                whole = self._empty(len(self))
                starts = range(0, len(self), BLOCK)
                for start in tqdm(starts, f"reading {self.name}", disable=None, delay=2, leave=False):
                    indices = np.arange(start, min(start + BLOCK, len(self)))
                    self._decode_into(indices, *(part[indices[0] : indices[-1] + 1] for part in whole))
                self._cache = whole
            return self._cache

    def _empty(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        return np.empty((n, *self.image_shape), self.dtype), np.empty(n, np.int32)

    def _decode_into(self, indices: np.ndarray, pixels: np.ndarray, labels: np.ndarray) -> None:
        def piece(rows: range) -> None:
            chosen = [int(indices[row]) for row in rows]
            for row, i, (data, label) in zip(rows, chosen, self._records.read(chosen), strict=True):
                pixels[row], labels[row] = self._decode(data, i), label

        in_threads(self._threads, len(indices), PIECE, piece)

    def _decode(self, data: bytes, i: int) -> np.ndarray:
        where = self._records.where(i)
        pixels = self._decoder(data, where)
        if pixels.shape != self.image_shape:
            raise UserError(
                f"{where}: height, width, channels {pixels.shape}; allowed: {self.image_shape} as the first image, "
                f"{self._records.where(0)}; --config.data.crop=center --config.model.img_resolution=N crops as it "
                "reads, python -m ddo_jax.data SRC DST.zip --resolution=N --crop=center makes a set of equal ones"
            )
        return pixels


def _ruled(fingerprint: str, rule: str) -> str:
    return f"{zlib.crc32(rule.encode(), int(fingerprint, 16)):08x}" if rule else fingerprint


class CroppedSource:
    """Images of any size and mode as RGB squares, by VAR's random crops as they are read; nothing is kept.

    Raises:
      UserError: here of the first image, in `read` of any: damaged, or deeper than 8 bits.
    """

    random_crop = True
    dtype, max_level = np.dtype(np.uint8), 255  # interpolation makes any level

    def __init__(self, records: Records, resolution: int, note: images.Note | None = None):
        self._records, self._rule, self._threads = records, f"var {resolution}", ThreadPoolExecutor(THREADS)
        self._note = note
        self.name, self.num_classes = f"{records.name}, {self._rule}", records.num_classes
        self.class_names = records.class_names
        self.image_shape = (resolution, resolution, 3)
        self.read(np.arange(1))

    def __len__(self) -> int:
        return len(self._records)

    @functools.cached_property
    def class_counts(self) -> np.ndarray | None:
        return count_classes(self._records.labels, self.num_classes)

    @functools.cached_property
    def fingerprint(self) -> str:
        """As `EncodedSource.fingerprint`."""
        return _ruled(self._records.fingerprint, self._rule)

    def read(self, indices: np.ndarray, draws: np.ndarray | None = None) -> dict[str, np.ndarray]:
        pixels, labels = np.empty((len(indices), *self.image_shape), np.uint8), np.empty(len(indices), np.int32)

        def piece(rows: range) -> None:
            chosen = [int(indices[row]) for row in rows]
            for row, i, (data, label) in zip(rows, chosen, self._records.read(chosen), strict=True):
                image = images.convert(data, self._records.where(i), "RGB", self._note)
                pixels[row] = crops.crop_var(image, self.image_shape[0], None if draws is None else draws[row])
                labels[row] = label

        in_threads(self._threads, len(indices), LARGE_PIECE, piece)
        return {"image": pixels, "label": labels}


def data_dir(directory: str | None) -> epath.Path:
    """The config's directory, else $TFDS_DATA_DIR, else TFDS's own default ~/tensorflow_datasets."""
    return files.literal(directory or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets")


def open_digits(split: str, directory: str | None) -> ArraySource:
    """The project's TFDS builder, prepared on first use (2 s), read back whole as a data source."""
    import tensorflow_datasets as tfds
    from absl import logging

    from ddo_jax.data.digits import DdoDigits

    tfds.disable_progress_bar()
    builder = DdoDigits(data_dir=data_dir(directory), file_format="array_record")
    try:
        builder.download_and_prepare()
    except ImportError as e:
        raise UserError(f"dataset 'digits' needs scikit-learn ({e}): python -m pip install -e '.[demo]'") from None
    except OSError as e:
        raise UserError(
            f"data directory {data_dir(directory)}: {e.strerror or e}; set --config.data.dir or TFDS_DATA_DIR"
        ) from None
    try:
        data = builder.as_data_source(split)
    except ValueError:
        known = ", ".join(sorted(builder.info.splits))
        raise UserError(f"split {split!r} of dataset 'digits'; allowed: {known}") from None
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)  # TFDS recommends OpenCV over Pillow: no matter for 2,000 images
    records = data.__getitems__(range(len(data)))
    logging.set_verbosity(verbosity)
    return ArraySource(
        name=f"digits:{split}",
        images=np.stack([r["image"] for r in records]),
        labels=np.array([r["label"] for r in records], np.int32),
        num_classes=10,
    )


KINDS = ("digits", "zip:PATH", "folder:PATH", "idx:DIR", "tfds:NAME")


def open_records(name: str, split: str, directory: str | None = None, *, allow_latents: bool = False) -> Records:
    """The encoded images of "zip:PATH", "folder:PATH", "idx:DIR", "tfds:NAME", or the path of a .zip or directory.

    A relative PATH that is not there is looked for in `directory`. Sets of latents are refused unless allowed: who
    wants pixels must not get floats.

    Raises:
      UserError: unknown name (the known ones are listed), or what it names is missing or damaged.
    """
    kind, _, rest = name.partition(":")
    if kind not in ("zip", "folder", "idx", "tfds") or not rest:
        path = _path(name, directory)
        if name.endswith(".zip"):
            kind, rest = "zip", name
        elif name and path.is_dir():
            versions = files.matching(path, "*.*.*")
            is_set = any((p / "dataset_info.json").exists() for p in (path, *versions))
            kind, rest = ("tfds" if is_set else "folder"), str(path.resolve())
        else:
            raise UserError(
                f"config.data.name: {name!r}; allowed: {', '.join(KINDS)}, the path of a .zip or a directory"
            )
    if kind == "tfds":
        return catalogue.TfdsRecords(rest, split, data_dir(directory))
    if kind == "idx":
        return idx.IdxRecords(_path(rest, directory), split)
    reader = archives.ZipRecords if kind == "zip" else archives.FolderRecords
    return reader(_path(rest, directory), split, allow_latents)


def _path(name: str, directory: str | None) -> Path:
    path = Path(name).expanduser()
    return data_dir(directory) / path if directory and not path.exists() else path


def _check_crop(name: str, crop: str, resolution: int, channels: int) -> None:
    if crop not in crops.CROPS:
        raise UserError(f"config.data.crop: {crop!r}; allowed: {', '.join(map(repr, crops.CROPS))}")
    if crop and name == "digits":
        raise UserError(f"config.data.crop: {crop!r}; allowed with data set 'digits': ''")
    if crop and resolution < 1:
        raise UserError(f"config.model.img_resolution: {resolution}; allowed with data.crop = {crop!r}: 1 or more")
    if crop and channels not in ((3,) if crop == "var" else _MODES):
        allowed = "3" if crop == "var" else "1, 3"
        raise UserError(f"config.model.img_channels: {channels}; allowed with data.crop = {crop!r}: {allowed}")


_MODES = {1: "L", 3: "RGB"}


def _center(resolution: int, channels: int, note: images.Note | None) -> Decode:
    """A file's content -> the central square: photographs are turned upright, any colours become `channels`."""

    def decode(data: bytes, where: str) -> np.ndarray:
        image = images.convert(data, where, _MODES[channels], note, turn=True)
        return np.asarray(crops.crop_center(image, resolution)).reshape(resolution, resolution, channels)

    return decode


def open_source(
    name: str,
    split: str,
    directory: str | None = None,
    *,
    crop: str = "",
    resolution: int = 0,
    channels: int = 3,
    alpha: str = "white",
) -> Source:
    """Open a dataset by name (see the top of this file).

    Args:
      name: of the set. split: "train", "test", or a part, "train[:90%]"; zips and folders have only "train".
      directory: of TFDS sets, and of relative paths; unset: $TFDS_DATA_DIR or ~/tensorflow_datasets.
      crop: "": images as they are stored. Else of any size and mode, resolution x resolution x channels as they are
        read: "center" the central square, "var" VAR's random crops (RGB).
      alpha: "white": transparent images and palettes are shown on white. "refuse": they are refused.

    Raises:
      UserError: unknown name or crop (the known ones are listed), a crop of latents, or what `name` names is missing or
        damaged.
    """
    _check_crop(name, crop, resolution, channels)
    if name == "digits":
        return open_digits(split, directory)
    records = open_records(name, split, directory, allow_latents=True)
    note = OnWhite() if alpha == "white" else None
    if crop and records.latents:
        raise UserError(f"config.data.crop: {crop!r}; allowed with latents, as {records.name} holds them: ''")
    if crop == "var":
        return CroppedSource(records, resolution, note)
    if crop == "center":
        rule = f"center {resolution}{' grey' if channels == 1 else ''}"
        return EncodedSource(records, _center(resolution, channels, note), rule)
    return EncodedSource(records, None if records.latents else functools.partial(images.decode, note=note))


def of_config(config, split: str) -> Source:
    """The data set of a run's config, its training or its held-out part, as the run sees it.

    Raises:
      UserError: as `open_source`.
    """
    c, m = config.data, config.model
    size = {"resolution": m.img_resolution, "channels": m.img_channels} if c.crop else {}
    return open_source(c.name, split, c.dir, crop=c.crop, alpha=c.alpha, **size)
