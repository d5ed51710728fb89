"""What is said of the package in several places is said once, or alike; `.ci/package` builds and uses it."""

import ast
import configparser
import importlib
import re
from pathlib import Path

import pytest

import ddo_jax

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def setup():
    parsed = configparser.ConfigParser()
    parsed.read(ROOT / "setup.cfg")
    return parsed


def lines(text):
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def test_oldest_are_the_lower_bounds(setup):
    """Breaks if a bound moves and the matrix goes on testing the old one."""
    required = lines(setup["options"]["install_requires"])
    bounds = {m[1]: m[2] for r in required if (m := re.match(r"([\w-]+).*>=([\d.]+)", r))}
    oldest = dict(line.split("==") for line in lines((ROOT / "tests/oldest.txt").read_text()))
    assert oldest.pop("jaxlib") == oldest["jax"]
    assert oldest.items() <= bounds.items() and {"jax", "flax", "optax", "orbax-checkpoint"} <= oldest.keys()


def test_the_matrix_has_every_python(setup):
    """Breaks if a Python that is promised is not tried."""
    matrix = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text())["jobs"]["fast"]["strategy"]["matrix"]
    classifiers = re.findall(r"Python :: (3\.\d+)", setup["metadata"]["classifiers"])
    assert matrix["python"] == classifiers
    low, high = re.fullmatch(r">=(3\.\d+),<3\.(\d+)", setup["options"]["python_requires"]).groups()
    assert (low, f"3.{int(high) - 1}") == (classifiers[0], classifiers[-1])


def test_console_scripts(setup):
    """Breaks if a command is installed that does nothing, or one of ours is not installed."""
    scripts = dict(re.findall(r"([\w-]+) = ([\w.:]+)", setup["options.entry_points"]["console_scripts"]))
    for target in scripts.values():
        module, name = target.split(":")
        assert callable(getattr(importlib.import_module(module), name))
    commands = {p.parent.name for p in (ROOT / "ddo_jax").glob("*/__main__.py")}
    commands |= {p.stem for p in (ROOT / "ddo_jax").glob("*.py") if 'if __name__ == "__main__"' in p.read_text()}
    assert {f"ddo-jax-{c}" if c != "main" else "ddo-jax" for c in commands} == scripts.keys()


def test_packages_are_listed(setup):
    """Breaks if a folder of modules, or a file that they read, is left out of the wheel."""
    found = {".".join(p.parent.relative_to(ROOT).parts) for p in (ROOT / "ddo_jax").rglob("__init__.py")}
    assert found | {"ddo_jax.configs"} == set(lines(setup["options"]["packages"]))
    data = {p.suffix for p in (ROOT / "configs").iterdir() if p.is_file()} - {".py", ".pyc"}
    assert data == {".safetensors"}


def test_citation():
    """Breaks if the file cannot be read by those who cite, or the version is written down a second time."""
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors", "license"} <= cited.keys() and "version" not in cited
    assert "2503.01103" in cited["preferred-citation"]["url"]
    tracked = [ROOT / "setup.cfg", ROOT / "pyproject.toml", ROOT / "docs/conf.py"]
    assert not any(ddo_jax.__version__ in re.findall(r"\d+\.\d+\.\d+\b", path.read_text()) for path in tracked)
    version = [n for n in ast.parse((ROOT / "ddo_jax/__init__.py").read_text()).body if isinstance(n, ast.Assign)][0]
    assert version.targets[0].id == "__version__"
