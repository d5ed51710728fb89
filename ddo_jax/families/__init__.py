"""Registry of families: `get_family(config)`; `from_released(config, released)` for files of others."""

import importlib
from typing import Any

from ddo_jax.errors import UserError, one_line
from ddo_jax.families.base import Family, Guidance, Records, Side, Spec

__all__ = ["FAMILIES", "KINDS", "Family", "Guidance", "Records", "Side", "Spec", "from_released", "get_family"]

FAMILIES = {name: f"ddo_jax.families.{name}" for name in ("edm", "edm2", "sit", "var")}
KINDS = {"edm": "edm", "mlp": "edm", "edm2": "edm2", "sit": "sit", "var": "var"}  # of files: {kind: family}


def _module(name: str) -> Any:
    if name not in FAMILIES:
        allowed = f"{', '.join(sorted(FAMILIES))}, or a function of yours, as in package.module:make"
        raise UserError(f"config.family: {name!r}; allowed: {allowed}")
    return importlib.import_module(FAMILIES[name])


def _make_of(path: str) -> Any:
    """The function that "package.module:make" names."""
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as e:  # somebody's module: it may raise anything
        raise UserError(f"config.family: {path!r}: {type(e).__name__}: {one_line(e)}") from None


def get_family(config: Any) -> Family:
    """The family that `config.family` names, built from `config.model` and the keys that it claims.

    A name with a colon, "package.module:make", is a function (config) -> Family anywhere on the path.

    Raises:
      UserError: unknown family or model arguments.
    """
    if ":" not in config.family:
        return _module(config.family).make(config)
    family = _make_of(config.family)(config)
    if not isinstance(family, Family):
        made = type(family).__name__
        raise UserError(f"config.family: {config.family!r} gives a {made}; it must give a ddo_jax.families.Family")
    return family


def from_released(config: Any, released: Any) -> None:
    """Set `config.family`, `config.model` and `config.sampler` to those of a released checkpoint.

    Args:
      config: ConfigDict, changed in place. released: of `ddo_jax.convert.read`.

    Raises:
      UserError: a kind no family has.
    """
    if released.kind not in KINDS:
        raise UserError(f"a file of kind {released.kind}; allowed, as generators: {', '.join(KINDS)}")
    with config.unlocked():
        config.family = KINDS[released.kind]
        _module(config.family).configure(config, released)
