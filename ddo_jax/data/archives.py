"""Images or latents in a zip (EDM's format) or a folder, with labels from dataset.json or the names of subfolders.

Order and labels as in specs/edm.md section 14.2 and specs/edm2.md section 11: sorted by name, labels looked up by name.
"""

import json
import os
import re
import zipfile
import zlib
from pathlib import Path

import numpy as np
from etils import epath

from ddo_jax.data import latents
from ddo_jax.data.images import EXTENSIONS
from ddo_jax.errors import UserError

LABELS = "dataset.json"
WHOLE_READ = 2**30  # sets of files up to this size are fingerprinted by their content
_EDM_NAME = re.compile(r"\d{5}/img(-mean-std-)?\d{8}\.\w+")
_SPLIT = re.compile(r"train(?:\[(-?\d+%?)?:(-?\d+%?)?\])?")


def split_range(split: str, n: int, name: str) -> range:
    """The part of n files that a split means: "train" is all, "train[:90%]" and "train[45000:]" as in TFDS.

    Raises:
      UserError: another split.

    >>> split_range("train[-10%:]", 50, "x")
    range(45, 50)
    """
    match = _SPLIT.fullmatch(split)
    if not match:
        raise UserError(
            f"split {split!r} of {name}: files have no splits; allowed: train, train[:90%], train[45000:] ..."
        )

    def position(text: str | None) -> int | None:
        if text is None:
            return None
        return round(int(text[:-1]) * n / 100) if text.endswith("%") else int(text)

    chosen = range(n)[position(match[1]) : position(match[2])]
    if not chosen:
        raise UserError(f"split {split!r} of {name}: empty; the set has {n} images")
    return chosen


def parse_labels(text: bytes, names: list[str], where: str) -> tuple[np.ndarray, int]:
    """(int32 [N], number of classes) from EDM's dataset.json: {"labels": [[name, class], ...] or null}.

    Raises:
      UserError: not such a file; an image without label or a label without image; float vectors.
    """
    try:
        found = json.loads(text)
        entries = found.get("labels")
        table = {str(name).replace("\\", "/"): label for name, label in entries or ()}
    except (ValueError, AttributeError, TypeError) as e:
        raise UserError(f'{where}: {e}; it must hold {{"labels": [["name", class], ...]}} or null') from None
    if entries is None:
        return np.zeros(len(names), np.int32), 0
    for missing, what in (
        (set(names) - set(table), "no label for"),
        (set(table) - set(names), "a label, but no image,"),
    ):
        if missing:
            raise UserError(f"{where}: {what} {min(missing)} ({len(missing)} such); every image must have one label")
    for name in names:
        label = table[name]
        if type(label) is not int or not 0 <= label < 2**31:
            kind = "vectors are not supported: " if isinstance(label, list) else ""
            raise UserError(f"{where}: {kind}label {str(label)[:40]} of {name}; allowed: class numbers 0, 1, 2 ...")
    labels = np.array([table[name] for name in names], np.int32)
    return labels, int(labels.max()) + 1


def folder_labels(names: list[str], where: str) -> tuple[np.ndarray, int]:
    """Labels of a folder without dataset.json: one class a subfolder, in sorted order; none if it has none.

    Raises:
      UserError: images both beside and inside subfolders.
    """
    nested = [n for n in names if "/" in n]
    if not nested or all(_EDM_NAME.fullmatch(n) for n in names):  # 00000/img00000000.png: folders are no classes
        return np.zeros(len(names), np.int32), 0
    if len(nested) < len(names):
        flat = min(set(names) - set(nested))
        raise UserError(
            f"{where}: {flat} lies beside subfolders, {nested[0]} in one; allowed: all or none, or {LABELS}"
        )
    of_name = [n.split("/")[0] for n in names]
    index = {folder: i for i, folder in enumerate(sorted(set(of_name)))}
    return np.array([index[folder] for folder in of_name], np.int32), len(index)


def example_names(names: list[str], where: str, allow_latents: bool) -> tuple[list[str], bool]:
    """(the images or the latents among files, sorted; whether they are latents).

    Raises:
      UserError: none, both, one twice, or latents that are not allowed.
    """
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
    return found, bool(arrays)


