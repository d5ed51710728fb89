"""How a run is judged: which networks and references, which images for which purpose, the evaluation of parameters."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from ddo_jax import config as configs
from ddo_jax import files
from ddo_jax.convert import names
from ddo_jax.data import sources
from ddo_jax.data.labels import balanced_labels, balanced_rule, present_classes
from ddo_jax.errors import UserError
from ddo_jax.evaluate import collect, features, image_sets, references
from ddo_jax.evaluate.collect import DINOV2, EFFICIENTNET, MAIN
from ddo_jax.evaluate.evaluator import Evaluator, First, Images, with_real_features
from ddo_jax.evaluate.records import Evaluation, read
from ddo_jax.families import Family
from ddo_jax.generate.seeds import seed_range, seeds_text
from ddo_jax.store import workdir as workdirs
from ddo_jax.store.checkpoint import weights_digest

SELECTING = ("fid", "sfid", "fd_dinov2", "kid", "mind")  # lower is better in all of them


NOTHING = "none"  # eval.network: nothing is scored


def select_metric(config) -> str | None:
    """The metric that selects (of `collect.METRICS`); None where nothing is scored."""
    if config.eval.network == NOTHING:
        return None
    return config.eval.select or ("fd_dinov2" if config.eval.network == "dinov2" else "fid")


def report_metrics(config) -> list[str]:
    """What the report scores, the selecting one first."""
    first = select_metric(config)
    return [] if first is None else list(dict.fromkeys([first, *config.eval.metrics]))


def networks_of(config) -> dict[str, tuple[str, str | None]]:
    """{MAIN | DINOV2 | EFFICIENTNET: (name, WHAT of its weights)} of the feature networks that a run needs."""
    c = config.eval
    if c.network == NOTHING:
        return {}
    main = (c.network, c.weights)
    if c.network == "dinov2":
        return {DINOV2: main}
    found = {MAIN: main}
    beside = {DINOV2: c.dinov2_weights, EFFICIENTNET: c.efficientnet_weights}
    wanted = collect.networks_of(report_metrics(config))
    return found | {name: (name, weights) for name, weights in beside.items() if name in wanted}


def check_metrics(config) -> None:
    """Refuse metrics that are none, or that the networks of the run cannot give.

    Raises:
      UserError: names key and value.
    """
    if config.eval.network == NOTHING:
        _check_unscored(config)
        return
    configs.require(select_metric(config) in SELECTING, "eval.select", config.eval.select, ", ".join(SELECTING))
    for metric in config.eval.metrics:
        configs.require(metric in collect.METRICS, "eval.metrics", metric, ", ".join(collect.METRICS))
    there = networks_of(config)
    for metric in report_metrics(config):
        key = "eval.metrics" if metric in config.eval.metrics else "eval.select"
        allowed = f"what eval.network = {config.eval.network!r} gives"
        configs.require(collect.networks_of([metric]) <= there.keys(), key, metric, allowed)
        photographs = metric not in ("fd_dinov2", "fd_efficientnet") or config.eval.network != "digits"
        configs.require(photographs, key, metric, "of photographs; eval.network = 'digits' judges digits")
    e = config.eval
    collect.check(report_metrics(config), e.num)
    collect.check([select_metric(config)], e.select_num or e.num)


def _check_unscored(config) -> None:
    """Where nothing is scored, nothing can be chosen."""
    allowed = f"{{}}: eval.network = {NOTHING!r} scores nothing"
    for key, nothing in (("select", None), ("metrics", ()), ("reference", None), ("weights", None)):
        value = config.eval[key]
        configs.require(value == nothing, f"eval.{key}", value, allowed.format("unset" if nothing is None else nothing))
    configs.require(not config.ddo.line, "ddo.line", config.ddo.line, allowed.format("()"))
    configs.require(config.ddo.search != "auto", "ddo.search", "auto", allowed.format("fixed, grid"))
    trained = [("ddo", "alpha"), ("ddo", "beta")] if config.ddo.rounds else []
    trained += [("neon", "w")] if config.ddo.rounds and configs.method_of(config) == "neon" else []
    trained += [("control", "lrs")] if config.ddo.rounds and config.control.enabled else []
    for section, key in trained:
        value = config[section][key]
        one = f"one value: eval.network = {NOTHING!r} scores nothing, so that nothing could choose"
        configs.require(len(value) == 1, f"{section}.{key}", value, one)


def scoring_inputs(config) -> dict[str, str]:
    """Fingerprints of the files that a run is judged by: the feature network's weights, the reference's statistics."""
    found = {}
    for name, weights in list(networks_of(config).values())[:1]:
        path = features.file_of(name, weights)
        found |= {} if path is None else {"features": f"{name} {files.digest(path)}"}
    if config.eval.reference:
        path = names.resolve(config.eval.reference)
        found |= {"reference": files.digest(path)} if Path(path).is_file() else {}
    return found


def feature_network(name: str, weights: str | None, config, workdir: epath.Path, reals: dict) -> features.FeatureNet:
    """A network that judges all candidates of the run, the same one at every start.

    Args:
      reals: {"train": source, config.data.holdout: source}.

    Raises:
      UserError: its file is damaged, and what is made again differs.
    """
    if name not in features.FITTED:  # the digest of its file is among the run's inputs
        return features.get_features(name, weights=weights)
    recorded = workdirs.recorded_inputs(workdir).get("features", "").removeprefix(f"{name} ") or None
    path, holdout = workdir / f"features-{name}.npz", reals.get(config.data.holdout)
    if holdout is None and name == "digits":  # it is fitted on the whole training split, in every run
        holdout = sources.open_source("digits", "test", config.data.dir)
    fit = features.Fit(reals["train"], holdout, config.model.levels, path, recorded)
    network = features.get_features(name, fit)
    workdirs.check_inputs(workdir, {"features": f"{name} {network.digest}"})
    return network


def open_evaluator(config, workdir: epath.Path, family: Family, data) -> Evaluator:
    """The evaluator of a run.

    Statistics of a file (`config.eval.reference`) take the place of the training set's; held-out images are a second
    reference.
    """
    reals = {"train": data}
    if config.data.holdout:
        reals[config.data.holdout] = sources.of_config(config, config.data.holdout)
    networks = {
        owner: feature_network(name, weights, config, workdir, reals)
        for owner, (name, weights) in networks_of(config).items()
    }
    wanted, found = report_metrics(config), {}
    if not networks:
        return Evaluator({}, {})
    lengths = collect.probe(networks, wanted, family.spec.image_shape)
    for name, source in reals.items():
        if name == "train" and config.eval.reference:
            path = names.resolve(config.eval.reference)
            found[name] = references.open_reference(path, lengths, networks)
        else:
            found[name] = references.of_images(_opener(source, config.model.levels), lengths, networks)
    return with_real_features(Evaluator(networks, found), wanted)


def _opener(source, levels: int):
    return lambda limit: image_sets.of_source(source, limit, levels)


def ema_length(c) -> str:
    """Of the average that a phase is judged by."""
    if not c.ema_stds and not c.ema_mimg:
        return "none"
    return f"power function, std {c.ema_stds[0]}" if c.ema_stds else f"half-life {c.ema_mimg:g} million images"


@dataclasses.dataclass(frozen=True)
class Scorer:
    """Samples from parameters and scores them.

    Attributes:
      config, family, frozen: of the run. evaluator: of `open_evaluator`.
      samplers: [(settings, sampler)]: the run's own, then those of config.eval.also.
      classes: ids with images, None: all. metric: the name of what selects, of that many images.
    """

    config: Any
    family: Family
    frozen: Any
    evaluator: Evaluator
    samplers: list
    classes: np.ndarray | None

    @property
    def metric(self) -> str:
        network = next(iter(self.evaluator.networks.values()))
        num, select = self._num("select"), select_metric(self.config)
        return network.named(num) if select == "fid" else collect.named(select, num)

    def _num(self, purpose: str) -> int:
        e = self.config.eval
        return e.num if purpose == "report" else e.select_num or e.num

    def samples(self, params, seeds: np.ndarray, how: int = 0):
        """Records of images with labels balanced by position."""
        labels = balanced_labels(np.arange(len(seeds)), self.family.spec.num_classes, self.classes)
        return self.samplers[how][1](params, self.frozen, seeds, labels)

    def __call__(self, params, at: tuple[str, int, int], purpose: str, index: int, how: int = 0):
        """(Evaluation of one seed range, its first `config.eval.grid` images).

        Args:
          at: (phase, step, images) of the record. purpose: "select" or "report"; index: which range.
          how: which sampler.
        """
        spec, settings = self.family.spec, self.samplers[how][0]
        seeds = seed_range(purpose, index, self._num(purpose))
        kept = First(self.samples(params, seeds, how), self.config.eval.grid)
        made = {
            "purpose": purpose,
            "seeds": seeds_text(seeds.astype(np.int64)),
            "labels": balanced_rule(self.classes) if spec.num_classes else "none",
            "quantised_to": f"uint8, {spec.levels} levels",
            "weights": weights_digest(params),
            "ema": "; ".join(f"{section}: {ema_length(self.config[section])}" for section in self._averaged()),
            "sampler": settings.record(),
            "nfe": settings.nfe,
            "guidance": self._guidance(settings),
            "rng": "jax",
            "dtype": self.config.eval.dtype,
            "precision": self.config.precision,
        }
        images = Images(at[0], len(seeds), spec.image_shape, spec.levels, spec.num_classes, kept, made)
        wanted = report_metrics(self.config) if purpose == "report" else [select_metric(self.config)]
        paired = purpose == "select" and self.config.ddo.search == "auto"
        found = self.evaluator.score(images, [metric for metric in wanted if metric], paired)
        phase, step, seen = at
        return dataclasses.replace(found, phase=phase, step=step, images=seen), kept.images()

    def _averaged(self) -> tuple[str, ...]:
        """The sections whose averages are judged."""
        return ("pretrain", "ddo") if not configs.is_set(self.config.adapt.length) else ("adapt", "ddo")

    def _guidance(self, settings) -> dict | None:
        g, strength = self.family.spec.guidance, self.family.strength(settings)
        return None if strength == g.neutral else {g.setting: strength, "rule": g.rule}


def open_scorer(config, workdir: epath.Path, family: Family, frozen, samplers: list, data) -> Scorer:
    """The scorer of a run. data: the source of real images."""
    evaluator = open_evaluator(config, workdir, family, data)
    return Scorer(config, family, frozen, evaluator, samplers, present_classes(data.class_counts))


def evaluation(record: dict) -> Evaluation:
    """One that this run recorded, of any version.

    Raises:
      UserError: it is none.
    """
    try:
        return read(record)
    except ValueError as e:
        raise UserError(
            f"a record of this run: {e}; continue with the version that wrote it, or put back a copy of the workdir"
        ) from None


def evaluations(result: dict) -> list[Evaluation]:
    """Those of a finished task, or of a checkpoint's history."""
    return [evaluation(e) for e in result.get("evals", [])]
