"""Registry of families: `get_family(config)`; `from_released(config, released)` for files of others."""

import importlib

from ddo_jax.errors import UserError
from ddo_jax.families.base import Family

FAMILIES = {"edm": "ddo_jax.families.edm", "edm2": "ddo_jax.families.edm2", "var": "ddo_jax.families.var"}


def _module(name: str):
    if name not in FAMILIES:
        raise UserError(f"config.family: {name!r}; allowed: {', '.join(sorted(FAMILIES))}")
    return importlib.import_module(FAMILIES[name])


def get_family(config) -> Family:
    """The family named by `config.family`, built from `config.model` and `config.precision`.

    Raises:
      UserError: unknown family or model arguments.
    """
    return _module(config.family).make(config)


def from_released(config, released) -> None:
    """Set `config.family`, `config.model` and `config.sampler` to those of a released checkpoint.

    Args:
      config: ConfigDict, changed in place. released: of `ddo_jax.convert.read`.

    Raises:
      UserError: a kind no family has.
    """
    with config.unlocked():
        config.family = released.kind
        _module(released.kind).configure(config, released)
