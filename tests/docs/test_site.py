"""The site is built without a warning and read in a browser, from disk, without a network."""

import re
import subprocess
import sys

import pytest

from tests import browser
from tests.docs.snippets import ROOT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    argv = [
        sys.executable,
        "-m",
        "sphinx",
        "-q",
        "-W",
        "--keep-going",
        "-d",
        f"{folder}/doctrees",
        "docs",
        f"{folder}/html",
    ]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder / "html"


def pages(site):
    return sorted(p for p in site.rglob("*.html") if p.name not in ("genindex.html", "search.html", "py-modindex.html"))


def test_pages_need_no_network(site):
    """Breaks if a page loads a script, a style, a font or a picture from elsewhere."""
    assert len(pages(site)) >= 25
    for page in pages(site):
        loaded = re.findall(
            r"<(?:script|img|iframe)\b[^>]*\bsrc=\"([^\"]*)\"|<link\b[^>]*\bhref=\"([^\"]*)\"", page.read_text()
        )
        assert not [a or b for a, b in loaded if re.match(r"(https?:)?//", a or b)], page
    for style in site.rglob("*.css"):
        assert not re.search(r"url\(\s*['\"]?(?:https?:)?//", style.read_text()), style


def test_pages_in_a_browser(site):
    """Breaks if a page complains, is broader than its window, lacks a picture, or shows its formulas as text."""
    with browser.opened(width=1250) as driver:
        for page in pages(site):
            driver.get(page.as_uri())
            assert not browser.complaints(driver), page
            assert not browser.broken_images(driver), page
            assert driver.execute_script("return document.documentElement.scrollWidth <= innerWidth"), page
        driver.get((site / "ddo.html").as_uri())
        heights = driver.execute_script(
            "return [...document.querySelectorAll('math')].map(m => m.getBoundingClientRect().height)"
        )
        assert len(heights) > 20 and min(heights) > 5


def test_search_finds(site):
    """Breaks if the search of the site finds nothing, as when one of our pages takes the name of its own."""
    from selenium.webdriver.support.ui import WebDriverWait

    with browser.opened() as driver:
        driver.get((site / "search.html").as_uri() + "?q=ridge")
        results = "return [...document.querySelectorAll('ul.search li a')].map(a => a.textContent)"
        WebDriverWait(driver, 20).until(lambda d: "α and β" in d.execute_script(results))
