"""Orbax checkpoints with a verified digest per leaf; the latest and the best are both kept.

Orbax restores flipped bits silently (tried: 75 of 75), so every checkpoint carries a 32-bit digest
of every leaf in its metadata. A damaged or torn checkpoint is skipped with a warning in favour of the newest
good one.
"""

import contextlib
import dataclasses
import errno
import functools
import json
import math
import os
import sys
import uuid
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath
from orbax.checkpoint import checkpoint_managers as ocm

from ddo_jax import files, sharding
from ddo_jax.errors import UserError


def digest(x: jax.Array) -> jax.Array:
    """uint32 [] of the bits of one array; a wrap-around sum, so it does not depend on the sharding."""
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    words = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32).ravel()
    index = jax.lax.iota(jnp.uint32, words.size)
    mixed = (words ^ (index * jnp.uint32(0x9E3779B1))) * (jnp.uint32(2) * index + jnp.uint32(1))
    return jnp.sum(mixed, dtype=jnp.uint32)


@jax.jit
def _digests(leaves):
    return jnp.stack([digest(x) for x in leaves])


def digests(tree) -> dict[str, int]:
    """{path of the leaf: digest}."""
    paths, leaves = zip(*jax.tree_util.tree_leaves_with_path(tree), strict=True)
    return dict(zip(map(jax.tree_util.keystr, paths), _digests(list(leaves)).tolist(), strict=True))


def weights_digest(params) -> str:
    """Eight hex digits over the per-leaf digests of a parameter tree."""
    return f"{zlib.crc32(repr(sorted(digests(params).items())).encode()):08x}"


def check_name(path: epath.PathLike) -> None:
    """TensorStore takes a backslash for a slash, so that arrays would go to another folder, and its paths are UTF-8.

    Raises:
      UserError: the path has something of these in it.
    """
    text = os.fspath(path)
    invalid = [c for c in text if "\ud800" <= c <= "\udfff"]  # bytes of a name that are no UTF-8
    found = "a backslash" if "\\" in text else "bytes that are not UTF-8" if invalid else None
    if found:
        raise UserError(
            f"{ascii(text)}: {found} in the path, which the checkpoint library cannot hold; allowed: any other "
            "character; rename the folder or take another one"
        )


def try_out(workdir: epath.PathLike) -> None:
    """Save a small checkpoint somewhere in `workdir`, read it back and remove it: before hours of training.

    Raises:
      UserError: what was saved does not come back; names the path.
      OSError: it cannot be written.
    """
    check_name(files.literal(workdir))
    directory = files.literal(workdir) / f".trial-{sharding.agree_on(uuid.uuid4().int % 2**31)}"
    mesh = sharding.make_mesh(1)
    tree = sharding.place(mesh, {"trial": np.arange(8, dtype=np.float32)})
    try:
        with Checkpoints(directory) as checkpoints:
            checkpoints.save(0, {"ema": tree}, {"step": 0})
        restore_ema(directory, 0, sharding.abstract(mesh, tree))
    except OSError:
        raise
    except Exception as e:  # TensorStore's are of many kinds
        if files.is_full(e):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(directory)) from e
        reason = _reason(e).removeprefix(f"{directory}/0: ")
        raise UserError(
            f"{workdir}: a checkpoint saved there cannot be read back ({reason.partition(';')[0]}); nothing was "
            "trained; take a folder of another name or on another disk"
        ) from None
    finally:
        sharding.agree(True)  # nobody reads any more
        if jax.process_index() == 0 and directory.exists():
            directory.rmtree()


@dataclasses.dataclass
class _Best:
    """Orbax's policy for the best step. The scores are those of the verified records, {step: score}: Orbax's own
    file of them has no checksum, and one that is damaged would stop a run before anything can be skipped."""

    scores: dict[int, float]

    def should_preserve(self, checkpoints, *, context):
        steps = [c.step for c in checkpoints]
        scored = {step: score for step, score in self.scores.items() if step in steps}
        best = min(scored, key=lambda step: (scored[step], step), default=None)
        return [step == best for step in steps]


def _options(scores: dict[int, float] | None, alone: bool = False) -> ocp.CheckpointManagerOptions:
    """scores: of the checkpoints that are there, to know the best one; None to read only. alone: see `Checkpoints`."""
    if scores is None:
        return ocp.CheckpointManagerOptions(read_only=True)
    policy = ocm.AnyPreservationPolicy([ocm.LatestN(2), _Best(scores)])
    return ocp.CheckpointManagerOptions(preservation_policy=policy, cleanup_tmp_directories=alone)


