"""`--dry_run`: what a run will do and need, from shapes alone. Nothing of the real size is allocated."""

import math

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from ddo_jax import sharding
from ddo_jax.data import sources
from ddo_jax.errors import UserError
from ddo_jax.evaluate import features
from ddo_jax.run import config as configs
from ddo_jax.run import load, state
from ddo_jax.run.prepare import check_network


def human(number: float, unit: str = "") -> str:
    """
    >>> human(64864), human(3.2e9, "B"), human(12)
    ('64.9 k', '3.2 GB', '12 ')
    """
    for factor, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= factor:
            return f"{number / factor:.1f} {prefix}{unit}"
    return f"{number:.0f} {unit}"


def forward_flops(family, params, frozen, batch: int = 8) -> float:
    """FLOPs of one forward pass of one image, as XLA counts them before optimisation."""
    record = {
        "image": jax.ShapeDtypeStruct((batch, *family.image_shape), jnp.uint8),
        "label": jax.ShapeDtypeStruct((batch,), jnp.int32),
    }

    def forward(params, frozen, record, key):
        examples = family.encode(frozen, record, key)
        return family.score(params, frozen, examples, family.draw(key, batch, (0.0, 1.0)))

    key = jax.eval_shape(lambda: jax.random.key(0))
    cost = jax.jit(forward).lower(params, frozen, record, key).cost_analysis() or {}
    return float(cost.get("flops", math.nan)) / batch


def bytes_per_device(mesh, tree) -> int:
    """Bytes of a pytree on one device under the sharding rule."""
    shardings = sharding.tree_sharding(mesh, tree)
    sizes = jax.tree.map(lambda x, s: math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize, tree, shardings)
    return sum(jax.tree.leaves(sizes))


def plan(config: ConfigDict, workdir: str) -> str:
    """The text that `--dry_run` prints.

    Raises:
      UserError: the config cannot run.
    """
    devices = jax.devices()
    family, settings, mesh = check_network(config)
    found = at_hand(config)
    images = found["data"][1]
    params, frozen = jax.eval_shape(family.init, jax.random.key(0))
    training = jax.eval_shape(lambda p: state.new_state(p, state.optimizer(config.ddo)), params)
    flops = forward_flops(family, params, frozen)
    held = bytes_per_device(mesh, training)
    reference = bytes_per_device(mesh, params)
    sections = [
        "config",
        _indent("\n".join(f"{key} = {value!r}" for key, value in configs.leaves(config))),
        f"workdir      {workdir}",
        f"devices      {len(devices)} x {devices[0].device_kind}, mesh {dict(mesh.shape)}",
        f"network      {state.parameter_count(params):,} parameters",
        f"memory       {human(held, 'B')} per device for parameters, EMA and optimizer, {human(reference, 'B')} "
        "for the reference, as much again for gradients; activations come on top",
        f"forward      {human(flops, 'FLOP')} per image; a DDO step {human(8 * flops * config.ddo.batch, 'FLOP')}, "
        f"an image sampled {human(family.nfe(settings) * flops, 'FLOP')} ({family.nfe(settings)} NFE)",
        *(f"{name:<12} {text}" for name, (text, _) in found.items()),
        "plan",
        _indent("\n".join(_phases(config, images))),
        f"disk         {human(_disk(config, family, params), 'B')} at most at a time in the workdir",
    ]
    return "\n".join(sections)


def at_hand(config) -> dict[str, tuple[str, int]]:
    """{input: (what it is or where to get it, number of images)}: a plan needs no file, a run needs them all."""

    def data():
        source = sources.open_source(config.data.name, config.data.split, config.data.dir)
        text = f"{source.name}, {len(source):,} images, {source.num_classes} classes, CRC {source.fingerprint}"
        return text, len(source)

    def scores():
        features.check(config.eval.network, config.eval.weights)
        return f"{config.eval.network}, at hand", 0

    def start():
        load.find(config.init)
        return f"{config.init}, at hand", 0

    wanted = {"data": data, "scores": scores} | ({} if config.init == "scratch" else {"start": start})
    found = {}
    for name, look in wanted.items():
        try:
            found[name] = look()
        except UserError as e:
            found[name] = f"NOT AT HAND: {e}", 1
    return found


def _indent(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.rstrip().splitlines())


def _length(config, section: str, examples: int, key: str) -> int | None:
    c = config[section]
    return configs.steps(c[key], c.batch, examples, f"{section}.{key}")


def _phases(config, examples: int) -> list[str]:
    lines = []
    if config.init == "scratch":
        total = _length(config, "pretrain", examples, "length")
        lines.append(f"pretrain     {total} steps of {config.pretrain.batch} images")
    else:
        lines.append(f"start        {config.init}")
    grid = len(config.ddo.alpha) * len(config.ddo.beta)
    if config.ddo.rounds:
        total = _length(config, "ddo", examples, "length")
        every = _length(config, "ddo", examples, "eval_every")
        judged = config.eval.select_num or config.eval.num
        evaluations = 1 + grid * (math.ceil(total / every) if every else 0)
        lines.append(
            f"{config.ddo.rounds} rounds     {config.ddo.pool} fakes, then {grid} candidates of {total} steps of "
            f"{config.ddo.batch} + {config.ddo.batch} images; {evaluations} evaluations of {judged} images"
        )
        if config.control.enabled:
            steps = config.control.factor * config.ddo.rounds * total
            lines.append(f"control      {len(config.control.lrs)} learning rates, {steps} steps each")
    lines.append(f"report       {config.eval.report_seeds} seed ranges of {config.eval.num} images a system")
    return lines


def _disk(config, family, params) -> float:
    """Checkpoints (latest two and best of all candidates of a round, one of every older round), pool, best/."""
    grid = max(1, len(config.ddo.alpha) * len(config.ddo.beta))
    pool = config.ddo.pool * math.prod(family.image_shape)
    state_bytes = 4 * 4 * state.parameter_count(params)
    rounds = config.ddo.rounds if config.keep == "all" else min(config.ddo.rounds, 1)
    kept = config.ddo.rounds - rounds
    others = 3 * (len(config.control.lrs) if config.control.enabled else 0) + 3 * (config.init == "scratch")
    return rounds * (pool + 3 * grid * state_bytes) + (kept + others + 0.5) * state_bytes
