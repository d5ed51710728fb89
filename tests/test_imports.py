"""Imports point downwards: main > run > {families, data, evaluate, convert} > models > core; core is pure.

Imports inside functions count too; the one exception is `ddo_jax.load`, which exists to import late.
"""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "ddo_jax"
PURE = {
    *("jax", "numpy", "jaxtyping", "ddo_jax"),
    *("typing", "math", "functools", "dataclasses", "collections"),
}
RANK = {"core": 0, "models": 1, "families": 2, "data": 2, "evaluate": 2, "convert": 2, "run": 3}
COMMANDS = {"main", "sample", "posthoc"}  # and every __main__.py: they may import anything
SHARED_RANK, COMMAND_RANK = 0, 4  # shared: the other modules beside __init__.py; all use them
FORBIDDEN = ("flax", "torch", "tensorflow", "orbax", "matplotlib", "sklearn", "scipy.stats", "optax")


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(source, name, is_package=False):
    """Every module that the source of module `name` imports; of `from a import b` both a and a.b."""
    package = name.split(".") if is_package else name.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*base, *([node.module] if node.module else [])])
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return found


def rank(name):
    """Height of a module of ours; None if it is none (a function, or somebody else's package)."""
    parts = name.split(".")
    if parts[0] != "ddo_jax" or len(parts) == 1:
        return None if parts[0] != "ddo_jax" else 0  # the package itself re-exports core
    if parts[-1] == "__main__" or (len(parts) == 2 and parts[1] in COMMANDS):
        return COMMAND_RANK
    if parts[1] in RANK:
        return RANK[parts[1]]
    if (PACKAGE / parts[1]).is_dir():
        raise AssertionError(f"ddo_jax/{parts[1]} has no layer: give it one in {Path(__file__).name}")
    return SHARED_RANK if (PACKAGE / f"{parts[1]}.py").exists() else None


def upward(source, name, is_package=False):
    """The imports of module `name` that point upwards; from core also those of shared modules."""
    own = rank(name)
    in_core = name.startswith("ddo_jax.core")
    bad = set()
    for target in imported(source, name, is_package):
        height = rank(target)
        if height is None:
            continue
        out_of_core = in_core and target != "ddo_jax" and not f"{target}.".startswith("ddo_jax.core.")
        if height > own or out_of_core:
            bad.add(target)
    return bad


def without_load(source):
    """The source of ddo_jax/__init__.py with the body of `load` taken out."""
    tree = ast.parse(source)
    tree.body = [node for node in tree.body if not (isinstance(node, ast.FunctionDef) and node.name == "load")]
    return ast.unparse(tree)


MODULES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_imports_point_downwards(path):
    source = path.read_text()
    if path == PACKAGE / "__init__.py":
        source = without_load(source)
    assert not upward(source, module_name(path), path.name == "__init__.py")


@pytest.mark.parametrize("path", sorted((PACKAGE / "core").glob("*.py")), ids=module_name)
def test_core_is_pure(path):
    names = {name.split(".")[0] for name in imported(path.read_text(), module_name(path))}
    assert names <= PURE


@pytest.mark.parametrize(
    "name, source, bad",
    [
        ("ddo_jax.core.ddo", "import ddo_jax.models.mlp", {"ddo_jax.models.mlp"}),
        ("ddo_jax.core.ddo", "import ddo_jax.errors", {"ddo_jax.errors"}),
        ("ddo_jax.core.ddo", "from . import edm\nfrom .edm import x\nfrom ddo_jax.core import ar", set()),
        ("ddo_jax.models.mlp", "from ..families import edm", {"ddo_jax.families", "ddo_jax.families.edm"}),
        ("ddo_jax.models.mlp", "from ddo_jax import run", {"ddo_jax.run"}),
        ("ddo_jax.families.edm", "def f():\n  import ddo_jax.run.loop as x", {"ddo_jax.run.loop"}),
        ("ddo_jax.families.edm", "from ddo_jax.data import pool\nfrom ddo_jax.models import edm", set()),
        ("ddo_jax.run.loop", "import ddo_jax.main\nimport ddo_jax.data.x", {"ddo_jax.main"}),
        ("ddo_jax.evaluate.__main__", "import ddo_jax.run.loop", set()),
        ("ddo_jax.sample", "import ddo_jax.run.loop, flax", set()),
        ("ddo_jax", "from ddo_jax.core import ddo\nfrom ddo_jax import models", {"ddo_jax.models"}),
    ],
)
def test_the_check_itself(name, source, bad):
    assert upward(source, name, is_package=name == "ddo_jax") == bad


def test_importing_the_package_is_light():
    """In a fresh process, so that this one's modules do not count."""
    code = f"import sys, ddo_jax; print(*[m for m in {FORBIDDEN!r} if m in sys.modules])"
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert run.stdout.split() == []
