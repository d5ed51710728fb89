"""Arrays of .npz files: what a header claims is held against what is there before anything of that size is made.

Nothing is unpickled. Whatever is wrong with a file comes out as `Damaged`, with the reason in one line.
"""

import contextlib
import io
import math
import zipfile
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from ddo_jax.errors import one_line

MOST_DEFLATED = 1100  # bytes that one byte of a deflated member can become: the format's limit is 1,032


class Damaged(ValueError):
    """A file that is no .npz, or not as it was written."""


class Header(NamedTuple):
    """What a member says of its array."""

    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype


@contextlib.contextmanager
def reading() -> Iterator[None]:
    """Any exception of zipfile, zlib or NumPy's reader, of which there are a dozen kinds, becomes `Damaged`."""
    try:
        yield
    except Damaged:
        raise
    except Exception as e:
        raise Damaged(one_line(e)) from None


def check_ratio(info: zipfile.ZipInfo) -> None:
    """
    Raises:
      Damaged: a member that claims more bytes than its packed ones can become.
    """
    if info.file_size > MOST_DEFLATED * info.compress_size + 1024:
        raise Damaged(f"{info.filename} has {info.file_size:,} bytes in {info.compress_size:,} packed ones")


def opened(file) -> zipfile.ZipFile:
    """The archive of a path, an open file or bytes; use it within `reading`."""
    return zipfile.ZipFile(io.BytesIO(file) if isinstance(file, bytes) else file)


def header(archive: zipfile.ZipFile, name: str, member) -> Header:
    """The header of an array, read from its open member, which then stands at the first value.

    Raises:
      Damaged: dimensions, dtype or size that cannot be. Use it within `reading` for all else.
    """
    info = archive.getinfo(f"{name}.npy")
    check_ratio(info)
    version = np.lib.format.read_magic(member)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in read:
        raise Damaged(f"{name} has .npy version {version}")
    found = Header(*read[version](member))
    if found.dtype.hasobject:
        raise Damaged(f"{name} holds Python objects, which are not read")
    if any(type(n) is not int or n < 0 for n in found.shape):
        raise Damaged(f"{name} has the shape {found.shape}")
    size = math.prod(found.shape) * found.dtype.itemsize
    if size != info.file_size - member.tell():
        raise Damaged(f"{name} is {found.dtype} {found.shape}, {size:,} bytes, but holds {info.file_size:,}")
    return found


def names(file) -> list[str]:
    """Of the arrays in a file.

    Raises:
      Damaged: it is no .npz: a zip of .npy files.
    """
    with reading(), opened(file) as archive:
        found = archive.namelist()
        if not found or not all(name.endswith(".npy") for name in found):
            raise Damaged("it is no .npz: no zip of .npy files")
        return [name.removesuffix(".npy") for name in found]


def headers(file) -> dict[str, Header]:
    """{name: Header} of all arrays.

    Raises:
      Damaged: see the top of this module.
    """
    found = {}
    for name in names(file):
        with reading(), opened(file) as archive, archive.open(f"{name}.npy") as member:
            found[name] = header(archive, name, member)
    return found


def read(file, wanted: Iterable[str] | None = None) -> dict[str, np.ndarray]:
    """The arrays of a file.

    Args:
      file: a path, an open file or bytes. wanted: names; None: all.

    Raises:
      Damaged: see the top of this module; or a name that is not there.
    """
    found = {}
    there = names(file)
    for name in there if wanted is None else wanted:
        if name not in there:
            raise Damaged(f"no {name} among {', '.join(there[:9])}")
        with reading(), opened(file) as archive, archive.open(f"{name}.npy") as member:
            about = header(archive, name, member)
            size = math.prod(about.shape) * about.dtype.itemsize
            content = member.read(size)
            if len(content) != size or member.read(1):  # the end of the member checks its CRC
                raise Damaged(f"{name} ends early")
            array = np.frombuffer(bytearray(content), about.dtype)  # a copy that can be written to
            found[name] = array.reshape(about.shape, order="F" if about.fortran else "C")
    return found
