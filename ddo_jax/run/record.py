"""Records: one JSON object a line is the record; TensorBoard files and the console are views of it."""

import contextlib
import json
import math
import os
import sys
import time

from etils import epath

from ddo_jax import files, stores

REMOTE_S = 15.0  # a record on an object store is written again so often


class JsonLines:
    """Append-only JSON lines that survive kill -9 and are cut back to the step a run resumes from."""

    def __init__(self, path: epath.PathLike, resume_step: int = 0):
        self.path = epath.Path(path)
        kept = [r for r in files.read_jsonl(self.path) if _is_before(r, resume_step)]
        write_jsonl(self.path, kept)
        self._remote = stores.is_remote(self.path)  # where nothing can be appended: the whole file again
        self._records, self._written = kept if self._remote else [], time.monotonic()
        self._file = None if self._remote else self.path.open("a")

    def write(self, record: dict) -> None:
        if self._file is not None:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
            return
        self._records.append(record)
        if time.monotonic() - self._written > REMOTE_S:
            self.flush()

    def flush(self) -> None:
        """To be called before what makes a run resume behind its records: a checkpoint."""
        if self._remote:
            write_jsonl(self.path, self._records)
            self._written = time.monotonic()

    def close(self) -> None:
        self.flush()
        if self._file is not None:
            self._file.close()


def _is_before(record: dict, step: int) -> bool:
    at = record.get("step")
    return isinstance(at, int) and at <= step


class TensorBoard:
    """Event files of one phase where tensorboardX is installed, else nothing.

    They are a view of the record: where they cannot be written, a note says so and the run goes on. (SummaryWriter
    writes from a thread, and waits for ever once that has died of a full disk.)
    """

    def __init__(self, directory: epath.PathLike, enabled: bool = True):
        self._writer, self._directory = None, str(directory)
        if enabled and not stores.is_remote(directory):  # it appends
            with contextlib.suppress(ImportError), self._noting():
                from tensorboardX.event_file_writer import EventsWriter
                from tensorboardX.record_writer import directory_check

                directory_check(self._directory)
                self._writer = EventsWriter(os.path.join(self._directory, "events"))

    @contextlib.contextmanager
    def _noting(self):
        try:
            yield
        except OSError as e:
            self._writer = None
            print(f"note: no TensorBoard files: {self._directory}: {e.strerror or e}", file=sys.stderr)

    def write(self, step: int, scalars: dict) -> None:
        if self._writer is None:
            return
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.summary import scalar

        with self._noting():
            for key, value in scalars.items():
                if isinstance(value, int | float) and key != "step":
                    self._writer.write_event(Event(wall_time=time.time(), step=step, summary=scalar(key, value)))
            self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            with self._noting():
                self._writer.close()


def duration(seconds: float) -> str:
    """
    >>> duration(59.6), duration(3725)
    ('1m00s', '1h02m')
    """
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"


class Console:
    """On a terminal one status line that is rewritten; in a log plain lines, not more than one in 5 s.

    Nothing that is said stops a run: a stream that is closed, or whose disk is full, is dropped.
    """

    def __init__(self, stream=None, quiet_s: float = 5.0):
        self._stream = sys.stderr if stream is None else stream
        self._tty = self._stream.isatty()
        self._quiet_s, self._last, self._width = quiet_s, -math.inf, 0

    def status(self, text: str, *, done: bool = False) -> None:
        """Show progress; `done` ends the line (and is never left out)."""
        if self._tty:
            self._write("\r" + text.ljust(self._width) + ("\n" if done else ""))
            self._width = 0 if done else len(text)
        elif done or time.monotonic() - self._last > self._quiet_s:
            self._last = time.monotonic()
            self._write(text + "\n")

    def line(self, text: str) -> None:
        """A line that stays."""
        self._write(("\r" + " " * self._width + "\r" if self._width else "") + text + "\n")
        self._width = 0

    def _write(self, text: str) -> None:
        if self._stream is not None:
            try:
                self._stream.write(text)
                self._stream.flush()
            except (OSError, ValueError):  # ValueError: closed here
                self._stream = None


class Progress:
    """Status text of a loop: fraction, rate, time left."""

    def __init__(self, name: str, start: int, end: int):
        self.name, self.start, self.end = name, start, end
        self._began = time.monotonic()

    def text(self, step: int, extra: str = "") -> str:
        elapsed = time.monotonic() - self._began
        rate = (step - self.start) / max(elapsed, 1e-9)
        left = duration((self.end - step) / rate) if rate > 0 and step < self.end else duration(elapsed)
        mark = "left" if step < self.end else "in all"
        percent = 100 * step / self.end
        return f"{self.name:<22} {step:>7}/{self.end} {percent:3.0f}%  {left:>6} {mark}  {extra}".rstrip()


class PhaseLog:
    """metrics.jsonl and TensorBoard files of one phase directory."""

    def __init__(self, directory: epath.Path, resume_step: int, tensorboard: bool, main: bool = True):
        self._main = main  # one process writes
        if main:
            self._lines = JsonLines(directory / "metrics.jsonl", resume_step)
            self._board = TensorBoard(directory / "tensorboard", tensorboard)

    def write(self, record: dict) -> None:
        if self._main:
            self._lines.write(record)
            self._board.write(record["step"], record)

    def flush(self) -> None:
        if self._main:
            self._lines.flush()

    def close(self) -> None:
        if self._main:
            self._lines.close()
            self._board.close()


def write_jsonl(path: epath.PathLike, records: list[dict]) -> None:
    """A whole JSON-lines file at once."""
    files.write_bytes(path, "".join(json.dumps(r) + "\n" for r in records).encode())


def concatenate(paths: list[epath.Path], target: epath.Path) -> None:
    """The run's own metrics.jsonl: the phases' records, one after the other."""
    write_jsonl(target, [r for path in paths for r in files.read_jsonl(path)])
