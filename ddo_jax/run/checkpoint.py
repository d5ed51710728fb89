"""Orbax checkpoints with a verified digest per leaf; the latest and the best are both kept.

Orbax restores flipped bits silently (PLATFORM notes: 75 of 75), so every checkpoint carries a 32-bit digest
of every leaf in its metadata. A damaged or torn checkpoint is skipped with a warning in favour of the newest
good one.
"""

import functools
import sys
import zlib

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers as ocm

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


def _options(read_only: bool) -> ocp.CheckpointManagerOptions:
    latest, best = (
        ocm.LatestN(2),
        ocm.BestN(get_metric_fn=lambda m: m["score"], reverse=True, n=1, keep_checkpoints_without_metrics=False),
    )
    return ocp.CheckpointManagerOptions(
        read_only=read_only,
        best_fn=lambda m: m["score"],
        best_mode="min",
        preservation_policy=ocm.AnyPreservationPolicy([latest, best]),
    )


class Checkpoints:
    """The checkpoints of one phase, in `directory`; a context manager.

    A checkpoint is the training state plus a JSON `meta` (the phase's history so far, the digests).
    """

    def __init__(self, directory: epath.PathLike, *, read_only: bool = False):
        self.directory = epath.Path(directory).absolute()
        if not read_only:
            self.directory.mkdir(parents=True, exist_ok=True)
        self._manager = ocp.CheckpointManager(self.directory, options=_options(read_only))
        self._damaged: set[int] = set()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._manager.close()  # waits for the save in flight

    def save(self, step: int, state, meta: dict, score: float | None = None) -> None:
        """Save asynchronously; `score` (lower is better) makes it a candidate for "best"."""
        if step in self._damaged:
            self._manager.delete(step)
            self._damaged.remove(step)
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            meta=ocp.args.JsonSave({**meta, "digests": digests(state)}),
        )
        self._manager.save(step, args=args, metrics=None if score is None else {"score": score}, force=True)

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def restore_latest(self, abstract) -> tuple[dict, dict] | None:
        """(state, meta) of the newest good checkpoint, or None.

        Args:
          abstract: ShapeDtypeStructs with shardings.
        """
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), meta=ocp.args.JsonRestore())
                restored = self._manager.restore(step, args=args)
                _verify(restored["state"], restored["meta"]["digests"])
                return restored["state"], restored["meta"]
            except Exception as e:  # Orbax raises many kinds for damaged files: none of them may stop a run
                print(
                    f"warning: checkpoint {self.directory}/{step} is damaged ({_reason(e)}): skipped", file=sys.stderr
                )
                self._damaged.add(step)  # replaced when its step is saved again, not before: it may be a passing fault
        if self._damaged:
            raise UserError(
                f"{self.directory}: none of the {len(self._damaged)} checkpoints can be read; if the disk is well, "
                f"remove {self.directory.parent} to train this phase anew"
            )
        return None


def _verify(tree, expected: dict[str, int]) -> None:
    wrong = [path for path, value in digests(tree).items() if expected.get(path) != value]
    if wrong:
        raise ValueError(f"digest of {wrong[0]} does not match")


def _reason(e: Exception) -> str:
    """Orbax's messages run over pages: the beginning of the first line."""
    return (str(e).splitlines() or [type(e).__name__])[0][:160]


def restore_ema(directory: epath.PathLike, step: int | None, abstract):
    """The EMA parameters of one checkpoint (None: the newest), verified, on the shardings of `abstract`.

    Raises:
      UserError: absent or damaged; names the directory.
    """
    directory = epath.Path(directory).absolute()
    if not directory.exists():
        raise UserError(f"{directory}: no such checkpoint directory")
    with ocp.CheckpointManager(directory, options=_options(read_only=True)) as manager:
        step = manager.latest_step() if step is None else step
        if step is None or step not in manager.all_steps():
            have = ", ".join(map(str, manager.all_steps())) or "none"
            raise UserError(f"{directory}: no checkpoint of step {step} (there are: {have})")
        item = {"ema": abstract}
        partial = functools.partial(ocp.args.PyTreeRestore, partial_restore=True)
        args = ocp.args.Composite(
            state=partial(item=item, restore_args=ocp.checkpoint_utils.construct_restore_args(item)),
            meta=ocp.args.JsonRestore(),
        )
        try:
            restored = manager.restore(step, args=args)
            _verify(restored["state"], restored["meta"]["digests"])
        except Exception as e:
            raise UserError(
                f"{directory}/{step}: {_reason(e)}; the checkpoint is damaged or of another network: "
                "take another checkpoint, or remove this round's directory (and later ones) to play it again"
            ) from None
        return restored["state"]["ema"]
