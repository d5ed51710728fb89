"""What is asked for against what a machine or a format can hold, before anything of that size is made.

These are lower bounds: what is refused cannot work, what passes may still be too much (`--dry_run` estimates a
step, and refuses nothing: it plans for other machines).
"""

import math
import os
from pathlib import Path

import jax

from ddo_jax.errors import UserError
from ddo_jax.evaluate.score import SEEDS
from ddo_jax.run import config as configs

MOST_GRID = 10_000  # images of one picture
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


def check_parameters(family) -> None:
    """Refuse a network whose parameters alone, with optimizer and average, fill the devices. Allocates nothing.

    Raises:
      UserError: names the size and the limit.
    """
    params, _ = jax.eval_shape(family.init, jax.random.key(0))
    number = sum(math.prod(x.shape) for x in jax.tree.leaves(params))
    require("config.model", f"{number:.3g} parameters", 4 * 4 * number, device_bytes(), "training")


def check(config, family, examples: int) -> None:
    """Refuse a run that asks for more than there can be.

    Args:
      config: valid. examples: in the data set.

    Raises:
      UserError: one line with the size and the limit.
    """
    check_parameters(family)
    shape = family.record_shapes[-1]
    for phase in ("pretrain", "ddo", "control"):
        rows = config[phase].batch // config[phase].accumulation
        check_batch(f"config.{phase}.batch (per micro-batch)", rows, shape, "training")
    check_batch("config.eval.batch", config.eval.batch, family.image_shape, "sampling")
    allowed = f"at most {MOST_GRID:,}, the images of one picture"
    configs.require(config.eval.grid <= MOST_GRID, "eval.grid", config.eval.grid, allowed)
    _check_steps_and_seeds(config, examples)
    if config.objective == "ddo":
        each = math.prod(shape) * (1 if shape == family.image_shape else 4)
        require("config.ddo.pool", config.ddo.pool, config.ddo.pool * each, host_bytes(), "a pool")


def _check_steps_and_seeds(config, examples: int) -> None:
    """Steps are counted in 32 bits; every purpose has its own range of seeds."""
    c, rounds, e = config.ddo, config.ddo.rounds, config.eval
    total = configs.steps(c.length, c.batch, examples, "ddo.length") if rounds else 0
    configs.steps(config.pretrain.length, config.pretrain.batch, examples, "pretrain.length")
    steps = config.control.factor * rounds * total
    if config.control.enabled:
        allowed = f"at most {configs.MOST_STEPS:,} steps in all"
        configs.require(steps <= configs.MOST_STEPS, "control.factor", config.control.factor, allowed)
    fakes = 0 if config.objective != "ddo" else c.pool or total * c.batch
    for key, each, times, purpose in (
        ("eval.num", e.num, e.report_seeds, "report"),
        ("eval.select_num", e.select_num or e.num, max(rounds, 1), "select"),
        ("ddo.pool", fakes, rounds, "pool"),
    ):
        most = SEEDS[purpose][1]
        allowed = f"{each:,} images, {times:,} times, are at most the {most:,} seeds that there are for them"
        configs.require(each * times <= most, key, each, allowed)
