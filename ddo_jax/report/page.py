"""report.html: the report as one file that needs nothing beside it, no network, and no program but a browser."""

from __future__ import annotations

import base64
import functools
import html
import importlib.resources
import json
import string
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ddo_jax.report.pictures import png
from ddo_jax.report.plots import Curve, colour_of

if TYPE_CHECKING:
    from ddo_jax.report.report import Section


class Shown(NamedTuple):
    """What a page shows beside its text. pictures: {name: PNG}. grids: {title: images}. levels: grey levels of the
    grids. curves: of all candidates. metric: what they are of."""

    pictures: dict[str, bytes]
    grids: dict[str, np.ndarray]
    levels: int
    curves: list[Curve]
    metric: str


@functools.cache
def _asset(name: str) -> str:
    return importlib.resources.files("ddo_jax.report").joinpath("assets", name).read_text(encoding="utf-8")


@functools.cache
def _markdown():
    from markdown_it import MarkdownIt  # only here: a run does not start with it

    # Pictures come as data, never through Markdown: a name in it must not make the page ask for anything.
    return MarkdownIt("commonmark", {"html": False}).enable("table").disable(["image", "link", "autolink"])


def _image(data: bytes, alt: str) -> str:
    return f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{base64.b64encode(data).decode()}">'


def _figures(name: str, shown: Shown) -> str:
    """The pictures of a section: grids and curves become interactive, others are as they are in the Markdown."""
    if name == "samples":
        figures = [
            f"<figure>{_image(png(images, shown.levels), title)}<figcaption>{html.escape(title)}</figcaption></figure>"
            for title, images in shown.grids.items()
        ]
        return f'<div class="grids">{"".join(figures)}</div>'
    if name == "curves":
        without = f"<noscript>{_image(shown.pictures[name], name)}</noscript>"
        return f'<div id="curves">{without}</div>'
    return _image(shown.pictures[name], name)


def _section(section: Section, shown: Shown) -> str:
    body = _markdown().render(section.body)
    picture = _figures(section.picture, shown) if section.picture else ""
    if section.folded:
        return f"<details><summary>{html.escape(section.title)}</summary>{picture}{body}</details>"
    return f"<section><h2>{html.escape(section.title)}</h2>{picture}{body}</section>"


def _data(shown: Shown) -> str:
    """What the page's script draws, as JSON that may stand in a script element."""
    series = [
        {
            "label": f"{c.label}, stopped" if c.stopped else c.label,
            "stopped": c.stopped,
            "colour": colour_of(c),
            "dash": c.kind == "control",
            "x": [n / 1e6 for n in c.images],
            "y": c.values,
        }
        for c in shown.curves
    ]
    data = {"curves": {"metric": shown.metric, "series": series} if series else None}
    return json.dumps(data).replace("<", "\\u003c")


def page(title: str, summary: str, sections: Iterable[Section], shown: Shown) -> str:
    """The whole file. summary: Markdown, below the title."""
    parts = [f"<h1>{html.escape(title)}</h1>", _markdown().render(summary), *(_section(s, shown) for s in sections)]
    return string.Template(_asset("page.html")).substitute(
        title=html.escape(title),
        style=_asset("uPlot.min.css") + _asset("page.css"),
        body="\n".join(parts),
        script=_asset("uPlot.iife.min.js"),
        data=_data(shown),
        page=_asset("page.js"),
    )
