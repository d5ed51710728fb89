"""The configuration of a run: its keys, what is refused, how a config file is loaded.

A config file starts from `base()`, which is locked: a misspelt key answers "Did you mean ...".
"""

from ddo_jax.config.keys import HARMLESS, MOST_STEPS, OBJECTIVES, base, difference, is_set, leaves, steps
from ddo_jax.config.validate import check_claimed, require, validate

__all__ = ["HARMLESS", "MOST_STEPS", "OBJECTIVES", "base", "check_claimed", "difference", "is_set", "leaves"]
__all__ += ["require", "steps", "validate"]
