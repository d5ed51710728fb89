"""The pool of fakes: written in chunks, published by `result.json`, read back like the data.

A chunk is an .npz (one CRC-32 per array, checked on reading) published by an atomic rename, so an
interrupted pool continues after its last whole chunk.
"""

import hashlib
import io
import itertools

import numpy as np
from etils import epath

from ddo_jax import files, npz
from ddo_jax.data.sources import ArraySource
from ddo_jax.errors import UserError

MARKER = "result.json"
DAMAGED = (OSError, npz.Damaged, KeyError)


def chunk_path(directory: epath.Path, index: int) -> epath.Path:
    return directory / f"chunk-{index:05d}.npz"


def write_chunk(
    directory: epath.Path, index: int, images: np.ndarray, labels: np.ndarray, seeds: np.ndarray | None = None
) -> str:
    """Publish chunk `index`: images uint8 or float32 [n, H, W, C], labels int32 [n], seeds uint32 [n]; its digest."""
    buffer = io.BytesIO()
    np.savez(buffer, images=images, labels=labels, **({} if seeds is None else {"seeds": seeds}))
    files.write_bytes(chunk_path(directory, index), buffer.getvalue())
    return digest(images, labels)


def digest(images: np.ndarray, labels: np.ndarray) -> str:
    """Twelve hex digits of a chunk's content; those of all chunks stand in the pool's result.json."""
    content = hashlib.sha256()
    for array in (images, labels):
        content.update(f"{array.dtype} {array.shape}".encode())
        content.update(np.ascontiguousarray(array))
    return content.hexdigest()[:12]


def read_chunk(
    path: epath.Path, expected: str | None = None, seeds: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(images, labels) of a chunk.

    Args:
      expected: its digest, if known. seeds: those that it must be of (chunks before 2026-12 do not say theirs).

    Raises:
      UserError: missing, damaged or another one; names the file.
    """
    try:
        arrays = npz.read(path.read_bytes())
        images, labels = arrays["images"], arrays["labels"]
    except DAMAGED as e:
        raise _damaged(path, e) from None
    if images.ndim < 2 or labels.shape != (len(images),) or labels.dtype.kind not in "iu":
        raise _damaged(path, f"images {images.shape}, labels {labels.dtype} {labels.shape}")
    other = seeds is not None and not np.array_equal(arrays.get("seeds", seeds), seeds)
    if other or expected not in (None, digest(images, labels)):
        raise _damaged(path, "its content is of another chunk" if other else "its content does not match its digest")
    return images, labels


def _damaged(path: epath.Path, reason) -> UserError:
    mend = f"put back a copy, or move {path.parent} aside: the same command makes it anew"
    return UserError(f"pool file {path} is missing or damaged ({reason}); {mend}")


def read_labels(path: epath.Path) -> np.ndarray:
    """The labels of a chunk, without its images."""
    try:
        with path.open("rb") as f:
            return npz.read(f, ["labels"])["labels"]
    except DAMAGED as e:
        raise _damaged(path, e) from None


def kept_digest(path: epath.Path, expected: str | None, seeds: np.ndarray) -> str | None:
    """The digest of a chunk that is there and right; None of any other (an interrupted pool makes those again)."""
    try:
        return digest(*read_chunk(path, expected, seeds))
    except UserError:
        return None


def problem(directory: epath.Path, result: dict) -> str:
    """The first chunk of a finished pool that is not as it was written, in words; "" if there is none."""
    try:
        for path, expected in _chunks(directory, result):
            read_chunk(path, expected)
    except UserError as e:
        return str(e).partition(";")[0]
    return ""


def _chunks(directory: epath.Path, result: dict) -> list[tuple[epath.Path, str | None]]:
    """(path, digest) of every chunk; pools before 2026-12 have no digests.

    Raises:
      UserError: it is no record of a pool.
    """
    number = result.get("chunks")
    digests = result.get("digests", [None] * number if type(number) is int and 0 < number < 10**7 else None)
    if type(number) is not int or not isinstance(digests, list) or len(digests) != number or number < 1:
        raise _damaged(directory / MARKER, "it is no record of a pool")
    return [(chunk_path(directory, i), d) for i, d in enumerate(digests)]


def open_pool(directory: epath.Path) -> ArraySource:
    """Read a finished pool (`result.json`: "chunks", "num_classes") as a source, like the data.

    Beside the pool itself no more than a chunk is in memory: 50,000 latents of 64x64x4 have 3.3 GB.

    Raises:
      UserError: not finished, or a chunk that is damaged or unlike the first; it is named.
    """
    try:
        marker = files.read_sealed(directory / MARKER)
    except files.Damaged as e:
        raise _damaged(directory / MARKER, e) from None
    if marker is None:
        raise UserError(f"{directory}: no finished pool ({MARKER} is missing)")
    chunks = _chunks(directory, marker)
    labels = [read_labels(path) for path, _ in chunks]  # first, for they tell the size of the pool
    ends = list(itertools.accumulate(map(len, labels)))
    images = None
    for (path, expected), own, end in zip(chunks, labels, ends, strict=True):
        part, _ = read_chunk(path, expected)
        if images is None:
            images = np.empty((ends[-1], *part.shape[1:]), part.dtype)
        if part.dtype != images.dtype or part.shape != (len(own), *images.shape[1:]):
            wanted = f"{images.dtype} {(len(own), *images.shape[1:])}"
            raise _damaged(path, f"images {part.dtype} {part.shape}, expected {wanted}")
        images[end - len(own) : end] = part
    labels, num_classes = np.concatenate(labels), marker.get("num_classes")
    if type(num_classes) is not int or labels.min(initial=0) < 0 or labels.max(initial=0) > max(num_classes, 0):
        raise _damaged(directory / MARKER, f"labels up to {labels.max(initial=0)} of {num_classes} classes")
    return ArraySource(f"pool:{directory.parent.name}", images, labels, num_classes)
