"""Every command and snippet of README and docs is run, or, where it needs weights or a cluster, parsed.

Commands that install are parsed: the extras that they name exist. Others are run as they stand, in a folder of their
page that has a finished `runs/digits`, with three exceptions:
`folder:PATH` is a folder of small shapes, `my.py` the config of docs/model.md with the toy family, and recipes that
take a minute or more run as their `:runlocal`, README's first run excepted.
"""

import configparser
import importlib
import json
import os
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.docs.snippets import PAGES, ROOT, blocks, commands
from tests.harness import shapes

INSTALLS = ("git", "apt-get")
TOOLS = ("ruff", "mypy", "cd")
COMMANDS = commands()
RUN = [c for c in COMMANDS if c.run and c.words[1:2] == ["-m"] and c.words[2].startswith("ddo_jax")]


def extras_of(requirement):
    return re.findall(r"[\w-]+", match[1]) if (match := re.search(r"\[(.*)\]", requirement)) else []


def parse(command, tmp_path):
    """Whatever is wrong with the words of a command, as an exception."""
    program, *rest = command.words
    if program in INSTALLS or program in TOOLS:
        return
    if program == "pip":
        program, rest = "python", ["-m", "pip", *rest]
    if program.startswith("ddo-jax"):
        parsed = configparser.ConfigParser()
        parsed.read(ROOT / "setup.cfg")
        assert f"{program} =" in parsed["options.entry_points"]["console_scripts"]
        return
    if program.startswith("launch/"):
        argv = [str(ROOT / program), "--print", *rest]
        subprocess.run(argv, env=os.environ | command.variables, check=True, capture_output=True)
        return
    if program.startswith(".ci/"):
        assert os.access(ROOT / program, os.X_OK)
        return
    assert program == "python", command
    if rest[0] != "-m":
        assert (ROOT / rest[0]).is_file(), command
        return
    module, arguments = rest[1], rest[2:]
    if module == "pip":
        parsed = configparser.ConfigParser()
        parsed.read(ROOT / "setup.cfg")
        ours = [a for a in arguments if a.startswith((".[", "ddo_jax["))]
        assert all(extra in parsed["options.extras_require"] for a in ours for extra in extras_of(a)), command
    elif module == "ddo_jax.main":
        code = "import sys; from ddo_jax import main; main.parse(sys.argv)"
        env = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
        arguments = [a.replace("configs/", f"{ROOT}/configs/") for a in arguments]
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], env=env, capture_output=True, text=True, cwd=tmp_path
        )
        assert done.returncode == 0, f"{command.where}: {done.stderr}"
    elif module.startswith("ddo_jax."):
        package = (ROOT / module.replace(".", "/")).is_dir()
        found = importlib.import_module(f"{module}.__main__" if package else module)
        encodes = module == "ddo_jax.data" and arguments[:1] == ["encode"]
        parser = found.encode_parser() if encodes else found.parser()
        known = {option for action in parser._actions for option in action.option_strings}
        assert {a.split("=")[0] for a in arguments if a.startswith("--")} <= known, command
        if command.whole:
            parser.parse_args(arguments[encodes:])
    elif module.startswith("benchmarks."):
        known = (ROOT / f"{module.replace('.', '/')}.py").read_text()
        flags = [a.split("=")[0] for a in arguments if a.startswith("--")]
        assert all(f'"{flag}"' in known for flag in flags), command
    else:
        assert module in ("pytest", "sphinx", "build"), command


@pytest.fixture(scope="module")
def neighbours(tmp_path_factory):
    """A folder with what commands name: my.py, its family, a folder of images."""
    folder = tmp_path_factory.mktemp("docs")
    (config,) = [b.text for b in blocks(ROOT / "docs/model.md") if b.language == "python"]
    (folder / "my.py").write_text(config)
    (folder / "mypackage").mkdir()
    shutil.copy(ROOT / "tests/families/toy.py", folder / "mypackage/mymodule.py")
    shapes(folder / "PATH")
    return folder


@pytest.mark.slow
def test_every_command_is_understood(neighbours):
    """Breaks if a flag, a config, a variant, a script or an extra that the documentation names is not there."""
    assert len(COMMANDS) > 50
    for command in COMMANDS:
        try:
            parse(command, neighbours)
        except SystemExit as e:
            raise AssertionError(f"{command.where}: {' '.join(command.words)}") from e


