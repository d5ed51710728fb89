"""What a run leaves for others: the card, the page, and their way to a hub."""

import html.parser
import os
import re
import subprocess
import sys

import pytest

from ddo_jax import convert, files
from ddo_jax.convert import __main__ as convert_command
from ddo_jax.convert import origin
from ddo_jax.convert.read import same_bytes
from ddo_jax.errors import UserError
from ddo_jax.evaluate.records import Round
from ddo_jax.evaluate.records import read as read_evaluation
from ddo_jax.push import collect, push_to_hub
from ddo_jax.report import card, page, report
from ddo_jax.run import main_job
from ddo_jax.store.origin import of_init
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
    assert f"from `{first.name}`, on `digits:train`" in (second / "best/README.md").read_text()


def test_weights_say_where_they_come_from(runs, tmp_path, monkeypatch):
    """Breaks if a licence is lost on the way, through runs and through files that were taken elsewhere, or if a run
    fails at its end because what it came from is gone."""
    first, second = runs
    assert of_init("scratch") == ((), "unknown")
    assert of_init("edm2-img64-s-ddo") == (("edm2-img64-s-ddo",), card.NON_COMMERCIAL)
    assert of_init(str(second)) == ((second.name, first.name), "unknown")
    exported = second / "best/params.safetensors"
    assert of_init(str(exported)) == (("params.safetensors", first.name), "unknown")
    assert of_init(str(first / "rounds" / "001")) == (("001",), "unknown")
    assert of_init(str(tmp_path / "gone")) == (("gone",), "unknown") and of_init("hf://a/b/c.pkl").licence == "unknown"
    # NVIDIA's, converted by us under another name: the licence goes along.
    monkeypatch.chdir(tmp_path)
    os.link(exported, "edm-cifar10-32x32-cond-vp.safetensors")
    convert_command.main(["edm-cifar10-32x32-cond-vp.safetensors", "mine.safetensors"])
    assert of_init("mine.safetensors").licence == card.NON_COMMERCIAL
    assert of_init("mine.safetensors").starts[:2] == ("mine.safetensors", "edm-cifar10-32x32-cond-vp.safetensors")
    for content in (b"", b"\xff" * 20, b"\x02\0\0\0\0\0\0\0[]"):
        (tmp_path / "torn.safetensors").write_bytes(content)
        assert of_init("torn.safetensors") == (("torn.safetensors",), "unknown")
    assert "no commercial use" in card.licence_line(card.NON_COMMERCIAL) and "`mit`" in card.licence_line("mit")


def test_a_card_can_be_edited_and_is_made_where_it_lacks(runs):
    """Breaks if an edit is overwritten by the next start, or a run that ended without a card never gets one."""
    config, path = micro_config(), runs[0] / "best/README.md"
    text = path.read_text()
    path.write_text(text + "mine")
    main_job.run(config, runs[0])
    assert path.read_text() == text + "mine"
    path.unlink()
    main_job.run(config, runs[0])
    assert path.read_text() == text


def test_cards_of_other_runs(runs):
    """Breaks if a card says of a run what did not happen."""
    first = runs[0]
    config = micro_config()
    evals = [read_evaluation(e) for e in files.read_jsonl(first / "evals.jsonl") if e["phase"] == "start"]
    scores = {"start": report.Scores(evals)}
    model = card.Model("edm", 2, (8, 8, 1), 10, "d", ("a_b", "![x](http://evil)"))
    text = card.card(config, scores, [], (), model, origin.Origin(("edm2-img64-s",), card.NON_COMMERCIAL), False)
    assert "rounds of" not in text and "## Rounds" not in text and "samples.png" not in text
    assert r"(a\_b, \!\[x\](http://evil))" in text and "holds these weights" in text and "CC BY-NC-SA" in text
    config.method = "neon"
    rounds = [Round(n, False, 1.0, "a4_b1", evals[0]) for n in (1, 2)]
    text = card.card(config, scores, rounds, ("A note.",), model._replace(family="mine"), origin.SCRATCH, False)
    assert "2 rounds of Neon (Neon, arXiv 2510.03597)" in text and "A note." in text
    assert "no: it was kept" in text and card._tried(Round(2, True, None, "a", evals[0]))[-1] == "not scored"
    assert 'ddo_jax.load(".")' in text and "module of the family" in text


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
    found = Page(text)
    assert found.asked and all(source.startswith("data:image/png;base64,") for source in found.asked)
    assert not re.search(r"""(?:url|import|fetch)\(['"]?(?:https?:)?//""", text)
    markdown = (folder / "report.md").read_text()
    titles = re.findall(r"^## (.*)$", markdown, re.MULTILINE)
    assert titles == re.findall(r"<(?:h2|summary)>(.*?)</", text) and titles[-1] == "Protocol"
    assert found.tags.count("details") == 1 and found.tags.count("table") == markdown.count("\n| --- |")


def test_a_name_is_no_markup():
    """Breaks if a class or a data set can make the page load something, or say something of its own."""
    hostile = "![x](http://evil/x.png) <img src=http://evil> [y](javascript:alert(1)) <http://evil>"
    shown = page.Shown({}, {}, 256, [], "fd")
    text = page.page(hostile, hostile, [report.Section(hostile, hostile)], shown)
    assert not Page(text).asked


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
        assert b"license: cc-by-4.0\n" in repo["README.md"] and b"No licence is known" not in repo["README.md"]
        assert command("push", first, "me/digits").returncode == 0 and len(there.commits) == 2  # again: a new commit
        back = command("convert", "hf://me/digits/params.safetensors", tmp_path / "back.safetensors")
        assert back.returncode == 0, back.stderr
        used = command("sample", "--checkpoint=hf://me/digits/params.safetensors", f"--out={tmp_path}/s", "--seeds=0-1")
        assert used.returncode == 0 and (tmp_path / "s" / "000000.png").exists(), used.stderr
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
    with pytest.raises(UserError, match="no SPDX identifier"):
        push_to_hub(first, "me/digits", licence="mit\nfoo: bar")
    (best / "result.json").rename(best / "gone.json")
    with pytest.raises(UserError, match="no best/result.json"):
        push_to_hub(tmp_path, "me/digits")
    (best / "gone.json").rename(best / "result.json")
    (best / "params.safetensors").write_bytes(b"torn")
    with pytest.raises(UserError, match="not as it was written"):
        push_to_hub(tmp_path, "me/digits")
    files.write_sealed(best / "result.json", {"files": {}})
    (best / "README.md").write_text("---\nlicense: cc-by-nc-sa-4.0\n---\nlicense: unknown\n")
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
        values = [cell.text for cell in driver.find_elements(By.CSS_SELECTOR, ".u-legend .u-value")]
        numbers = [float(v) for v in values if v != "–"]  # a curve that ended before has none there
        assert len(values) == 4 and len(numbers) >= 2 and min(numbers[1:]) > 1

        table = one("details table")
        assert not table.is_displayed()
        one("summary").click()
        assert table.is_displayed() and not browser.complaints(driver)
