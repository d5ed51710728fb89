"""What a run publishes beside its report: views of its records, and best/."""

import functools
from collections.abc import Callable

import jax
from etils import epath

from ddo_jax import files, sharding
from ddo_jax.convert import safetensors
from ddo_jax.convert.origin import Origin
from ddo_jax.report.card import Model
from ddo_jax.run import jobs, record
from ddo_jax.run.candidates import divide
from ddo_jax.run.prepare import Setup
from ddo_jax.run.scoring import evaluation, evaluations
from ddo_jax.store import classes
from ddo_jax.store.checkpoint import keep_ema, read_meta, weights_digest
from ddo_jax.store.origin import of_init


def finished(workdir: epath.Path) -> dict[str, dict]:
    """{relative directory: result} of every finished task, in the order of the run."""
    directories = [workdir / "pretrain", workdir / "adapt"]
    for number in files.matching(workdir / "rounds", "*"):
        directories += files.matching(number, "*")
    directories += [*files.matching(workdir / "control", "*"), *files.matching(workdir / "report" / "scores", "*")]
    found = {d: jobs.result_of(d) for d in directories if d.is_dir()}
    for lost in (d for d, result in found.items() if result is None and (d.parent / "best.json").exists()):
        jobs.say(f"{lost}: its result is lost, though the round is decided: left out of evals.jsonl and curves")
    return {str(d.relative_to(workdir)): result for d, result in found.items() if result is not None}


def publish_views(setup: Setup) -> None:
    """metrics.jsonl and evals.jsonl of the whole run, put together from the phases' own records."""
    if jax.process_index() != 0:
        return
    results = finished(setup.workdir)
    logs = [setup.workdir / name / "metrics.jsonl" for name in results]
    record.concatenate([p for p in logs if p.exists()], setup.workdir / "metrics.jsonl")
    evals = [e for r in results.values() for e in (evaluations(r) or ([evaluation(r)] if "protocol" in r else []))]
    record.write_jsonl(setup.workdir / "evals.jsonl", [e.record() for e in evals])


CARD, PICTURE = "README.md", "samples.png"


def publish_best(setup: Setup, best: sharding.Parked, card: Callable[[Model, Origin, bool], str]) -> None:
    """best/: the run's result as a checkpoint that `init` and `load` take, and as safetensors for others, with a card.

    Args:
      card: (model, origin, whether the report has a picture) -> the card's text.
    """
    directory = setup.workdir / "best"

    def run():
        params = best()
        keep_ema(directory / "checkpoints", 0, params, {"step": 0})
        host = jax.tree.map(sharding.to_host, (params, setup.frozen))
        written = []
        if jax.process_index() == 0:
            arrays, about = setup.family.export(*host)
            origin = of_init(setup.config.init)
            about = about | classes.metadata(setup.data) | origin.metadata()
            files.write_bytes(directory / "params.safetensors", safetensors.dumps(arrays, about))
            files.write_sealed(directory / "config.json", setup.config.to_dict())
            written = [directory / "params.safetensors", directory / "config.json"]  # the card is for its maker to edit
            if pictured := (picture := setup.workdir / "report" / PICTURE).exists():
                files.write_bytes(directory / PICTURE, picture.read_bytes())
            files.write_bytes(directory / CARD, card(_model(setup, params), origin, pictured).encode())
            if (table := files.kept(setup.workdir / classes.TABLE)) is not None:
                files.write_bytes(directory / classes.TABLE, table)  # best/ alone can be taken elsewhere
                written.append(directory / classes.TABLE)
        return {"weights": weights_digest(params), "files": {p.name: files.digest(p) for p in written}}

    divide(setup, [jobs.Task(directory, run, functools.partial(_best_problem, directory))])


def _model(setup: Setup, params) -> Model:
    spec, data = setup.family.spec, setup.data
    count = sum(x.size for x in jax.tree.leaves(params))
    return Model(spec.name, spec.num_classes, spec.image_shape, count, data.name, tuple(data.class_names or ()))


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
    if not (directory / CARD).exists():  # also of a run that ended before there were cards
        return f"{directory / CARD}: missing"
    for name, digest in result.get("files", {"params.safetensors": None, "config.json": None}).items():
        path = directory / name
        if not path.exists():
            return f"{path}: missing"
        if digest not in (None, files.digest(path)):
            return f"{path}: not as it was written"
    return ""
