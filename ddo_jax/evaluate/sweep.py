"""`python -m ddo_jax.evaluate --sweep guidance=0,0.5,1`: one checkpoint scored at several sampler settings.

The paper's trade-off of FID and Inception Score over the strength of guidance, as a table and a picture.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ddo_jax.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HIGHER = ("is", "accuracy", "precision", "recall", "density", "coverage")  # is better; of all other metrics lower


def parse(text: str, kinds: dict) -> tuple[str, list]:
    """A sweep's key and values.

    Args:
      text: KEY=V1,V2,... kinds: {key: type} of all that can be swept.

    Raises:
      UserError: another key, fewer than two values, or a value of another type.

    >>> parse("guidance=0,0.5", {"guidance": float})
    ('guidance', [0.0, 0.5])
    """
    key, _, values = text.partition("=")
    if key not in kinds:
        raise UserError(f"--sweep: {key!r}; allowed: {', '.join(kinds)}, as in guidance=0,0.5,1.0")
    try:
        found = [kinds[key](value) for value in values.split(",")]
        if not all(map(math.isfinite, found)):
            raise ValueError
    except ValueError:
        raise UserError(f"--sweep: {text!r}; allowed: numbers ({kinds[key].__name__}), as in {key}=0,1,2") from None
    if len(found) < 2 or len(set(found)) < len(found):
        raise UserError(f"--sweep: {text!r}; allowed: two or more values, all different")
    return key, found


def table(key: str, rows: dict) -> str:
    """{value: {metric: number}} -> one aligned line a value, the best of every metric marked.

    >>> print(table("guidance", {0.0: {"fid": 5.0, "is": 20.0}, 1.5: {"fid": 3.0, "is": 40.0}}))
    guidance   fid    is
           0     5    20
         1.5    3*   40*
    """
    names = list(dict.fromkeys(name for values in rows.values() for name in values))
    best = {}
    for name in (n for n in names if not _spread(n)):
        column = [numbers[name] for numbers in rows.values()]
        best[name] = (max if _higher(name) else min)(column) if len(set(column)) > 1 else None
    lines = [[key, *names]]
    for value, numbers in rows.items():
        lines.append([f"{value:g}", *(f"{numbers[n]:.5g}{'*' * (numbers[n] == best.get(n))}" for n in names)])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    widths[1:] = [max(width, 4) for width in widths[1:]]
    return "\n".join("  ".join(c.rjust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def _spread(name: str) -> bool:
    return "_std" in name or name.endswith("_slope")


def _higher(name: str) -> bool:
    return name.startswith(HIGHER) and not _spread(name)


def figure(key: str, rows: dict, title: str) -> Figure:
    """Every metric over the swept value; FID over the Inception Score first, where both are there."""
    names = [n for n in dict.fromkeys(n for v in rows.values() for n in v) if not _spread(n)]
    score = next((n for n in names if n.startswith("is")), None)
    distance = next((n for n in names if not _higher(n)), None)
    trade = [(score, distance)] if score and distance else []
    panels = trade + [(key, name) for name in names]
    from matplotlib.figure import Figure  # slow, and rarely asked for

    drawn = Figure(figsize=(4.4 * len(panels), 3.8), layout="constrained")
    for axes, (x, y) in zip(drawn.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        points = [(value if x == key else numbers[x], numbers[y]) for value, numbers in rows.items()]
        axes.plot(*zip(*points, strict=True), "-o", color="#1f6fb4", ms=4, lw=1.3)
        if x != key:
            for point, value in zip(points, rows, strict=True):
                axes.annotate(f"{value:g}", point, textcoords="offset points", xytext=(5, 4), fontsize=8)
        axes.set_xlabel(x if x == key else f"{x} (higher is better)")
        axes.set_ylabel(f"{y} ({'higher' if _higher(y) else 'lower'} is better)")
        axes.grid(alpha=0.25)
    drawn.suptitle(title.replace("$", r"\$"), fontsize=10)  # a path, not TeX
    return drawn
