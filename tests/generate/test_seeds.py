"""Ranges of seeds, and lists of them."""

import numpy as np

from ddo_jax.generate.seeds import seed_range


def test_seed_ranges_are_disjoint():
    """Breaks if selection, report and pool ever share a seed in 1000 rounds of 50k, or one wraps at 2**32."""
    last = -1
    for purpose in ("report", "select", "pool"):
        for index in range(1000):
            seeds = seed_range(purpose, index, 50_000)
            assert seeds.dtype == np.uint32 and len(seeds) == 50_000
            assert last < int(seeds[0]) and int(seeds[-1]) == int(seeds[0]) + 49_999
            last = int(seeds[-1])
    assert last < 2**32
