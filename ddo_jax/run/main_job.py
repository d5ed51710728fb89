"""The main job: start, rounds, control, report. `run` is what the command line calls."""

import dataclasses
import functools
import math
import re

import jax
import numpy as np
from etils import epath

from ddo_jax import config as configs
from ddo_jax import sharding
from ddo_jax.convert import origin
from ddo_jax.data import sources
from ddo_jax.evaluate.neighbours import distance_among, nearest_distance, some_images
from ddo_jax.evaluate.records import Evaluation, Round
from ddo_jax.generate.seeds import seed_range
from ddo_jax.report import card, plots, report
from ddo_jax.run import costs, jobs, profile, publish, record, rounds
from ddo_jax.run.candidates import divide
from ddo_jax.run.checks import FEW
from ddo_jax.run.prepare import Setup, prepare
from ddo_jax.run.scoring import evaluations


def run(config, workdir: epath.PathLike, profile_steps: str | None = None) -> epath.Path:
    """Do the whole job, or what is left of it, in `workdir`; the path of the report.

    Args:
      profile_steps: "20-30": of the first candidate that comes to step 20, a trace is written (`run.profile`).

    Raises:
      UserError: what a user can mend; nothing is overwritten.
    """
    console = record.Console()
    traced = profile.of_flag(profile_steps, config, workdir, console.line)
    setup = dataclasses.replace(prepare(config, workdir, console), profile=traced)
    config = setup.config
    start = rounds.begin(setup)
    systems = {"start": start}
    final_scores(setup, "start", start)
    ref, played = start, []
    for index in range(config.ddo.rounds):
        ref, summary = rounds.play_round(setup, index, ref)
        played.append(summary)
        publish.publish_views(setup)
    if config.ddo.rounds:
        systems["ddo"] = ref
    if config.control.enabled and config.ddo.rounds:
        systems["control"], _ = rounds.control(setup, start)
    scores = {name: final_scores(setup, name, params) for name, params in systems.items()}
    scores |= other_scores(setup, systems)
    scores |= yardstick(setup)
    publish.publish_views(setup)
    path = make_report(setup, systems, scores, played)
    told = notes(setup, scores)
    publish.publish_best(setup, ref, functools.partial(card.card, config, scores, played, told))
    if traced.waits:
        console.line(f"--profile_steps: {profile_steps}: no phase came to the first of them; nothing was traced")
    console.line(f"report: {path}")
    return path


def final_scores(setup: Setup, name: str, system: sharding.Parked) -> report.Scores:
    """The system's numbers on the report's seed ranges, which chose nothing."""
    config = setup.config

    def score():
        params = system()
        result = {"evals": [e.record() for e in report_evals(setup, name, params, 0)]}
        if setup.family.spec.kind(setup.data.image_shape) != "pixels":  # latents: no images to compare with
            return result
        images = samples(setup, params, min(config.eval.num, 1024))
        return result | {"nearest": nearest_distance(images, some_images(setup.data), config.model.levels)}

    (result,) = divide(setup, [jobs.Task(setup.workdir / "report" / "scores" / name, score)])
    return report.Scores(evaluations(result), result.get("nearest"))


def report_evals(setup: Setup, name: str, params, how: int) -> list[Evaluation]:
    """Evaluations of a system on the report's seed ranges; how: which sampler (see `scoring.Scorer`)."""
    ranges = range(setup.config.eval.report_seeds)
    evals = [setup.scorer(params, (name, 0, 0), "report", i, how)[0] for i in ranges]
    if evals[0].metric:
        text = report.mean_and_spread([e.score for e in evals])
        setup.console.line(f"{report.shown(name, configs.method_of(setup.config))}: {evals[0].metric} {text}")
    return evals


