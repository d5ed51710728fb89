"""Files that are either whole or absent.

Every finished unit of a run is published by a file written last. On a local file system that is a
temporary file and an atomic rename; object stores (gs://) create an object at once or not at all.
"""

import contextlib
import json
import os
import uuid
from collections.abc import Iterator
from typing import Any, BinaryIO

from etils import epath


def _temporary(path: epath.Path) -> epath.Path:
    """Nobody else's name: process ids are equal in two containers on one shared folder."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")


@contextlib.contextmanager
def writing(path: epath.PathLike) -> Iterator[BinaryIO]:
    """A local file to be written bit by bit, for what does not fit into memory: renamed to `path` at the end.

    After an exception there is neither the new file nor a temporary one.
    """
    path = epath.Path(path)
    temporary = _temporary(path)
    try:
        with open(temporary, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: epath.PathLike, data: bytes) -> None:
    """Write `data` so that a reader sees either the old file or the new one, also after kill -9."""
    path = epath.Path(path)
    if "://" in os.fspath(path):
        path.write_bytes(data)
        return
    with writing(path) as f:
        f.write(data)


def write_json(path: epath.PathLike, value: Any) -> None:
    """`write_bytes` of indented JSON."""
    write_bytes(path, (json.dumps(value, indent=1, default=float) + "\n").encode())


def read_json(path: epath.PathLike) -> Any | None:
    """The parsed file, or None if there is none."""
    path = epath.Path(path)
    return json.loads(path.read_text()) if path.exists() else None


def create_exclusive(path: epath.PathLike, data: bytes) -> bool:
    """Create a file if it is absent; False if somebody was first. Atomic on local file systems."""
    path = epath.Path(path)
    if "://" in os.fspath(path):  # no exclusive create through epath: the claim's lease covers the gap
        if path.exists():
            return False
        path.write_bytes(data)
        return True
    temporary = _temporary(path)
    temporary.write_bytes(data)
    try:
        os.link(temporary, path)  # fails if `path` exists, and never shows a half-written file
        return True
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links: exclusive, though a reader may see it before its content
        try:
            with open(path, "xb") as f:
                f.write(data)
            return True
        except FileExistsError:
            return False
    finally:
        temporary.unlink()


def read_jsonl(path: epath.PathLike) -> list[dict]:
    """All whole lines of a JSON-lines file; a torn last line (kill during a write) is left out."""
    path = epath.Path(path)
    records = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records
