"""Where config files of versions before 2026-12 find `base`; today: `ddo_jax.config`."""

from ddo_jax.config import base
from ddo_jax.errors import deprecated

__all__ = ["base"]

deprecated("ddo_jax.run.config", "ddo_jax.config", gone="0.2")
