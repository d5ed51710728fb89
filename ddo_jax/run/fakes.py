"""Where the fakes of a step come from: a pool, the reference as training goes, or the data under wrong labels.

Each is a function (first step) -> pair, and pair(k, real) -> (record of fakes on the devices, their positions in
their source or None) for k = first, first + 1, ...; `real` is the step's record of data on the devices.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from ddo_jax import sharding
from ddo_jax.data.pipeline import batches
from ddo_jax.generate.seeds import seeds_at

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
      sample: (seeds, labels) -> iterator of records on the host. batch: real images a step. steps: of a round.
      index: of the round, from 0. keep: for the other candidates of the round, which see the same fakes.
    """
    made: dict[int, dict] = {}

    def start(first: int):
        def pair(k, real):
            rows = np.arange(k * batch, (k + 1) * batch)
            whole = made.get(k)
            if whole is None:
                seeds = seeds_at("pool", index, steps * batch, rows)
                parts = list(sample(seeds, sharding.to_host(real["label"])))
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
