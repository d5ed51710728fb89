"""The main job: start, rounds, control, report. `run` is what the command line calls."""

import functools

import jax
import numpy as np
from etils import epath

from ddo_jax import files, sharding
from ddo_jax.convert import safetensors
from ddo_jax.data import sources
from ddo_jax.data.labels import present_classes
from ddo_jax.evaluate import score
from ddo_jax.run import classes, record, report, rounds, search
from ddo_jax.run.checkpoint import Checkpoints, read_meta, weights_digest
from ddo_jax.run.prepare import prepare
from ddo_jax.run.rounds import Setup


def run(config, workdir: epath.PathLike) -> epath.Path:
    """Do the whole job, or what is left of it, in `workdir`; the path of the report.

    Raises:
      UserError: what a user can mend; nothing is overwritten.
    """
    console = record.Console()
    setup = prepare(config, workdir, console)
    start = rounds.pretrain(setup) if setup.init is None else setup.init
    systems = {"start": start}
    final_scores(setup, "start", start)
    ref, played = start, []
    for index in range(config.ddo.rounds):
        ref, summary = rounds.play_round(setup, index, ref)
        played.append(summary)
        publish_views(setup)
    if config.ddo.rounds:
        systems["ddo"] = ref
    if config.control.enabled and config.ddo.rounds:
        systems["control"], _ = rounds.control(setup, start)
    scores = {name: final_scores(setup, name, params) for name, params in systems.items()}
    scores |= other_scores(setup, systems)
    scores |= held_out_scores(setup)
    publish_views(setup)
    publish_best(setup, ref)
    path = make_report(setup, systems, scores, played)
    console.line(f"report: {path}")
    return path


def final_scores(setup: Setup, name: str, params) -> dict:
    """The system's numbers on the report's seed ranges, which chose nothing."""
    c, tools = setup.config, setup.tools

    def run():
        evals = report_evals(setup, name, params, 0)
        if tools.data.image_shape != tools.family.image_shape:  # latents: no images to compare with
            return {"evals": evals}
        images = samples(setup, params, min(c.eval.num, 1024))
        nearest = score.nearest_distance(images, score.some_images(tools.data), c.model.levels)
        return {"evals": evals, "nearest": nearest}

    (result,) = rounds.divide(setup, [search.Task(setup.workdir / "report" / "scores" / name, run)])
    return result


def report_evals(setup: Setup, name: str, params, how: int) -> list[dict]:
    """Evaluations of a system on the report's seed ranges; how: which sampler (see `prepare.make_evaluator`)."""
    tools, evals = setup.tools, []
    for i in range(setup.config.eval.report_seeds):
        evals.append({"images": 0, **tools.evaluate(params, name, 0, "report", i, how)[0]})
    text = report.mean_and_spread([e[e["metric"]] for e in evals])
    tools.console.line(f"{report.shown(name)}: {evals[0]['metric']} {text}")
    return evals


def other_scores(setup: Setup, systems: dict) -> dict:
    """The systems under the sampler settings of config.eval.also; they select nothing."""
    tasks = {}
    for how, given in enumerate(setup.config.eval.also, 1):
        label = ", ".join(f"{k} {v}" for k, v in given.items())
        for system, params in systems.items():
            name = f"{system}{report.UNDER}{label}"

            def run(name=name, params=params, how=how):
                return {"evals": report_evals(setup, name, params, how)}

            directory = setup.workdir / "report" / "scores" / f"{system}-{label.replace(', ', '-').replace(' ', '')}"
            tasks[name] = search.Task(directory, run)
    return dict(zip(tasks, rounds.divide(setup, list(tasks.values())), strict=True))


def held_out_scores(setup: Setup) -> dict:
    """The yardstick: real images the models never saw, by their distance to the nearest training image."""
    c = setup.config
    if not c.data.holdout:
        return {}
    held_out = sources.of_config(c, c.data.holdout)
    images = [score.some_images(source) for source in (held_out, setup.tools.data)]
    nearest = score.nearest_distance(*images, c.model.levels)
    return {"held-out images": {"evals": [{}], "nearest": nearest}}


def samples(setup: Setup, params, num: int) -> np.ndarray:
    """The first `num` images of the report's first seed range."""
    seeds = score.seed_range("report", 0, setup.config.eval.num)[:num]
    present = present_classes(setup.tools.data.class_counts)
    labels = score.balanced(seeds, setup.tools.family.num_classes, present)
    records = setup.sampler(params, setup.tools.frozen, seeds, labels)
    return np.concatenate([r["image"] for r in records])


def finished(workdir: epath.Path) -> dict[str, dict]:
    """{relative directory: result} of every finished task, in the order of the run."""
    directories = [workdir / "pretrain"]
    for number in files.matching(workdir / "rounds", "*"):
        directories += files.matching(number, "*")
    directories += [*files.matching(workdir / "control", "*"), *files.matching(workdir / "report" / "scores", "*")]
    found = {d: search.result_of(d) for d in directories if d.is_dir()}
    for lost in (d for d, result in found.items() if result is None and (d.parent / "best.json").exists()):
        search.say(f"{lost}: its result is lost, though the round is decided: left out of evals.jsonl and curves")
    return {str(d.relative_to(workdir)): result for d, result in found.items() if result is not None}


