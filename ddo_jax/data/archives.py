"""Encoded images or latents in a zip (EDM's format) or a folder; `tree` tells which files, `labelling` which labels."""

import os
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from etils import epath

from ddo_jax import npz
from ddo_jax.data import labelling, tree
from ddo_jax.errors import UserError, one_line

ASKING = 32  # threads that wait for a file system
WHOLE_READ = 2**30  # sets of files up to this size are fingerprinted by their content


class _Files:
    """What zips and folders share once their files are listed: names, labels, the part that a split means.

    Attributes:
      name: of the set in records. latents: whether its examples are. labels: int32 [N]. num_classes: 0 without labels.
      class_names: by id; () where nobody named them.
    """

    name: str
    latents: bool
    labels: np.ndarray
    num_classes: int
    class_names: tuple[str, ...]

    def _open(self, files: list[str], where: str, name: str, split: str, allow_latents: bool, labelled: bool) -> None:
        """Which of `files` are the examples of `split`, and their labels; `where` names the set in errors."""
        names, self.latents = tree.example_names(files, where, allow_latents)
        found = labelling.find_labels(files, names, where) if labelled or tree.LABELS in files else None
        if found is not None:
            path, prefix = found
            text, inner = self._bytes(path), [n.removeprefix(prefix) for n in names]
            whole = labelling.parse_labels(text, inner, self._at(path))
        else:
            try:
                whole = labelling.folder_labels(names, where)
            except UserError:
                if labelled:
                    raise
                whole = labelling.unlabelled(len(names))
        labelling.say_missing(whole, where)
        self.name = f"{name}:{split}"
        chosen = labelling.split_indices(split, len(names), self.name, whole)
        self._names, self.labels = [names[i] for i in chosen], whole.labels[chosen]
        self.num_classes, self.class_names = whole.num_classes, whole.names

    def __len__(self) -> int:
        return len(self._names)

    def _at(self, name: str) -> str:
        raise NotImplementedError

    def _bytes(self, name: str) -> bytes:
        raise NotImplementedError

    def where(self, i: int) -> str:
        return self._at(self._names[i])

    def read(self, indices: list[int]) -> list[tuple[bytes, int]]:
        return [(self._bytes(self._names[i]), int(self.labels[i])) for i in indices]


class ZipRecords(_Files):
    """Encoded images of a zip; with `allow_latents` also latents.

    Args:
      labelled: False where images are only looked at: subfolders that are no classes are read all the same, and a
        dataset.json in one of them is no matter.

    Raises:
      UserError: no whole zip of images, see `tree.example_names`, `labelling`.
    """

    def __init__(self, path: Path, split: str, allow_latents: bool = False, labelled: bool = True):
        self._path = path
        try:
            self._zip = zipfile.ZipFile(path)
        except Exception as e:  # zipfile raises many kinds for damaged files
            reason = getattr(e, "strerror", None) or one_line(e)
            raise UserError(f"{path}: {reason}; it must be a whole zip of images") from None
        members = [(name.replace("\\", "/"), name) for name in self._zip.namelist()]  # some tools of Windows
        self._members = dict(members)
        files = [name for name, _ in members if tree.is_data(name) and not name.endswith("/")]
        self._open(files, str(path), f"zip:{path.name}", split, allow_latents, labelled)

    def _at(self, name: str) -> str:
        return f"{self._path}: {name}"

    def _bytes(self, name: str) -> bytes:
        try:
            npz.check_ratio(self._zip.getinfo(self._members[name]))
            return self._zip.read(self._members[name])
        except Exception as e:  # zipfile and zlib raise many kinds for damaged files
            raise UserError(f"{self._path}: {name}: damaged or unreadable ({one_line(e)}); restore the zip") from None

    @property
    def fingerprint(self) -> str:
        """Of names, sizes and CRCs in the zip's directory, and labels: nothing is read."""
        infos = [self._zip.getinfo(self._members[name]) for name in self._names]
        listing = repr([(i.filename, i.file_size, i.CRC) for i in infos])
        return f"{zlib.crc32(self.labels.tobytes(), zlib.crc32(listing.encode())):08x}"


class FolderRecords(_Files):
    """Encoded images of a folder and its subfolders; with `allow_latents` also latents. Arguments as `ZipRecords`.

    Raises:
      UserError: no folder of images, see `tree`, `labelling`.
    """

    def __init__(self, path: Path, split: str, allow_latents: bool = False, labelled: bool = True):
        self._path = path
        if not path.is_dir():
            raise UserError(f"folder {path}: {'not a folder' if path.exists() else 'does not exist'}")
        name = f"folder:{path.resolve().name}"
        self._open(tree.list_folder(path), str(path), name, split, allow_latents, labelled)

    def _at(self, name: str) -> str:
        return f"{self._path}/{name}"

    def _bytes(self, name: str) -> bytes:
        try:
            return (self._path / name).read_bytes()
        except OSError as e:
            raise UserError(f"{self._path}/{name}: {e.strerror or e}") from None

    @property
    def fingerprint(self) -> str:
        """Of names, labels and files' content (up to 1 GiB of files; beyond, of their sizes)."""
        crc = zlib.crc32(self.labels.tobytes(), zlib.crc32(repr(self._names).encode()))
        return files_crc([self._path / name for name in self._names], crc)


def _sizes(paths: list) -> list[int]:
    """Of files, many at a time: over a network each answer takes its time, and ImageNet has 1.28 million."""
    remote = any("://" in os.fspath(path) for path in paths[:1])

    def of(part: list) -> list[int]:
        return [epath.Path(path).stat().length if remote else os.stat(path).st_size for path in part]

    parts = [paths[i : i + 1000] for i in range(0, len(paths), 1000)]
    with ThreadPoolExecutor(ASKING) as threads:
        return [size for sizes in threads.map(of, parts) for size in sizes]


def files_crc(paths: list, crc: int) -> str:
    """CRC-32 of the content of files, continued from `crc`; of their sizes if they exceed 1 GiB in all."""
    sizes = _sizes(paths)
    if sum(sizes) > WHOLE_READ:
        return f"{zlib.crc32(repr(sizes).encode(), crc):08x}"
    for path in paths:
        with epath.Path(path).open("rb") as f:
            while block := f.read(2**24):
                crc = zlib.crc32(block, crc)
    return f"{crc:08x}"
