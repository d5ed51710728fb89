"""Commands and snippets of the documentation, as a reader would copy them."""

import re
import shlex
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "examples/README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
MARK = "<!-- parsed, not run: "  # before a block: why nobody runs it here
BLOCK = re.compile(
    rf"^(?:{MARK}(?P<mark>[^>]*) -->\n)?```(?P<language>[^\n`]*)\n(?P<text>.*?)^```", re.DOTALL | re.MULTILINE
)
INLINE = re.compile(r"`((?:python (?:-m )?|pip |launch/|\.ci/|ddo-jax)[^`]+)`")


class Block(NamedTuple):
    """language: "" | sh | python | {directive} | ... mark: why it is parsed only; None: it is run."""

    page: Path
    line: int
    language: str
    text: str
    mark: str | None


class Command(NamedTuple):
    """variables: set for it alone. words: the program and its arguments. run: not only parsed. whole: as it is typed,
    not what a sentence says of it."""

    where: str
    page: Path
    variables: dict[str, str]
    words: list[str]
    run: bool
    whole: bool = True


def blocks(page: Path) -> list[Block]:
    text = page.read_text()
    return [
        Block(page, text[: m.start()].count("\n") + 1, m["language"], m["text"], m["mark"])
        for m in BLOCK.finditer(text)
    ]


def _split(line: str):
    """Words of the commands of a line, which && joins; comments are left out."""
    command = []
    for word in [*shlex.split(line, comments=True), "&&"]:
        if word != "&&":
            command.append(word)
        elif command:
            yield command
            command = []


def _command(where: str, page: Path, words: list[str], run: bool) -> Command:
    assigned = [w for w in words if re.match(r"[A-Z_]+=", w)]
    variables = dict(w.split("=", 1) for w in words[: len(assigned)])
    return Command(where, page, variables, words[len(variables) :], run)


def commands() -> list[Command]:
    """Of all pages: of their blocks of shell, and of their sentences (parsed only)."""
    found = []
    for page in PAGES:
        for block in blocks(page):
            if block.language == "sh":
                for line in block.text.replace("\\\n", " ").splitlines():
                    where = f"{page.name}:{block.line}"
                    found += [_command(where, page, words, block.mark is None) for words in _split(line)]
        for text in INLINE.findall(BLOCK.sub("", page.read_text())):
            if not re.search(r"\.\.\.|SRC|DST|\|", text):  # a form, not a command
                parts = _split(re.sub(r"=N\b", "=1", " ".join(text.split())))
                found += [_command(page.name, page, words, False)._replace(whole=False) for words in parts]
    return found
