"""Records, the console, durations."""

import gc
import io
import json
import warnings

import pytest

from ddo_jax.run import record


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_json_lines_are_cut_back_to_the_resume_step(tmp_path):
    """Breaks if steps that are done again are recorded twice, or older ones are lost."""
    path = tmp_path / "metrics.jsonl"
    log = record.JsonLines(path)
    for step in (1, 2, 3, 4):
        log.write({"step": step})
    log.close()
    log = record.JsonLines(path, 2)
    log.write({"step": 3, "again": True})
    log.close()
    assert lines(path) == [{"step": 1}, {"step": 2}, {"step": 3, "again": True}]


def test_torn_last_line_is_dropped(tmp_path):
    """Breaks if a kill during a write makes the record unreadable."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    log = record.JsonLines(path, 2)
    log.write({"step": 3})
    log.close()
    assert [r["step"] for r in lines(path)] == [1, 2, 3]


def test_lines_are_on_disk_at_once(tmp_path):
    """Breaks if a kill loses lines that sit in a buffer."""
    log = record.JsonLines(tmp_path / "metrics.jsonl")
    log.write({"step": 1})
    assert lines(tmp_path / "metrics.jsonl") == [{"step": 1}]
    log.close()


def test_phase_log_of_other_processes_writes_nothing(tmp_path):
    """Breaks if two processes write one file."""
    log = record.PhaseLog(tmp_path, 0, True, main=False)
    log.write({"step": 1, "x": 1.0})
    log.close()
    assert not list(tmp_path.iterdir())


def test_tensorboard_files(tmp_path):
    """Breaks if event files are not written where tensorboardX is installed, or written when switched off."""
    pytest.importorskip("tensorboardX")
    for name, enabled in (("on", True), ("off", False)):
        (tmp_path / name).mkdir()
        log = record.PhaseLog(tmp_path / name, 0, enabled)
        log.write({"phase": "p", "step": 1, "loss/mle": 1.0})
        log.close()
    assert list((tmp_path / "on" / "tensorboard").glob("events*"))
    assert not (tmp_path / "off" / "tensorboard").exists()


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_console_in_a_log():
    """Breaks if a log gets carriage returns, a line for each step, or not the last one."""
    stream = io.StringIO()
    console = record.Console(stream, quiet_s=1000)
    for text in ("first", "left out"):
        console.status(text)
    console.status("last", done=True)
    console.line("stays")
    assert stream.getvalue() == "first\nlast\nstays\n"


def test_console_on_a_terminal():
    """Breaks if the status line scrolls, or leftovers of a longer one stay behind."""
    stream = Terminal()
    console = record.Console(stream)
    console.status("a long text")
    console.status("short")
    console.line("stays")
    console.status("end", done=True)
    assert stream.getvalue() == "\ra long text\rshort      \r     \rstays\n\rend\n"


@pytest.mark.parametrize(
    "seconds, text", [(0, "0s"), (59.4, "59s"), (59.6, "1m00s"), (3599.6, "1h00m"), (3725, "1h02m"), (90000, "25h00m")]
)
def test_duration(seconds, text):
    """Breaks if 59.6 s becomes 60s or 0m60s."""
    assert record.duration(seconds) == text


def test_progress():
    """Breaks if the time left counts the steps of an earlier start, or the last line asks for more."""
    progress = record.Progress("phase", 50, 100)
    progress._began -= 10
    assert " 75/100  75%     10s left" in progress.text(75)
    assert "100/100 100%     10s in all" in progress.text(100)
    assert "left" in progress.text(50)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # tensorboardX leaves its file open
def test_tensorboard_on_a_full_disk(tmp_path, capsys, monkeypatch):
    """Breaks if a view of the record stops the run, or waits for a thread that died."""
    events = pytest.importorskip("tensorboardX.event_file_writer")

    def full(*_):
        raise OSError(28, "No space left on device")

    board = record.TensorBoard(tmp_path / "a")
    monkeypatch.setattr(events.EventsWriter, "write_event", full)
    for step in range(30):
        board.write(step, {"x": 1.0})
    board.close()
    record.TensorBoard(tmp_path / "b").close()
    err = capsys.readouterr().err
    assert err.count("note: no TensorBoard files") == 2 and err.count("\n") == 2
    del board
    with warnings.catch_warnings(action="ignore"):  # the library leaves its files open; here, not in another test
        gc.collect()
