"""Released checkpoints <-> our pytrees. The only place that knows other people's names and layouts.

    released = read(path)                                        # kind, config, state_dict, extras of any format
    module, variables = from_torch(kind, config, state_dict)     # state_dict: {released name: numpy array}
    state_dict = to_torch(kind, config, variables)               # byte-equal round trip, in the file's order

`config` holds the constructor arguments as the released file records them. Nothing here imports torch.
"""

import contextlib
import importlib
import math
from collections.abc import Iterator

from ddo_jax.convert.read import Released, read
from ddo_jax.errors import one_line

__all__ = ["KINDS", "Released", "from_torch", "layout", "read", "to_torch"]

_KINDS = ("dinov2", "edm", "edm2", "efficientnet", "inception", "mlp", "sdvae", "sit", "var", "vqvae")
KINDS = {kind: f"ddo_jax.convert.{kind}" for kind in _KINDS}


def _converter(kind: str):
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; allowed: {', '.join(sorted(KINDS))}")
    return importlib.import_module(KINDS[kind])  # on demand: each kind imports its own networks


MOST = 10**6  # of channels, blocks, classes ... in a configuration; products of three still fit into 64 bits


@contextlib.contextmanager
def _foreign(kind: str, config: dict) -> Iterator[None]:
    """A configuration comes from a file: a number that no network has is refused before anything of that size is made,
    and whatever a network of other nonsense raises becomes the one exception that is promised."""
    for key, value in config.items():
        for number in value if isinstance(value, list | tuple) else [value]:
            whole = isinstance(number, int) and not isinstance(number, bool)
            if whole and not -1 <= number <= MOST or isinstance(number, float) and not math.isfinite(number):
                raise ValueError(f"{kind}: {key} is {value}; allowed: finite numbers, whole ones up to {MOST:,}")
    try:
        yield
    except ValueError:
        raise
    except Exception as e:
        raise ValueError(f"{kind}: no such network: {type(e).__name__}: {one_line(e)}") from None


def layout(kind: str, config: dict) -> dict:
    """{released name: shape} in file order that `from_torch` expects; allocates nothing.

    Raises:
      ValueError: unknown kind or configuration.
    """
    with _foreign(kind, config):
        return _converter(kind).layout(config)[1]


def from_torch(kind: str, config: dict, state_dict: dict):
    """(module, variables) of a released network; variables are NumPy arrays in our layout.

    Raises:
      ValueError: unknown kind; or a parameter is missing, unknown or of another shape (named in the message).
    """
    with _foreign(kind, config):
        return _converter(kind).from_torch(config, state_dict)


def to_torch(kind: str, config: dict, variables: dict) -> dict:
    """The released state dict {name: NumPy array} of our variables, in the order of the released file.

    Raises:
      ValueError: as `from_torch`.
    """
    with _foreign(kind, config):
        return _converter(kind).to_torch(config, variables)
