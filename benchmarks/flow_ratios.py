"""What r is made of over t, for the weights of a flow's log-ratio: a figure, and JSON lines.

    python benchmarks/flow_ratios.py --out=docs/flow_ratios.png runs/edm runs/x runs/velocity

Every run is finished, starts from the same weights and has its own `config.model.weight`. Reference: where round 1
began; target: the best of round 1. r of real rows and of samples of the reference with the run's own law of t, one draw
a pair, as in training; and, at the reference, the norm of every row's own gradient of w(t) |v - u|^2, which is the pull
of a row before anything is saturated.

Expected: `velocity` gives the rows with t near 1 most of the pull, `x` those with t near 0, `edm` spreads it.
"""

import argparse
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import runs
from common import report

from ddo_jax.generate.seeds import seed_range

NUM, PULLS, PART = 2000, 512, 500  # rows of r, rows of gradients, rows at a time
EDGES = np.array([0, 0.2, 0.4, 0.6, 0.8, 0.9, 0.95, 1.0])


def pairs(setup, start) -> tuple:
    """(real, fake) records of NUM rows each; the fakes are samples of the start."""
    real = setup.data.read(np.random.default_rng(0).permutation(len(setup.data))[:NUM])
    parts = list(setup.scorer.samples(start, seed_range("report", 1, NUM)))
    return real, {k: np.concatenate([np.asarray(p[k]) for p in parts]) for k in ("image", "label")}


def ratios(setup, target, start, sides: tuple, law: tuple) -> tuple[np.ndarray, list[np.ndarray]]:
    """t [NUM], [r of real, r of fake] in nats; row i of both has the same (t, eps)."""
    family, frozen = setup.family, setup.frozen
    draws = family.pair_draw(jax.random.key(1), NUM, law)

    @jax.jit
    def r_of(record, draws):
        examples = family.encode(frozen, record, jax.random.key(2))
        s, s_ref = (family.score(params, frozen, examples, draws) for params in (target, start))
        return family.ratio(s, s_ref, examples, draws)

    def whole(record):
        parts = (jax.tree.map(lambda v, i=i: v[i : i + PART], (record, draws)) for i in range(0, NUM, PART))
        return np.concatenate([np.asarray(r_of(*part)) for part in parts])

    return np.asarray(draws["t"]), [whole(record) for record in sides]


def pulls(setup, start, real: dict, law: tuple) -> tuple[np.ndarray, np.ndarray]:
    """t [PULLS], and the norm of each row's gradient of w(t) |v - u|^2 at the reference."""
    family, frozen = setup.family, setup.frozen
    draws = family.pair_draw(jax.random.key(3), PULLS, law)
    record = {k: v[:PULLS] for k, v in real.items()}

    def nll(params, record, draws):
        one = jax.tree.map(lambda v: v[None], (record, draws))
        examples = family.encode(frozen, one[0], jax.random.key(2))
        return family.nll(family.score(params, frozen, examples, one[1]), examples, one[1])[0]

    @jax.jit
    def norm(row):
        gradient = jax.grad(nll)(start, *row)
        return jnp.sqrt(sum(jnp.sum(jnp.square(g)) for g in jax.tree.leaves(gradient)))

    return np.asarray(draws["t"]), np.asarray(jax.lax.map(norm, (record, draws)))


def shares(t: np.ndarray, values: np.ndarray) -> list[float]:
    """Share of the sum of `values` >= 0 in every bin of `EDGES`."""
    return [round(float(v), 4) for v in np.histogram(t, EDGES, weights=values)[0] / values.sum()]


def separation(real: np.ndarray, fake: np.ndarray) -> float:
    """Chance that r of a real row is above that of a fake one (the area under the ROC curve)."""
    return round(float(np.mean(real[:, None] > fake[None])), 4)


def measure(run: Path) -> dict:
    """Of a finished run."""
    with tempfile.TemporaryDirectory() as scratch:
        setup = runs.beside(run, Path(scratch))
        start = runs.start(setup, run)
        found, target = next(runs.played(setup, run))
        if target is None:
            raise SystemExit(f"{run}: round 1 kept its reference; there is no target to look at")
        law = (setup.config.ddo.p_mean, setup.config.ddo.p_std)
        sides = pairs(setup, start)
        t, (real, fake) = ratios(setup, target, start, sides, law)
        t_pull, pull = pulls(setup, start, sides[0], law)
    beta = float(found.candidate.rpartition("_b")[2])
    return {
        "run": run.name,
        "weight": setup.family.weight,
        "beta": beta,
        "step": found.best.step,
        "score": [round(v, 1) for v in (found.start, found.best.score)],
        "std_r": [round(float(x.std()), 2) for x in (real, fake)],
        "separation": separation(real, fake),
        "bins_of_t": EDGES.tolist(),
        "rows": shares(t, np.ones_like(t)),
        "pull": shares(t_pull, pull),
        "squares_of_r": shares(t, real**2 + fake**2),
        "saturated": round(float(np.mean(np.abs(beta * np.concatenate([real, fake])) > 3)), 4),
        "arrays": (t, beta * real, beta * fake, t_pull, pull),
    }


def running(t: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean of `values` in twenty equal parts of the rows by t, at their mean t."""
    parts = np.array_split(np.argsort(t), 20)
    return np.array([t[i].mean() for i in parts]), np.array([values[i].mean() for i in parts])


def draw(found: list[dict], out: str) -> None:
    """Above: logits over t. Below: how much of the pull comes from where, beside how many rows are there."""
    figure, axes = plt.subplots(2, len(found), figsize=(4.2 * len(found), 6.4), layout="constrained", squeeze=False)
    for (top, low), m in zip(axes.T, found, strict=True):
        t, real, fake, _, _ = m["arrays"]
        for values, name, colour in ((real, "real", "C0"), (fake, "fake", "C1")):
            top.scatter(t, values, s=3, alpha=0.25, color=colour, linewidths=0)
            top.plot(*running(t, values), color=colour, label=f"{name}, mean")
        top.set_yscale("symlog", linthresh=1.0)
        top.axhspan(-3, 3, color="0.93", zorder=0)
        top.set(title=f"{m['weight']}, beta {m['beta']:g}: FD x 100 {m['score'][0]:.0f} -> {m['score'][1]:.0f}")
        top.set(xlabel="t (1: data)", ylabel="beta r")
        top.legend(fontsize=8, loc="lower left")
        x = np.arange(len(EDGES) - 1)
        for i, (key, label) in enumerate((("rows", "rows"), ("pull", "pull at the start"), ("squares_of_r", "r²"))):
            low.bar(x + 0.27 * (i - 1), m[key], 0.27, label=label, color=("0.75", "C2", "C3")[i])
        low.set_xticks(x, [f"{a:g}–{b:g}" for a, b in zip(EDGES[:-1], EDGES[1:], strict=True)], fontsize=7)
        low.set(xlabel="t", ylabel="share of the sum over a batch", ylim=(0, 1))
        low.legend(fontsize=8)
    figure.savefig(out, dpi=110)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    p.add_argument("--out", default="flow_ratios.png")
    args = p.parse_args()
    found = [measure(run) for run in args.runs]
    for m in found:
        report("flow_ratios", **{k: v for k, v in m.items() if k != "arrays"})
    draw(found, args.out)


if __name__ == "__main__":
    main()
