"""Which files of a folder or zip are data: what is read, what is never read, what is left out with a word."""

import collections
import functools
import os
import posixpath
import sys
from collections.abc import Iterable
from pathlib import Path

from ddo_jax.data import latents
from ddo_jax.data.images import EXTENSIONS
from ddo_jax.errors import UserError

LABELS = "dataset.json"
NEVER = ("__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information")  # made by systems, with pictures inside
# Files that lie beside images on purpose: left out without a word.
SILENT = (".json", ".jsonl", ".txt", ".csv", ".tsv", ".md", ".html", ".xml", ".yaml", ".yml", ".log", ".db", ".ini")


def is_data(name: str) -> bool:
    """Whether a name (with "/") may be data: no part of it starts with a dot or belongs to a system.

    >>> is_data("a/0.png"), is_data(".ipynb_checkpoints/0.png"), is_data("a/._0.png"), is_data("__MACOSX/a/0.png")
    (True, False, False, False)
    """
    return not any(part.startswith(".") or part in NEVER for part in name.split("/") if part not in (".", ".."))


@functools.cache
def warn(text: str) -> None:
    """One line for a person, on stderr, once a process; nothing is refused."""
    print(f"warning: {text}", file=sys.stderr)


def list_folder(path: Path) -> list[str]:
    """The files of a folder at any depth, as sorted names relative to it.

    Hidden files and folders are never data. A folder that is reached several ways, by links, is read once: under its
    own name if that lies in the set, else under the first link to it.

    Raises:
      UserError: a folder that cannot be read, or an image that is no file (a pipe would wait for ever).
    """
    found, seen, starts = [], {}, collections.deque([path])
    while starts:
        _walk(path, starts.popleft(), found, seen, starts)
    _say_empty(path, list(seen.values()), found)
    return sorted(found)


def _say_empty(root: Path, folders: list[Path], files: list[str]) -> None:
    """A word on folders without images: where others are classes, they are none."""
    holding = {name.rpartition("/")[0] for name in files if _is_example(name)}
    full = {parent for name in holding for parent in (Path(name), *Path(name).parents)}
    empty = sorted(p.as_posix() for p in (folder.relative_to(root) for folder in folders) if p not in full)
    if empty and len(full) > 1:  # the root itself is one
        shown = ", ".join(empty[:5]) + (", ..." if len(empty) > 5 else "")
        warn(f"{root}: no image in {len(empty)} of the folders ({shown}); they are no classes")


def _walk(root: Path, start: Path, found: list[str], seen: dict, links: collections.deque) -> None:
    """The files of `start` into `found`; its linked folders, for later, into `links`; real folders into `seen`."""
    pending = [start]
    while pending:
        folder = pending.pop()
        real = os.path.realpath(folder)
        if real in seen:
            warn(f"{folder}: the same folder as {seen[real]}; its images are read once")
            continue
        seen[real] = folder
        try:
            entries = sorted(os.scandir(folder), key=lambda e: e.name)
        except OSError as e:
            raise UserError(f"{folder}: {e.strerror or e}; make it readable, or move it out of the set") from None
        prefix = "" if folder == root else folder.relative_to(root).as_posix() + "/"
        for entry in entries:
            if not is_data(entry.name):
                continue
            if entry.is_dir():
                (links if entry.is_symlink() else pending).append(folder / entry.name)
            elif entry.is_file() or not _is_example(entry.name):
                found.append(prefix + entry.name)
            elif entry.is_symlink():
                raise UserError(f"{entry.path}: a link to nothing; restore {os.readlink(entry.path)}, or remove it")
            else:
                raise UserError(f"{entry.path}: not a file (a pipe or device); move it out of the set")


def _is_example(name: str) -> bool:
    return name.lower().endswith((*EXTENSIONS, latents.EXTENSION))


def example_names(names: Iterable[str], where: str, allow_latents: bool) -> tuple[list[str], bool]:
    """(the images or the latents among files, sorted; whether they are latents). Other files are counted in a warning.

    Raises:
      UserError: none, both, one twice, or latents that are not allowed.
    """
    names = [n for n in names if is_data(n) and not n.endswith("/")]
    images = sorted(n for n in names if n.lower().endswith(EXTENSIONS))
    arrays = sorted(n for n in names if n.lower().endswith(latents.EXTENSION))
    if images and arrays:
        raise UserError(f"{where}: holds both images ({images[0]}) and latents ({arrays[0]}); make a set of each kind")
    if arrays and not allow_latents:
        raise UserError(f"{where}: latents ({arrays[0]}), which are not images; known: {' '.join(EXTENSIONS)}")
    found = images or arrays
    if not found:
        known = " ".join([*EXTENSIONS, latents.EXTENSION] if allow_latents else EXTENSIONS)
        raise UserError(f"{where}: no images among {len(names)} files; known: {known}")
    twice = [a for a, b in zip(found, found[1:], strict=False) if a == b]
    if twice:
        raise UserError(f"{where}: {twice[0]} is in it twice")
    left_out(names, where)
    return found, bool(arrays)


def left_out(names: list[str], where: str) -> None:
    """Says how many files are not read for their names."""
    kinds = [posixpath.splitext(n)[1].lower() or "no extension" for n in names if not _is_example(n)]
    counts = collections.Counter(kind for kind in kinds if kind not in SILENT)
    if counts:
        shown = ", ".join(f"{n} {kind}" for kind, n in counts.most_common(5))
        more = ", ..." if len(counts) > 5 else ""
        warn(f"{where}: left out for their names: {shown}{more}; read are {' '.join(EXTENSIONS)}")