def read_meta(directory: epath.PathLike, step: int) -> dict:
    """The record of a checkpoint, without its arrays.

    Raises:
      files.Damaged: absent, or not as it was written.
    """
    path = files.literal(directory) / str(step) / "meta" / "metadata"
    meta = files.read_sealed(path)
    if meta is None:
        raise files.Damaged(f"{path}: missing")
    return meta


def _score(directory: epath.Path, step: int) -> float | None:
    """The score that a checkpoint was saved with; None if it has none, or its record is damaged."""
    try:
        meta = read_meta(directory, step)
        last = (meta.get("evals") or [{}])[-1]  # of versions before 2026-12 the last evaluation, if it is of this step
        score = meta["score"] if "score" in meta else last[last["metric"]] if last.get("step") == step else None
    except (files.Damaged, TypeError, KeyError, AttributeError):
        return None
    return float(score) if isinstance(score, int | float) and math.isfinite(score) else None


def _drop_damaged_times(directory: epath.Path) -> None:
    """Orbax stops at once where its file of a checkpoint's times is no JSON object; without the file it goes on."""
    for path in (directory / str(step) / "_CHECKPOINT_METADATA" for step in _steps(directory)):
        content = files.kept(path)
        try:
            damaged = content is not None and not isinstance(json.loads(content), dict)
        except (ValueError, RecursionError):
            damaged = True
        if damaged:
            with contextlib.suppress(OSError):
                path.unlink()


def _steps(directory: epath.Path) -> list[int]:
    return sorted(int(p.name) for p in files.matching(directory, "*") if p.name.isdecimal() and p.name.isascii())


class Checkpoints:
    """The checkpoints of one phase, in `directory`; a context manager.

    A checkpoint is the training state plus a JSON `meta` (the phase's history so far, the digests, a checksum).

    Args:
      alone: no other job writes there (it is claimed): what a killed one left of an unfinished save is removed.
    """

    def __init__(self, directory: epath.PathLike, *, alone: bool = False):
        self.directory = files.literal(directory)
        check_name(self.directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        found = {step: _score(self.directory, step) for step in _steps(self.directory)}
        self._scores = {step: score for step, score in found.items() if score is not None}
        _drop_damaged_times(self.directory)
        self._manager = ocp.CheckpointManager(self.directory, options=_options(self._scores, alone))
        self._damaged: set[int] = set()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._manager.close()  # waits for the save in flight

    def save(self, step: int, state, meta: dict, score: float | None = None) -> None:
        """Save asynchronously; `score` (lower is better) makes it a candidate for "best"."""
        if step in self._damaged or step in self._manager.all_steps():  # the latter: saved before it was scored
            self._manager.delete(step)
            self._damaged.discard(step)
        self._scores.pop(step, None)
        if score is not None and math.isfinite(score):
            self._scores[step] = score
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            meta=ocp.args.JsonSave(files.sealed({**meta, "score": score, "digests": digests(state)})),
        )
        self._manager.save(step, args=args, force=True)

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def restore_latest(self, abstract) -> tuple[dict, dict] | None:
        """(state, meta) of the newest good checkpoint, or None.

        Args:
          abstract: ShapeDtypeStructs with shardings.
        """
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                _merge(self.directory / str(step) / "state")
                meta = read_meta(self.directory, step)
                # of versions before 2026-12 an average that is none is there all the same
                extra = {"ema": abstract["params"]} if "ema" not in abstract and _averaged(meta) else {}
                args = ocp.args.Composite(state=ocp.args.StandardRestore({**abstract, **extra}))
                restored = self._manager.restore(step, args=args)
                _verify(restored["state"], meta["digests"])
                return {name: restored["state"][name] for name in abstract}, meta
            except Exception as e:  # Orbax raises many kinds for damaged files: none of them may stop a run
                print(
                    f"warning: checkpoint {self.directory}/{step} is damaged ({_reason(e)}): skipped", file=sys.stderr
                )
                self._damaged.add(step)  # replaced when its step is saved again, not before: it may be a passing fault
        if self._damaged:
            raise UserError(
                f"{self.directory}: none of the {len(self._damaged)} checkpoints can be read, see the warnings; put "
                f"back a copy of one, or move {self.directory.parent} aside: the same command then trains this phase "
                "anew"
            )
        return None


