"""What a run costs, from its config alone: images trained on, sampled as fakes, sampled to be judged."""

import math
from typing import NamedTuple

from ddo_jax import config as configs
from ddo_jax.core import search
from ddo_jax.families import Family

EACH_ROUND = "each round"
PASSES = {"pretrain": 3, "adapt": 3, "ddo": 8, "control": 3}  # phases in order; see `work`
SEARCHED = 4  # values of beta that a search tries, typically
FEW = 2048  # images that select more cheaply: a figure to compare with


class Work(NamedTuple):
    """A part of a run.

    Attributes:
      name: of the part. trained: real images (of Neon: fakes) in steps. passes: forward passes that each costs, with
        all it brings along. fakes: images sampled to train on. judged: images sampled to be scored.
    """

    name: str
    trained: int
    passes: float
    fakes: int
    judged: int


class Each(NamedTuple):
    """Forward passes that a sampled image costs: one that is judged, a fake."""

    judged: int
    fake: int


def each(family: Family, settings) -> Each:
    """Of the run's sampler settings."""
    return Each(family.passes(settings), family.passes(family.fake_settings(settings)))


def length(config, section: str, examples: int, key: str) -> int | None:
    """Steps of a duration of a section."""
    c = config[section]
    return configs.steps(c[key], c.batch, examples, f"{section}.{key}")


def total(config, section: str, examples: int) -> int:
    """Steps of a phase."""
    if section == "control":
        return config.control.factor * config.ddo.rounds * total(config, "ddo", examples)
    return length(config, section, examples, "length") or 0


def times(config, section: str, examples: int, key: str) -> int:
    """How often a phase does what it does `key` = "eval_every" or "snapshot_every" steps; at its end too."""
    every = length(config, section, examples, key)
    return math.ceil(total(config, section, examples) / every) if every else 0


def candidates(config, section: str) -> int:
    """Trainings of a phase: of the pretraining, of one round, of the control; 0 if it is off."""
    if section == "pretrain":
        return int(config.init == "scratch")
    if section == "adapt":
        return int(configs.is_set(config.adapt.length))
    if section == "ddo":
        grid = len(config.ddo.alpha) * len(config.ddo.beta)
        return (SEARCHED if searches(config) else grid) if config.ddo.rounds else 0
    return len(config.control.lrs) if config.control.enabled and config.ddo.rounds else 0


def searches(config) -> bool:
    """Whether a round finds its beta itself."""
    return config.ddo.search == "auto" and configs.method_of(config) == "ddo"


def steps(config, section: str, examples: int) -> int:
    """Steps of all trainings of a phase; where beta is searched all but one end where they are first compared."""
    number, whole = candidates(config, section), total(config, section, examples)
    if section == "ddo" and searches(config):
        return (number - 1) * first_stop(config, examples) + whole
    return number * whole


def first_stop(config, examples: int) -> int:
    """The step at which a search compares its candidates."""
    every, warmup = (length(config, "ddo", examples, key) or 0 for key in ("eval_every", "warmup"))
    return search.stops(total(config, "ddo", examples), every, warmup)[0]


def evaluations(config, section: str, examples: int) -> int:
    """Evaluations of a phase; of a round with that of its start and those of a line."""
    each, number = times(config, section, examples, "eval_every"), candidates(config, section)
    inside = number * each
    if section == "ddo" and searches(config):
        inside = (number - 1) * -(-first_stop(config, examples) * each // total(config, section, examples)) + each
    if section != "ddo":
        return inside
    if configs.method_of(config) == "neon":
        return 1 + len(config.neon.w)
    return 1 + inside + len(config.ddo.line)


def judged(config) -> int:
    """Images of one evaluation inside a phase."""
    return config.eval.select_num or config.eval.num


def together(config, section: str) -> int:
    """Candidates that are trained side by side."""
    return max(1, min(config.ddo.together, candidates(config, section))) if section == "ddo" else 1


def passes(config, section: str) -> float:
    """Forward passes that a real image costs in training, and what it brings along (see `work`)."""
    pairs = section == "ddo" and configs.method_of(config) in ("ddo", "cca")
    if not pairs:
        return PASSES["control"] + config.remat
    each = (PASSES["ddo"] - 2) / 2 + config.remat + 1 / together(config, section)
    return each * (1 + configs.fakes_of_a_step(config.ddo) / config.ddo.batch)


def fakes(config, examples: int) -> int:
    """Images that the reference of one round samples to train on."""
    if not (configs.samples_fakes(config) and config.ddo.rounds):
        return 0
    return config.ddo.pool or total(config, "ddo", examples) * configs.fakes_of_a_step(config.ddo)


def work(config, examples: int) -> list[Work]:
    """The parts of a run in order; a round once.

    A backward pass costs two forward passes. DDO trains on a real image and a fake with the target, and evaluates the
    reference on both: 2 (1 + 2) + 2 = 8, with fewer fakes (ddo.fake_ratio) in proportion; MLE (and Neon) takes 3; with
    remat every trained image takes one more. What the reference said of tokens is kept: examples that return cost 6.
    Candidates side by side (ddo.together) share the reference's two. Tokenising is not in it.
    """
    parts = []
    for section in PASSES:
        if candidates(config, section):
            name = EACH_ROUND if section == "ddo" else section
            trained = steps(config, section, examples) * config[section].batch
            made = fakes(config, examples) if section == "ddo" else 0
            scored = judged(config) * evaluations(config, section, examples)
            parts.append(Work(name, trained, passes(config, section), made, scored))
    systems = (1 + bool(config.ddo.rounds) + bool(candidates(config, "control"))) * (1 + len(config.eval.also))
    return [*parts, Work("report", 0, 0, 0, systems * config.eval.report_seeds * config.eval.num)]


def forwards(part: Work, each: Each) -> dict[str, float]:
    """Forward passes of a part, by what they are for."""
    sampled = {"fakes": part.fakes * each.fake, "selection": part.judged * each.judged}
    return {"training": part.trained * part.passes, **sampled}


def shares(config, parts: list[Work], each: Each) -> list[str]:
    """Sentences: what a round's FLOPs are for, and what judging it by less would save; [] without rounds."""
    found = next((p for p in parts if p.name == EACH_ROUND), None)
    if found is None:
        return []
    spent = forwards(found, each)
    whole = sum(spent.values())
    lines = ["a round's FLOPs: " + ", ".join(f"{name} {value / whole:.0%}" for name, value in spent.items())]
    fewer = min(FEW, judged(config))
    ways = {f"{fewer:,} images an evaluation": spent["selection"] * (1 - fewer / judged(config))}
    if each.judged > 12:
        ways["DPM-Solver-v3 of 12 steps"] = spent["selection"] * (1 - 12 / each.judged)
        if fewer < judged(config):
            ways["both"] = spent["selection"] * (1 - fewer / judged(config) * 12 / each.judged)
    saved = [f"{name} {value / whole:.0%}" for name, value in ways.items() if value > 0]
    return lines + ([f"a cheaper selection would save of them: {', '.join(saved)}"] if saved else [])
