"""The model card beside exported weights: what they are, from what and under which licence, how their numbers came."""

from __future__ import annotations

from typing import Any, NamedTuple

from ddo_jax.config import method_of
from ddo_jax.evaluate.records import Round
from ddo_jax.report.report import METHODS, Scores, protocol_table, score_table, shared_protocol, summary_lines, table
from ddo_jax.store.origin import Origin

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


def _about(config: Any, model: Model, origin: Origin) -> str:
    method, shape = METHODS[method_of(config)], "x".join(map(str, model.image_shape))
    classes = f"{model.num_classes} classes" if model.num_classes else "no classes"
    arch = config.model.get("arch")
    network = f"family `{model.family}`{f', architecture `{arch}`' if arch else ''}, {model.parameters:,} parameters"
    named = f" ({', '.join(model.classes)})" if model.classes else ""
    return (
        f"A generator of {shape} images, {classes}{named}: {network}; {start_line(origin, model.data)}, then "
        f"{config.ddo.rounds} rounds of {method} (Direct Discriminative Optimization, arXiv 2503.01103) by ddo_jax. "
        "`params.safetensors` holds the average (EMA) of the best round, `config.json` every setting."
    )


USE = """```python
import ddo_jax

family, params, frozen = ddo_jax.load("params.safetensors")  # or hf://owner/name/params.safetensors
```

```sh
python -m ddo_jax.sample --checkpoint=params.safetensors --out=samples --seeds=0-63
```"""


def card(
    config: Any, scores: dict[str, Scores], rounds: list[Round], model: Model, origin: Origin, picture: bool
) -> str:
    """README.md of a folder with params.safetensors and config.json, and samples.png beside them if `picture`."""
    method = method_of(config)
    tried = [
        [r.number, r.candidate, r.best.step, "yes" if r.improved else "no: the reference was kept"] for r in rounds
    ]
    parts = [
        head(origin.licence, method),
        f"# {config.name or 'DDO'}",
        _about(config, model, origin),
        *["![The same seeds before and after](samples.png)"] * picture,
        "## Numbers",
        summary_lines(scores, rounds, method),
        score_table(scores, method),
        *([config.remark] if config.remark else []),
        "## Rounds",
        table(["round", "candidate", "best step", "better than its reference"], tried) if tried else "None.",
        "## Use",
        USE,
        "## Licence",
        licence_line(origin.licence),
        "## Protocol of the numbers",
        protocol_table(scores, rounds, method),
        shared_protocol(scores),
    ]
    return "\n\n".join(parts) + "\n"
