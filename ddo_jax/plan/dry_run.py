"""`--dry_run`: what a run will do and need, from shapes alone. Nothing of the real size is allocated."""

import math

import jax
from ml_collections import ConfigDict

from ddo_jax import config as configs
from ddo_jax.convert import names
from ddo_jax.data import sources
from ddo_jax.errors import UserError
from ddo_jax.evaluate import features
from ddo_jax.families import get_family
from ddo_jax.plan import memory
from ddo_jax.run import costs, fill, scoring, state
from ddo_jax.run.checks import check_network
from ddo_jax.store import classes, load

SHOW_HOURS = "--images_per_s=TRAIN[,SAMPLE] (real images of DDO steps a second, all devices; images sampled a second)"


def human(number: float, unit: str = "") -> str:
    """
    >>> human(64864), human(3.2e9, "B"), human(12)
    ('64.9 k', '3.2 GB', '12 ')
    """
    for factor, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= factor:
            return f"{number / factor:.1f} {prefix}{unit}"
    return f"{number:.0f} {unit}"


def forward_flops(family, params, frozen, batch: int = 8) -> tuple[float, float]:
    """FLOPs of one forward pass of one image, and of encoding a real one, as XLA counts them before optimisation."""

    def forward(params, frozen, examples, key):
        return family.score(params, frozen, examples, family.draw(key, batch, (0.0, 1.0)))

    def count(fn, *args):
        cost = jax.jit(fn).lower(*args).cost_analysis()  # None: this backend does not count; no "flops": there are none
        return math.nan if cost is None else float(cost.get("flops", 0.0)) / batch

    key, record = jax.eval_shape(lambda: jax.random.key(0)), memory.record(family, batch)
    examples = jax.eval_shape(family.encode, frozen, record, key)
    return count(forward, params, frozen, examples, key), count(family.encode, frozen, record, key)


def plan(config: ConfigDict, workdir: str, images_per_s: list[str] | None = None) -> str:
    """The text that `--dry_run` prints.

    Args:
      images_per_s: the flag of `ddo_jax.main`, see `SHOW_HOURS`.

    Raises:
      UserError: the config cannot run, or `images_per_s` is not one or two numbers.
    """
    devices = jax.devices()
    config = fill.filled(config, workdir)
    family, settings, mesh = check_network(config)
    rates = throughput(images_per_s)
    found = at_hand(config, family)
    images = found["data"][1]
    parts = costs.work(config, images)
    params, frozen = memory.abstract(family)
    (flops, encoding), nfe = forward_flops(family, params, frozen), settings.nfe
    each = costs.each(family, settings)  # cached keys make VAR's ten steps one
    step = (costs.passes(config, "ddo") * flops + encoding) * config.ddo.batch
    encoder = f"; encoding a real image {human(encoding, 'FLOP')}, not in the cost below" * (encoding > 0.01 * flops)
    sections = [
        "config",
        _indent([f"{key} = {value!r}" for key, value in configs.leaves(config)]),
        f"workdir      {workdir}",
        f"devices      {len(devices)} x {devices[0].device_kind}, mesh {dict(mesh.shape)}",
        f"network      {state.parameter_count(params):,} parameters",
        "memory",
        _indent(_memory(config, len(devices), params)),
        f"forward      {human(flops, 'FLOP')} per image; a DDO step {human(step, 'FLOP')}, "
        f"an image sampled {human(each.judged * flops, 'FLOP')} ({nfe} NFE){encoder}",
        *(f"{name:<12} {text}" for name, (text, _) in found.items()),
        "plan",
        _indent(_phases(config, images)),
        "cost",
        _indent(_costs(config, parts, flops, each, rates) + costs.shares(config, parts, each)),
        f"disk         {human(_disk(config, family, params, images), 'B')} at most at a time in the workdir",
    ]
    return "\n".join(sections)


def throughput(images_per_s: list[str] | None) -> tuple[float, ...]:
    """The numbers of --images_per_s, or ().

    >>> throughput(["120", "35.5"]), throughput(None)
    ((120.0, 35.5), ())

    Raises:
      UserError: not one or two numbers above 0.
    """
    try:
        rates = tuple(map(float, images_per_s or ()))
    except ValueError:
        rates = (0.0,)
    if len(rates) > 2 or not all(0 < rate < math.inf for rate in rates):
        raise UserError(f"--images_per_s={','.join(images_per_s)}: allowed: one or two numbers above 0, as in 120,35")
    return rates


