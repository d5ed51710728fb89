"""Config files of the command line: found by path or by name, what they import, and keys that flags unset.

A path is a file of the user's or of ours; a name without .py, `digits` or `edm2_in64:search`, is one of ours, from
anywhere. A config file may import the files beside it; if its folder is called configs, `configs` is that folder. What
else is called configs in the current directory or on PYTHONPATH has no say then.
"""

import contextlib
import importlib.machinery
import importlib.util
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict

from ddo_jax.errors import UserError, one_line

PACKAGE = Path(__file__).parent.parent


def ours() -> Path:
    """The folder of our experiments: inside the package where it was installed from a wheel, else beside it."""
    inside = PACKAGE / "configs"
    return inside if inside.is_dir() else PACKAGE.parent / "configs"


def names() -> list[str]:
    """Of our experiments.

    >>> "digits" in names()
    True
    """
    return sorted(p.stem for p in ours().glob("*.py") if not p.name.startswith("_"))


def split(text: str) -> tuple[Path, str | None]:
    """(path, variant or None); `~` is expanded, which shells do not after `=`.

    >>> split("configs/digits.py:unet"), split("a:b/my.py")
    ((PosixPath('configs/digits.py'), 'unet'), (PosixPath('a:b/my.py'), None))
    """
    if text.endswith(".py"):
        path, variant = text, None
    elif ".py:" in text:
        path, _, variant = text.partition(".py:")
        path += ".py"
    else:
        path, found, rest = text.partition(":")
        variant = rest if found else None
    return Path(os.path.expanduser(path)), variant


class Parser(flags.ArgumentParser):
    """Of --config; the flag's parser in ml_collections leaves imports to chance and cuts paths at their first colon."""

    def parse(self, argument: str):
        path, variant = split(argument)
        if not path.is_file() and path.suffix != ".py" and path.name == str(path):
            path = ours() / f"{path}.py"
        if not path.is_file():
            known = f"one of ours ({', '.join(names())})"
            raise UserError(f"--config: {argument}: no such file; allowed: FILE.py or FILE.py:VARIANT, or {known}")
        try:
            with _neighbours(path.absolute().parent):
                module = _execute("ddo_jax_config_file", path)
                config = module.get_config(*([] if variant is None else [variant]))
        except (Exception, SystemExit) as e:  # somebody's program: it may raise anything, or exit
            raise UserError(f"--config: {argument}: {type(e).__name__}: {one_line(e, 400)}") from None
        if not isinstance(config, ConfigDict):
            raise UserError(
                f"--config: {argument}: get_config() gives {type(config).__name__}; it must return the ConfigDict that "
                "starts as ddo_jax.config.base()"
            )
        return config.lock()


def _execute(name: str, path: Path, search: list[str] | None = None):
    """The module of a file, under a name that others import it by. search: of a package, where its modules are."""
    loader = importlib.machinery.SourceFileLoader(name, str(path))
    spec = importlib.util.spec_from_file_location(name, path, loader=loader, submodule_search_locations=search)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


@contextlib.contextmanager
def _neighbours(folder: Path) -> Iterator[None]:
    """The folder comes first for imports; `configs` is what the top of this module says."""
    sys.path.insert(0, str(folder))
    try:
        if folder.name == "configs":
            for name in [n for n in sys.modules if n == "configs" or n.startswith("configs.")]:
                del sys.modules[name]
            if (folder / "__init__.py").exists():
                _execute("configs", folder / "__init__.py", [str(folder)])
            else:
                spec = importlib.machinery.ModuleSpec("configs", None, is_package=True)
                spec.submodule_search_locations = [str(folder)]
                sys.modules["configs"] = importlib.util.module_from_spec(spec)
        yield
    finally:
        sys.path.remove(str(folder))


# -- keys that are unset ----------------------------------------------------------------------------------


def take_nones(argv: list[str]) -> tuple[list[str], list[str]]:
    """(argv without `--config.KEY=None`, the keys whose last value that is): the flag's parsers know no None.

    >>> take_nones(["main", "--config.a.b=None", "--config.c", "None", "--config.d=None", "--config.d=3"])
    (['main', '--config.d=3'], ['a.b', 'c'])
    """
    found = []  # (key, value, its arguments)
    i = 0
    while i < len(argv) and argv[i] != "--":
        key = re.fullmatch(r"--?config\.([^=]+)(?:=(.*))?", argv[i], re.DOTALL)
        if key is not None and key[2] is None and argv[i + 1 : i + 2] == ["None"]:
            found.append((key[1], "None", [i, i + 1]))
        elif key is not None:
            found.append((key[1], key[2], [i]))
        i += len(found[-1][2]) if found and found[-1][2][0] == i else 1
    unset = [key for key, value in {key: value for key, value, _ in found}.items() if value == "None"]
    left_out = {j for key, value, indices in found if key in unset or value == "None" for j in indices}
    return [a for i, a in enumerate(argv) if i not in left_out], unset


def unset(config, key: str) -> None:
    """Make an optional key of a loaded config None, or all keys of an optional part (a duration).

    Raises:
      UserError: the key is not optional.
    """
    from ddo_jax.config import base, leaves

    known = dict(leaves(base()))
    section, _, name = key.rpartition(".")
    part = config
    for step in section.split(".") if section else ():
        part = part[step]
    below = {f"{key}.{k}" for k, _ in leaves(part[name])} if hasattr(part[name], "items") else {key}
    optional = all(k not in known and k.startswith("model.") or known.get(k, "") is None for k in below)
    if not optional:
        default = known.get(key)
        allowed = "a value; keys in it can be unset" if default is None else f"a {type(default).__name__}"
        raise UserError(f"config.{key}: None; allowed: {allowed}")
    if below == {key}:
        part[name] = None
    else:
        for k in below:
            part[name][k.removeprefix(f"{key}.")] = None
