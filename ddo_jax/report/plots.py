"""The report's pictures, as matplotlib figures; the library is imported when one is drawn, not when a run starts."""

from __future__ import annotations

import dataclasses
import itertools
from typing import TYPE_CHECKING

import numpy as np

from ddo_jax.report.pictures import grid

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = {"round": ("#1f6fb4", "#3fa34d", "#8e44ad", "#c0762b", "#b03a5b", "#2aa198"), "control": "#888888"}


def drawn(**size) -> Figure:
    """An empty figure."""
    from matplotlib.figure import Figure

    return Figure(**size, layout="constrained")


@dataclasses.dataclass(frozen=True)
class Curve:
    """One candidate: kind "round" | "control", index of its round, images [n] seen since the start, values [n]."""

    label: str
    kind: str
    index: int
    images: list[float]
    values: list[float]
    stopped: bool = False  # before the end of its round


@dataclasses.dataclass(frozen=True)
class Ratios:
    """Log-ratios of real and fake images at the best checkpoint of a round (its number)."""

    round: int
    real: list[float]
    fake: list[float]


def colour_of(run: Curve) -> str:
    """Of its line: one for every round."""
    palette = COLOURS["round"]
    return COLOURS["control"] if run.kind == "control" else palette[run.index % len(palette)]


def curves(runs: list[Curve], metric: str) -> Figure:
    """`metric` over millions of images; one line a candidate, a ring at its best, a cross where it was stopped; rounds
    follow one another."""
    figure = drawn(figsize=(9, 4.5))
    axes = figure.subplots()
    for run in runs:
        colour = colour_of(run)
        style = "--" if run.kind == "control" else "-"
        millions = np.asarray(run.images) / 1e6
        axes.plot(millions, run.values, style, color=colour, marker=".", label=run.label, lw=1.3)
        best = int(np.argmin(run.values))
        axes.plot(millions[best], run.values[best], "o", color=colour, ms=8, mfc="none")
        if run.stopped:
            axes.plot(millions[-1], run.values[-1], "x", color=colour, ms=8)
    axes.set_xlabel("millions of real images since the start")
    axes.set_ylabel(metric)
    axes.set_ylim(bottom=min(0, *(min(run.values) for run in runs)))
    axes.grid(alpha=0.25)
    if len(runs) <= 16:
        axes.legend(fontsize=8)
    return figure


@dataclasses.dataclass(frozen=True)
class Visited:
    """A point of the plane that a round tried: its first evaluation and its best one."""

    round: int
    alpha: float
    beta: float
    first: float
    best: float


def plane(points: list[Visited], metric: str) -> Figure:
    """What every round tried, one panel a round, the last six: `metric` over beta, a colour an alpha; dashed the first
    evaluation, full the best one."""
    numbers = sorted({p.round for p in points})[-6:]
    figure = drawn(figsize=(3.6 * len(numbers), 3.2))
    alphas = sorted({p.alpha for p in points})
    for axes, number in zip(figure.subplots(1, len(numbers), squeeze=False)[0], numbers, strict=True):
        for alpha, colour in zip(alphas, itertools.cycle(COLOURS["round"]), strict=False):
            own = sorted((p for p in points if p.round == number and p.alpha == alpha), key=lambda p: p.beta)
            betas = [p.beta for p in own]
            axes.plot(betas, [p.first for p in own], "--", marker=".", color=colour, lw=1)
            axes.plot(betas, [p.best for p in own], "-o", color=colour, ms=5, label=f"α = {alpha:g}")
        tried = sorted({p.beta for p in points if p.round == number})
        axes.set_xscale("log")
        axes.minorticks_off()
        axes.set_xticks(tried, [f"{beta:g}" for beta in tried], fontsize=8)
        axes.set_title(f"round {number}", fontsize=10)
        axes.set_xlabel("β")
        axes.set_ylabel(metric)
        axes.grid(alpha=0.25)
        axes.legend(fontsize=8)
    return figure


def histograms(ratios: list[Ratios]) -> Figure:
    """Log-ratios of real and fake images, one panel a round, the last six."""
    ratios = ratios[-6:]
    figure = drawn(figsize=(3.6 * len(ratios), 3.2))
    for axes, entry in zip(figure.subplots(1, len(ratios), squeeze=False)[0], ratios, strict=True):
        both = np.concatenate([entry.real, entry.fake])
        bins = np.linspace(*np.percentile(both, [0.5, 99.5]), 50)
        axes.hist(entry.fake, bins, color="#c0762b", alpha=0.6, label="fake")
        axes.hist(entry.real, bins, color="#1f6fb4", alpha=0.6, label="real")
        axes.axvline(0, color="black", lw=0.8)
        axes.set_title(f"round {entry.round}", fontsize=10)
        axes.set_xlabel("r (nats)")
        axes.legend(fontsize=8)
    return figure


def grids(sets: dict[str, np.ndarray], levels: int) -> Figure:
    """Image sets of the same seeds, one beside the other; uint8 with `levels` grey levels."""
    figure = drawn(figsize=(4.2 * len(sets), 4.6))
    for axes, (title, images) in zip(figure.subplots(1, len(sets), squeeze=False)[0], sets.items(), strict=True):
        axes.imshow(grid(images, levels), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        axes.set_title(title, fontsize=11)
        axes.set_axis_off()
    return figure
