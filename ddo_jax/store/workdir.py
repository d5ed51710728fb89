"""The folder of a run: made, continued by the same config and inputs only, refused otherwise."""

import contextlib
import os

import jax
from etils import epath

from ddo_jax import config as configs
from ddo_jax import files, sharding
from ddo_jax.errors import UserError
from ddo_jax.store import checkpoint

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
