"""Every "specs/NAME.md section N" in docstrings and comments is there, in docs/specs; a bare "section N" is of the page
that its module's docstring names."""

import ast
import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SPECS = ROOT / "docs" / "specs"
FOLDERS = ("ddo_jax", "configs", "benchmarks", "examples", "tests", "launch")
FILES = {
    folder: [p for p in (ROOT / folder).rglob("*") if p.suffix in (".py", ".sh", ".yaml") and p != Path(__file__)]
    for folder in FOLDERS
}

NUMBERS = r"(?:[Ss]ections?|[Rr]ule) ((?:\d+[a-z]?(?:\.\d+)*)(?:(?:, (?:and )?| and | to |-|–)\d+[a-z]?(?:\.\d+)*)*)"
NAMED = re.compile(rf"\bspecs/(\w+)\.md(?:,)?(?: {NUMBERS})?")
BARE = re.compile(NUMBERS)
ELSEWHERE = re.compile(r"(?:arXiv [\d., /]*|README(?:\.md)?|DESIGN|appendix \w+ and |DDO paper \(|paper, )\W*$")


@functools.cache
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


def wrong_citations(path):
    """In words, those that lead nowhere."""
    for line, page, section in citations(path):
        at = f"{path.relative_to(ROOT)}:{line}"
        if page is None or not (SPECS / f"{page}.md").exists():
            yield f"{at}: section {section} of page {page}"
        elif section is not None and section not in headings(page):
            yield f"{at}: specs/{page}.md has no section {section}"


@pytest.mark.parametrize("folder", FOLDERS)
def test_citations_resolve(folder):
    """Breaks if a docstring sends its reader to a page or section that is not in the repository."""
    wrong = [text for path in FILES[folder] for text in wrong_citations(path)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("folder", FOLDERS)
def test_nothing_outside_is_cited(folder):
    """Breaks if a docstring cites a document or an issue that a clone does not have."""
    words = re.compile(r"PLATFORM (?:notes|\.md)|shared/specs|issue \"|STYLE\.md|DESIGN\.md")
    assert not [path for path in FILES[folder] if words.search(path.read_text())]