def publish_views(setup: Setup) -> None:
    """metrics.jsonl and evals.jsonl of the whole run, put together from the phases' own records."""
    if jax.process_index() != 0:
        return
    results = finished(setup.workdir)
    logs = [setup.workdir / name / "metrics.jsonl" for name in results]
    record.concatenate([p for p in logs if p.exists()], setup.workdir / "metrics.jsonl")
    evals = [e for r in results.values() for e in r.get("evals", [r] if "protocol" in r else [])]
    record.write_jsonl(setup.workdir / "evals.jsonl", evals)


def publish_best(setup: Setup, params) -> None:
    """best/: the run's result as a checkpoint that `init` and `load` take, and as safetensors for others."""
    directory = setup.workdir / "best"

    def run():
        if jax.process_index() == 0 and _checkpoint_problem(directory) and (directory / "checkpoints").exists():
            (directory / "checkpoints").rmtree()
        sharding.agree(True)  # the other processes wait
        with Checkpoints(directory / "checkpoints", alone=True) as checkpoints:
            if checkpoints.latest_step() is None:
                checkpoints.save(0, {"ema": params}, {"step": 0})
        host = jax.tree.map(sharding.to_host, (params, setup.tools.frozen))
        written = []
        if jax.process_index() == 0:
            arrays, about = setup.tools.family.export(*host)
            about = about | classes.metadata(setup.tools.data)
            files.write_bytes(directory / "params.safetensors", safetensors.dumps(arrays, about))
            files.write_sealed(directory / "config.json", setup.config.to_dict())
            written = [directory / "params.safetensors", directory / "config.json"]
            if (table := files.kept(setup.workdir / classes.TABLE)) is not None:
                files.write_bytes(directory / classes.TABLE, table)  # best/ alone can be taken elsewhere
                written.append(directory / classes.TABLE)
        return {"weights": weights_digest(params), "files": {p.name: files.digest(p) for p in written}}

    rounds.divide(setup, [search.Task(directory, run, functools.partial(_best_problem, directory))])


def _checkpoint_problem(directory: epath.Path) -> str:
    try:
        read_meta(directory / "checkpoints", 0)
    except files.Damaged as e:
        return str(e)
    return ""


def _best_problem(directory: epath.Path, result: dict) -> str:
    """What is not as it was written in best/, in words; "" if all is."""
    if problem := _checkpoint_problem(directory):
        return problem
    for name, digest in result.get("files", {"params.safetensors": None, "config.json": None}).items():
        path = directory / name
        if not path.exists():
            return f"{path}: missing"
        if digest not in (None, files.digest(path)):
            return f"{path}: not as it was written"
    return ""


def training_curves(setup: Setup, played: list[dict]) -> list[dict]:
    """Every candidate's evaluations; the rounds one after the other from the start on."""
    metric = setup.tools.metric
    results, curves, offset = finished(setup.workdir), [], 0
    for r in played:
        prefix = f"rounds/{r['round']:03d}/"
        length = 0
        for name, result in results.items():
            if name.startswith(prefix) and "steps" in result:
                images = [offset] + [offset + e["images"] for e in result["evals"]]
                values = [r["start"]] + [e[metric] for e in result["evals"]]
                label = f"round {r['round']}, {name.removeprefix(prefix)}"
                curves.append(dict(label=label, kind="round", index=r["round"] - 1, images=images, values=values))
                length = max(length, result["images"])
        offset += length
    for name, result in results.items():
        if name.startswith("control/"):
            images = [0] + [e["images"] for e in result["evals"]]
            values = [played[0]["start"]] + [e[metric] for e in result["evals"]]
            label = f"MLE control, lr {name.removeprefix('control/lr')}"
            curves.append(dict(label=label, kind="control", index=0, images=images, values=values))
    return curves


def make_report(setup: Setup, systems: dict, scores: dict, played: list[dict]) -> epath.Path:
    """All processes sample the grids; one writes."""
    num = min(setup.config.eval.grid, setup.config.eval.num)
    grids = {name: samples(setup, params, num) for name, params in systems.items()}
    directory = setup.workdir / "report"
    found = [(r["round"], search.result_of(setup.workdir / f"rounds/{r['round']:03d}" / "ratios")) for r in played]
    ratios = [{"round": index, **result} for index, result in found if result is not None]
    if jax.process_index() != 0:
        return directory / "report.md"
    return report.write_report(
        directory,
        config=setup.config,
        metric=setup.tools.metric,
        scores=scores,
        rounds=played,
        curves=training_curves(setup, played),
        ratios=ratios,
        grids=grids,
    )
