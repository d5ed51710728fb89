"""What a config leaves unset is read from the data: `filled`. So one command serves any folder of images.

Read off the data, each for itself: the keys OF_DATA. Of `recipe`, by size and machine, where model.arch is unset: the
network with its arguments, lengths, the pool, beta. A workdir that exists has the last word: what was once filled in
stays, on whatever machine it is continued.
"""

from typing import Any

import jax
import numpy as np
from etils import epath

from ddo_jax import config as configs
from ddo_jax import files
from ddo_jax.data import sources
from ddo_jax.errors import UserError
from ddo_jax.evaluate import classifier, features

OF_DATA = ("model.img_resolution", "model.img_channels", "model.label_dim", "model.levels", "data.holdout")
OF_DATA += ("eval.network",)
OF_RECIPE = ("pretrain.length.steps", "ddo.length.steps", "ddo.eval_every.steps", "control.eval_every.steps")
OF_RECIPE += ("ddo.pool", "ddo.beta")
FEW_LEVELS = 32  # a set with so few grey levels has so few; one with more is an 8-bit set, perhaps a dark one
SMALL_SIDE = 28  # up to it a CPU trains a network of matrix products in minutes
PATCHES = (4, 7, 5, 3, 2)  # sides of a patch, the best first


def of_data(config, data) -> dict[str, Any]:
    """What the data say themselves.

    Raises:
      UserError: they are latents, or not square.
    """
    h, w, channels = data.image_shape
    if data.dtype != np.uint8 or h != w:
        seen = "latents" if data.dtype != np.uint8 else f"images of {h} x {w}"
        raise UserError(
            f"{data.name}: {seen}; allowed where the config leaves config.model to the data: square images "
            "(--config.data.crop=center --config.model.img_resolution=N makes them so)"
        )
    levels = data.max_level + 1 if 1 < data.max_level + 1 <= FEW_LEVELS else 256
    return {
        "model.img_resolution": h,
        "model.img_channels": channels,
        "model.label_dim": data.num_classes if data.num_classes > 1 else 0,
        "model.levels": levels,
        "data.holdout": _holdout(config),
        "eval.network": _network((h, w, channels), levels, data.num_classes),
    }


def _network(shape: tuple[int, ...], levels: int, num_classes: int) -> str:
    """What can judge: a classifier where there are classes to tell apart; else one of photographs, if it is there."""
    if classifier.Design(shape, levels, num_classes).problem() is None:
        return "classifier"
    try:
        features.check("efficientnet", None)
    except UserError:
        return "none"
    return "efficientnet"


def _holdout(config) -> str:
    """The split "test", if there is one."""
    try:
        sources.of_config(config, "test")
    except UserError:
        return ""
    return "test"


def recipe(shape: tuple[int, ...], num: int, accelerator: bool) -> dict[str, Any]:
    """Network and lengths for `num` images [H,W,C]; all of it ours.

    Matrix products up to 28 x 28 on a CPU, where a patch divides the side: some ten minutes. A DDPM++ above, or on an
    accelerator. The pool has as many fakes as there are images, within bounds. beta is a power law through the two
    sizes that were searched: 0.2 for the 64 numbers of a digit, 0.03 for the 784 of Fashion-MNIST.
    """
    side = shape[0]
    patch = next((p for p in PATCHES if side % p == 0 and side >= 4 * p), None)
    small = side <= SMALL_SIDE and not accelerator and patch is not None
    if small:
        model = dict(arch="mixer", patch=patch, width=64, blocks=4, tokens=96, ratio=2)
    else:
        halved = (1, 2, 2) if side % 4 == 0 else (1,)
        model = dict(arch="SongUNet", model_channels=128 if side > SMALL_SIDE else 64, channel_mult=halved)
        model |= dict(num_blocks=2, attn_resolutions=(side // 2 ** (len(halved) // 2),), dropout=0.1)
    pretraining, round_ = (6000, 200) if small else (40_000, 1000)
    return {
        **{f"model.{key}": value for key, value in model.items()},
        "pretrain.length.steps": pretraining,
        "ddo.length.steps": round_,
        "ddo.eval_every.steps": round_ // 4,
        "control.eval_every.steps": round_ // 2,
        "ddo.pool": int(np.clip(num, 2048, 20_000)),
        "ddo.beta": (float(f"{0.2 * (64 / np.prod(shape)) ** 0.75:.1g}"),),
    }


def _at(config, key: str) -> Any:
    for step in key.split("."):
        config = config[step]
    return config


def _unset(config, key: str) -> bool:
    """Whether a key has no value; a duration has none in any of its units."""
    duration, _, unit = key.rpartition(".")
    return not configs.is_set(_at(config, duration)) if unit == "steps" else _at(config, key) is None


def filled(config, workdir: epath.PathLike, say=print):
    """The config with what it leaves unset (a copy); itself where nothing is.

    Args:
      workdir: of the run. say: is told, in one line, what was filled in.

    Raises:
      UserError: the data cannot be opened, or do not say what the network must be.
    """
    whole = config.model.arch is None
    keys = [key for key in OF_DATA + OF_RECIPE * whole if _unset(config, key)]
    if not keys:
        return config
    made = config.copy_and_resolve_references()
    if made.data.crop:
        size, key = made.model.img_resolution, "model.img_resolution"
        configs.require(size is not None, key, size, f"a number: data.crop = {made.data.crop!r} crops to it")
        made.model.img_channels = made.model.img_channels or 3
    found, source = _recorded(epath.Path(workdir).expanduser()), f"{workdir}, as it was begun"
    if found is None:
        data = sources.of_config(made, made.data.split)
        found = of_data(made, data) | recipe(data.image_shape, len(data), jax.default_backend() != "cpu")
        source = f"{data.name}, {len(data):,} images"
    if whole:
        names = (key.removeprefix("model.") for key in found if key.startswith("model."))
        keys += [f"model.{name}" for name in names if made.model.get(name) is None]
    values = {key: found[key] for key in dict.fromkeys(keys)}
    with made.unlocked():
        for key, value in values.items():
            section, _, name = key.rpartition(".")
            _at(made, section)[name] = tuple(value) if isinstance(value, list) else value
    say(f"{source}: " + ", ".join(f"{key} = {value!r}" for key, value in values.items()))
    return made.lock()


def _recorded(workdir: epath.Path) -> dict[str, Any] | None:
    """The leaves of the config that a workdir was begun with; None where there is none, or it is damaged, which opening
    the workdir will say."""
    try:
        recorded = files.read_sealed(workdir / "config.json")
    except files.Damaged:
        return None
    return None if recorded is None else dict(configs.leaves(recorded))
