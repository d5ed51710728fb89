"""The report of a run: Markdown with PNG pictures and one HTML file, every number with its protocol."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import statistics
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from etils import epath

from ddo_jax import files
from ddo_jax.config import method_of
from ddo_jax.evaluate.records import Evaluation, Round
from ddo_jax.report import page, plots

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAMES = {"start": "start (pretrained)", "control": "control (continued MLE)"}
METHODS = {
    "ddo": "DDO",
    "neon": "Neon",
    "mle": "MLE",
    "cca": "CCA",
}  # of the system "ddo"


HELD_OUT, AMONG = "held-out images", "training images from one another"  # rows without a model
UNDER = ", "  # between a system and the sampler settings it is scored under, where they are not the run's own


def shown(system: str, method: str = "ddo") -> str:
    """
    >>> shown("ddo"), shown("ddo, cfg 1", "neon")
    ('after DDO', 'after Neon, cfg 1')
    """
    name, _, settings = system.partition(UNDER)
    names = NAMES | {"ddo": f"after {METHODS[method]}"}
    return names.get(name, name) + (f", {settings}" if settings else "")


def mean_and_spread(values: list[float]) -> str:
    """
    >>> mean_and_spread([5.0, 5.5, 6.0]), mean_and_spread([0.25])
    ('5.50 ± 0.50', '0.250')
    """
    mean = statistics.fmean(values)
    digits = 2 if abs(mean) >= 1 else 3
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean:.{digits}f}{spread}"


@dataclasses.dataclass(frozen=True)
class Scores:
    """Of one system: its evaluations on the report's seed ranges, and the mean distance of an image to its nearest
    training image (None: not measured)."""

    evals: list[Evaluation]
    nearest: float | None = None


class Point(NamedTuple):
    """A point of a line search. through: the candidate that the line goes through at w = 1."""

    round: int
    through: str
    w: float
    metric: str
    score: float


def plain(name: str) -> str:
    r"""Somebody's name of a class or a set, as Markdown that shows it and means nothing.

    >>> plain("a_b ![x](http://evil)")
    'a\\_b \\!\\[x\\](http://evil)'
    """
    return re.sub(r"([\\`*_{}\[\]<>#|!])", r"\\\1", name)


def table(header: list[str], rows: list[list]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in row) + " |" for row in lines)


def score_table(scores: dict[str, Scores], method: str = "ddo") -> str:
    """One row a system, one column a number; mean ± standard deviation over the report's seed ranges."""
    keys = list(dict.fromkeys(k for s in scores.values() for e in s.evals[:1] for k in e.values))
    rows = []
    for system, s in scores.items():
        there = s.evals[0].values if s.evals else {}
        cells = [mean_and_spread([e.values[k] for e in s.evals]) if k in there else "" for k in keys]
        nearest = ["" if s.nearest is None else f"{s.nearest:.3f}"] * _compared(scores)
        rows.append([shown(system, method), *cells, *nearest])
    return table(["", *keys, *["nearest training image"] * _compared(scores)], rows)


def _compared(scores: dict[str, Scores]) -> bool:
    """Whether samples were compared with training images: not where the data are latents."""
    return any(s.nearest is not None for s in scores.values())


def protocol_table(scores: dict[str, Scores], rounds: list[Round], method: str = "ddo") -> str:
    """What each number was computed from; the shared part once, below."""
    found = [(shown(system, method), e) for system, s in scores.items() for e in s.evals]
    found += [(f"selected in round {r.number}", r.best) for r in rounds]
    rows = [
        [name, e.phase, e.step, e.protocol.n_samples, e.protocol.seeds, e.protocol.weights, e.protocol.content]
        for name, e in found
    ]
    return table(["number", "from", "step", "images", "seeds", "weights", "content"], rows)


def shared_protocol(scores: dict[str, Scores]) -> str:
    """What all numbers of the report have in common."""
    p = scores["start"].evals[0].protocol.record()
    own = ("purpose", "seeds", "weights", "time", "n_samples", "content", "class_balance")
    return "\n".join(f"* {k}: {json.dumps(v) if isinstance(v, dict) else v}" for k, v in p.items() if k not in own)


