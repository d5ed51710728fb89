"""The report of a run: Markdown with PNG pictures, every number with its protocol."""

import io
import json
import statistics

import numpy as np
from etils import epath
from matplotlib.figure import Figure

from ddo_jax import files
from ddo_jax.run import plots

NAMES = {"start": "start (pretrained)", "ddo": "after DDO", "control": "control (continued MLE)"}


UNDER = ", "  # between a system and the sampler settings it is scored under, where they are not the run's own


def shown(system: str) -> str:
    """
    >>> shown("ddo"), shown("ddo, cfg 1")
    ('after DDO', 'after DDO, cfg 1')
    """
    name, _, settings = system.partition(UNDER)
    return NAMES.get(name, name) + (f", {settings}" if settings else "")


def mean_and_spread(values: list[float]) -> str:
    """
    >>> mean_and_spread([5.0, 5.5, 6.0]), mean_and_spread([0.25])
    ('5.50 ± 0.50', '0.250')
    """
    mean = statistics.fmean(values)
    digits = 2 if abs(mean) >= 1 else 3
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean:.{digits}f}{spread}"


def numbers(record: dict) -> dict[str, float]:
    """The scores of an evaluation record, without its position and protocol."""
    return {k: v for k, v in record.items() if isinstance(v, float)}


def table(header: list[str], rows: list[list]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in row) + " |" for row in lines)


def score_table(scores: dict[str, dict]) -> str:
    """One row a system, one column a number; mean ± standard deviation over the report's seed ranges."""
    keys = list(dict.fromkeys(k for s in scores.values() for k in numbers(s["evals"][0])))
    rows = []
    for system, s in scores.items():
        cells = [mean_and_spread([e[k] for e in s["evals"]]) if k in s["evals"][0] else "" for k in keys]
        nearest = [f"{s['nearest']:.3f}" if "nearest" in s else ""] * _compared(scores)
        rows.append([shown(system), *cells, *nearest])
    return table(["", *keys, *["nearest training image"] * _compared(scores)], rows)


def _compared(scores: dict[str, dict]) -> bool:
    """Whether samples were compared with training images: not where the data are latents."""
    return any("nearest" in s for s in scores.values())


def protocol_table(scores: dict[str, dict], rounds: list[dict]) -> str:
    """What each number was computed from; the shared part once, below."""
    rows = []
    for system, s in scores.items():
        for e in s["evals"]:
            if "protocol" in e:
                p = e["protocol"]
                rows.append([shown(system), e["phase"], e["step"], p["n_samples"], _seeds(p), p["weights"]])
    for r in rounds:
        p = r["protocol"]
        rows.append([f"selected in round {r['round']}", r["phase"], r["step"], p["n_samples"], _seeds(p), p["weights"]])
    return table(["number", "from", "step", "images", "seeds", "weights"], rows)


def _seeds(protocol: dict) -> str:
    first, last = protocol["seeds"]
    return f"{first}–{last}"


def shared_protocol(scores: dict[str, dict]) -> str:
    p = dict(scores["start"]["evals"][0]["protocol"])
    for own in ("purpose", "seeds", "weights", "time", "n_samples"):
        p.pop(own)
    return "\n".join(f"* {k}: {json.dumps(v) if isinstance(v, dict) else v}" for k, v in p.items())


def summary_lines(scores: dict[str, dict], rounds: list[dict]) -> str:
    """The result in words, from the numbers."""
    metric = scores["start"]["evals"][0]["metric"]

    def mean(system):
        return statistics.fmean(e[metric] for e in scores[system]["evals"])

    lines = []
    if "ddo" in scores:
        ratio = mean("ddo") / mean("start")
        lines.append(f"DDO changed {metric} from {mean('start'):.2f} to {mean('ddo'):.2f} (factor {ratio:.2f}).")
    if "control" in scores:
        lines.append(f"The control (continued MLE, best of learning rates and steps) reaches {mean('control'):.2f}.")
    for r in rounds:
        verdict = "" if r["improved"] else ": not better than its reference, which was kept"
        change = f"{r['metric']} {r['start']:.2f} → {r[r['metric']]:.2f}"
        lines.append(f"Round {r['round']}: {change} with {r['candidate']} at step {r['step']}{verdict}.")
    return "\n".join(f"* {line}" for line in lines)


def write_report(
    directory: epath.PathLike,
    *,
    config,
    metric: str,
    scores: dict[str, dict],
    rounds: list[dict],
    curves: list[dict],
    ratios: list[dict],
    grids: dict[str, np.ndarray],
) -> epath.Path:
    """Write report.md and its pictures.

    Args:
      directory: folder of the report. config: of the run. metric: the selecting number.
      scores: {"start" | "ddo" | "control" | "held-out images": {"evals": [records], "nearest": float}}.
      rounds: summary of every round. curves: {"label", "kind", "images", "values"} of every candidate.
      ratios: {"round", "real", "fake"} log-ratios at every round's best. grids: {system: images}, same seeds.

    Returns:
      The path of report.md.
    """
    directory = epath.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    pictures = _grid_pictures(grids, config.model.levels)
    if curves:
        pictures["curves"] = plots.curves(curves, metric)
    if ratios:
        pictures["ratios"] = plots.histograms(ratios)
    for name, figure in pictures.items():
        files.write_bytes(directory / f"{name}.png", _png(figure))
    path = directory / "report.md"
    files.write_bytes(path, _text(config, scores, rounds, list(pictures)).encode())
    return path


def _grid_pictures(grids: dict[str, np.ndarray], levels: int) -> dict[str, Figure]:
    titles = {NAMES.get(k, k): images for k, images in grids.items()}
    return {"samples": plots.grids(titles, levels)} if titles else {}


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


NEAREST = (
    " The last column is the mean distance of an image to its nearest training image, of up to 10,000 (far below that "
    "of held-out images would mean copying)."
)
CAPTIONS = {
    "samples": "The same seeds and labels before and after (rows: seeds; columns: classes, where there are any).",
    "curves": "The selecting number over the images of training, for all rounds and candidates. Chosen on one "
    "range of sampling seeds; the table above reports others.",
    "ratios": "Log-ratio r = log p_target − log p_reference of real images and of the reference's own samples, "
    "at the best checkpoint of each round. Their distance is what the discriminator sees.",
}


def _text(config, scores, rounds, pictures: list[str]) -> str:
    parts = [
        f"# {config.name or 'DDO'}",
        summary_lines(scores, rounds),
        "## Numbers",
        score_table(scores),
        f"Mean ± standard deviation over {config.eval.report_seeds} ranges of sampling seeds that chose nothing. "
        f"`{scores['start']['evals'][0]['metric']}` is the Fréchet distance to the training images (lower is better), "
        "`accuracy` the share of images that the feature network puts into their own class."
        + NEAREST
        * _compared(scores),
    ]
    if config.remark:
        parts.append(config.remark)
    for name in ("samples", "curves", "ratios"):
        if name in pictures:
            parts.append(f"## {name.capitalize()}\n\n![{name}]({name}.png)\n\n{CAPTIONS[name]}")
    parts += ["## Protocol", protocol_table(scores, rounds), "All numbers:", shared_protocol(scores)]
    return "\n\n".join(parts) + "\n"
