"""The pool of fakes: written in chunks, published by `result.json`, read back like the data.

A chunk is an .npz (one CRC-32 per array, checked on reading) published by an atomic rename, so an
interrupted pool continues after its last whole chunk.
"""

import io
import itertools
import zipfile
import zlib

import numpy as np
from etils import epath

from ddo_jax import files
from ddo_jax.data.sources import ArraySource
from ddo_jax.errors import UserError

MARKER = "result.json"
DAMAGED = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError)


def chunk_path(directory: epath.Path, index: int) -> epath.Path:
    return directory / f"chunk-{index:05d}.npz"


def write_chunk(directory: epath.Path, index: int, images: np.ndarray, labels: np.ndarray) -> None:
    """Publish chunk `index`: images uint8 or float32 [n, H, W, C], labels int32 [n]."""
    buffer = io.BytesIO()
    np.savez(buffer, images=images, labels=labels)
    files.write_bytes(chunk_path(directory, index), buffer.getvalue())


def read_chunk(path: epath.Path) -> tuple[np.ndarray, np.ndarray]:
    """(images, labels) of a chunk.

    Raises:
      UserError: missing or damaged; names the file.
    """
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as chunk:
            return chunk["images"], chunk["labels"]
    except DAMAGED as e:
        raise _damaged(path, e) from None


def _damaged(path: epath.Path, reason) -> UserError:
    mend = f"put back a copy, or move {path.parent} aside: the same command makes it anew"
    return UserError(f"pool file {path} is missing or damaged ({reason}); {mend}")


def _labels(path: epath.Path) -> np.ndarray:
    """The labels of a chunk, without its images."""
    try:
        with path.open("rb") as f, np.load(f, allow_pickle=False) as chunk:
            return chunk["labels"]
    except DAMAGED as e:
        raise _damaged(path, e) from None


def is_whole(path: epath.Path) -> bool:
    """Whether a chunk is there and undamaged (an interrupted pool makes the others again)."""
    try:
        read_chunk(path)
        return True
    except UserError:
        return False


def open_pool(directory: epath.Path) -> ArraySource:
    """Read a finished pool (`result.json`: "chunks", "num_classes") as a source, like the data.

    Beside the pool itself no more than a chunk is in memory: 50,000 latents of 64x64x4 have 3.3 GB.

    Raises:
      UserError: not finished, or a chunk that is damaged or unlike the first; it is named.
    """
    marker = files.read_json(directory / MARKER)
    if marker is None:
        raise UserError(f"{directory}: no finished pool ({MARKER} is missing)")
    paths = [chunk_path(directory, i) for i in range(marker["chunks"])]
    labels = [_labels(path) for path in paths]  # first, for they tell the size of the pool
    ends = list(itertools.accumulate(map(len, labels)))
    images = None
    for path, own, end in zip(paths, labels, ends, strict=True):
        part, _ = read_chunk(path)
        if images is None:
            images = np.empty((ends[-1], *part.shape[1:]), part.dtype)
        if part.dtype != images.dtype or part.shape != (len(own), *images.shape[1:]):
            wanted = f"{images.dtype} {(len(own), *images.shape[1:])}"
            raise _damaged(path, f"images {part.dtype} {part.shape}, expected {wanted}")
        images[end - len(own) : end] = part
    return ArraySource(f"pool:{directory.parent.name}", images, np.concatenate(labels), marker["num_classes"])
