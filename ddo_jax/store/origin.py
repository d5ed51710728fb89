"""The origin of a run's weights: of files by what they say of themselves, of runs by what they exported."""

from etils import epath

from ddo_jax.convert import names, origin
from ddo_jax.convert.origin import SCRATCH, Origin, made_from
from ddo_jax.store.load import Ours, find


def of_init(init: str) -> Origin:
    """Of a run with this config.init; never fails: what is gone, or says nothing, is of unknown licence."""
    return SCRATCH if init == "scratch" else made_from(init, _told(init))


def _told(what: str) -> Origin:
    scheme, remote, _ = what.partition("://")
    try:
        folder = (not remote or scheme in ("gs", "s3", "file")) and epath.Path(what).expanduser().is_dir()  # as `find`
        if not folder:
            return origin.of_file(names.resolve(what))
        found = find(what)
    except Exception:  # whatever a store of the day raises: an origin is no reason to lose the end of a run
        return SCRATCH
    if not isinstance(found, Ours):
        return SCRATCH
    for exported in (found.root / "params.safetensors", found.root / "best" / "params.safetensors"):
        if exported.exists():
            return origin.of_file(exported)
    init = found.config.get("init", "scratch")  # a checkpoint from the middle of a run
    return SCRATCH if init == "scratch" else made_from(init, SCRATCH)
