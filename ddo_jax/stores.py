"""Object stores (gs://, s3://, az://) through fsspec: what `etils.epath` does not say.

There a file is written at once or not at all, but nothing is appended to, renamed, or a folder. Several jobs decide by
preconditions: an object is created if there is none, removed if it is still the one that was seen.
"""

import functools
import os
from typing import Any

from etils import epath

from ddo_jax.errors import UserError, one_line


def is_remote(path: epath.PathLike) -> bool:
    """
    >>> is_remote("gs://bucket/run"), is_remote("/runs/a")
    (True, False)
    """
    return "://" in os.fspath(path)


@functools.cache
def prepare() -> None:
    """Other jobs write too: listings must not be remembered. To be called before the first file is opened there."""
    import fsspec

    for protocol in ("gs", "gcs", "s3", "az"):
        fsspec.config.conf.setdefault(protocol, {}).setdefault("use_listings_cache", False)


def filesystem(path: epath.PathLike) -> Any:
    """fsspec's file system of a path there."""
    import fsspec

    prepare()
    return fsspec.filesystem(os.fspath(path).partition("://")[0])


def reach(path: epath.PathLike) -> None:
    """Ask for a path there, before anything depends on it; nothing for a local one.

    Raises:
      UserError: the store's library is not installed, there are no credentials, no such bucket, no network.
    """
    if not is_remote(path):
        return
    try:
        filesystem(path).exists(os.fspath(path))
    except ImportError as e:
        raise UserError(f"{path}: {e}; gs:// needs: python -m pip install 'ddo_jax[gcs]'") from None
    except ValueError as e:
        raise UserError(f"{path}: {one_line(e)}; allowed: a folder, gs://, s3://, az://") from None
    except Exception as e:  # of aiohttp, google.auth, gcsfs: many kinds
        raise UserError(
            f"{path}: cannot be reached ({one_line(e)}); check its name, the network, and the credentials (gcloud auth "
            "application-default login)"
        ) from None


def create(path: epath.PathLike, data: bytes) -> bool:
    """Create an object if there is none; False if somebody was first.

    Of a request that succeeded but whose answer was lost, the repetition fails: whose it is, its content tells.
    """
    try:
        filesystem(path).pipe_file(os.fspath(path), data, mode="create")  # gs: ifGenerationMatch=0; s3: If-None-Match
    except FileExistsError:
        return False
    return True


def remove_if(path: epath.PathLike, content: bytes) -> bool:
    """Remove an object whose content is this one; whether it did.

    On gs:// nobody can have replaced it in between (ifGenerationMatch); other stores have no such request.
    """
    fs, name = filesystem(path), os.fspath(path)
    try:
        seen = fs.info(name)
        if fs.cat_file(name) != content:
            return False
        if name.startswith("gs://"):
            bucket, _, key = name.removeprefix("gs://").partition("/")
            fs.call("DELETE", "b/{}/o/{}", bucket, key, ifGenerationMatch=seen["generation"])
        else:
            fs.rm_file(name)
    except (FileNotFoundError, FileExistsError):  # the latter is gcsfs's word for another generation
        return False
    return True
