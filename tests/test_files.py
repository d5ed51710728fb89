"""Files: a path is a name and no pattern, what only saves time may fail, a full disk is one line."""

import errno
import os

import pytest

from ddo_jax import files
from ddo_jax.errors import UserError

NAMES = ["run[1]", "a*", "a?b", "**", "{x}", "a:b", "sp ", "new\nline", "[!a]", "~", "ü"]


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_is_a_name(tmp_path, name):
    """Breaks if brackets, * or ? of a folder's own name list a neighbour: tidy would delete the neighbour's files."""
    for folder in (name, "run1", "ab", "aXb", "x", "b"):
        (tmp_path / folder / "sub").mkdir(parents=True)
        (tmp_path / folder / "sub" / f"chunk-{folder[:1]}.npz").write_text(folder)
        (tmp_path / folder / "sub" / ".chunk-1.npz").write_text("")
        (tmp_path / folder / "sub" / "other").write_text("")
    (found,) = files.matching(tmp_path / name / "sub", "chunk-*.npz")
    assert found.read_text() == name and str(found.parent) == str(tmp_path / name / "sub")
    (found,) = files.literal(tmp_path / name).glob("s*/chunk-*.npz")
    assert found.read_text() == name
    assert files.matching(tmp_path / name / "nowhere", "*") == files.matching(found, "*") == []


def test_literal_paths(monkeypatch, tmp_path):
    """Breaks if a path for Orbax is relative, a bucket's becomes local, or `..` is cut behind a link."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "deep" / "target").mkdir(parents=True)
    (tmp_path / "link").symlink_to("deep/target")
    assert str(files.literal("gs://bucket/run[1]") / "x") == "gs://bucket/run[1]/x"
    assert str(files.literal("run[1]")) == str(tmp_path / "run[1]")
    assert str(files.literal("link/../run")) == str(tmp_path.resolve() / "deep" / "run")
    assert isinstance(files.literal("x") / "y", files.Literal)


def test_what_saves_time_may_fail(tmp_path, capsys, monkeypatch):
    """Breaks if a cache that cannot be written stops a command after its work, or is made in a folder named ~."""
    (tmp_path / "file").write_text("")
    files.keep(tmp_path / "file" / "cache" / "x.npz", b"x", "statistics")
    err = capsys.readouterr().err
    assert err.startswith("note: statistics not kept") and str(tmp_path / "file") in err and err.count("\n") == 1
    files.keep(tmp_path / "cache" / "x.npz", b"x", "statistics")
    assert files.kept(tmp_path / "cache" / "x.npz") == b"x" and files.kept(tmp_path / "file" / "x") is None
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "~/mine")
    assert files.cache_dir("xla") == tmp_path / "mine" / "ddo_jax" / "xla"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # no home
    assert files.cache_dir("xla").is_absolute() and "~" not in str(files.cache_dir("xla"))


def chained(outer, inner):
    try:
        try:
            raise inner
        except Exception as e:
            raise outer from e
    except Exception as e:
        return e


FULL = OSError(errno.ENOSPC, "No space left on device", "/x/chunk")
TENSORSTORE = ValueError('RESOURCE_EXHAUSTED: Error writing local file "/x/d": [OS error 28: ENOSPC No space left on]')


@pytest.mark.parametrize(
    "error, full",
    [
        (FULL, True),
        (OSError(errno.EDQUOT, "quota"), True),
        (TENSORSTORE, True),
        (chained(RuntimeError("save failed"), TENSORSTORE), True),
        (chained(ValueError("a"), chained(KeyError("b"), FULL)), True),
        (OSError(errno.EACCES, "Permission denied"), False),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate"), False),
    ],
)
def test_full_disk(error, full):
    """Breaks if a full disk ends in a traceback, or an accelerator's memory counts as one."""
    with pytest.raises(UserError if full else type(error)) as e, files.full_disk("RUN keeps its work"):
        raise error
    if full:
        assert "no space left on the disk" in str(e.value) and str(e.value).endswith("; RUN keeps its work")
