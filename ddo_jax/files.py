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
import socket
import sys
import tempfile
import uuid
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from etils import epath

from ddo_jax import stores
from ddo_jax.errors import UserError, one_line


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
    if stores.is_remote(text):
        stores.prepare()
        return Literal(text)
    local = Path(text)
    return Literal(local.resolve() if ".." in local.parts else local.absolute())  # behind a link `..` leads elsewhere


def host_id() -> str:
    """Eight hex digits of this host's name, for names of files."""
    return f"{zlib.crc32(socket.gethostname().encode()):08x}"


def _temporary(path: epath.Path) -> epath.Path:
    """Nobody else's name (process ids are equal in two containers on one shared folder) that tells whose it is."""
    return path.with_name(f".{path.name[:50]}.{host_id()}-{os.getpid()}-{uuid.uuid4().hex[:16]}.tmp")


def is_running(pid: int) -> bool:
    """Whether there is a process of that number on this host."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


_LEFT = re.compile(r"\..+\.(?:([0-9a-f]{8})-(\d+)-[0-9a-f]{16}|[0-9a-f]{32})\.tmp")  # the latter before 2026-12


def remove_leftovers(root: epath.PathLike, age_s: float) -> list[epath.Path]:
    """Remove the temporary files of writers that were killed, anywhere below a local folder.

    Args:
      age_s: of another host's writer nothing is known: its file goes when it has not grown for so long.

    Returns:
      What was removed. What cannot be removed stays.
    """
    removed = []
    if stores.is_remote(root):
        return removed
    now = filesystem_time(root)
    for directory, _, names in os.walk(root):
        for name in names:
            path = os.path.join(directory, name)
            with contextlib.suppress(OSError):
                if (match := _LEFT.fullmatch(name)) and _is_left(match, now - os.stat(path).st_mtime, age_s):
                    os.unlink(path)
                    removed.append(epath.Path(path))
    return removed


def _is_left(match: re.Match, age: float, age_s: float) -> bool:
    host, pid = match[1], match[2]
    return age > age_s or (host == host_id() and not is_running(int(pid)))


def filesystem_time(directory: epath.PathLike) -> float:
    """Now, by the clock that stamps the files of a folder: those of two hosts on a shared one may differ."""
    with tempfile.TemporaryFile(dir=directory) as probe:
        probe.write(b"x")
        probe.flush()
        return os.fstat(probe.fileno()).st_mtime


@contextlib.contextmanager
def writing(path: epath.PathLike) -> Iterator[BinaryIO]:
    """A local file to be written bit by bit, for what does not fit into memory: renamed to `path` at the end.

    After an exception there is neither the new file nor a temporary one.
    """
    path = epath.Path(path)
    if stores.is_remote(path):
        with path.open("wb") as f:
            yield f
        return
    if os.path.exists(path) and not os.path.isfile(path):  # a rename would take its place, also a device's
        raise OSError(errno.EEXIST, "it exists and is no regular file", os.fspath(path))
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
    if stores.is_remote(path):
        path.write_bytes(data)
        return
    with writing(path) as f:
        f.write(data)


def json_bytes(value: Any) -> bytes:
    """Indented JSON."""
    return (json.dumps(value, indent=1, default=float) + "\n").encode()


def write_json(path: epath.PathLike, value: Any) -> None:
    """`write_bytes` of `json_bytes`."""
    write_bytes(path, json_bytes(value))


def read_json(path: epath.PathLike) -> Any | None:
    """The parsed file, or None if there is none."""
    path = epath.Path(path)
    return json.loads(path.read_text()) if path.exists() else None


class Damaged(ValueError):
    """A record that is there and cannot be trusted; one line that begins with its path."""


CHECKSUM = "checksum"  # the last entry, on a line of its own


def checksum(value: dict) -> str:
    """Twelve hex digits of a JSON object without its checksum; whitespace and the order of keys do not count.

    >>> checksum({"a": 1, "b": [2.5]}) == checksum({"b": [2.5], "a": 1, "checksum": "?"}) != checksum({"a": 1})
    True
    """
    plain = json.loads(json.dumps({k: v for k, v in value.items() if k != CHECKSUM}, default=float))
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:12]


def sealed(value: dict) -> dict:
    """The object with its checksum."""
    return {**{k: v for k, v in value.items() if k != CHECKSUM}, CHECKSUM: checksum(value)}


def unsealed(value: Any, name: epath.PathLike) -> dict:
    """The object without its checksum; one of an older version has none.

    Raises:
      Damaged: no object, or its checksum is of another one.
    """
    if not isinstance(value, dict):
        raise Damaged(f"{name}: no JSON object")
    if value.get(CHECKSUM, checksum(value)) != checksum(value):
        raise Damaged(f"{name}: its content does not match its checksum")
    return {k: v for k, v in value.items() if k != CHECKSUM}


def write_sealed(path: epath.PathLike, value: dict) -> None:
    """`write_json` of a record that decides something: with a checksum."""
    write_json(path, sealed(value))


def read_sealed(path: epath.PathLike) -> dict | None:
    """The record, or None if there is no such file.

    Raises:
      Damaged: not JSON, no object, another checksum, or it cannot be read.
    """
    try:
        return unsealed(json.loads(epath.Path(path).read_bytes()), path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except Damaged:
        raise
    except OSError as e:
        raise Damaged(f"{path}: cannot be read ({e.strerror or e})") from None
    except (ValueError, RecursionError) as e:
        reason = "nested too deeply" if isinstance(e, RecursionError) else one_line(e)
        raise Damaged(f"{path}: {'empty' if is_empty(path) else f'not JSON ({reason})'}") from None


def is_empty(path: epath.PathLike) -> bool:
    return epath.Path(path).stat().length == 0


def create_exclusive(path: epath.PathLike, data: bytes) -> bool:
    """Create a file if it is absent; False if somebody was first. Whole or absent where there are hard links."""
    path = epath.Path(path)
    if stores.is_remote(path):
        return stores.create(path, data)
    temporary = _temporary(path)
    try:
        with open(temporary, "xb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        return _link(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _link(temporary: epath.Path, path: epath.Path) -> bool:
    try:
        os.link(temporary, path)  # fails if `path` exists, and never shows a half-written file
        return True
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links, or what the next call says again
        return _create_under_lock(path, temporary)


def _create_under_lock(path: epath.Path, temporary: epath.Path) -> bool:
    """`create_exclusive` on a file system without hard links: a folder can be made by one only, renames are whole."""
    lock = path.with_name(f".{path.name}.lock")
    try:
        os.mkdir(lock)
    except FileExistsError:  # held for a moment, or left by a killed process
        with contextlib.suppress(OSError):
            if filesystem_time(path.parent) - os.stat(lock).st_mtime > LOCK_S:
                os.rmdir(lock)
        return False
    try:
        if path.exists():
            return False
        os.replace(temporary, path)
        return True
    finally:
        with contextlib.suppress(OSError):
            os.rmdir(lock)


def remove_if(path: epath.Path, stale: bytes, same: Callable[[bytes, bytes], bool]) -> None:
    """Take away a file that several jobs may have seen, and that one of them may have replaced since.

    Args:
      stale: what was seen. same: whether a content is that one.
    """
    if stores.is_remote(path):
        stores.remove_if(path, stale)
        return
    aside = _temporary(path)
    try:
        path.rename(aside)  # of one file, only one job succeeds
    except OSError:
        return
    moved = aside.read_bytes()
    if not same(moved, stale):
        create_exclusive(path, moved)  # give it back
    aside.unlink()


LOCK_S = 60.0  # what is held under the lock takes milliseconds


def read_jsonl(path: epath.PathLike) -> list[dict]:
    """All whole lines of a JSON-lines file; a torn last line (kill during a write), or an odd one, is left out."""
    path = epath.Path(path)
    records = []
    for line in path.read_bytes().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError, RecursionError):
            record = json.loads(line)
            if isinstance(record, dict):
                records.append(record)
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


def digest(path: epath.PathLike) -> str:
    """Twelve hex digits of the SHA-256 of a file."""
    with epath.Path(path).open("rb") as f:
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
