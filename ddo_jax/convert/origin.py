"""From which weights others were made, and under which licence that leaves them: it goes along in exported files."""

import json
from pathlib import Path
from typing import NamedTuple

from etils import epath

from ddo_jax.convert import names
from ddo_jax.convert.safetensors import MAX_HEADER

KEY = "ddo_jax_origin"  # metadata of a .safetensors


class Origin(NamedTuple):
    """starts: what the weights began as, then what that began as, ...; () from scratch. licence: SPDX, or "unknown"."""

    starts: tuple[str, ...]
    licence: str

    def metadata(self) -> dict[str, str]:
        """For an exported file."""
        return {KEY: json.dumps(self._asdict())}


SCRATCH = Origin((), "unknown")  # its maker gives it one


def shown(what: str) -> str:
    """A name, an address, or the last part of a path: where things lie on somebody's machine is nobody's business.

    >>> shown("edm2-img64-s"), shown("hf://a/b/c.pkl"), shown("/home/me/runs/digits/")
    ('edm2-img64-s', 'hf://a/b/c.pkl', 'digits')
    """
    return what if "://" in what else Path(what).name or what


def made_from(what: str, told: Origin) -> Origin:
    """Of weights that begin as WHAT, which says `told` of itself."""
    known = names.licence(what)
    return Origin((shown(what), *told.starts), told.licence if known == "unknown" else known)


def of_metadata(metadata: dict) -> Origin | None:
    """What an exported file says of itself; None if nothing."""
    try:
        told = json.loads(metadata[KEY])
        return Origin(tuple(map(str, told["starts"])), str(told["licence"]))
    except (KeyError, TypeError, ValueError):
        return None


def of_file(path: epath.PathLike) -> Origin:
    """What a file says of itself: its header alone is read, and only ours say anything."""
    try:
        with epath.Path(path).open("rb") as f:
            length = int.from_bytes(f.read(8), "little")
            header = json.loads(f.read(length)) if length <= MAX_HEADER else {}
        return of_metadata(header.get("__metadata__", {})) or SCRATCH
    except (OSError, ValueError, AttributeError, RecursionError):
        return SCRATCH
