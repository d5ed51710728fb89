"""What the reference says of examples, asked once: outside the differentiated step, and kept where an example returns.

Only for families whose scores are exact (`Family.version`): with the same label a sequence of tokens has one
likelihood. Rows return in later epochs of the data, in an offline pool, and in every further candidate of a round,
which sees the same pairs and the same dropped labels.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ddo_jax import sharding
from ddo_jax.run import step

BLOCK = 64  # steps whose versions are fetched together: the host must not wait for every one


class Programs(NamedTuple):
    """Compiled once a run: `versions` (key, first, noise) -> int32 [BLOCK, B]; `score` (ref, frozen, record, key, k,
    noise) -> s_ref [B]."""

    versions: Any
    score: Any


def programs(family, c) -> Programs:
    """Of the config's section "ddo"; scores are made in its micro-batches."""

    def draws(key, k, noise):
        return family.draw(step.step_keys(key, k)[2], c.batch, noise)

    @jax.jit
    def versions(key, first, noise):
        return jax.vmap(lambda k: family.version(draws(key, k, noise)))(first + jnp.arange(BLOCK))

    @functools.partial(jax.jit, compiler_options=family.compiler_options or None)
    def score(ref, frozen, record, key, k, noise):
        def one(rows):
            return family.score(ref, frozen, *rows)

        rows = family.encode(frozen, record, key), draws(key, k, noise)
        return step.in_micro_batches(one, rows, c.accumulation)

    return Programs(versions, score)


class Kept:
    """Scores of one source's rows under one reference: float32 [N, 2], NaN where unknown."""

    def __init__(self, num: int):
        self.values = np.full((num, 2), np.nan, np.float32)
        self._pending = None

    def find(self, rows, versions) -> np.ndarray | None:
        """Scores [B], or None if one is unknown."""
        if self._pending is not None:
            where, scores = self._pending
            self.values[where], self._pending = sharding.to_host(scores), None
        found = self.values[rows, versions]
        return None if np.isnan(found).any() else found

    def keep(self, rows, versions, scores) -> None:
        """Scores [B] on the devices: fetched at the next `find`, when the step that needs them is under way."""
        self._pending = (rows, versions), scores


class References:
    """Asks the reference of a phase for the pairs of a step.

    Args:
      programs: of `programs`. mesh, frozen: of the run. phase: has ref, key and noise of its steps (`hyper.noise`).
      kept: {"real" | "fake": Kept}, shared by the candidates of a round; a source without one is asked every time.
    """

    def __init__(self, programs: Programs, mesh, frozen, phase, key, kept: dict[str, Kept]):
        self.programs, self.mesh, self.frozen = programs, mesh, frozen
        self.phase, self.key, self.kept = phase, key, kept
        self._block, self._versions = None, None

    def __call__(self, k: int, records: dict, rows: dict):
        """s_ref [B,2] of step k, on the devices: columns "real" and "fake".

        Args:
          records: {"real", "fake"} on the devices. rows: their positions in their sources, int [B], or None.
        """
        columns = [self._ask(k, name, records[name], rows[name]) for name in ("real", "fake")]
        return jnp.stack(columns, axis=1)

    def _ask(self, k: int, name: str, record, rows):
        kept = None if rows is None else self.kept.get(name)
        if kept is not None:
            versions = self._versions_of(k)
            known = kept.find(rows, versions)
            if known is not None:
                share = len(known) // jax.process_count()
                own = slice(jax.process_index() * share, (jax.process_index() + 1) * share)
                return sharding.put_batch(self.mesh, known[own])
        noise = self.phase.hyper.noise
        s_ref = self.programs.score(self.phase.ref, self.frozen, record, self.key, k, noise)
        if kept is not None:
            kept.keep(rows, versions, s_ref)
        return s_ref

    def _versions_of(self, k: int) -> np.ndarray:
        if self._block != k // BLOCK:
            self._block = k // BLOCK
            found = self.programs.versions(self.key, self._block * BLOCK, self.phase.hyper.noise)
            self._versions = sharding.to_host(found)
        return self._versions[k % BLOCK]
