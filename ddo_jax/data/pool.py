"""The pool of fakes: written in chunks, published by `result.json`, read back like the data.

A chunk is an .npz (one CRC-32 per array, checked on reading) published by an atomic rename, so an
interrupted pool continues after its last whole chunk.
"""

import io
import zipfile
import zlib

import numpy as np
from etils import epath

from ddo_jax import files
from ddo_jax.data.sources import ArraySource
from ddo_jax.errors import UserError

MARKER = "result.json"


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
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as e:
        raise UserError(f"pool file {path} is missing or damaged ({e}); remove {path.parent} and start again") from None


def is_whole(path: epath.Path) -> bool:
    """Whether a chunk is there and undamaged (an interrupted pool makes the others again)."""
    try:
        read_chunk(path)
        return True
    except UserError:
        return False


def open_pool(directory: epath.Path) -> ArraySource:
    """Read a finished pool (`result.json`: "chunks", "num_classes") as a source, like the data.

    Raises:
      UserError: not finished, or a damaged chunk, which is named.
    """
    marker = files.read_json(directory / MARKER)
    if marker is None:
        raise UserError(f"{directory}: no finished pool ({MARKER} is missing)")
    chunks = [read_chunk(chunk_path(directory, i)) for i in range(marker["chunks"])]
    images, labels = (np.concatenate(parts) for parts in zip(*chunks, strict=True))
    return ArraySource(f"pool:{directory.parent.name}", images, labels, marker["num_classes"])