def at_hand(config, family) -> dict[str, tuple[str, int]]:
    """{input: (what it is or where to get it, number of images)}: a plan needs no file, a run needs them all."""

    def data():
        source = sources.of_config(config, config.data.split)
        classes.look(config, family, source)
        text = f"{source.name}, {len(source):,} images, {source.num_classes} classes, CRC {source.fingerprint}"
        return text, len(source)

    def scores():
        if config.eval.network == scoring.NOTHING:
            return "none: nothing is scored, a round ends at its length", 0
        networks = scoring.networks_of(config).values()
        for network in networks:
            features.check(*network)
        return f"{', '.join(name for name, _ in networks)}, at hand", 0

    def start():
        load.find(config.init)
        return f"{config.init}, at hand", 0

    def autoencoder():
        parts = family.companions()
        return f"at hand, {human(memory.tree_bytes(parts), 'B')}", 0

    def references():
        names.resolve(config.eval.reference)
        return f"{config.eval.reference}, at hand", 0

    wanted = {"data": data, "scores": scores}
    wanted |= {"references": references} if config.eval.reference else {}
    if not family.spec.works_on_pixels:
        wanted |= {"tokenizer" if family.spec.stored.kind == "tokens" else "autoencoder": autoencoder}
    wanted |= {"start": start} if config.init != "scratch" else {}
    found = {}
    for name, look in wanted.items():
        try:
            found[name] = look()
        except UserError as e:
            found[name] = f"NOT AT HAND: {e}", 1
    return found


def _indent(lines: list[str]) -> str:
    return "\n".join(f"  {line}" for line in lines)


def _memory(config, devices: int, params) -> list[str]:
    """A training step of every phase on one device: as configured, and with `remat` the other way round."""
    lines, families = [], {}
    for remat in (config.remat, not config.remat):
        variant = config.copy_and_resolve_references()
        variant.remat = remat
        families[remat] = get_family(variant)
    for section in [s for s in costs.PASSES if costs.candidates(config, s)]:
        method = configs.method_of(config)
        objective = method if section == "ddo" and method != "neon" else "mle"
        parts, other = (
            memory.step_bytes(
                family, config[section], objective, devices, config.mesh.fsdp, costs.together(config, section)
            )
            for family in families.values()
        )
        listed = ", ".join(f"{name} {human(size, 'B')}" for name, size in parts.items() if name != "total")
        lines.append(f"{section}: {human(parts['total'], 'B')} per device with remat={config.remat}: {listed}")
        if other != parts:  # networks without blocks have nothing to recompute
            lines.append(f"{section}: {human(other['total'], 'B')} per device with remat={not config.remat}")
    copies = memory.PARKED * memory.tree_bytes(params)
    lines.append(f"{human(copies, 'B')} of the hosts' memory for the parameters of the run's start and the last best")
    return [
        *lines,
        "estimates of training steps before fusion; compiled programs took 0.4 to 1.0 of them on GPUs (VAR-d30 "
        "without accumulation 4.5), 0.3 to 1.6 on TPUs (docs/scaling.md)",
    ]


def _phases(config, examples: int) -> list[str]:
    lines = []
    if config.init == "scratch":
        lines.append(
            f"pretrain     {costs.total(config, 'pretrain', examples)} steps of {config.pretrain.batch} images"
        )
    else:
        lines.append(f"start        {config.init}")
    if costs.candidates(config, "adapt"):
        steps = costs.total(config, "adapt", examples)
        lines.append(f"adapt        {steps} steps of {config.adapt.batch} images, what depends on classes drawn anew")
    if config.ddo.rounds:
        lines.append(_round(config, examples))
    if costs.candidates(config, "control"):
        steps = costs.total(config, "control", examples)
        lines.append(f"control      {costs.candidates(config, 'control')} learning rates, {steps} steps each")
    lines.append(f"report       {config.eval.report_seeds} seed ranges of {config.eval.num} images a system")
    return lines


