"""From a config and a workdir to a prepared run: family, mesh, data, sampler, evaluator."""

import contextlib
import dataclasses
import datetime
import functools
import importlib.metadata
import os
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from ddo_jax import __version__, files, sharding
from ddo_jax.convert import names
from ddo_jax.core import frechet
from ddo_jax.data import sources
from ddo_jax.data.labels import balanced_rule, present_classes
from ddo_jax.errors import UserError, one_line
from ddo_jax.evaluate import features, image_sets, references, score
from ddo_jax.evaluate.collect import DINOV2, MAIN
from ddo_jax.families import get_family
from ddo_jax.families.base import Family
from ddo_jax.run import asked, checkpoint, classes, limits, load, loop, record, rounds, search, state, step
from ddo_jax.run import config as configs

# Keys that say where something lies: {key: its possible entries in inputs.json}. With equal content they may change.
PLACES = {"data.name": ["data"], "init": ["start"], "model.vae": ["vae", "vqvae"]}
PLACES |= {"eval.weights": ["features"], "eval.reference": ["reference"]}


def open_workdir(config, workdir: epath.PathLike, inputs: dict[str, str] | None = None) -> epath.Path:
    """Create the workdir or continue in it; nothing is written if its config is another one.

    Args:
      inputs: {what: fingerprint}, see `check_inputs`.

    Raises:
      UserError: not writable, cannot hold checkpoints, or made with another config (the difference is shown).
    """
    workdir = epath.Path(workdir).expanduser()
    wanted = config.to_dict()
    if (workdir / "request.json").exists():
        raise UserError(f"workdir {workdir} is a folder of generated images (request.json); take another --workdir")
    try:
        have = files.read_sealed(workdir / "config.json")
        if have is not None:
            changed = _changes(have, wanted, recorded_inputs(workdir), inputs or {})
            if changed:
                raise UserError(
                    f"workdir {workdir} was made with another config ({'; '.join(changed)}); "
                    "take another --workdir, or undo the change"
                )
        if sharding.agree(have is None):
            _try_out(workdir)
        if jax.process_index() == 0:
            files.write_sealed(workdir / "config.json", wanted)
    except files.Damaged as e:
        raise UserError(
            f"{e}; put back a copy of it, or, if this command has the config that the workdir was made with, move the "
            "file away: it is then written anew"
        ) from None
    except OSError as e:
        raise UserError(
            f"workdir {workdir}: {e.strerror or e}; --workdir must name a directory that can be written"
        ) from None
    return workdir


def recorded_inputs(workdir: epath.Path) -> dict[str, str]:
    """What a workdir was made from: {what: fingerprint}; {} in a new one.

    Raises:
      UserError: the record is damaged.
    """
    try:
        return files.read_sealed(workdir / "inputs.json") or {}
    except files.Damaged as e:
        raise UserError(
            f"{e}; put back a copy of it, or, if data and weights are those that the workdir was made from, move the "
            "file away: it is then written anew"
        ) from None


def _changes(old: dict, new: dict, recorded: dict[str, str], inputs: dict[str, str]) -> list[str]:
    """`configs.difference` without places that moved with what lies there; of the others the contents are shown.

    >>> _changes({"init": "a.pkl"}, {"init": "b.pkl"}, {"start": "1f"}, {"start": "1f"})
    []
    >>> _changes({"init": "a.pkl"}, {"init": "b.pkl"}, {"start": "1f"}, {"start": "2e"})
    ['config.init: a.pkl -> b.pkl (content 1f -> 2e)']
    """
    changed = []
    for line in configs.difference(old, new):
        key = line.partition(": ")[0].removeprefix("config.")
        entry = next((e for e in PLACES.get(key, ()) if e in inputs), None)
        before, now = recorded.get(entry), inputs.get(entry)
        if before is None or now is None:
            changed.append(line)
        elif before != now:
            changed.append(f"{line} (content {before} -> {now})")
    return changed


def _try_out(workdir: epath.Path) -> None:
    """Make the workdir if checkpoints can be kept in it; nothing that was not there stays after a refusal.

    Raises:
      OSError, UserError: see `open_workdir`, `checkpoint.try_out`.
    """
    checkpoint.check_name(files.literal(workdir))
    new = [p for p in (workdir, *workdir.parents) if not p.exists()]
    lead = jax.process_index() == 0
    try:
        if lead:
            workdir.mkdir(parents=True, exist_ok=True)
        sharding.agree(True)  # the other hosts wait until it is there
        checkpoint.try_out(workdir)
    except (OSError, UserError):
        for path in new if lead else ():
            with contextlib.suppress(OSError):  # another job may have begun in it
                os.rmdir(path)
        raise


