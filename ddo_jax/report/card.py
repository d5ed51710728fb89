"""The model card beside exported weights: what they are, from what and under which licence, how their numbers came."""

from __future__ import annotations

from typing import Any, NamedTuple

from ddo_jax.config import method_of
from ddo_jax.convert.origin import Origin
from ddo_jax.evaluate.records import Round
from ddo_jax.families import FAMILIES
from ddo_jax.report.report import (
    METHODS,
    Scores,
    plain,
    protocol_table,
    score_table,
    shared_protocol,
    summary_lines,
    table,
)

NON_COMMERCIAL = "cc-by-nc-sa-4.0"


class Model(NamedTuple):
    """What a card says of the network itself.

    family, num_classes, image_shape: of its `Spec`. parameters: how many. data: name of the training set. classes:
    names of its classes, () where there are none.
    """

    family: str
    num_classes: int
    image_shape: tuple[int, ...]
    parameters: int
    data: str
    classes: tuple[str, ...] = ()


def licence_line(licence: str) -> str:
    """What a reader must know, in a sentence."""
    if licence == NON_COMMERCIAL:
        return (
            "The weights that these were made from are CC BY-NC-SA 4.0; so are these: attribution, no commercial use, "
            "the same licence for what is made of them."
        )
    if licence == "unknown":
        return (
            "No licence is known of what these weights were made from: whoever passes them on must state one, with "
            "regard to the training data (`license:` above)."
        )
    return f"The weights that these were made from are published under the licence `{licence}`."


def head(licence: str, method: str) -> str:
    """The card's front matter, as hubs read it."""
    facts = {"library_name": "ddo_jax", "license": licence, "pipeline_tag": "unconditional-image-generation"}
    lines = [*(f"{key}: {value}" for key, value in facts.items()), "tags:", "- ddo_jax", "- jax", f"- {method}"]
    return "\n".join(["---", *lines, "---"])


def start_line(origin: Origin, data: str) -> str:
    if not origin.starts:
        return f"trained from scratch on `{data}`"
    return f"from {', itself from '.join(f'`{start}`' for start in origin.starts)}, on `{data}`"


PAPERS = {"ddo": "Direct Discriminative Optimization, arXiv 2503.01103", "neon": "Neon, arXiv 2510.03597"}
PAPERS |= {"mle": "maximum likelihood", "cca": "CCA, arXiv 2410.09347"}
MOST_NAMES = 20  # of classes, in a sentence


def _about(config: Any, model: Model, origin: Origin, rounds: list[Round]) -> str:
    method, shape = method_of(config), "x".join(map(str, model.image_shape))
    classes = f"{model.num_classes} classes" if model.num_classes else "no classes"
    some = [plain(name) for name in model.classes[:MOST_NAMES]]
    some += ["..."] if len(model.classes) > MOST_NAMES else []
    arch = config.model.get("arch")
    network = f"family `{model.family}`{f', architecture `{arch}`' if arch else ''}, {model.parameters:,} parameters"
    named = f" ({', '.join(some)})" if some else ""
    then = f", then {len(rounds)} rounds of {METHODS[method]} ({PAPERS[method]})" if rounds else ""
    better = any(r.improved for r in rounds)
    held = "the average (EMA) of the best round" if better else "the weights of the start: no round was better"
    return (
        f"A generator of {shape} images, {classes}{named}: {network}; {start_line(origin, model.data)}{then}, by "
        "ddo_jax. "
        f"`params.safetensors` holds {held if rounds else 'these weights'}, `config.json` every setting."
    )


def _use(family: str) -> str:
    """How to load it; weights of a family of the user's own are loaded by the run's config, which names it."""
    ours = family in FAMILIES
    what, where = ("params.safetensors", "params.safetensors") if ours else (".", "this folder")
    note = "" if ours else "With the module of the family, which `config.json` names, on the path:\n\n"
    remote = "  # or hf://owner/name/params.safetensors" if ours else f"  # {where}, with its checkpoints/"
    return (
        f'{note}```python\nimport ddo_jax\n\nfamily, params, frozen = ddo_jax.load("{what}"){remote}\n```\n\n'
        f"```sh\npython -m ddo_jax.sample --checkpoint={what} --out=samples --seeds=0-63\n```"
    )


def _tried(r: Round) -> list:
    verdict = "not scored" if r.start is None else "yes" if r.improved else "no: it was kept"
    return [r.number, r.candidate, r.best.step, verdict]


def card(
    config: Any,
    scores: dict[str, Scores],
    rounds: list[Round],
    notes: tuple[str, ...],
    model: Model,
    origin: Origin,
    picture: bool,
) -> str:
    """README.md of a folder with params.safetensors and config.json, and samples.png beside them if `picture`."""
    method = method_of(config)
    header = ["round", "candidate", "best step", "better than its reference"]
    scored = bool(scores["start"].evals[0].metric)
    parts = [
        head(origin.licence, method),
        f"# {config.name or 'DDO'}",
        _about(config, model, origin, rounds),
        *["![The same seeds before and after](samples.png)"] * picture,
        "## Numbers",
        summary_lines(scores, rounds, method),
        *[score_table(scores, method)] * scored,
        *notes,
        *([config.remark] if config.remark else []),
        *["## Rounds", table(header, [_tried(r) for r in rounds])] * bool(rounds),
        "## Use",
        _use(model.family),
        "## Licence",
        licence_line(origin.licence),
        "## Protocol of the numbers",
        protocol_table(scores, rounds, method),
        shared_protocol(scores),
    ]
    return "\n\n".join(parts) + "\n"
