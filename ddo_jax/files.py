"""Files that are either whole or absent.

Every finished unit of a run is published by a file written last. On a local file system that is a
temporary file and an atomic rename; object stores (gs://) create an object at once or not at all.
"""

import contextlib
import errno
import fnmatch
import hashlib
import json
import os
import re
import sys
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from etils import epath

from ddo_jax.errors import UserError


def matching(directory: epath.PathLike, pattern: str) -> list[epath.Path]:
    """The entries of a folder whose names match, sorted; [] if there is no such folder.

    `epath.Path.glob` takes the whole path as a pattern: of `run[1]/` it lists `run1/`. Here the folder is a name.

    Args:
      pattern: of one name, as in "chunk-*.npz"; names that begin with a dot match patterns that do so only.
    """
    wanted, hidden = re.compile(fnmatch.translate(pattern)), pattern.startswith(".")
    try:
        found = [p for p in epath.Path(directory).iterdir() if hidden or not p.name.startswith(".")]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(p for p in found if wanted.fullmatch(p.name))


class Literal(type(epath.Path("."))):
    """A path for libraries that call `glob` on it (Orbax, TFDS): its own characters are no pattern."""

    def glob(self, pattern: str) -> Iterator["Literal"]:
        first, _, rest = pattern.partition("/")
        for path in matching(self, first):
            yield from path.glob(rest) if rest else (path,)


def literal(path: epath.PathLike) -> Literal:
    """`path`, absolute, as such a path; what is derived from it is one, too."""
    text = os.path.expanduser(os.fspath(path))
    if "://" in text:
        return Literal(text)
    local = Path(text)
    return Literal(local.resolve() if ".." in local.parts else local.absolute())  # behind a link `..` leads elsewhere


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


def cache_dir(name: str) -> Path:
    """$XDG_CACHE_HOME/ddo_jax/<name>, by default ~/.cache/ddo_jax/<name>; it may not be there, or not be writable.

    Where there is no home it lies in the folder for temporary files.
    """
    home = os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    if home.startswith("~"):
        home = os.path.join(tempfile.gettempdir(), f"cache-{os.getuid()}")
    return Path(home) / "ddo_jax" / name


def keep(path: epath.PathLike, data: bytes, what: str) -> None:
    """Write a file that only saves time; where that cannot be, a note on stderr says so."""
    path = epath.Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, data)
    except OSError as e:
        print(f"note: {what} not kept for the next time: {path}: {e.strerror or e}", file=sys.stderr)


def digest(path: os.PathLike | str) -> str:
    """Twelve hex digits of the SHA-256 of a local file."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()[:12]


def kept(path: epath.PathLike) -> bytes | None:
    """The content of such a file; None if it is not there, or cannot be read."""
    try:
        return epath.Path(path).read_bytes()
    except OSError:
        return None


FULL = ("No space left on device", "Disk quota exceeded", "RESOURCE_EXHAUSTED: Error writing")


def is_full(error: BaseException) -> bool:
    """Whether an exception, or one that it came from, says that a disk is full; TensorStore has its own."""
    return any(
        getattr(e, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or any(words in str(e) for words in FULL)
        for e in _origins(error)
    )


def _origins(error: BaseException) -> list[BaseException]:
    """An exception and all that it came from."""
    found, new = [], [error]
    while new:
        e = new.pop()
        if e is not None and not any(e is other for other in found):
            found.append(e)
            new += [e.__cause__, e.__context__]
    return found


@contextlib.contextmanager
def full_disk(kept: str) -> Iterator[None]:
    """A full disk while something is written becomes one line.

    Args:
      kept: what there is nevertheless, and what to do.

    Raises:
      UserError: the disk is full.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as e:
        if not is_full(e):
            raise
        name = next((x.filename for x in _origins(e) if isinstance(x, OSError) and x.filename), None)
        raise UserError(f"no space left on the disk{f' ({name})' if name else ''}; {kept}") from e