def other_scores(setup: Setup, systems: dict[str, sharding.Parked]) -> dict[str, report.Scores]:
    """The systems under the sampler settings of config.eval.also; they select nothing."""
    tasks = {}
    for how, given in enumerate(setup.config.eval.also, 1):
        label = ", ".join(f"{k} {v}" for k, v in given.items())
        for system, params in systems.items():
            name = f"{system}{report.UNDER}{label}"

            def score(name=name, params=params, how=how):
                return {"evals": [e.record() for e in report_evals(setup, name, params(), how)]}

            directory = setup.workdir / "report" / "scores" / f"{system}-{label.replace(', ', '-').replace(' ', '')}"
            tasks[name] = jobs.Task(directory, score)
    results = divide(setup, list(tasks.values()))
    return {name: report.Scores(evaluations(result)) for name, result in zip(tasks, results, strict=True)}


def yardstick(setup: Setup) -> dict[str, report.Scores]:
    """How far real images are from the nearest training image: those that the models never saw, or, where no images are
    held out, the training images from one another."""
    config, levels = setup.config, setup.config.model.levels
    if config.data.holdout:
        held_out = sources.of_config(config, config.data.holdout)
        images = [some_images(source) for source in (held_out, setup.data)]
        return {report.HELD_OUT: report.Scores([], nearest_distance(*images, levels))}
    if setup.family.spec.kind(setup.data.image_shape) != "pixels":
        return {}
    return {report.AMONG: report.Scores([], distance_among(some_images(setup.data), levels))}


def notes(setup: Setup, scores: dict[str, report.Scores]) -> tuple[str, ...]:
    """What the reader of the report must know beside its numbers."""
    found = []
    if setup.drawn is not None:
        new = f"drawn anew for {setup.family.spec.num_classes} classes: {', '.join(setup.drawn)}; all else was kept"
        found.append(
            f"The start is `{origin.shown(setup.config.init)}` after MLE on {report.plain(setup.data.name)} "
            f"(`config.adapt`); {new if setup.drawn else 'all of its parameters were kept'}."
        )
    last = scores.get("ddo", scores["start"]).nearest
    real = next((name for name in (report.HELD_OUT, report.AMONG) if name in scores), None)
    if len(setup.data) < FEW and last is not None and real is not None:
        found.append(
            f"{report.plain(setup.data.name)} has {len(setup.data)} images, fewer than {FEW}: a network may learn them "
            f"by heart. Its samples are {last:.3f} from the nearest training image, {real} "
            f"{scores[real].nearest:.3f}; far below that they are copies."
        )
    return tuple(found)


def samples(setup: Setup, params, num: int) -> np.ndarray:
    """The first `num` images of the report's first seed range."""
    seeds = seed_range("report", 0, setup.config.eval.num)[:num]
    return np.concatenate([r["image"] for r in setup.scorer.samples(params, seeds)])


def training_curves(setup: Setup, played: list[Round]) -> list[plots.Curve]:
    """Every candidate's evaluations; the rounds one after the other from the start on."""
    results, curves, offset, c = publish.finished(setup.workdir), [], 0, setup.config.ddo
    if any(r.start is None for r in played):  # nothing was scored
        return []
    for r in played:
        prefix = f"rounds/{r.number:03d}/"
        length = 0
        for name, result in results.items():
            if name.startswith(prefix) and "steps" in result:
                label = f"round {r.number}, {name.removeprefix(prefix)}"
                curve = _curve(label, "round", r.number - 1, r.start, offset, evaluations(result))
                whole = configs.steps(c.length, c.batch, len(setup.data), "ddo.length")
                curves.append(dataclasses.replace(curve, stopped=result["steps"] < whole))
                length = max(length, result["images"])
        offset += length
    for name, result in results.items():
        if name.startswith("control/"):
            label = f"MLE control, lr {name.removeprefix('control/lr')}"
            curves.append(_curve(label, "control", 0, played[0].start, 0, evaluations(result)))
    return curves


def _curve(label: str, kind: str, index: int, start: float, offset: int, evals: list) -> plots.Curve:
    images = [offset, *(offset + e.images for e in evals)]
    return plots.Curve(label, kind, index, images, [start, *(e.score for e in evals)])


