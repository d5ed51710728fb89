"""The folder of a run: made, continued by the same config and inputs only, refused otherwise."""

import contextlib
import os
import socket
import time
import uuid
from collections.abc import Callable

import jax
from etils import epath

from ddo_jax import config as configs
from ddo_jax import files, hosts, sharding, stores
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
        have = hosts.together(lambda: _compared(workdir, wanted, inputs or {}))
        if sharding.agree(have is None):
            _try_out(workdir)
        else:
            _check_shared(workdir)
        _by_first(workdir, lambda: _record(workdir, wanted, have, inputs or {}))
    except OSError as e:
        raise _not_writable(workdir, e) from None
    return workdir


def _not_writable(workdir: epath.Path, e: OSError) -> UserError:
    return UserError(f"workdir {workdir}: {e.strerror or e}; --workdir must name a directory that can be written")


def _by_first(workdir: epath.Path, call: Callable[[], object]) -> None:
    """`call` on process 0, while the others wait; what goes wrong there is said by all."""

    def guarded() -> None:
        try:
            if jax.process_index() == 0:
                call()
        except OSError as e:
            raise _not_writable(workdir, e) from None

    hosts.together(guarded)


def _compared(workdir: epath.Path, wanted: dict, inputs: dict[str, str]) -> dict | None:
    """The config that the workdir was made with, None in a new one.

    Raises:
      UserError: it is another one, or damaged.
    """
    try:
        have = files.read_sealed(workdir / "config.json")
    except files.Damaged as e:
        raise UserError(
            f"{e}; put back a copy of it, or, if this command has the config that the workdir was made with, move the "
            "file away: it is then written anew"
        ) from None
    changed = [] if have is None else _changes(have, wanted, recorded_inputs(workdir), inputs)
    if changed:
        raise UserError(
            f"workdir {workdir} was made with another config ({'; '.join(changed)}); "
            "take another --workdir, or undo the change"
        )
    return have


def _record(workdir: epath.Path, wanted: dict, have: dict | None, inputs: dict[str, str]) -> None:
    """Write the config down; of two jobs that begin at once the second one compares with the first one's."""
    path = workdir / "config.json"
    if have is None and not files.create_exclusive(path, files.json_bytes(files.sealed(wanted))):
        _compared(workdir, wanted, inputs)
    files.write_sealed(path, wanted)


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
    new = [] if stores.is_remote(workdir) else [p for p in (workdir, *workdir.parents) if not p.exists()]
    lead = jax.process_index() == 0
    try:
        _by_first(workdir, lambda: workdir.mkdir(parents=True, exist_ok=True))
        _check_shared(workdir)
        checkpoint.try_out(workdir)
    except (OSError, UserError):
        for path in new if lead else ():
            with contextlib.suppress(OSError):  # another job may have begun in it
                os.rmdir(path)
        raise


SEEN_S = 10.0  # a folder on a network shows a new file to other hosts within so long


def _check_shared(workdir: epath.Path) -> None:
    """All processes of a run must see the same folder.

    Raises:
      UserError: names a process that does not see what the first one writes.
    """
    if jax.process_count() == 1:
        return
    marker = workdir / f".seen-{sharding.agree_on(uuid.uuid4().int % 2**31)}"
    _by_first(workdir, lambda: files.write_bytes(marker, b""))
    deadline = time.monotonic() + SEEN_S
    while not (seen := marker.exists()) and time.monotonic() < deadline:
        time.sleep(0.2)
    told = hosts.gathered("" if seen else f"process {jax.process_index()} ({socket.gethostname()})")
    if jax.process_index() == 0:
        marker.unlink()
    if blind := [text for text in told if text]:
        raise UserError(
            f"workdir {workdir}: {', '.join(blind)} does not see what process 0 writes there; --workdir must name one "
            "folder that all hosts share"
        )


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