def _merge(state: files.Literal) -> None:
    """Make the common index of the stores that the processes of a run wrote, where it is missing.

    Orbax makes it when it saves; in a folder like `run[1]` versions of this project before 2026-12 did not find the
    stores, so that the arrays lay there, but nothing pointed to them.

    Raises:
      UserError: the index cannot be written.
    """
    if sharding.agree((state / "manifest.ocdbt").exists() or not files.matching(state, "ocdbt.process_*")):
        return
    if jax.process_index() == 0:
        shared = ts.Context()  # a copy between stores of two contexts is refused

        def opened(path):
            base = f"{path}/" if "://" in str(path) else {"driver": "file", "path": f"{path}/"}
            return ts.KvStore.open({"driver": "ocdbt", "base": base}, context=shared).result()

        try:
            whole, change = opened(state), ts.Transaction(atomic=True)
            for part in files.matching(state, "ocdbt.process_*"):
                opened(part).experimental_copy_range_to(whole.with_transaction(change)).result()
            change.commit_sync()
        except Exception as e:  # TensorStore's are of many kinds
            raise UserError(
                f"{state}: the arrays' index is missing and cannot be made ({_reason(e)}); a copy of the run in a "
                "folder that can be written may be readable"
            ) from None
    sharding.agree(True)  # the others wait until it is there


def _verify(tree, expected: dict[str, int]) -> None:
    wrong = [path for path, value in digests(tree).items() if expected.get(path) != value]
    if wrong:
        raise ValueError(f"digest of {wrong[0]} does not match")


def _reason(e: Exception) -> str:
    """Orbax's messages run over pages: the beginning of the first line."""
    return (str(e).splitlines() or [type(e).__name__])[0][:160]


def keep_ema(directory: epath.PathLike, step: int, params, meta: dict, score: float | None = None) -> None:
    """Parameters alone as a checkpoint that `restore_ema` reads; a good one that is there stays, a damaged one is
    replaced. All processes call it."""
    directory = files.literal(directory)
    try:
        read_meta(directory, step)
    except files.Damaged:
        if jax.process_index() == 0 and directory.exists():
            directory.rmtree()
    sharding.agree(True)  # the other processes wait
    with Checkpoints(directory, alone=True) as checkpoints:
        if checkpoints.latest_step() is None:
            checkpoints.save(step, {"ema": params}, meta, score)


def _averaged(meta: dict) -> bool:
    """Whether a checkpoint holds an average beside the parameters."""
    return any(path.startswith("['ema']") for path in meta["digests"])


def restore_ema(directory: epath.PathLike, step: int | None, abstract):
    """The EMA parameters of one checkpoint (None: the newest), or its parameters where the phase had no average;
    verified, on the shardings of `abstract`.

    Raises:
      UserError: absent or damaged; names the directory.
    """
    directory = files.literal(directory)
    check_name(directory)
    if not directory.exists():
        raise UserError(f"{directory}: no such checkpoint directory")
    _drop_damaged_times(directory)
    with ocp.CheckpointManager(directory, options=_options(None)) as manager:
        step = manager.latest_step() if step is None else step
        if step is None or step not in manager.all_steps():
            have = ", ".join(map(str, manager.all_steps())) or "none"
            raise UserError(f"{directory}: no checkpoint of step {step} (there are: {have})")
        partial = functools.partial(ocp.args.PyTreeRestore, partial_restore=True)
        try:
            _merge(directory / str(step) / "state")
            meta = read_meta(directory, step)
            name = "ema" if _averaged(meta) else "params"
            item = {name: abstract}
            args = ocp.args.Composite(
                state=partial(item=item, restore_args=ocp.checkpoint_utils.construct_restore_args(item)),
            )
            restored = manager.restore(step, args=args)
            _verify(restored["state"], meta["digests"])
        except UserError:
            raise
        except Exception as e:
            phase = directory.parent if directory.name == "checkpoints" else directory
            raise UserError(
                f"{directory}/{step}: {_reason(e)}; the checkpoint is damaged or of another network: put back a copy "
                f"of it or take another checkpoint; a run makes it anew once {phase} and what came of it (later "
                "rounds, control, report, best) are moved aside"
            ) from None
        return restored["state"][name]
