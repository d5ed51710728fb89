"""What is asked for against what a machine or a format can hold, before anything of that size is made.

These are lower bounds: what is refused cannot work, what passes may still be too much (`--dry_run` estimates a
step, and refuses nothing: it plans for other machines).
"""

import math
import os
from pathlib import Path

import jax

from ddo_jax.errors import UserError

COPIES = {"training": 4, "sampling": 2}  # of a batch in float32 that are there at once: image, noise, output, gradient


def host_bytes() -> int:
    """Memory of this host, or of the container that the process is in."""
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
    except (OSError, ValueError):  # no such group, or "max"
        return physical
    return min(physical, limit)


def device_bytes() -> int:
    """Memory of all devices of the run; of a CPU that of the host."""
    devices = jax.devices()
    if devices[0].platform == "cpu":
        return host_bytes() * jax.process_count()
    limits = [(d.memory_stats() or {}).get("bytes_limit", 0) for d in jax.local_devices()]
    return sum(limits) * jax.process_count() if all(limits) else 2**63


def size(number: float) -> str:
    """
    >>> size(512), size(3.2e9), size(4e21)
    ('512 B', '3.0 GiB', '3.47e+03 EiB')
    """
    for unit in ("B", "KiB", "MiB", "GiB", "TiB", "PiB"):
        if number < 1024:
            return f"{number:.0f} B" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:.3g} EiB"


def require(key: str, value, needed: float, available: int, what: str) -> None:
    """
    Raises:
      UserError: more is needed than there is.
    """
    if needed > available:
        raise UserError(
            f"{key}: {value}; {what} needs at least {size(needed)}, this machine has {size(available)}; take less"
        )


def check_batch(key: str, batch: int, shape: tuple[int, ...], use: str) -> None:
    """Refuse a batch whose images alone fill the devices.

    Args:
      shape: of an image or its latents. use: of COPIES.

    Raises:
      UserError: names the size and the limit.
    """
    require(key, batch, 4 * COPIES[use] * batch * math.prod(shape), device_bytes(), use)
