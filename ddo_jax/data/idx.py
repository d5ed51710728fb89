"""MNIST's format: two files of a split, images and labels, plain or gzip (MNIST, Fashion-MNIST, KMNIST, EMNIST).

    train-images-idx3-ubyte[.gz]  train-labels-idx1-ubyte[.gz]      split "train"
    t10k-images-idx3-ubyte[.gz]   t10k-labels-idx1-ubyte[.gz]       split "test"

Four bytes (0, 0, type, number of axes), the lengths as big-endian uint32, the values; only unsigned bytes (type 8) are
images. Four axes are images of several channels. Images are handed on as PNG: a set is what any other set is.
"""

import gzip
import zlib
from pathlib import Path

import numpy as np

from ddo_jax.data import labelling
from ddo_jax.data.images import encode_png
from ddo_jax.errors import UserError

SPLITS = {"train": "train", "test": "t10k"}
UNSIGNED_BYTE = 8
MOST_BYTES = 2**32  # of a file, unpacked


def _path(folder: Path, split: str, what: str, axes: str) -> Path:
    """The file of a split's images or labels."""
    stems = [f"{SPLITS[split]}-{what}{sep}idx{n}-ubyte" for sep in "-." for n in axes]
    found = [p for stem in stems for end in ("", ".gz") if (p := folder / f"{stem}{end}").is_file()]
    if not found:
        there = [s for s, name in SPLITS.items() if any(folder.glob(f"{name}-{what}*"))]
        known = f"; there: {', '.join(there)}" if there else ""
        raise UserError(f"idx:{folder}: no {stems[0]} or {stems[0]}.gz, the {what} of split {split!r}{known}")
    return found[0]


def read_idx(path: Path) -> np.ndarray:
    """uint8 array of a file, read-only.

    Raises:
      UserError: no such file, damaged, or of other values than unsigned bytes.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as f:
            data = f.read(MOST_BYTES + 1)
    except (OSError, EOFError, zlib.error) as e:
        raise UserError(f"{path}: damaged or unreadable ({e}); restore the file") from None
    if len(data) < 4 or data[:2] != b"\0\0" or data[2] != UNSIGNED_BYTE or not 1 <= data[3] <= 4:
        raise UserError(f"{path}: begins with {data[:4]!r}; an idx file of unsigned bytes begins with 0, 0, 8, 1 to 4")
    start = 4 + 4 * data[3]
    shape = tuple(int(n) for n in np.frombuffer(data[4:start], ">u4"))
    if len(data) - start != np.prod(shape, dtype=np.float64) or len(shape) != data[3]:
        raise UserError(f"{path}: {len(data) - start} values; its header says {shape}; restore the file")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


class IdxRecords:
    """Images of a folder in MNIST's format, as `sources.Records`.

    Args:
      split: "train", "test", or a part, "train[:90%]".

    Raises:
      UserError: a file is missing or damaged, images and labels do not fit together, another split.
    """

    latents = False
    class_names: tuple[str, ...] = ()

    def __init__(self, folder: Path, split: str):
        which, bracket, part = split.partition("[")
        if which not in SPLITS:
            raise UserError(f"split {split!r} of idx:{folder.name}; allowed: train, test, or parts, train[:90%] ...")
        if not folder.is_dir():
            raise UserError(f"idx:{folder}: {'not a folder' if folder.exists() else 'does not exist'}")
        self._path = _path(folder, which, "images", "34")
        images, labels = read_idx(self._path), read_idx(_path(folder, which, "labels", "1"))
        if images.ndim not in (3, 4) or labels.shape != images.shape[:1] or not len(images):
            raise UserError(f"{self._path}: images {images.shape} with labels {labels.shape}; they must be as many")
        if 0 in images.shape or images.shape[3:] not in ((), (1,), (3,)):
            raise UserError(f"{self._path}: images {images.shape}; allowed: [N, H, W], or [N, H, W, C] with C = 1 or 3")
        self.name, self.num_classes = f"idx:{folder.resolve().name}:{split}", int(labels.max()) + 1
        whole = labelling.Labelling(labels.astype(np.int32), self.num_classes, ())
        self._rows = labelling.split_indices(f"train{bracket}{part}", len(labels), self.name, whole)
        self._images, self.labels = images, whole.labels[self._rows]

    def __len__(self) -> int:
        return len(self._rows)

    def where(self, i: int) -> str:
        return f"{self._path}: image {self._rows[i]}"

    def read(self, indices: list[int]) -> list[tuple[bytes, int]]:
        rows = [np.atleast_3d(self._images[self._rows[i]]) for i in indices]
        return [(encode_png(row), int(self.labels[i])) for i, row in zip(indices, rows, strict=True)]

    @property
    def fingerprint(self) -> str:
        """Of the pixels and labels."""
        return f"{zlib.crc32(self.labels.tobytes(), zlib.crc32(self._images[self._rows].tobytes())):08x}"
