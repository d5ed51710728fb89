"""Seeds: the ranges that a run takes for each purpose, and lists of them as flags and records write them."""

import itertools
import re
import zlib

import numpy as np

from ddo_jax.errors import UserError

SEEDS = {
    "report": (0, 10**9),
    "select": (10**9, 10**9),
    "pool": (2 * 10**9, 2**32 - 2 * 10**9),
}  # {purpose: (first, number)}


def seeds_at(purpose: str, index: int, num: int, positions: np.ndarray) -> np.ndarray:
    """Seeds at positions of a generated set of `num` images. Reports use 0..num-1, num..2num-1, ... as the literature
    does; what selects (one range per round) and what trains (fakes) lives far from them.

    >>> seeds_at("pool", 1, 8, np.array([0, 7]))
    array([2000000008, 2000000015], dtype=uint32)
    """
    return (SEEDS[purpose][0] + index * num + positions).astype(np.uint32)


def seed_range(purpose: str, index: int, num: int) -> np.ndarray:
    """All seeds of one generated set.

    >>> seed_range("report", 1, 3), seed_range("select", 0, 2)
    (array([3, 4, 5], dtype=uint32), array([1000000000, 1000000001], dtype=uint32))
    """
    return seeds_at(purpose, index, num, np.arange(num))


MOST_SEEDS = 10**8  # of one request: 0.8 GB of numbers
_SEEDS = re.compile(r"(\d{1,10})(?:-(\d{1,10}))?", re.ASCII)


def parse_seeds(text: str) -> np.ndarray:
    """Seeds of ranges and numbers, in their order.

    Raises:
      UserError: not such a text, a range that runs backwards, or a seed that is there twice.

    >>> parse_seeds("0-3,10")
    array([ 0,  1,  2,  3, 10])
    """
    matches = [_SEEDS.fullmatch(part.strip()) for part in text.split(",")]
    ranges = [(int(m[1]), int(m[2] or m[1])) for m in matches if m]
    if not all(matches) or any(last >= 2**32 for _, last in ranges):
        raise UserError(f"--seeds: {text!r}; allowed: ranges and numbers below 2^32, as in 0-49999,60000")
    for first, last in ranges:
        if first > last:
            raise UserError(f"--seeds: {first}-{last} runs backwards; write {last}-{first}")
    if sum(last - first + 1 for first, last in ranges) > MOST_SEEDS:
        raise UserError(f"--seeds: {text!r}; allowed: {MOST_SEEDS:,} seeds at a time; make the others later")
    for (_, last), (first, _) in itertools.pairwise(sorted(ranges)):
        if first <= last:
            raise UserError(f"--seeds: {text!r} has seed {first} twice; allowed: every seed once")
    return np.concatenate([np.arange(first, last + 1) for first, last in ranges])


def check_apart(ranges: list[np.ndarray]) -> None:
    """Sets of images that are compared share no image.

    Raises:
      UserError: names a seed that is in two of them.
    """
    seeds, counts = np.unique(np.concatenate(ranges), return_counts=True)
    if counts.max() > 1:
        raise UserError(
            f"--seeds: seed {seeds[counts > 1][0]} is in two ranges ({np.sum(counts > 1)} such seeds); allowed: ranges "
            "that share nothing, or their spread means nothing"
        )


def seeds_text(seeds: np.ndarray) -> str:
    """The seeds exactly, as `parse_seeds` reads them; a long list of odd ones by its ends, number and CRC-32.

    >>> seeds_text(np.array([0, 1, 2, 3, 10])), seeds_text(np.array([0, 5]))
    ('0-3,10', '0,5')
    """
    runs = np.split(seeds, np.flatnonzero(np.diff(seeds) != 1) + 1)
    if len(runs) > 100:
        crc = zlib.crc32(np.ascontiguousarray(seeds, "<i8"))
        return f"{len(seeds)} from {seeds[0]} to {seeds[-1]}, CRC {crc:08x}"
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
