"""Every "specs/NAME.md section N" in docstrings and comments is there, in docs/specs; a bare "section N" is of the page
that its module's docstring names."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SPECS = ROOT / "docs" / "specs"
FOLDERS = ("ddo_jax", "configs", "benchmarks", "examples", "tests", "launch")
FILES = [p for folder in FOLDERS for p in sorted((ROOT / folder).rglob("*")) if p.suffix in (".py", ".sh", ".yaml")]

NUMBERS = r"(?:[Ss]ections?|[Rr]ule) ((?:\d+[a-z]?(?:\.\d+)*)(?:(?:, (?:and )?| and | to |-|–)\d+[a-z]?(?:\.\d+)*)*)"
NAMED = re.compile(rf"\bspecs/(\w+)\.md(?:,)?(?: {NUMBERS})?")
BARE = re.compile(NUMBERS)
ELSEWHERE = re.compile(r"(?:arXiv [\d., /]*|README(?:\.md)?|DESIGN|appendix \w+ and |DDO paper \(|paper, )\W*$")


def headings(name):
    """Numbers of a page's sections."""
    text = (SPECS / f"{name}.md").read_text()
    return {m[1] for m in re.finditer(r"^#+ (\d+[a-z]?(?:\.\d+)*)\.? ", text, re.M)}


def sections(text):
    """
    >>> sections("3-5"), sections("2.1, 4 and 6")
    (['3', '5'], ['2.1', '4', '6'])
    """
    return re.findall(r"\d+[a-z]?(?:\.\d+)*", text)


def citations(path):
    """(line, page or None if the module names none, section or None) of all that a file cites."""
    text = path.read_text()
    page = None
    if path.suffix == ".py":
        first = NAMED.search(ast.get_docstring(ast.parse(text)) or "")
        page = first[1] if first else None
    for number, line in enumerate(text.splitlines(), 1):
        taken = []
        for m in NAMED.finditer(line):
            taken.append(m.span())
            yield from ((number, m[1], section) for section in sections(m[2] or "") or [None])
        for m in BARE.finditer(line):
            own = any(a <= m.start() < b for a, b in taken)
            if not own and not ELSEWHERE.search(line[: m.start()]):
                yield from ((number, page, section) for section in sections(m[1]))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_citations_resolve(path):
    """Breaks if a docstring sends its reader to a page or section that is not in the repository."""
    if path == Path(__file__):
        return
    wrong = []
    for line, page, section in citations(path):
        if page is None or not (SPECS / f"{page}.md").exists():
            wrong.append(f"line {line}: section {section} of page {page}")
        elif section is not None and section not in headings(page):
            wrong.append(f"line {line}: specs/{page}.md has no section {section}")
    assert not wrong, wrong


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_outside_is_cited(path):
    """Breaks if a docstring cites a document or an issue that a clone does not have."""
    words = re.compile(r"PLATFORM (?:notes|\.md)|shared/specs|issue \"|STYLE\.md|DESIGN\.md")
    assert path == Path(__file__) or not words.search(path.read_text())
