"""How often does a point of the line win? Scores the line through the best checkpoint of every round of finished runs.

    python benchmarks/line.py --weights=-1,-0.5,0.5,1.5,2 runs/digits runs/digits_var

Nothing is trained and the runs are only read: the points are scored as `config.ddo.line` would, on the selection seeds
of their round. w = 1 is the checkpoint itself, whose score must come out again. One JSON line a round.
"""

import argparse
import tempfile
from pathlib import Path

import runs
from common import report

from ddo_jax.run import lines


def scores(setup, run: Path, weights: list[float]):
    """(`Round`, {w: score}) of every round; {} of one that kept its reference: its checkpoints are gone."""
    ref = runs.start(setup, run)
    merge = lines.merger(setup, ref)
    for played, best in runs.played(setup, run):
        found = {}
        for w in (1.0, *weights) if best is not None else ():
            at = (f"{played.number}/w{w:g}", played.best.step, played.best.images)
            found[w] = setup.scorer(merge(ref, best, w), at, "select", played.number - 1)[0].score
        yield played, found
        ref = ref if best is None else best


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("runs", nargs="+", type=Path)
    p.add_argument("--weights", default="-1,-0.5,0.5,1.5,2")
    args = p.parse_args()
    weights = [float(w) for w in args.weights.split(",")]
    for run in args.runs:
        with tempfile.TemporaryDirectory() as scratch:
            setup = runs.beside(run, Path(scratch))
            for played, found in scores(setup, run, weights):
                report(
                    "line",
                    config=setup.config.name,
                    seed=setup.config.seed,
                    round=played.number,
                    metric=played.best.metric,
                    through=played.candidate,
                    start=round(played.start, 4),
                    recorded=round(played.best.score, 4),
                    scores={f"{w:g}": round(s, 4) for w, s in sorted(found.items())},
                    best=None if not found else min(found, key=found.get),
                )


if __name__ == "__main__":
    main()
