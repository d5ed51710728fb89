"""FD against compute of finished runs that differ in `ddo.fake_ratio`: a figure, and one JSON line a run.

    python benchmarks/fakes.py --out=docs/fakes.png "digits=runs/d25-*,runs/d50-*,runs/d100-*" "digits_var=runs/v*"

A group is NAME=patterns of workdirs; runs of one ratio (training seeds) are averaged. Compute: forward-equivalents of
training, 4 (B_real + B_fake) a step (specs/ddo.md section 7); making fakes comes on top where they are made as training
goes, and is in the JSON lines as their number. Expected: with half as many fakes a step costs three quarters; whether
more steps for that are of use is the question.
"""

import argparse
import glob
import json
from collections import defaultdict
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import runs  # noqa: F401  puts the repository on the path
from common import report

from ddo_jax import files


def curve(run: Path) -> dict:
    """A finished run: its ratio, the compute at every evaluation of its rounds, and their scores."""
    c = files.read_sealed(run / "config.json")
    ratio = c["ddo"].get("fake_ratio", 1.0)
    each = 4 * (1 + ratio)  # forward-equivalents an image of the data
    evals = [json.loads(line) for line in (run / "evals.jsonl").read_text().splitlines()]
    whole = c["ddo"]["length"]["steps"] * c["ddo"]["batch"]
    points = []
    for e in evals:
        if e["phase"].startswith("rounds/") and e["step"]:
            before = (int(e["phase"].split("/")[1]) - 1) * whole
            points.append((each * (before + e["images"]) / 1e6, e[e["metric"]]))
    reported = {
        phase: [e[e["metric"]] for e in evals if e["phase"] == phase and e["protocol"]["purpose"] == "report"]
        for phase in ("start", "ddo")
    }
    return {
        "ratio": ratio,
        "seed": c["seed"],
        "mforward": [x for x, _ in points],
        "score": [y for _, y in points],
        "start": float(np.mean(reported["start"])),
        "ddo": float(np.mean(reported["ddo"])),
        "fakes": int(c["ddo"]["rounds"] * c["ddo"]["length"]["steps"] * round(ratio * c["ddo"]["batch"])),
        "rounds": c["ddo"]["rounds"],
    }


def draw(ax, name: str, curves: list[dict]) -> None:
    by_ratio = defaultdict(list)
    for c in curves:
        by_ratio[c["ratio"]].append(c)
    for ratio, group in sorted(by_ratio.items()):
        y = np.mean([c["score"] for c in group], axis=0)
        label = f"{ratio:g}: {np.mean([c['ddo'] for c in group]):.1f}" + (
            f" ({len(group)} seeds)" if len(group) > 1 else ""
        )
        ax.plot(group[0]["mforward"], y, marker="o", label=label)
    ax.set(title=name, xlabel="training, million forward-equivalents", ylabel="FD x 100, selection seeds")
    ax.legend(title="fakes over reals: FD x 100 at the end,\non seeds that chose nothing", fontsize=8)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("groups", nargs="+", metavar="NAME=PATTERN[,PATTERN]")
    p.add_argument("--out", default="fakes.png")
    args = p.parse_args()
    figure, axes = plt.subplots(1, len(args.groups), figsize=(5 * len(args.groups), 4), layout="constrained")
    for ax, text in zip(np.atleast_1d(axes), args.groups, strict=True):
        name, _, patterns = text.partition("=")
        found = [curve(Path(run)) for pattern in patterns.split(",") for run in sorted(glob.glob(pattern))]
        for c in found:
            report("fakes", group=name, **c)
        draw(ax, name, found)
    figure.savefig(args.out, dpi=110)


if __name__ == "__main__":
    main()
