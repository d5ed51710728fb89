"""From which weights a run's own were made, and under which licence that leaves them."""

import json
from typing import NamedTuple

from ddo_jax import convert
from ddo_jax.convert import names
from ddo_jax.store.load import Ours, find

KEY = "ddo_jax_origin"  # metadata of an exported file


class Origin(NamedTuple):
    """starts: what the weights began as, then what that began as, ...; () from scratch. licence: SPDX, or "unknown"."""

    starts: tuple[str, ...]
    licence: str

    def metadata(self) -> dict[str, str]:
        """For an exported file: what it is made from goes where it goes."""
        return {KEY: json.dumps(self._asdict())}


def of_init(init: str) -> Origin:
    """Of a run with this config.init.

    Runs of ours are followed to their own starts, and exported files by what they say of themselves. What was trained
    from scratch has the licence that its maker gives it: none is known here.
    """
    starts = []
    while init != "scratch":
        starts.append(init)
        if (licence := names.licence(init)) != "unknown":
            return Origin(tuple(starts), licence)
        found = find(init)
        if not isinstance(found, Ours):
            told = _told(found)
            return Origin((*starts, *told.starts), told.licence)
        init = found.config.get("init", "scratch")
    return Origin(tuple(starts), "unknown")


def _told(released: convert.Released) -> Origin:
    """What an exported file says of itself; nothing, of files of others."""
    try:
        told = json.loads(released.extras.get("metadata", {})[KEY])
        return Origin(tuple(map(str, told["starts"])), str(told["licence"]))
    except (KeyError, TypeError, ValueError):
        return Origin((), "unknown")
