"""What a run leaves for others: the card, the page, and their way to a hub."""

import html.parser
import os
import re
import subprocess
import sys

import pytest

from ddo_jax import convert, files
from ddo_jax.convert.read import same_bytes
from ddo_jax.errors import UserError
from ddo_jax.push import collect, push_to_hub
from ddo_jax.report import card
from ddo_jax.run import main_job
from ddo_jax.store import origin
from tests import browser, hub
from tests.harness import micro_config

pytest.importorskip("huggingface_hub")


@pytest.fixture(scope="module")
def runs(tmp_path_factory, fitted):
    """Workdirs of a run from scratch, and of one that began with its result."""
    first, second = (tmp_path_factory.mktemp(name) for name in ("first", "second"))
    for workdir in (first, second):
        (workdir / "features-digits.npz").write_bytes(fitted[1].read_bytes())
    config = micro_config()
    main_job.run(config, first)
    config.init, config.control.enabled, config.ddo.beta = str(first), False, (0.1,)
    main_job.run(config, second)
    return first, second


def test_the_card(runs):
    """Breaks if a reader of the weights alone cannot tell what they are, from what, and how their numbers came."""
    from huggingface_hub import ModelCard

    first, second = runs
    text = (first / "best/README.md").read_text()
    data = ModelCard(text).data
    assert (data.library_name, data.license, "ddo" in data.tags) == ("ddo_jax", "unknown", True)
    ddo = [e for e in files.read_jsonl(first / "evals.jsonl") if e["phase"] == "ddo"]
    assert re.search(r"after DDO \| [\d.]+ ± ", text) and all(e["protocol"]["weights"] in text for e in ddo)
    assert "trained from scratch on `digits:train`" in text and "10 classes" in text and "No licence is known" in text
    for file in re.findall(r"\]\(([^)]*)\)", text):
        assert (first / "best" / file).exists()
    assert f"from `{first}`, on `digits:train`" in (second / "best/README.md").read_text()


def test_weights_say_where_they_come_from(runs, tmp_path, monkeypatch):
    """Breaks if a licence is lost on the way: through runs, and through exported files that were taken elsewhere."""
    first, second = runs
    assert origin.of_init("scratch") == ((), "unknown")
    assert origin.of_init("edm2-img64-s-ddo") == (("edm2-img64-s-ddo",), card.NON_COMMERCIAL)
    assert origin.of_init(str(second)) == ((str(second), str(first)), "unknown")
    exported = second / "best/params.safetensors"
    assert origin.of_init(str(exported)) == ((str(exported), str(first)), "unknown")
    released = convert.read(exported)
    told = origin.Origin(("edm-cifar10-cond-vp",), card.NON_COMMERCIAL).metadata()
    monkeypatch.setitem(released.extras, "metadata", told)
    monkeypatch.setattr(origin, "find", lambda what: released)
    assert origin.of_init("elsewhere.safetensors").licence == card.NON_COMMERCIAL
    monkeypatch.setitem(released.extras, "metadata", {origin.KEY: "[1"})
    assert origin.of_init("elsewhere.safetensors").licence == "unknown"
    assert "no commercial use" in card.licence_line(card.NON_COMMERCIAL) and "`mit`" in card.licence_line("mit")


class Page(html.parser.HTMLParser):
    """What a page asks for, and which elements it has."""

    def __init__(self, text):
        super().__init__()
        self.asked, self.tags = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.asked += [value for name, value in attributes if name in ("src", "href", "srcset", "data")]


def test_the_page_needs_nothing_else(runs):
    """Breaks if report.html asks for a file or an address, or lacks something of report.md."""
    folder = runs[0] / "report"
    text = (folder / "report.html").read_text()
    page = Page(text)
    assert page.asked and all(source.startswith("data:image/png;base64,") for source in page.asked)
    assert not re.search(r"""(?:url|import|fetch)\(['"]?(?:https?:)?//""", text)
    markdown = (folder / "report.md").read_text()
    titles = re.findall(r"^## (.*)$", markdown, re.MULTILINE)
    assert titles == re.findall(r"<(?:h2|summary)>(.*?)</", text) and titles[-1] == "Protocol"
    assert page.tags.count("details") == 1 and page.tags.count("table") == markdown.count("\n| --- |")