@functools.cache
def versions() -> dict[str, str]:
    """What made a number: commit, versions, device."""
    root = Path(__file__).parent.parent.parent
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=False)
    packages = {p: importlib.metadata.version(p) for p in ("jax", "flax")}
    commit = git.stdout.strip() if git.returncode == 0 else f"ddo_jax {__version__}"
    return {"commit": commit, **packages, "device": jax.devices()[0].device_kind}


def make_evaluator(config, workdir, family, frozen, samplers, train):
    """evaluate(params, phase, step, purpose, index, how=0) -> (record of one scored set with its whole protocol,
    its first `config.eval.grid` images). samplers: [(settings, sampler)]; how: which of them."""
    network = feature_network(config, workdir, train)
    if config.eval.network != "digits" and config.model.levels != 256:

        def full_range(images):  # these networks take 256 grey levels
            return network_256.apply(image_sets.to_levels(images, config.model.levels, 256))

        network_256, network = network, dataclasses.replace(network, apply=full_range)
    reals = {"train": train}
    if config.data.holdout:
        reals[config.data.holdout] = sources.of_config(config, config.data.holdout)
    moments, named = make_references(config, network, reals, family.image_shape)
    numbers = {"report": config.eval.num, "select": config.eval.select_num or config.eval.num}
    present = present_classes(train.class_counts)
    protocol = {
        "labels": balanced_rule(present) if family.num_classes else "none",
        "ema": {section: ema_length(config[section]) for section in ("pretrain", "ddo")},
        "quantised_to": f"{config.model.levels} levels",
        "features": f"{network.name} {network.digest}",
        "scale": network.scale,
        "references": named,
        "precision": config.precision,
        **versions(),
    }

    def evaluate(params, phase: str, at: int, purpose: str, index: int, how: int = 0) -> tuple[dict, np.ndarray]:
        num, (settings, sampler) = numbers[purpose], samplers[how]
        seeds = score.seed_range(purpose, index, num)
        labels = score.balanced(seeds, family.num_classes, present)
        records = sampler(params, frozen, seeds, labels)
        values, images = score.score(network, moments, records, keep=config.eval.grid)
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        drawn = {"purpose": purpose, "n_samples": num, "seeds": [int(seeds[0]), int(seeds[-1])], "time": now}
        made = {**drawn, "weights": checkpoint.weights_digest(params), **protocol}
        made |= {"sampler": {"solver": settings.solver, **settings._asdict()}, "nfe": family.nfe(settings)}
        made["guidance"] = getattr(settings, "cfg", 0.0) or None
        return {"phase": phase, "step": at, "metric": network.named(num), **values, "protocol": made}, images

    return evaluate, network.named(numbers["select"])


def feature_network(config, workdir, train) -> features.FeatureNet:
    """The network that judges all candidates of the run, the same one at every start.

    Raises:
      UserError: its file is damaged, and what is made again differs.
    """
    name = config.eval.network
    if name != "digits":  # the digest of its file is among the run's inputs
        return features.get_features(name, train, workdir, config.eval.weights)
    recorded = recorded_inputs(workdir).get("features", "").removeprefix(f"{name} ") or None
    network = features.get_features(name, train, workdir, expected=recorded)
    check_inputs(workdir, {"features": f"{name} {network.digest}"})
    return network


def ema_length(c) -> str:
    """Of the average that a phase is judged by."""
    if not c.ema_stds and not c.ema_mimg:
        return "none"
    return f"power function, std {c.ema_stds[0]}" if c.ema_stds else f"half-life {c.ema_mimg:g} million images"


def make_references(config, network, reals, shape) -> tuple[dict, dict]:
    """({name: moments of real images}, {name: what they are of}); the first one selects.

    Statistics of a file (`config.eval.reference`) take the place of the training set's; those that are computed
    with Inception or DINOv2 are kept by content in the cache.
    """
    if config.eval.network == "digits":
        moments = {name: score.reference(network, source) for name, source in reals.items()}
        return moments, {n: f"{s.name} {s.fingerprint} ({len(s)} images)" for n, s in reals.items()}
    owner, metric = {"inception": (MAIN, "fid"), "dinov2": (DINOV2, "fd_dinov2")}[config.eval.network]
    moments, named = {}, {}
    for name, source in reals.items():
        if name == "train" and config.eval.reference:
            length = network.apply(np.zeros((1, *shape), np.uint8))["features"].shape[1]
            path = names.resolve(config.eval.reference)
            found = references.open_reference(path, {metric: length}, {owner: network})
            moments[name] = dataclasses.asdict(found.gaussians[metric])
            named[name] = f"{found.name} {found.digest}"
        else:
            images = image_sets.of_source(source, levels=config.model.levels)
            mu, sigma = references.statistics(images, network, owner, config.model.levels)[metric]
            moments[name] = {"mu": mu, "sigma": sigma, "root": frechet.sqrt_psd(sigma)}
            named[name] = f"{source.name} {source.fingerprint} ({len(source)} images)"
    return moments, named