def test_marks_have_a_block():
    """Breaks if a mark stands where no block follows: the block behind it would be run, or nothing said."""
    for page in PAGES:
        assert page.read_text().count("<!-- parsed, not run: ") == sum(b.mark is not None for b in blocks(page)), page


def in_little(words, page):
    """A recipe of a minute or more as its `:runlocal`."""
    if page.name == "README.md" or "--dry_run" in words:
        return words
    recipe = r"--config=(?!.*:runlocal)(digits|digits_var|images)((?::\w+)*)"
    return [re.sub(f"^{recipe}$", r"--config=\1\2:runlocal", word) for word in words]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, neighbours):
    """README's first run, as it stands: its workdir."""
    folder = tmp_path_factory.mktemp("readme")
    done = execute(next(c for c in RUN if c.page.name == "README.md"), folder, neighbours)
    assert "control (continued MLE): fd_x100" in done.stderr
    return folder / "runs" / "digits"


def execute(command, folder, neighbours):
    env = os.environ | command.variables | {"PYTHONPATH": f"{ROOT}{os.pathsep}{neighbours}", "HF_HUB_OFFLINE": "1"}
    words = [sys.executable, *in_little(command.words[1:], command.page)]
    words = [w.replace("folder:PATH", f"folder:{neighbours / 'PATH'}") for w in words]
    words = [w.replace("--config=my.py", f"--config={neighbours / 'my.py'}") for w in words]
    done = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, f"{command.where}: {' '.join(words)}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done


@pytest.mark.slow
@pytest.mark.parametrize("page", sorted({c.page for c in RUN}), ids=lambda page: page.stem)
def test_commands_are_run(page, finished, neighbours, tmp_path):
    """Breaks if a command of a page ends otherwise than well, after the ones before it."""
    os.makedirs(tmp_path / "runs")
    shutil.copytree(finished, tmp_path / "runs" / "digits")
    for command in [c for c in RUN if c.page == page]:
        execute(command, tmp_path, neighbours)


def test_snippets_of_readme():
    """Breaks if the loss in README does not run, or is not (1 + alpha) log 2 at the reference."""
    first, second = [b.text for b in blocks(ROOT / "README.md") if b.language == "python"]
    params, x, label = jnp.float32(0.5), jnp.ones((4, 2, 2, 1)), jnp.zeros(4, int)
    network = {"apply_fn": lambda p, x_in, c_noise, label: p * x_in}
    exec(compile(first, "README.md", "exec"), network)
    batch = {"real": x, "fake": -x, "real_label": label, "fake_label": label}
    loss, _ = network["loss_fn"](params, params, batch, jnp.ones(4), jnp.ones_like(x))
    np.testing.assert_allclose(loss, 5 * np.log(2), rtol=1e-6)
    tokens = jnp.zeros((4, 3), jnp.int32)
    namespace = {"apply_fn": lambda p, tokens, label: p * jnp.ones((4, 3, 5)), "params": params, "ref_params": params}
    namespace |= {"tokens": tokens, "label": label, "ddo_jax": importlib.import_module("ddo_jax")}
    exec(compile(second, "README.md", "exec"), namespace)
    np.testing.assert_array_equal(namespace["r"], 0)


def test_snippets_of_docs(capsys):
    """Breaks if a snippet of a page does not run; docs/model.md's is the config that commands run."""
    for page in PAGES[1:]:
        if page.name != "model.md":
            with jax.numpy_dtype_promotion("standard"):
                for block in (b for b in blocks(page) if b.language == "python"):
                    exec(compile(block.text, page.name, "exec"), {})
    loss, same, margin = map(float, capsys.readouterr().out.split())
    np.testing.assert_allclose((loss, margin), (same, 0), rtol=1e-6)


@pytest.mark.slow
def test_the_notebook_runs():
    """Breaks if examples/quickstart.ipynb does not run from top to bottom, or was saved with somebody's results."""
    import nbformat
    from nbclient import NotebookClient

    path = ROOT / "examples" / "quickstart.ipynb"
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook.cells), "saved with results"
    done = NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}
    ).execute()
    text = json.dumps([cell.get("outputs", []) for cell in done.cells])
    assert "image/png" in text and re.search(r"energy distance [\d.]+ -> [\d.]+", text)
    before, after = map(float, re.search(r"energy distance ([\d.]+) -> ([\d.]+)", text).groups())
    assert after < before
