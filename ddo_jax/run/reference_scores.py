"""What the reference says of examples, asked once: outside the differentiated step, and kept where an example returns.

Only for families whose scores are exact (`Spec.exact`): with the same label a sequence of tokens has one
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

STEPS = 64  # whose versions are fetched together: the host must not wait for every one
PARTS = 8  # a batch is asked in so many blocks, those only that have unknown rows


class Programs(NamedTuple):
    """Compiled once a run.

    Attributes:
      versions: (key, first, sigma_law) -> int32 [STEPS, max(B, F)] of the steps from `first` on.
      fill: (said [B], positions [block], ref, frozen, record, (key, k, sigma_law)) -> said with the scores there.
      block: rows asked together.
    """

    versions: Any
    fill: Any
    block: int


def programs(family, c, mesh) -> Programs:
    """Of the config's section "ddo", on a mesh."""

    def draws(key, k, sigma_law):
        return family.pair_draw(step.step_keys(key, k)[2], step.drawn_rows(c), sigma_law)

    @jax.jit
    def versions(key, first, sigma_law):  # a loop: under vmap some generators of keys draw other numbers
        return jax.lax.map(lambda k: family.version(draws(key, k, sigma_law)), first + jnp.arange(STEPS))

    @functools.partial(jax.jit, compiler_options=family.compiler_options or None)
    def fill(said, positions, ref, frozen, record, at):
        key, _, _ = at
        record, drawn = jax.tree.map(lambda x: x[positions], (record, draws(*at)))
        with sharding.rows_over(mesh):
            return said.at[positions].set(family.score(ref, frozen, family.encode(frozen, record, key), drawn))

    return Programs(versions, fill, mesh.size * -(-c.batch // (PARTS * mesh.size)))


class Kept:
    """Scores of one source's rows under one reference: float32 [N, 2], NaN where unknown."""

    def __init__(self, num: int):
        self.values = np.full((num, 2), np.nan, np.float32)
        self._pending = None

    def find(self, rows, versions) -> np.ndarray:
        """Scores [B], NaN where unknown."""
        if self._pending is not None:
            where, scores = self._pending
            self.values[where], self._pending = sharding.to_host(scores), None
        return self.values[rows, versions]

    def keep(self, rows, versions, scores) -> None:
        """Scores [B] on the devices: fetched at the next `find`, when the step that needs them is under way."""
        self._pending = (rows, versions), scores


class ReferenceScores:
    """Asks the reference of a phase about the pairs of a step.

    Args:
      programs: of `programs`. mesh, frozen: of the run. phase: has `hyper.sigma_law` and `partners`: the reference's
        parameters, and {"real" | "fake": Kept}, shared by the candidates of a round; a source without one is asked
        every time. key: of its steps.
    """

    def __init__(self, programs: Programs, mesh, frozen, phase, key):
        self.programs, self.mesh, self.frozen = programs, mesh, frozen
        self.phase, self.key, self.kept = phase, key, phase.partners.kept or {}
        self._first, self._versions = None, None

    def __call__(self, k: int, records: dict, rows: dict):
        """s_ref of step k, on the devices: ([B] of real, [F] of fake).

        Args:
          records: {"real", "fake"} on the devices. rows: their positions in their sources, int [B], or None.
        """
        return tuple(self._ask(k, name, records[name], rows[name]) for name in ("real", "fake"))

    def _ask(self, k: int, name: str, record, rows):
        kept = None if rows is None else self.kept.get(name)
        if kept is None:
            known = np.full(len(record["label"]), np.nan, np.float32)
        else:
            versions = self._versions_of(k)[: len(rows)]
            known = kept.find(rows, versions)
        unknown = np.flatnonzero(np.isnan(known))
        said = sharding.put_batch(self.mesh, known[sharding.own_rows(len(known))])
        size, phase = self.programs.block, self.phase
        for i in range(0, len(unknown), size):
            positions = sharding.replicate(self.mesh, np.resize(unknown[i : i + size], size))
            args = (phase.partners.ref, self.frozen, record, (self.key, k, phase.hyper.sigma_law))
            said = self.programs.fill(said, positions, *args)
        if kept is not None and len(unknown):
            kept.keep(rows, versions, said)
        return said

    def _versions_of(self, k: int) -> np.ndarray:
        if self._first != k - k % STEPS:
            self._first = k - k % STEPS
            self._versions = sharding.to_host(self.programs.versions(self.key, self._first, self.phase.hyper.sigma_law))
        return self._versions[k % STEPS]