def summary_lines(scores: dict[str, Scores], rounds: list[Round], method: str = "ddo") -> str:
    """The result in words, from the numbers."""
    metric = scores["start"].evals[0].metric
    if not metric:
        return UNSCORED

    def mean(system):
        return statistics.fmean(e.score for e in scores[system].evals)

    lines = []
    if "ddo" in scores:
        ratio = mean("ddo") / mean("start")
        lines.append(
            f"{METHODS[method]} changed {metric} from {mean('start'):.2f} to {mean('ddo'):.2f} (factor {ratio:.2f})."
        )
    if "control" in scores:
        lines.append(f"The control (continued MLE, best of learning rates and steps) reaches {mean('control'):.2f}.")
    for r in rounds:
        verdict = "" if r.improved else ": not better than its reference, which was kept"
        change = f"{r.best.metric} {r.start:.2f} → {r.best.score:.2f}"
        lines.append(f"Round {r.number}: {change} with {r.candidate} at step {r.best.step}{verdict}.")
    return "\n".join(f"* {line}" for line in lines)


UNSCORED = (
    "* Nothing was scored (`eval.network = none`): no number chose between checkpoints, every round ended at its "
    "length and its last checkpoint was taken. Whether DDO helped is for the eye to say, by the pictures."
)


@dataclasses.dataclass(frozen=True)
class Report:
    """All that a finished run shows.

    Attributes:
      config: of the run. scores: {"start" | "ddo" | "control" | HELD_OUT | AMONG | one of them under other settings}.
      rounds: in order. curves: of every candidate. ratios: at every round's best. grids: {system: images}, same seeds.
      notes: sentences on the run that a reader must know beside its numbers. lines: of line searches.
      visited: the (alpha, beta) that were tried. searched, signal, cost: of searches for beta, of each round's first
        gradients, of the whole; as rows of a table. shares: sentences on the cost.
    """

    config: Any
    scores: dict[str, Scores]
    rounds: list[Round]
    curves: list[plots.Curve]
    ratios: list[plots.Ratios]
    grids: dict[str, np.ndarray]
    notes: tuple[str, ...] = ()
    lines: tuple[Point, ...] = ()
    visited: tuple[plots.Visited, ...] = ()
    searched: tuple[list, ...] = ()
    signal: tuple[list, ...] = ()
    cost: tuple[list, ...] = ()
    shares: tuple[str, ...] = ()

    def write(self, directory: epath.PathLike) -> epath.Path:
        """report.md with its pictures, and report.html, which holds them; the path of report.md."""
        directory = epath.Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        method, metric = method_of(self.config), self.scores["start"].evals[0].metric
        grids = {shown(system, method): images for system, images in self.grids.items()}
        pictures = {name: _png(figure) for name, figure in self.figures(grids, metric).items()}
        for name, data in pictures.items():
            files.write_bytes(directory / f"{name}.png", data)
        title, summary = self.config.name or "DDO", summary_lines(self.scores, self.rounds, method)
        sections = _sections(self, list(pictures), method)
        whole = page.Shown(pictures, grids, self.config.model.levels, self.curves, metric)
        files.write_bytes(directory / "report.html", page.page(title, summary, sections, whole).encode())
        files.write_bytes(directory / "report.md", _markdown(title, summary, sections).encode())
        return directory / "report.md"

    def figures(self, grids: dict[str, np.ndarray], metric: str) -> dict[str, Figure]:
        """The pictures of what there is; grids: by their titles."""
        drawn = {}
        if grids:
            drawn["samples"] = plots.grids(grids, self.config.model.levels)
        if self.curves:
            drawn["curves"] = plots.curves(self.curves, metric)
        if len({(p.alpha, p.beta) for p in self.visited}) > 1:
            drawn["plane"] = plots.plane(list(self.visited), metric)
        if self.ratios:
            drawn["ratios"] = plots.histograms(self.ratios)
        return drawn


class Section(NamedTuple):
    """body: Markdown. picture: name of the one above it, or "". folded: of those who ask, not at first sight."""

    title: str
    body: str
    picture: str = ""
    folded: bool = False


def _joined(*parts: str) -> str:
    """Paragraphs of Markdown."""
    return "\n\n".join(part for part in parts if part)


