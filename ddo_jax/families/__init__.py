"""Registry of families: `get_family(config)`."""

from ddo_jax.errors import UserError
from ddo_jax.families.base import Family


def _edm(config) -> Family:
    from ddo_jax.families import edm

    return edm.make(config)


FAMILIES = {"edm": _edm}


def get_family(config) -> Family:
    """The family named by `config.family`, built from `config.model` and `config.precision`.

    Raises:
      UserError: unknown family or model arguments.
    """
    if config.family not in FAMILIES:
        raise UserError(f"config.family: {config.family!r}; allowed: {', '.join(sorted(FAMILIES))}")
    return FAMILIES[config.family](config)
