"""Paths on command lines are what the user typed."""

import importlib
import os

import pytest

PARSERS = [
    ("ddo_jax.sample", "parser", "checkpoint out guide vae"),
    ("ddo_jax.evaluate.__main__", "parser", "images ref plot weights dinov2_weights keep out against data_dir"),
    ("ddo_jax.evaluate.__main__", "parser", "checkpoint ref plot weights dinov2_weights keep out guide vae"),
    ("ddo_jax.posthoc", "parser", "snapshots out"),
    ("ddo_jax.push", "parser", "run"),
    ("ddo_jax.data.__main__", "parser", "src dst data_dir"),
    ("ddo_jax.data.__main__", "encode_parser", "src dst data_dir vae"),
]


@pytest.mark.parametrize("module, make, names", PARSERS)
def test_home_is_expanded_in_every_path(module, make, names):
    """Breaks if `~` after = makes a folder of that name, or names without a home change."""
    parser = getattr(importlib.import_module(module), make)()
    positional = {a.dest for a in parser._actions if not a.option_strings}
    others = [a for a in parser._actions if a.required and a.dest not in names.split()]

    def parse(value):
        flags = [value if name in positional else f"--{name}={value}" for name in names.split()]
        parsed = parser.parse_args(
            [*flags, *(f"{a.option_strings[-1]}=1" if a.option_strings else "1" for a in others)]
        )
        return {getattr(parsed, name) for name in names.split()}

    assert parse("~/x") == {os.path.expanduser("~/x")}
    for name in ("hf://owner/repository/file", "gs://bucket/~x", "edm2-img64-s", "folder:~/x", "a~", "./~"):
        assert parse(name) == {name}


def test_converted_files(monkeypatch, tmp_path):
    """Breaks if `convert` writes into a folder named ~."""
    from ddo_jax.convert import __main__ as command

    monkeypatch.setenv("HOME", str(tmp_path))
    args = command.parser().parse_args(["~/a.pkl", "~/b.safetensors"])
    assert (args.src, args.dst) == (f"{tmp_path}/a.pkl", f"{tmp_path}/b.safetensors")


def test_paths_of_the_library(monkeypatch, tmp_path):
    """Breaks if WHAT of a config or of ddo_jax.load is looked for in a folder named ~."""
    import ddo_jax
    from ddo_jax.convert import names
    from ddo_jax.errors import UserError
    from ddo_jax.store import snapshots

    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "weights.pkl").write_text("x")
    (tmp_path / "run").mkdir()
    assert names.resolve("~/weights.pkl") == str(tmp_path / "weights.pkl")
    for find in (ddo_jax.load, snapshots.find):
        with pytest.raises(UserError, match=f"{tmp_path}/run|~/run: no snapshots"):
            find("~/run")