def _search_table(rows: tuple[list, ...]) -> list[Section]:
    header = ["round", "candidate", "compared at step", "score", "behind the best", "± 95 %", "then"]
    return [Section("Search", _joined(SEARCH, table(header, list(rows))))] if rows else []


def _line_table(points: tuple[Point, ...]) -> list[Section]:
    """Points of the line searches, a row each."""
    if not points:
        return []
    rows = [[p.round, p.through, f"{p.w:g}", f"{p.score:.3f}"] for p in points]
    return [Section("Line search", _joined(LINE, table(["round", "through", "w", points[0].metric], rows)))]


def _signal_table(rows: tuple[list, ...]) -> list[Section]:
    header = ["round", "real: norm", "if there were only noise", "fakes: norm", "if there were only noise"]
    return [Section("First gradients", _joined(SIGNAL, table(header, list(rows))))] if rows else []


def _cost_table(report: Report) -> list[Section]:
    if not report.cost:
        return []
    header = ["", "images trained on", "fakes sampled", "images sampled to be scored"]
    said = "\n".join(f"* {line}" for line in report.shares)
    return [Section("Cost", _joined(table(header, list(report.cost)), said))]


SEARCH = (
    "What `ddo.search = auto` compared: candidates at equal steps, on the same sampling seeds, so that the interval is "
    "that of a paired difference. It is known to first order and for the Fréchet distance only."
)
LINE = (
    "θ(w) = (1 − w) θ_ref + w θ: w = 1 is what was trained, w > 1 goes further, w < 0 the other way (of Neon −w is "
    "shown). Scored on the round's selection seeds, as the candidates are."
)
SIGNAL = (
    "Norm of the mean gradient of log p of the reference at the start of a round, on real images and on its own "
    "samples. Where it is no larger than noise alone would make it, DDO's first step is chance's."
)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


NEAREST = (
    " The last column is the mean distance of an image to its nearest training image, of up to 10,000 (far below that "
    "of real images, the last row, would mean copying)."
)
CAPTIONS = {
    "samples": "The same seeds and labels before and after (rows: seeds; columns: classes, where there are any).",
    "curves": "The selecting number over the images of training, for all rounds and candidates; a cross where a search "
    "stopped one. Chosen on one range of sampling seeds; the table above reports others.",
    "plane": "Every β that was tried (a colour an α): dashed its first evaluation, full its best one.",
    "ratios": "Log-ratio r = log p_target − log p_reference of real images and of the reference's own samples, "
    "at the best checkpoint of each round. Their distance is what the discriminator sees.",
}


def _about_numbers(config, scores: dict[str, Scores]) -> str:
    """What the columns of the score table are."""
    metric, nearest = scores["start"].evals[0].metric, NEAREST * _compared(scores)
    if not metric:
        return nearest.strip()
    return (
        f"Mean ± standard deviation over {config.eval.report_seeds} ranges of sampling seeds that chose nothing. "
        f"`{metric}` is the Fréchet distance to the training images (lower is better), "
        f"`accuracy` the share of images that the feature network puts into their own class.{nearest}"
    )


def _sections(report: Report, pictures: list[str], method: str) -> list[Section]:
    config, scores, rounds = report.config, report.scores, report.rounds
    numbers = _joined(score_table(scores, method), _about_numbers(config, scores), *report.notes, config.remark or "")
    found = [Section("Numbers", numbers)]
    found += [Section(name.capitalize(), CAPTIONS[name], name) for name in CAPTIONS if name in pictures]
    found += _search_table(report.searched)
    found += _line_table(report.lines) + _signal_table(report.signal) + _cost_table(report)
    protocol = _joined(protocol_table(scores, rounds, method), "All numbers:", shared_protocol(scores))
    return [*found, Section("Protocol", protocol, folded=True)]


def _markdown(title: str, summary: str, sections: list[Section]) -> str:
    parts = [f"# {title}", summary]
    for section in sections:
        picture = f"![{section.picture}]({section.picture}.png)" if section.picture else ""
        parts += [f"## {section.title}", *([picture] if picture else []), section.body]
    return _joined(*parts) + "\n"
