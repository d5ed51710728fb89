"""The names promised to users and how they are called, against what was promised.

A change that is meant: `python tests/test_public_api.py > tests/goldens/public_api.txt`; a name that goes, or an
argument, warns for one release first (`ddo_jax.errors.deprecated`).
"""

import ast
import importlib
import inspect
from pathlib import Path

import pytest

import ddo_jax
from ddo_jax import config as configs
from ddo_jax import errors

PROMISED = Path(__file__).parent / "goldens" / "public_api.txt"


def line(name: str) -> str:
    """A name and its parameters: kinds and defaults count, annotations do not."""
    value = getattr(ddo_jax, name)
    given = inspect.signature(value).parameters.values()
    bare = inspect.Signature([p.replace(annotation=inspect.Parameter.empty) for p in given])
    return f"{name}{bare}"


def public_api() -> str:
    return "".join(f"{line(name)}\n" for name in sorted(ddo_jax.__all__))


def test_what_is_promised_is_there():
    """Breaks if a promised name is gone, or is called in another way."""
    assert public_api() == PROMISED.read_text()


def deprecations():
    """(where, arguments) of every call of `deprecated` in the package."""
    for path in sorted(Path(ddo_jax.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            name = getattr(node, "func", None)
            if isinstance(node, ast.Call) and "deprecated" in (getattr(name, "id", ""), getattr(name, "attr", "")):
                named = {k.arg: ast.literal_eval(k.value) for k in node.keywords}
                yield f"{path.name}:{node.lineno}", [ast.literal_eval(a) for a in node.args], named


def numbers(version):
    return tuple(map(int, version.split(".")))


def test_every_deprecation_ends():
    """Breaks in the release that was named as the one without the old name: it is time to delete it."""
    found = list(deprecations())
    assert len(found) == 2
    for where, names, named in found:
        assert len(names) == 2 and names[0] != names[1], where
        assert numbers(ddo_jax.__version__) < numbers(named["gone"]), where


def test_old_names_warn_and_work():
    """Breaks if an old name is silently accepted, or not at all, or the caller's line is not named."""
    with pytest.warns(FutureWarning, match="ddo_jax.run.config is ddo_jax.config today; ddo_jax 0.2 will not know"):
        old = importlib.import_module("ddo_jax.run.config")
    assert old.base is configs.base

    def caller():
        errors.deprecated("old", "new", gone="9.0")

    with pytest.warns(FutureWarning, match="old is new today; ddo_jax 9.0 will not know old") as told:
        caller()
    assert Path(told[0].filename) == Path(__file__)
    config = configs.base()
    with config.unlocked():
        config.objective = "mle"
    with pytest.warns(FutureWarning, match="config.objective is config.method today"), pytest.raises(errors.UserError):
        configs.validate(config, 1)  # of what it lacks otherwise


if __name__ == "__main__":
    print(public_api(), end="")
