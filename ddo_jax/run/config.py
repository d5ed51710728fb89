"""Where config files of versions before 2026-12 find `base`; today: `ddo_jax.config`."""

from ddo_jax.config import base

__all__ = ["base"]
