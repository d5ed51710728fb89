"""Everything that can be refused before a workdir is touched."""

import dataclasses
import math
from typing import Any

import jax

from ddo_jax import config as configs
from ddo_jax import limits, sharding
from ddo_jax.convert import names
from ddo_jax.data import sources
from ddo_jax.data.tree import warn
from ddo_jax.errors import UserError, one_line
from ddo_jax.evaluate import features
from ddo_jax.families import Family, get_family
from ddo_jax.families.base import PHASES
from ddo_jax.generate.seeds import SEEDS
from ddo_jax.run import scoring
from ddo_jax.store import classes, load

MOST_GRID = 10_000  # images of one picture
FEW = 500  # images that a network may learn by heart


@dataclasses.dataclass(frozen=True)
class Checked:
    """What a valid config stands for; nothing is written yet."""

    family: Family
    settings: Any
    mesh: jax.sharding.Mesh
    data: sources.Source
    init: Any


def check_network(config):
    """(family, sampler settings, mesh) of a valid config; reads no file.

    Raises:
      UserError: see `config.validate`; or arguments that give no network.
    """
    configs.validate(config, len(jax.devices()))
    try:
        family = get_family(config)
        jax.eval_shape(family.init, jax.random.key(0))
    except UserError:
        raise
    except Exception as e:  # what Flax and JAX raise for arguments that give no network is of many kinds
        raise UserError(f"config.model: no such network: {type(e).__name__}: {one_line(e)}") from None
    configs.check_claimed(config, family.spec)
    method = configs.method_of(config)
    if method not in (*family.objectives, "neon"):
        allowed = f"neon, {', '.join(family.objectives)}, of family {family.spec.name}"
        raise UserError(f"config.method: {method!r}; allowed: {allowed}")
    for given in config.eval.also:
        family.settings({**config.sampler, **given})
    return family, family.settings(config.sampler), sharding.make_mesh(config.mesh.fsdp)


def check(config) -> Checked:
    """Everything that can be refused before the workdir is touched.

    Raises:
      UserError: see `config.validate`, `load.find`, `sources.open_source`, `check_data`.
    """
    family, settings, mesh = check_network(config)
    if config.eval.network == "digits" and config.data.name != "digits":
        allowed = "classifier (of labelled images), inception, dinov2, efficientnet, none"
        raise UserError(f"config.eval.network: 'digits' judges digits only, not {config.data.name}; allowed: {allowed}")
    scoring.check_metrics(config)
    init = None if config.init == "scratch" else find_start(config.init)
    family.companions()
    data = sources.of_config(config, config.data.split)
    check_data(config, family, data)
    if init is not None and configs.is_set(config.adapt.length):
        load.donor(init, family)
    check_sizes(config, family, len(data))
    if len(data) < FEW:
        warn(
            f"{data.name}: {len(data)} images, fewer than {FEW}: a network may learn them by heart; the report has the "
            "distance of samples to the nearest of them"
        )
    classes.look(config, family, data)
    if config.eval.network == "classifier":
        features.check_fit(data, config.model.levels)
    latent = family.spec.kind(data.image_shape) != "pixels"
    if config.data.holdout:
        _refuse_latents(latent, "data.holdout", config.data.holdout, "'': they are not decoded to be scored")
        sources.of_config(config, config.data.holdout)
    for name, weights in scoring.networks_of(config).values():
        features.check(name, weights)
    if config.eval.reference:
        names.resolve(config.eval.reference)
    _refuse_latents(latent and config.data.flip, "data.flip", True, "False, a mirrored latent is not the mirror's")
    unknown = latent and not config.eval.reference and config.eval.network != scoring.NOTHING
    _refuse_latents(unknown, "eval.reference", "unset", "statistics of real images")
    return Checked(family, settings, mesh, data, init)


def _refuse_latents(wrong: bool, key: str, value, allowed: str) -> None:
    if wrong:
        raise UserError(f"config.{key}: {value!r}; allowed with a data set of latents: {allowed}")


def find_start(what: str):
    """`load.find` of config.init; the message says how to give a file.

    Raises:
      UserError: not at hand.
    """
    try:
        return load.find(what)
    except UserError as e:
        raise UserError(f"{e}; --config.init=FILE takes a local file, --dry_run lists all that is missing") from None