def make_report(setup: Setup, systems: dict, scores: dict, played: list[Round]) -> epath.Path:
    """All processes sample the grids; one writes."""
    num = min(setup.config.eval.grid, setup.config.eval.num)
    grids = {name: samples(setup, params(), num) for name, params in systems.items()}
    directory = setup.workdir / "report"
    found = [(r.number, jobs.result_of(setup.workdir / f"rounds/{r.number:03d}" / "ratios")) for r in played]
    ratios = [plots.Ratios(number, result["real"], result["fake"]) for number, result in found if result is not None]
    if jax.process_index() != 0:
        return directory / "report.md"
    shown = report.Report(
        setup.config,
        scores,
        played,
        training_curves(setup, played),
        ratios,
        grids,
        notes(setup, scores),
        lines=line_points(setup, played),
        visited=visited(setup, played),
        searched=searched(setup, played),
        signal=signals(setup, played),
        **costs_of(setup),
    )
    return shown.write(directory)


def visited(setup: Setup, played: list[Round]) -> tuple[plots.Visited, ...]:
    """The (alpha, beta) that the rounds tried."""
    results, found = publish.finished(setup.workdir), []
    for r in played:
        for name, result in results.items():
            cell = re.fullmatch(rf"rounds/{r.number:03d}/(?:cca_)?a([^_]+)_b([^/]+)", name)
            scores = [e.score for e in evaluations(result) if e.score is not None] if cell else []
            if scores:
                found.append(plots.Visited(r.number, float(cell[1]), float(cell[2]), scores[0], min(scores)))
    return tuple(found)


def searched(setup: Setup, played: list[Round]) -> tuple[list, ...]:
    """A row for every comparison of a candidate (see `run.search`)."""
    rows = []
    for r in played:
        directory = setup.workdir / f"rounds/{r.number:03d}"
        for halving in (jobs.result_of(directory / "search") or {"halvings": []})["halvings"]:
            for name, v in halving["verdicts"].items():
                numbers = [
                    "" if v[key] is None or math.isnan(v[key]) else f"{v[key]:.3f}" for key in ("behind", "within")
                ]
                score = halving["scores"][name]
                then = "goes on" if v["goes_on"] else f"stops: {v['why']}"
                rows.append([r.number, name, halving["step"], f"{score:.3f}", *numbers, then])
    return tuple(rows)


def line_points(setup: Setup, played: list[Round]) -> tuple[report.Point, ...]:
    """The points of the rounds' line searches, each line in order."""
    found = []
    for r in played:
        prefix = f"rounds/{r.number:03d}/"
        results = [x for name, x in publish.finished(setup.workdir).items() if name.startswith(prefix) and "w" in x]
        for result in sorted(results, key=lambda x: x["w"]):
            for e in evaluations(result):
                if e.score is not None:
                    found.append(report.Point(r.number, result["through"], result["w"], e.metric, e.score))
    return tuple(found)


def signals(setup: Setup, played: list[Round]) -> tuple[list, ...]:
    """A row a round (see `run.signal`)."""
    found = [(r.number, jobs.result_of(setup.workdir / f"rounds/{r.number:03d}" / "signal")) for r in played]
    return tuple(
        [number, *(f"{x[side][key]:.3g}" for side in ("real", "fake") for key in ("norm", "noise"))]
        for number, x in found
        if x is not None
    )


def costs_of(setup: Setup) -> dict:
    """`cost` and `shares` of the report."""
    config = setup.config
    parts, each = costs.work(config, len(setup.data)), costs.each(setup.family, setup.family.settings(config.sampler))
    rows = [[p.name, f"{p.trained:,}", f"{p.fakes:,}", f"{p.judged:,}"] for p in parts]
    return {"cost": tuple(rows), "shares": tuple(costs.shares(config, parts, each))}