def step_factory(config, family, mesh):
    """step_for(phase): phases of one kind share a compiled program, whatever their alpha, beta, lr."""

    @functools.cache
    def build(objective: str, total: int, warmup: float, section: str):
        c = config[section]
        tx = state.optimizer(c)
        shapes = jax.eval_shape(lambda k: state.new_state(family.init(k)[0], tx, c.ema_stds), jax.random.key(0))
        return step.make_step(family, c, tx, mesh, shapes, objective=objective, warmup=warmup, total=total * c.batch)

    return lambda p: build(p.objective, p.total, p.warmup, p.section)


class Checked(NamedTuple):
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
    if config.objective not in family.objectives:
        allowed = f"{', '.join(family.objectives)}, of family {family.name}"
        raise UserError(f"config.objective: {config.objective!r}; allowed: {allowed}")
    for given in config.eval.also:
        family.settings({**config.sampler, **given})
    return family, family.settings(config.sampler), sharding.make_mesh(config.mesh.fsdp)


def check_inputs(workdir: epath.Path, inputs: dict[str, str]) -> None:
    """Refuse to continue on other data or weights than the work already done.

    Args:
      inputs: {what: fingerprint}. What an older workdir did not record is recorded now.

    Raises:
      UserError: shows what changed.
    """
    have = recorded_inputs(workdir)
    changed = [f"{k}: {have[k]} -> {v}" for k, v in inputs.items() if have.get(k, v) != v]
    if changed:
        raise UserError(
            f"workdir {workdir} was made from other inputs ({'; '.join(changed)}); "
            "take another --workdir, or put them back"
        )
    if jax.process_index() == 0 and inputs.keys() - have.keys():
        files.write_sealed(workdir / "inputs.json", have | inputs)


def scoring_inputs(config) -> dict[str, str]:
    """Fingerprints of the files that a run is judged by: the feature network's weights, the reference's statistics."""
    found = {}
    weights = features.file_of(config.eval.network, config.eval.weights)
    if weights is not None:
        found["features"] = f"{config.eval.network} {files.digest(weights)}"
    if config.eval.reference:
        path = names.resolve(config.eval.reference)
        found |= {"reference": files.digest(path)} if Path(path).is_file() else {}
    return found


def check(config) -> Checked:
    """Everything that can be refused before the workdir is touched.

    Raises:
      UserError: see `config.validate`, `load.find`, `sources.open_source`, `check_data`.
    """
    family, settings, mesh = check_network(config)
    if config.eval.network == "digits" and config.data.name != "digits":
        raise UserError(f"config.eval.network: 'digits' judges digits only, not {config.data.name}; allowed: inception")
    init = None if config.init == "scratch" else find_start(config.init)
    family.companions()
    data = sources.of_config(config, config.data.split)
    check_data(config, family, data)
    limits.check(config, family, len(data))
    classes.look(config, family, data)
    latent = data.image_shape != family.image_shape
    if config.data.holdout:
        _refuse_latents(latent, "data.holdout", config.data.holdout, "'': they are not decoded to be scored")
        sources.of_config(config, config.data.holdout)
    features.check(config.eval.network, config.eval.weights)
    if config.eval.reference:
        names.resolve(config.eval.reference)
    _refuse_latents(latent and config.data.flip, "data.flip", True, "False, a mirrored latent is not the mirror's")
    _refuse_latents(latent and not config.eval.reference, "eval.reference", "unset", "statistics of real images")
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