def _round(config, examples: int) -> str:
    """A round in a line."""
    c, method, grid = config.ddo, configs.method_of(config), costs.candidates(config, "ddo")
    fakes = {"mle": "", "neon": " fakes", "cca": f" + {c.batch} (the same under wrong labels)"}
    beside = fakes.get(
        method, f" + {configs.fakes_of_a_step(c)}" + " (made by the reference as training goes)" * (not c.pool)
    )
    made = f"{c.pool} fakes, then " if c.pool and configs.samples_fakes(config) else ""
    line = len(config.neon.w) if method == "neon" else len(c.line)
    then = f", {line} points of a line" if line else ""
    who = f"{grid} candidates"
    if costs.searches(config):
        who = f"typically {grid} values of beta tried to step {costs.first_stop(config, examples)}, one of them"
    side = f", {n} side by side" if (n := costs.together(config, "ddo")) > 1 else ""
    return (
        f"{c.rounds} rounds     {made}{who} of {costs.total(config, 'ddo', examples)} steps of "
        f"{c.batch}{beside} images{side}{then}; {costs.evaluations(config, 'ddo', examples)} evaluations of "
        f"{costs.judged(config)} images"
    )


def _costs(config, parts: list[costs.Work], flops: float, each: costs.Each, rates: tuple[float, ...]) -> list[str]:
    """A line for every part, and for all of them: images, PFLOP and, at `rates` (see `throughput`), hours."""
    rounds, ddo = config.ddo.rounds, costs.passes(config, "ddo")
    train = rates[0] if rates else math.nan
    sample = rates[1] if len(rates) > 1 else train * ddo / each.judged  # at the same FLOP/s

    def line(name, *numbers, hours):
        cells = " ".join(f"{number:>14}" for number in numbers)
        return f"{name:<14} {cells}" + (f" {hours:>10}" if rates else "")

    def row(name, some: list[costs.Work], times: int = 1):
        trained, fakes, judged = (times * sum(getattr(p, key) for p in some) for key in ("trained", "fakes", "judged"))
        spent = [costs.forwards(p, each) for p in some]
        forwards = times * sum(s["training"] for s in spent)
        sampled = times * sum(s["fakes"] + s["selection"] for s in spent)
        hours = (forwards / ddo / train + sampled / each.judged / sample) / 3600
        pflop = (forwards + sampled) * flops / 1e15
        return line(name, f"{trained:,}", f"{fakes:,}", f"{judged:,}", f"{pflop:,.4g}", hours=f"{hours:,.4g}")

    lines = [line("", "trained", "fakes sampled", "judged", "PFLOP", hours="hours")]
    for part in parts:
        lines.append(row(part.name, [part]))
        if part.name == costs.EACH_ROUND:
            lines.append(row(f"all {rounds} rounds", [part], rounds))
    lines.append(row("everything", [p for p in parts for _ in range(rounds if p.name == costs.EACH_ROUND else 1)]))
    if rates:
        return [*lines, f"at {train:g} real images/s in DDO steps and {sample:.4g} images/s sampled, over all devices"]
    return [*lines, f"hours: give {SHOW_HOURS}"]


def _disk(config, family, params, examples: int) -> float:
    """Checkpoints (latest two and best of a round's candidates, one of every older round), pool, snapshots, best/."""
    count = state.parameter_count(params)
    total = 2 * 4 * count  # best/: a checkpoint of the EMA, and safetensors
    for section in [s for s in costs.PASSES if costs.candidates(config, s)]:
        emas, candidates = state.lengths(config[section]), costs.candidates(config, section)
        checkpoint = 4 * count * (3 + len(emas))  # parameters, two moments, EMAs
        snapshots = (
            2 * count * len(config[section].ema_stds) * costs.times(config, section, examples, "snapshot_every")
        )  # float16; all stay
        times = config.ddo.rounds if section == "ddo" else 1
        whole = times if config.keep == "all" else 1  # with all its checkpoints and its pool
        total += 3 * candidates * checkpoint * whole + checkpoint * (times - whole) + snapshots * candidates * times
        total += _pool(config, family) * whole if section == "ddo" else 0
    return total


def _pool(config, family) -> int:
    """Bytes of a round's fakes."""
    return config.ddo.pool * family.spec.stored.nbytes if configs.samples_fakes(config) else 0
