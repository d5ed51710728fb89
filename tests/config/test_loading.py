"""Config files: what they import; keys that flags unset."""

import subprocess
import sys
from pathlib import Path

import pytest

from ddo_jax import config as configs
from ddo_jax.config import loading
from ddo_jax.errors import UserError

ROOT = Path(__file__).parents[2]
PRINT = "import sys; from ddo_jax.config import loading; print(loading.Parser().parse(sys.argv[1]).name)"
MINE = """
import helper
from configs import mine_too as common
def get_config(variant=""):
    import late
    config = common.base()
    config.name = f"{variant} {helper.X} {late.X} {'mine'}"
    return config
"""
FOREIGN = "raise SystemExit('foreign configs')"


def loaded(path, cwd, pythonpath):
    environment = {"PYTHONPATH": f"{pythonpath}:{ROOT}", "JAX_PLATFORMS": "cpu", "PATH": "/usr/bin:/bin"}
    line = [sys.executable, "-c", PRINT, str(path)]
    done = subprocess.run(line, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("kind", ["package", "module"])
def test_neighbours_are_imported(tmp_path, kind):
    """Breaks if `configs` or a helper of the current directory or of PYTHONPATH is imported by a config file."""
    cwd, user = tmp_path / "cwd", tmp_path / "us:er"
    (cwd / "configs").mkdir(parents=True)
    for folder in (user, user / "configs"):
        folder.mkdir()
        for name, content in (("mine.py", MINE), ("helper.py", "X = 'h'"), ("late.py", "X = 'l'")):
            (folder / name).write_text(content)
    for name in ("configs/__init__.py", "configs/mine_too.py", "helper.py", "late.py"):
        (cwd / name).write_text(FOREIGN)
    if kind == "module":
        for path in (cwd / "configs").iterdir():
            path.unlink()
        (cwd / "configs").rmdir()
        (cwd / "configs.py").write_text(FOREIGN)
    assert loaded(ROOT / "configs" / "edm_cifar10_cond.py", cwd, cwd).startswith("EDM")
    assert loaded("edm_cifar10_cond:search", cwd, cwd).startswith("EDM")  # by name
    (user / "configs" / "mine_too.py").write_text("from ddo_jax.config import base")
    assert loaded(user / "configs" / "mine.py", cwd, cwd) == "h l mine"  # its own `configs`


def test_missing_file(tmp_path):
    """Breaks if the line does not name the file."""
    with pytest.raises(UserError, match="--config: .*nowhere.py: no such file"):
        loading.Parser().parse(str(tmp_path / "nowhere.py"))
    with pytest.raises(
        UserError, match="--config: digit: no such file; .* one of ours .digits, digits_var, edm2_in512,"
    ):
        loading.Parser().parse("digit")


def test_none_is_taken_from_the_flags():
    """Breaks if None reaches a parser of numbers, another flag's value is taken for it, or the last does not win."""
    argv = ["main", "--config=x.py", "--config.a=1", "-config.a", "None", "--workdir", "None", "--config.b.c=None"]
    assert loading.take_nones(argv) == (["main", "--config=x.py", "--workdir", "None"], ["a", "b.c"])
    assert loading.take_nones(["m", "--config.a=None", "--config.a=2"]) == (["m", "--config.a=2"], [])
    assert loading.take_nones(["m", "--", "--config.a=None"]) == (["m", "--", "--config.a=None"], [])


def test_every_optional_key_can_be_unset():
    """Breaks if =None does not unset a key with a typed default, sets another, or a duration keeps a unit."""
    for key, default in configs.leaves(configs.base()):
        config = configs.base()
        if default is None:
            loading.unset(config, key)
            assert dict(configs.leaves(config))[key] is None
        else:
            with pytest.raises(UserError, match=f"config.{key}: None; allowed: a "):
                loading.unset(config, key)
    config = configs.base()
    config.ddo.length.steps, config.eval.weights = 20, "file"
    loading.unset(config, "ddo.length")
    loading.unset(config, "eval.weights")
    assert config.ddo.length.to_dict() == {"steps": None, "mimg": None, "epochs": None}
    assert config.eval.weights is None
    with pytest.raises(UserError, match="config.data: None; allowed: a value"):
        loading.unset(config, "data")


@pytest.mark.parametrize(
    "text, words",
    [
        ("def get_config(:", "SyntaxError: invalid syntax"),
        ("import sys; sys.exit(0)", "SystemExit: 0"),
        ("def get_config(): raise RuntimeError('two\\nlines')", "RuntimeError: two lines"),
        ("def get_config(): 1 / 0", "ZeroDivisionError: division by zero"),
        ("def get_config(): pass", "get_config.. gives NoneType; it must return the ConfigDict"),
        ("x = 1", "AttributeError: .*get_config"),
    ],
)
def test_a_config_file_that_fails(tmp_path, text, words):
    """Breaks if somebody's config file ends the command in a traceback, or in exit code 0."""
    path = tmp_path / "mine.py"
    path.write_text(text)
    with pytest.raises(UserError, match=f"--config: .*mine.py: {words}"):
        loading.Parser().parse(str(path))
