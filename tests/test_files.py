"""Files: a path is a name and no pattern, what only saves time may fail, a full disk is one line."""

import errno
import os
import subprocess
import sys

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


def test_sealed_records(tmp_path):
    """Breaks if a changed digit of a record is believed, or an older version's record without checksum refused."""
    path, value = tmp_path / "result.json", {"score": 1.25, "n": 12, "name": "x", "none": None}
    assert files.read_sealed(path) is None
    files.write_sealed(path, value)
    assert files.read_sealed(path) == value
    lines = path.read_text().splitlines()
    assert lines[-2].strip().startswith('"checksum"')  # a line of its own
    text = path.read_text()
    for i, c in enumerate(text):
        path.write_text(text[:i] + ("7" if c != "7" else "3") + text[i + 1 :])
        try:
            assert value.items() <= files.read_sealed(path).items(), i  # blanks, or the name of the checksum
        except files.Damaged as e:
            assert str(e).startswith(str(path)) and "\n" not in str(e)
    files.write_json(path, value)
    assert files.read_sealed(path) == value


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b"[" * 200_000, b"\xff", b'{"a": 1, "checksum": 5}'])
def test_damaged_records(tmp_path, content):
    """Breaks if it is anything but one line with the path."""
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(files.Damaged, match="x.json: .") as e:
        files.read_sealed(path)
    assert "\n" not in str(e.value)
    path.unlink()
    path.mkdir()
    with pytest.raises(files.Damaged, match="cannot be read"):
        files.read_sealed(path)


def test_odd_lines_of_a_record_are_left_out(tmp_path):
    """Breaks if a damaged line ends in a traceback."""
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n[]\n3\n\xff\xfe\n{"x": 1}\n' + b"[" * 100_000 + b'\n{"step": 2}\n{"st')
    assert files.read_jsonl(path) == [{"step": 1}, {"x": 1}, {"step": 2}]


def test_leftovers_of_killed_writers(tmp_path):
    """Breaks if a killed writer's bytes stay for ever, or a living writer's file is taken away."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    here, there = files.host_id(), "00000000"
    names = {
        f".a.npz.{here}-{child.pid}-{'0' * 16}.tmp": True,  # its process is gone
        f".a.npz.{here}-{os.getppid()}-{'0' * 16}.tmp": False,  # lives
        f".a.npz.{there}-{child.pid}-{'0' * 16}.tmp": False,  # of another host, new
        f".a.npz.{'0' * 32}.tmp": False,  # of an older version, new
        ".mine.tmp": False,
        "a.tmp": False,
    }
    folder = tmp_path / "rounds" / "001" / "pool"
    folder.mkdir(parents=True)
    for name in names:
        (folder / name).write_bytes(b"x")
    assert {p.name for p in files.remove_leftovers(tmp_path, 600)} == {name for name, gone in names.items() if gone}
    for name in names:
        if (folder / name).exists():
            os.utime(folder / name, (0, 0))
    files.remove_leftovers(tmp_path, 600)
    assert sorted(p.name for p in folder.iterdir()) == [".mine.tmp", "a.tmp"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::RuntimeWarning")  # of fork
def test_a_temporary_file_is_known_again(tmp_path, monkeypatch):
    """Breaks if the names that are written and those that are removed part ways."""
    monkeypatch.setattr(os, "replace", lambda *_: os._exit(9))
    pid = os.fork()
    if not pid:
        files.write_bytes(tmp_path / ("n" * 200), b"content")
        os._exit(0)
    assert os.waitpid(pid, 0)[1] >> 8 == 9 and len(list(tmp_path.iterdir())) == 1
    assert len(files.remove_leftovers(tmp_path, 600)) == 1 and list(tmp_path.iterdir()) == []


def test_a_device_is_not_replaced(tmp_path):
    """Breaks if a rename puts a file in the place of /dev/full, /dev/null or a pipe."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="no regular file"):
        files.write_bytes(tmp_path / "pipe", b"x")
    assert [p.name for p in tmp_path.iterdir()] == ["pipe"]
