"""Imports point downwards, from the commands to the mathematics; core is pure. No module is exempt.

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
    *("jax", "numpy", "jaxtyping", "chex", "ddo_jax"),
    *("typing", "math", "functools", "dataclasses", "collections"),
}
# From the bottom up. A module may import its own room and those before it; two rooms never import each other.
ROOMS = ["errors", "core", "stores", "files", "npz", "hosts", "preemption", "sharding", "limits", "compilation", "cli"]
ROOMS += ["models", "convert", "families"]
ROOMS += [
    "data",
    "config",
    "store",
    "generate",
    "evaluate",
    "report",
    "run",
    "plan",
    "posthoc",
    "push",
    "sample",
    "main",
]
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
        return None if parts[0] != "ddo_jax" else ROOMS.index("core")  # the package itself re-exports core
    if parts[1] in ROOMS:
        return ROOMS.index(parts[1])
    if (PACKAGE / parts[1]).is_dir() or (PACKAGE / f"{parts[1]}.py").exists():
        raise AssertionError(f"ddo_jax/{parts[1]} has no place: give it one in {Path(__file__).name}")
    return None


def upward(source, name, is_package=False):
    """The imports of module `name` that point upwards; from core also those of shared modules."""
    own = rank(name)
    in_core = f"{name}.".startswith("ddo_jax.core.")
    bad = set()
    for target in imported(source, name, is_package):
        height = rank(target)
        if height is None:
            continue
        out_of_core = in_core and target != "ddo_jax" and not f"{target}.".startswith("ddo_jax.core.")
        stats = "ddo_jax.core.stats"  # beside DDO: what DDO is made of does not need it
        upstairs = in_core and not name.startswith(stats) and target.startswith(stats)
        if height > own or out_of_core or upstairs:
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


@pytest.mark.parametrize("path", sorted((PACKAGE / "core").rglob("*.py")), ids=module_name)
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
        ("ddo_jax.families.edm", "from ddo_jax.convert import edm\nfrom ddo_jax.models import edm", set()),
        ("ddo_jax.run.loop", "import ddo_jax.main\nimport ddo_jax.data.x", {"ddo_jax.main"}),
        ("ddo_jax.evaluate.__main__", "import ddo_jax.run.loop", {"ddo_jax.run.loop"}),
        ("ddo_jax.evaluate.__main__", "from ddo_jax.generate import request", set()),
        ("ddo_jax.core.stats.frechet", "from ddo_jax.core import ddo", set()),
        ("ddo_jax.core.ddo", "import ddo_jax.core.stats.frechet", {"ddo_jax.core.stats.frechet"}),
        ("ddo_jax.data.pool", "import ddo_jax.families.base", set()),
        ("ddo_jax.families.base", "import ddo_jax.data.pool", {"ddo_jax.data.pool"}),
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
