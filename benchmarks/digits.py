"""The README's first command, cold and warm, and what DDO gains on training seeds 0, 1, 2.

    python benchmarks/digits.py [--runs 3]

A cold start has no compilation cache and no prepared dataset; the warm start follows in the same folders with
a new workdir. Prints a JSON line per start and one per seed (three to five minutes in all on two cores).
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

from common import process, python, report, spread

SYSTEMS = ("start", "ddo", "control")


def scores(workdir: Path) -> dict:
    """Mean of the report's numbers of every system."""
    means = {}
    for system in SYSTEMS:
        result = json.loads((workdir / "report" / "scores" / system / "result.json").read_text())
        means[system] = round(statistics.fmean(e["fd_x100"] for e in result["evals"]), 3)
    return means


def start(home: Path, name: str, seed: int) -> tuple[dict, Path]:
    """One run of the main command with its caches below `home`."""
    workdir = home / name
    flags = ["--config=configs/digits.py", f"--workdir={workdir}", f"--config.seed={seed}"]
    folders = {"XDG_CACHE_HOME": str(home / "cache"), "TFDS_DATA_DIR": str(home / "tfds")}
    return process(python("-m", "ddo_jax.main", *flags), **folders), workdir


def main(runs: int) -> None:
    cold, warm = [], []
    for seed in range(runs):
        with tempfile.TemporaryDirectory() as home:
            first, workdir = start(Path(home), "first", seed)
            second, _ = start(Path(home), "second", seed)
            gained = scores(workdir)
        cold.append(first)
        warm.append(second)
        report("digits/start", seed=seed, cold=first, warm=second)
        ratio = round(gained["ddo"] / gained["start"], 3)
        report("digits/fd_x100", seed=seed, **gained, ddo_over_start=ratio, below_half=ratio < 0.5)
    for kind, found in (("cold", cold), ("warm", warm)):
        figures = {key: spread([f[key] for f in found]) for key in ("wall_s", "cpu_s", "peak_mb")}
        report(f"digits/{kind}", **figures)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    main(parser.parse_args().runs)
