"""The classes of a run's data: looked at before training, said once, kept in the workdir and in exported weights."""

import json

import jax
import numpy as np
from etils import epath

from ddo_jax import config as configs
from ddo_jax import files
from ddo_jax.data import labels
from ddo_jax.data.tree import warn
from ddo_jax.errors import UserError

TABLE = "classes.json"  # in the workdir and in best/
METADATA = "ddo_jax_classes"  # names by id, in an exported file
UNEVEN = 5  # times as many images in one class as in another: balanced fakes then differ from the data


def look(config, family, data) -> None:
    """Warn of classes without images, and of frequencies that a balanced pool does not have.

    Args:
      config: of a run. family: of it. data: Source of the training set.

    Raises:
      UserError: the pool shall follow frequencies that nobody counted.
    """
    counts = data.class_counts if family.spec.num_classes else None
    if counts is None:
        if family.spec.num_classes and config.ddo.pool_labels == "data":
            raise UserError(
                f"config.ddo.pool_labels: 'data'; allowed: 'balanced', for {data.name} is too large to count its "
                "labels; a zip of it (python -m ddo_jax.data) lists them"
            )
        return
    empty = np.flatnonzero(counts == 0)
    if len(empty):
        shown = ", ".join(_named(data, i) for i in empty[:5]) + (", ..." if len(empty) > 5 else "")
        warn(
            f"{data.name}: {len(empty)} of {len(counts)} classes have no image ({shown}); they get no fakes and are "
            "not evaluated"
        )
    some = counts[counts > 0]
    if some.min() == 1:
        alone = np.flatnonzero(counts == 1)
        shown = ", ".join(_named(data, i) for i in alone[:5]) + (", ..." if len(alone) > 5 else "")
        warn(f"{data.name}: one image in each of {len(alone)} classes ({shown}): samples of them can only be copies")
    least = {"ddo.batch": config.ddo.batch, "ddo.pool": config.ddo.pool, "eval.num": config.eval.num}
    least |= {"eval.select_num": config.eval.select_num or config.eval.num}
    short = [f"{key} = {value}" for key, value in least.items() if 0 < value < len(some)]
    if short:
        warn(f"{data.name}: {len(some)} classes, more than {', '.join(short)}: not every class is in each of them")
    pooled = configs.samples_fakes(config) and config.ddo.pool > 0 and config.ddo.pool_labels == "balanced"
    if pooled and config.ddo.rounds and some.max() >= UNEVEN * some.min():
        least, most = (int(np.flatnonzero(counts == n)[0]) for n in (some.min(), some.max()))
        warn(
            f"{data.name}: from {some.min()} images ({_named(data, least)}) to {some.max()} ({_named(data, most)}) a "
            "class, while the pool is balanced: rare classes have more fakes than real images; "
            "--config.ddo.pool_labels=data gives fakes the frequencies of the data"
        )


def _named(data, label: int) -> str:
    return f"{label}: {data.class_names[label]}" if data.class_names else str(label)


def keep(workdir: epath.Path, data, console) -> None:
    """Write the table of classes into a workdir where it is not, or not as it should be, and say it."""
    path = workdir / TABLE
    if not data.num_classes or jax.process_index() != 0:
        return
    table = labels.class_table(data.num_classes, data.class_names, data.class_counts)
    text = json.dumps(table, indent=1, default=float) + "\n"
    there = files.kept(path)
    if there != text.encode():
        console.line(labels.table_text(table) if there is None else f"{path}: not the classes of the data: made again")
        files.write_bytes(path, text.encode())


def metadata(data) -> dict[str, str]:
    """What an exported file says of the classes: their names, where somebody named them."""
    return {METADATA: json.dumps(data.class_names)} if data.class_names else {}


def pool_labels(config, family, data, num: int) -> tuple[np.ndarray, str]:
    """(labels int32 [num] of a round's fakes, the rule in words)."""
    if config.ddo.pool_labels == "data" and family.spec.num_classes:
        return labels.data_labels(num, data.class_counts), "frequencies of the data"
    present = labels.present_classes(data.class_counts)
    return labels.balanced_labels(np.arange(num), family.spec.num_classes, present), labels.balanced_rule(present)


def of_run(root: epath.Path) -> list[dict]:
    """The table that lies in a workdir or in best/; [] if there is none.

    Raises:
      UserError: not such a file.
    """
    try:
        table = files.read_json(root / TABLE) or []
        ok = [row["id"] for row in table] == list(range(len(table))) and all(
            isinstance(row["name"], str | None) and isinstance(row["images"], int | None) for row in table
        )
    except (ValueError, TypeError, KeyError):
        ok = False
    if not ok:
        raise UserError(f"{root / TABLE}: no table of classes; move it aside, classes then have no names")
    return table


def of_metadata(found: dict) -> list[dict]:
    """The table that an exported file's metadata mean; [] if they say nothing.

    Raises:
      UserError: what they say is no list of names.
    """
    try:
        names = json.loads(found.get(METADATA, "[]"))
    except ValueError:
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"metadata {METADATA}: {str(found.get(METADATA))[:60]}; it must be a JSON list of names")
    return labels.class_table(len(names), tuple(names))