def check_data(config, family, data) -> None:
    """The data must have the shape, the classes and the grey levels that the network is built for.

    Raises:
      UserError: they have not; says what to set, or how to make them so.
    """
    spec = family.spec
    configs.require(len(data) > 1, "data.name", config.data.name, "two images or more; this set has one")
    if spec.kind(data.image_shape) is None:
        mend = "set model.img_resolution and model.img_channels"
        if len(data.image_shape) == 3 and data.image_shape[0] != data.image_shape[1]:
            mend = (
                "height and width differ, and networks here are square: python -m ddo_jax.data SRC DST.zip "
                f"--crop=center --resolution={config.model.img_resolution} makes a square set, --config.data.crop=var "
                "crops as it reads"
            )
        raise UserError(
            f"config.model: takes {' or '.join(str(r.shape) for r in spec.data)}, but {data.name} has "
            f"{data.image_shape}; {mend}"
        )
    if spec.num_classes not in (0, data.num_classes):
        allowed = f"0 or {data.num_classes} as in {data.name}" if data.num_classes else f"0: {data.name} has no labels"
        raise UserError(f"config.model.label_dim: {spec.num_classes}; allowed: {allowed}")
    if config.model.levels < 256 and data.max_level >= config.model.levels:  # the maximum may need every image
        raise UserError(
            f"config.model.levels: {config.model.levels}, but {data.name} has the grey level {data.max_level}"
        )


def check_parameters(family) -> None:
    """Refuse a network whose parameters alone, with optimizer and average, fill the devices. Allocates nothing.

    Raises:
      UserError: names the size and the limit.
    """
    params, _ = jax.eval_shape(family.init, jax.random.key(0))
    number = sum(math.prod(x.shape) for x in jax.tree.leaves(params))
    limits.require("config.model", f"{number:.3g} parameters", 4 * 4 * number, limits.device_bytes(), "training")


def check_sizes(config, family, examples: int) -> None:
    """Refuse a run that asks for more than there can be.

    Args:
      config: valid. examples: in the data set.

    Raises:
      UserError: one line with the size and the limit.
    """
    check_parameters(family)
    shape = family.spec.data[-1].shape
    for phase in PHASES:
        rows = config[phase].batch // config[phase].accumulation
        limits.check_batch(f"config.{phase}.batch (per micro-batch)", rows, shape, "training")
    limits.check_batch("config.eval.batch", config.eval.batch, family.spec.image_shape, "sampling")
    allowed = f"at most {MOST_GRID:,}, the images of one picture"
    configs.require(config.eval.grid <= MOST_GRID, "eval.grid", config.eval.grid, allowed)
    _check_steps_and_seeds(config, examples)
    if configs.samples_fakes(config):
        each = family.spec.stored.nbytes
        limits.require("config.ddo.pool", config.ddo.pool, config.ddo.pool * each, limits.host_bytes(), "a pool")


def _check_steps_and_seeds(config, examples: int) -> None:
    """Steps are counted in 32 bits; every purpose has its own range of seeds."""
    c, rounds, e = config.ddo, config.ddo.rounds, config.eval
    each_round = configs.steps(c.length, c.batch, examples, "ddo.length") if rounds else 0
    configs.steps(config.pretrain.length, config.pretrain.batch, examples, "pretrain.length")
    steps = config.control.factor * rounds * each_round
    if config.control.enabled:
        allowed = f"at most {configs.MOST_STEPS:,} steps in all"
        configs.require(steps <= configs.MOST_STEPS, "control.factor", config.control.factor, allowed)
    fakes = (c.pool or each_round * configs.fakes_of_a_step(c)) if configs.samples_fakes(config) else 0
    for key, each, times, purpose in (
        ("eval.num", e.num, e.report_seeds, "report"),
        ("eval.select_num", e.select_num or e.num, max(rounds, 1), "select"),
        ("ddo.pool", fakes, rounds, "pool"),
    ):
        most = SEEDS[purpose][1]
        allowed = f"{each:,} images, {times:,} times, are at most the {most:,} seeds that there are for them"
        configs.require(each * times <= most, key, each, allowed)
