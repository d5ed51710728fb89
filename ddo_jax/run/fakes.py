"""The fakes of a round: a pool that is sampled before it, and where the fakes of a step come from.

That is the pool, the reference as training goes, or the data under wrong labels: a function (first step) -> pair, and
pair(k, real) -> (record of fakes on the devices, their positions in their source or None) for k = first, first + 1,
...; `real` is the step's record of data on the devices.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from ddo_jax import files, preemption, sharding
from ddo_jax.data import pool as pools
from ddo_jax.data import sources
from ddo_jax.data.labels import balanced_labels, present_classes
from ddo_jax.data.pipeline import batches
from ddo_jax.errors import UserError
from ddo_jax.generate.seeds import seed_range, seeds_at
from ddo_jax.run import jobs, record
from ddo_jax.run.prepare import Setup
from ddo_jax.store import classes

KEEP_BYTES = 2**30  # fakes of a round that are kept for its other candidates


def from_pool(mesh, pool: Callable, batch: int, seed: int):
    """Rows of a finished pool, in a seeded order of their own. pool: () -> its source."""

    def start(first: int):
        host = (jax.process_index(), jax.process_count())
        reader = batches(pool(), batch, seed, start=first, with_index=True, host=host)

        def pair(k, real):
            record = next(reader)
            rows = record.pop("index")
            return sharding.put_batch(mesh, record), rows

        return pair

    return start


def online(mesh, sample: Callable, batch: int, steps: int, index: int, keep: bool):
    """Made by the reference for the labels of the step's data; an image depends on (round, step, row) and label.

    Args:
      sample: (seeds, labels) -> iterator of records on the host. batch: fakes a step. steps: of a round.
      index: of the round, from 0. keep: for the other candidates of the round, which see the same fakes.
    """
    made: dict[int, dict] = {}

    def start(first: int):
        def pair(k, real):
            rows = np.arange(k * batch, (k + 1) * batch)
            whole = made.get(k)
            if whole is None:
                seeds = seeds_at("pool", index, steps * batch, rows)
                labels = np.resize(sharding.to_host(real["label"]), batch)
                parts = list(sample(seeds, labels))
                whole = {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}
                if keep and steps * sum(v.nbytes for v in whole.values()) <= KEEP_BYTES:
                    made[k] = whole
            own = sharding.own_rows(batch)
            return sharding.put_batch(mesh, {name: v[own] for name, v in whole.items()}), rows

        return pair

    return start


@jax.jit
def _rolled(labels):
    return jnp.roll(labels, -1)


def wrong_labels(first: int):
    """The data itself, each image with the label of the next one (CCA)."""

    def pair(k, real):
        return {**real, "label": _rolled(real["label"])}, None

    return pair


def make_pool(setup: Setup, directory: epath.Path, ref: sharding.Parked, index: int) -> dict:
    """Sample the fakes of a round chunk by chunk; whole chunks of an interrupted pool are kept."""
    family, config = setup.family, setup.config
    seeds = seed_range("pool", index, config.ddo.pool)
    labels, rule = classes.pool_labels(config, family, setup.data, len(seeds))
    size = config.eval.batch
    rows = [slice(i, i + size) for i in range(0, len(seeds), size)]
    recorded = pool_digests(directory, len(rows))
    digests = [pools.kept_digest(pools.chunk_path(directory, i), recorded[i], seeds[r]) for i, r in enumerate(rows)]
    missing = [i for i in range(len(rows)) if not sharding.agree(digests[i] is not None)]
    params = ref()
    progress = record.Progress(f"rounds/{index + 1:03d}/pool", len(rows) - len(missing), len(rows))
    for done, i in enumerate(missing, len(rows) - len(missing) + 1):
        (chunk,) = setup.programs.fakes(params, setup.frozen, seeds[rows[i]], labels[rows[i]])
        digests[i] = pools.digest(chunk["image"], chunk["label"])
        if recorded[i] not in (None, digests[i]):
            raise UserError(
                f"{pools.chunk_path(directory, i)}: lost or damaged, and made again on this device it is another one; "
                f"put back a copy of it, or move {directory.parent} aside: the round is then played anew"
            )
        if jax.process_index() == 0:
            pools.write_chunk(directory, i, chunk["image"], chunk["label"], seeds[rows[i]])
        setup.console.status(progress.text(done), done=done == len(rows))
        preemption.check()
    return {
        "chunks": len(rows),
        "digests": digests,
        "num_classes": family.spec.num_classes,
        "num": len(seeds),
        "seeds": [int(seeds[0]), int(seeds[-1])],
        "labels": rule,
        "sampler": family.fake_settings(family.settings(config.sampler)).record(),
    }


def pool_task(setup: Setup, directory: epath.Path, ref: sharding.Parked, index: int) -> jobs.Task:
    """The pool of a round; chunks that were lost since it was finished are made again."""
    target = directory / "pool"

    def problem(result):
        return "" if jobs.result_of(directory / "tidy") else pools.problem(target, result)

    return jobs.Task(target, lambda: make_pool(setup, target, ref, index), problem)


def pool_digests(directory: epath.Path, number: int) -> list[str | None]:
    """Those of a pool that was finished and then lost chunks; else `number` times None."""
    try:
        found = (files.read_sealed(directory / pools.MARKER) or {}).get("digests")
    except files.Damaged:
        found = None
    return found if isinstance(found, list) and len(found) == number else [None] * number


def some_fakes(setup: Setup, ref: sharding.Parked, index: int, num: int):
    """The reference's own samples as a source, for rounds without a pool."""
    num_classes = setup.family.spec.num_classes
    seeds = seed_range("select", index, num)
    labels = balanced_labels(np.arange(num), num_classes, present_classes(setup.data.class_counts))
    parts = list(setup.programs.fakes(ref(), setup.frozen, seeds, labels))
    images, labels = (np.concatenate([p[key] for p in parts]) for key in ("image", "label"))
    return sources.ArraySource("fakes", images, labels, num_classes)