class ZipRecords:
    """Encoded images of a zip; with `allow_latents` also latents."""

    def __init__(self, path: Path, split: str, allow_latents: bool = False):
        self._path = path
        try:
            self._zip = zipfile.ZipFile(path)
        except (OSError, zipfile.BadZipFile) as e:
            raise UserError(f"{path}: {getattr(e, 'strerror', None) or e}; it must be a whole zip of images") from None
        members = self._zip.namelist()
        names, self.latents = example_names(members, str(path), allow_latents)
        text = self._bytes(LABELS) if LABELS in members else b'{"labels": null}'
        labels, self.num_classes = parse_labels(text, names, f"{path}: {LABELS}")
        self.name = f"zip:{path.name}:{split}"
        chosen = split_range(split, len(names), self.name)
        self._names, self.labels = [names[i] for i in chosen], labels[chosen]

    def __len__(self) -> int:
        return len(self._names)

    def where(self, i: int) -> str:
        return f"{self._path}: {self._names[i]}"

    def _bytes(self, name: str) -> bytes:
        try:
            return self._zip.read(name)
        except (OSError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError) as e:
            raise UserError(f"{self._path}: {name}: damaged or unreadable ({e}); restore the zip") from None

    def read(self, indices: list[int]) -> list[tuple[bytes, int]]:
        return [(self._bytes(self._names[i]), int(self.labels[i])) for i in indices]

    @property
    def fingerprint(self) -> str:
        """Of names, sizes and CRCs in the zip's directory, and labels: nothing is read."""
        infos = [self._zip.getinfo(name) for name in self._names]
        listing = repr([(i.filename, i.file_size, i.CRC) for i in infos])
        return f"{zlib.crc32(self.labels.tobytes(), zlib.crc32(listing.encode())):08x}"


class FolderRecords:
    """Encoded images of a folder and its subfolders; with `allow_latents` also latents."""

    def __init__(self, path: Path, split: str, allow_latents: bool = False):
        self._path = path
        if not path.is_dir():
            raise UserError(f"folder {path}: {'not a folder' if path.exists() else 'does not exist'}")
        walk = os.walk(path, followlinks=True)
        files = [Path(folder, name).relative_to(path).as_posix() for folder, _, names in walk for name in names]
        names, self.latents = example_names(files, str(path), allow_latents)
        if LABELS in files:
            labels, self.num_classes = parse_labels(self._bytes(LABELS), names, f"{path}/{LABELS}")
        else:
            labels, self.num_classes = folder_labels(names, str(path))
        self.name = f"folder:{path.resolve().name}:{split}"
        chosen = split_range(split, len(names), self.name)
        self._names, self.labels = [names[i] for i in chosen], labels[chosen]

    def __len__(self) -> int:
        return len(self._names)

    def where(self, i: int) -> str:
        return f"{self._path}/{self._names[i]}"

    def _bytes(self, name: str) -> bytes:
        try:
            return (self._path / name).read_bytes()
        except OSError as e:
            raise UserError(f"{self._path}/{name}: {e.strerror or e}") from None

    def read(self, indices: list[int]) -> list[tuple[bytes, int]]:
        return [(self._bytes(self._names[i]), int(self.labels[i])) for i in indices]

    @property
    def fingerprint(self) -> str:
        """Of names, labels and files' content (up to 1 GiB of files; beyond, of their sizes)."""
        crc = zlib.crc32(self.labels.tobytes(), zlib.crc32(repr(self._names).encode()))
        return files_crc([self._path / name for name in self._names], crc)


def files_crc(paths: list, crc: int) -> str:
    """CRC-32 of the content of files, continued from `crc`; of their sizes if they exceed 1 GiB in all."""
    remote = any("://" in os.fspath(path) for path in paths[:1])
    sizes = [epath.Path(path).stat().length if remote else os.stat(path).st_size for path in paths]
    if sum(sizes) > WHOLE_READ:
        return f"{zlib.crc32(repr(sizes).encode(), crc):08x}"
    for path in paths:
        with epath.Path(path).open("rb") as f:
            while block := f.read(2**24):
                crc = zlib.crc32(block, crc)
    return f"{crc:08x}"
