"""How few images rank checkpoints as FD on 50,000 does? Kendall's tau of MIND and FD on small sets, of finished runs.

    python benchmarks/mind.py --out=/tmp/mind runs/digits0 runs/digits1 runs/digits2
    python benchmarks/mind.py --out=/tmp/mind --figure=docs/mind.png       # from the lines of all calls so far

Checkpoints: the start, the best of every round, the control's, of all runs together. Of each, `--num` images are made;
FD of all of them is the truth. Every size takes disjoint subsets, the same seeds of every checkpoint. One JSON line a
checkpoint (kept in OUT/checkpoints.jsonl), then one a data set, metric and size.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import runs
from common import report
from scipy.stats import kendalltau

from ddo_jax.core.stats import frechet
from ddo_jax.core.stats.mind import mind
from ddo_jax.data.images import to_levels
from ddo_jax.evaluate import collect
from ddo_jax.generate.seeds import seed_range

SIZES, SUBSETS = (128, 256, 512, 1024, 2048), 5


def features(setup, params, num: int) -> np.ndarray:
    """Of `num` images, float32 [num, D]."""
    evaluator = setup.scorer.evaluator
    network, have = evaluator.networks[collect.MAIN], setup.family.spec.levels
    parts = setup.scorer.samples(params, seed_range("report", 0, num))
    images = (to_levels(r["image"], have, network.levels) for r in parts)
    return np.concatenate([network.apply(x)["features"] for x in images])


def distances(fake: np.ndarray, real: np.ndarray, gaussian) -> dict:
    """FD of all, of every subset, and MIND of every subset, with the seconds that they took."""

    def fd(rows):
        return frechet.frechet_distance(gaussian.mu, gaussian.sigma, *frechet.moments(rows), root1=gaussian.root)

    found, took = {"truth": fd(fake)}, {}
    for name, metric in (("fd", fd), ("mind", lambda rows: mind(real, rows))):
        began = time.perf_counter()
        for n in SIZES:
            found[f"{name}_{n}"] = [metric(fake[i * n : (i + 1) * n]) for i in range(min(SUBSETS, len(fake) // n))]
        took[f"{name}_s"] = round(time.perf_counter() - began, 1)
    return found | took


def checkpoints(setup, run: Path):
    """(name, parameters)."""
    yield "start", runs.start(setup, run)
    yield from ((f"round {p.number}", best) for p, best in runs.played(setup, run) if best is not None)
    yield from ((f"control {name}", params) for name, params in runs.controls(setup, run))


def measure(run: Path, num: int, sampler: dict):
    with tempfile.TemporaryDirectory() as scratch:
        setup = runs.beside(run, Path(scratch), ("mind",), **sampler)
        evaluator = setup.scorer.evaluator
        reference, real = next(iter(evaluator.references.values())), evaluator.real
        for name, params in checkpoints(setup, run):
            found = distances(features(setup, params, num), real, reference.gaussians["fid"])
            yield {"data": setup.data.name, "run": run.name, "checkpoint": name, "num": num, "real": len(real), **found}


def taus(lines: list[dict]):
    """{(data, metric, size): tau of every subset}."""
    found = defaultdict(list)
    for data in dict.fromkeys(line["data"] for line in lines):
        own = [line for line in lines if line["data"] == data]
        for key in (f"{name}_{n}" for name in ("fd", "mind") for n in SIZES):
            name, n = key.split("_")
            for i in range(min(len(line[key]) for line in own)):
                tau = kendalltau([x["truth"] for x in own], [x[key][i] for x in own]).statistic
                found[data, name, int(n)].append(float(tau))
    return found


def draw(found, path: str) -> None:
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(data for data, _, _ in found))
    figure = Figure((4.2 * len(names), 3.4), layout="constrained")
    for axes, data in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for name, color in (("fd", "C0"), ("mind", "C1")):
            rows = [found[data, name, n] for n in SIZES]
            axes.plot(SIZES, [statistics.mean(r) for r in rows], "o-", color=color, label=name.upper())
            axes.fill_between(SIZES, [min(r) for r in rows], [max(r) for r in rows], color=color, alpha=0.2, lw=0)
        axes.set(title=data, xlabel="images", ylabel="Kendall's τ with FD of all", xscale="log", ylim=(0, 1.02))
        axes.set_xticks(SIZES, [str(n) for n in SIZES])
        axes.minorticks_off()
        axes.legend(loc="lower right")
    figure.savefig(path, dpi=120)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("runs", nargs="*", type=Path)
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--num", type=int, default=50_000)
    p.add_argument("--steps", type=int, help="of the sampler, in place of the run's")
    p.add_argument("--figure")
    args = p.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    kept = args.out / "checkpoints.jsonl"
    for run in args.runs:
        for line in measure(run, args.num, {"num_steps": args.steps} if args.steps else {}):
            with kept.open("a") as f:
                f.write(json.dumps(line) + "\n")
    found = taus([json.loads(line) for line in kept.read_text().splitlines()])
    for (data, name, n), values in found.items():
        report("mind", data=data, metric=name, images=n, tau=round(statistics.mean(values), 3), subsets=len(values))
    if args.figure:
        draw(found, args.figure)


if __name__ == "__main__":
    main()