def prepare(config, workdir: epath.PathLike, console: record.Console) -> rounds.Setup:
    """Check the config, open the workdir, build what the phases share.

    Raises:
      UserError: see `check`, `open_workdir`.
    """
    family, settings, mesh, data, init = check(config)
    if init is not None:
        params, own = load.parameters(init, family, mesh)
    else:
        params, own = None, load.initial_frozen(family, mesh, config.seed)
    frozen = load.complete(family, mesh, own)
    inputs = {"data": data.fingerprint, "start": "scratch" if params is None else checkpoint.weights_digest(params)}
    inputs |= {name: checkpoint.weights_digest(frozen[name]) for name in frozen if name not in own}
    inputs |= scoring_inputs(config)
    workdir = open_workdir(config, workdir, inputs)
    if jax.process_index() == 0:
        files.remove_leftovers(workdir, config.lease_s)
    check_inputs(workdir, inputs)
    classes.keep(workdir, data, console)
    load.save_frozen(workdir, own)
    sampler = search.reporting(score.make_sampler(family, settings, mesh, config.eval.batch))
    fakes = sampler  # pixels are stored as they are looked at: one program for both
    if len(family.record_shapes) > 1:
        how, batch = family.fake_settings(settings), config.eval.batch
        batch = batch if config.ddo.pool else min(batch, config.ddo.batch)  # a step's fakes are not padded
        fakes = search.reporting(score.make_sampler(family, how, mesh, batch, output="records"))
    train, tokens = tokenised(config, family, frozen, mesh, data)
    samplers = [(settings, sampler)]
    for given in config.eval.also:
        how = family.settings({**config.sampler, **given})
        samplers.append((how, search.reporting(score.make_sampler(family, how, mesh, config.eval.batch))))
    evaluate, metric = make_evaluator(config, workdir, family, frozen, samplers, data)
    tools = loop.Tools(
        family=family,
        frozen=frozen,
        mesh=mesh,
        data=data,
        flip=config.data.flip,
        train=train,
        tokens=tokens,
        asks=None if family.version is None else asked.programs(family, config.ddo, mesh),
        step_for=step_factory(config, family, mesh),
        ratio=step.make_ratio(family, config.ddo),
        evaluate=evaluate,
        levels=config.model.levels,
        metric=metric,
        log=config.log,
        console=console,
    )
    return rounds.Setup(config, workdir, tools, sampler, fakes, params)


TOKENISED_ONCE = 2**16  # images; of larger sets training makes the tokens of every step


def tokenised(config, family, frozen, mesh, data):
    """(what training reads, the program that makes tokens of its records or None), for families with tokens.

    The tokens of small sets are made here, once, where an image always has the same ones.
    """
    if family.version is None or data.image_shape != family.image_shape:
        return data, None

    @jax.jit
    def tokens(frozen, record):
        return family.store(frozen, family.encode(frozen, record, jax.random.key(0)))

    if config.data.flip or data.random_crop or len(data) > TOKENISED_ONCE:
        return data, tokens
    batch, parts = config.eval.batch, []
    for i in range(0, len(data), batch):
        rows = np.resize(np.arange(i, min(i + batch, len(data))), batch)  # padded: one program
        record = data.read(rows[sharding.own_rows(batch)])
        made = tokens(frozen, sharding.put_batch(mesh, record))
        parts.append({k: sharding.to_host(v)[: len(data) - i] for k, v in made.items()})
    images, labels = (np.concatenate([p[k] for p in parts]) for k in ("image", "label"))
    return sources.ArraySource(data.name, images, labels, data.num_classes), None


def check_data(config, family, data) -> None:
    """The data must have the shape, the classes and the grey levels that the network is built for.

    Raises:
      UserError: they have not; says what to set, or how to make them so.
    """
    if data.image_shape not in family.record_shapes:
        mend = "set model.img_resolution and model.img_channels"
        if len(data.image_shape) == 3 and data.image_shape[0] != data.image_shape[1]:
            mend = (
                "height and width differ, and networks here are square: python -m ddo_jax.data SRC DST.zip "
                f"--crop=center --resolution={config.model.img_resolution} makes a square set, --config.data.crop=var "
                "crops as it reads"
            )
        raise UserError(
            f"config.model: takes {' or '.join(map(str, family.record_shapes))}, but {data.name} has "
            f"{data.image_shape}; {mend}"
        )
    if family.num_classes not in (0, data.num_classes):
        allowed = f"0 or {data.num_classes} as in {data.name}" if data.num_classes else f"0: {data.name} has no labels"
        raise UserError(f"config.model.label_dim: {family.num_classes}; allowed: {allowed}")
    if config.model.levels < 256 and data.max_level >= config.model.levels:  # the maximum may need every image
        raise UserError(
            f"config.model.levels: {config.model.levels}, but {data.name} has the grey level {data.max_level}"
        )
