"""The configuration of a run: its keys, what is refused, how a config file is loaded.

A config file starts from `base()`, which is locked: a misspelt key answers "Did you mean ...".
"""

from ddo_jax.config.keys import (
    HARMLESS,
    METHODS,
    MOST_STEPS,
    base,
    difference,
    fakes_of_a_step,
    is_set,
    leaves,
    method_of,
    samples_fakes,
    steps,
)
from ddo_jax.config.validate import check_claimed, check_hosts, require, validate

__all__ = ["HARMLESS", "MOST_STEPS", "METHODS", "base", "check_claimed", "check_hosts", "difference", "is_set"]
__all__ += ["leaves", "fakes_of_a_step", "method_of", "samples_fakes"]
__all__ += ["require", "steps", "validate"]