def environment(address, tmp_path):
    return {"HF_ENDPOINT": address, "HF_TOKEN": hub.TOKEN, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1"}


def test_to_the_hub_and_back(runs, tmp_path):
    """Breaks if the hub's client and ours disagree, if a file is missing there, or if the way back is another one."""
    first = runs[0]
    with hub.running() as there:
        # A process of its own: the client reads its environment when it is imported.
        env = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"} | environment(there.url, tmp_path)

        def command(module, *arguments):
            argv = [sys.executable, "-m", f"ddo_jax.{module}", *map(str, arguments)]
            return subprocess.run(argv, env=env, capture_output=True, text=True, timeout=300)

        pushed = command("push", first, "me/digits", "--private", "--licence=cc-by-4.0")
        assert pushed.returncode == 0, pushed.stderr
        assert f"{there.url}/me/digits/commit/" in pushed.stdout and there.private == {"me/digits"}
        repo = there.repos["me/digits"]
        names = {"params.safetensors", "config.json", "README.md", "samples.png", "classes.json", "report.html"}
        assert repo.keys() == names
        assert repo["params.safetensors"] == (first / "best/params.safetensors").read_bytes()
        assert b"license: cc-by-4.0\n" in repo["README.md"]
        assert command("push", first, "me/digits").returncode == 0 and len(there.commits) == 2  # again: a new commit
        back = command("convert", "hf://me/digits/params.safetensors", tmp_path / "back.safetensors")
        assert back.returncode == 0, back.stderr
        env["HF_TOKEN"] = "hf_of_nobody"
        refused = command("push", first, "me/digits")
        assert refused.returncode == 2 and refused.stderr.count("\n") == 1 and "the hub refused" in refused.stderr
    assert same_bytes(
        convert.read(tmp_path / "back.safetensors").state_dict,
        convert.read(first / "best/params.safetensors").state_dict,
    )


def test_what_is_not_pushed(runs, tmp_path, monkeypatch):
    """Breaks if a name that is none, an unfinished or damaged run, or another licence than its start's goes out."""
    first = runs[0]
    for repo in ("digits", "me/you/digits", "me/di gits", "/x", "me/"):
        with pytest.raises(UserError, match="written owner/name"):
            push_to_hub(first, repo)
    with pytest.raises(UserError, match="no finished run with a card"):
        push_to_hub(tmp_path, "me/digits")
    best = tmp_path / "best"
    best.mkdir()
    for path in (first / "best").iterdir():
        if path.is_file():
            (best / path.name).write_bytes(path.read_bytes())
    assert collect(tmp_path, "mit")["README.md"].count(b"license: mit") == 1
    (best / "params.safetensors").write_bytes(b"torn")
    with pytest.raises(UserError, match="not as it was written"):
        push_to_hub(tmp_path, "me/digits")
    files.write_sealed(best / "result.json", {"files": {}})
    (best / "README.md").write_text("---\nlicense: cc-by-nc-sa-4.0\n---\n")
    with pytest.raises(UserError, match="licence of the weights that these were made from"):
        push_to_hub(tmp_path, "me/digits", licence="mit")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'ddo_jax\[hub\]'"):
        push_to_hub(first, "me/digits")


@pytest.mark.slow
def test_the_page_in_a_browser(runs):
    """Breaks if the slider, the choice of pictures, the hover values or the folded protocol do not work from disk."""
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import Select

    with browser.opened() as driver:
        driver.get((runs[0] / "report/report.html").as_uri())
        assert not browser.broken_images(driver)

        def one(selector):
            return driver.find_element(By.CSS_SELECTOR, selector)

        left, right = driver.find_elements(By.CSS_SELECTOR, ".stage img")
        assert left.size == right.size and left.size["width"] > 300
        assert "50%" in right.value_of_css_property("clip-path")
        one(".compare input").send_keys(Keys.END)
        assert (
            "100%" in right.value_of_css_property("clip-path") and one(".line").get_attribute("style") == "left: 100%;"
        )
        before = right.get_attribute("src")
        Select(driver.find_elements(By.CSS_SELECTOR, ".compare select")[1]).select_by_visible_text(
            "control (continued MLE)"
        )
        assert right.get_attribute("src") not in (before, left.get_attribute("src"))
        assert right.get_attribute("alt") == "control (continued MLE)"

        values = [cell.text for cell in driver.find_elements(By.CSS_SELECTOR, ".u-legend .u-value")]
        assert len(values) == 4 and set(values) == {"–"}  # images, two candidates, the control
        driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", one(".u-over"))
        ActionChains(driver).move_to_element(one(".u-over")).perform()
        values = [float(cell.text) for cell in driver.find_elements(By.CSS_SELECTOR, ".u-legend .u-value")]
        assert len(values) == 4 and min(values[1:]) > 1

        table = one("details table")
        assert not table.is_displayed()
        one("summary").click()
        assert table.is_displayed() and not browser.complaints(driver)
