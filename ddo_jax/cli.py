"""What the commands share: flags -> a call of the library; a mistake is one line and exit code 2.

A command is a module with `parser() -> Parser`, `run(args)` and `main(argv=None)`, which is `cli.main`. `ddo_jax.main`
takes absl's flags instead, for config files have theirs, and the same ends.
"""

import argparse
import contextlib
import os
import re
import runpy
import sys
from collections.abc import Callable, Iterator
from typing import Any

from absl import logging

from ddo_jax.errors import UserError

PATHS = re.compile("DIR|FILE|WHAT|SRC|DST|DATASET")  # in metavar


def fail(message: str):
    """The end of a command that a user can mend."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


class Parser(argparse.ArgumentParser):
    """Mistakes in one line; a leading `~` of every argument whose metavar names a path is expanded, which shells leave
    as it is after `=`.

    Other names (hf://..., known names) have none; those with a kind in front (folder:~/x) are expanded where they are
    opened.
    """

    def error(self, message):
        fail(f"{message}; see {self.prog} --help")

    def parse_known_args(self, args=None, namespace=None):
        found, rest = super().parse_known_args(args, namespace)
        for action in self._actions:
            value = getattr(found, action.dest, None)
            if isinstance(value, str) and isinstance(action.metavar, str) and PATHS.search(action.metavar):
                setattr(found, action.dest, os.path.expanduser(value))
        return found, rest


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """A UserError is one line on stderr and exit code 2."""
    try:
        yield
    except UserError as e:
        fail(str(e))


def main_job() -> None:
    """The console script `ddo-jax`: `python -m ddo_jax.main`, whose --help absl knows only under that name."""
    runpy.run_module("ddo_jax.main", run_name="__main__", alter_sys=True)


def main(parser: Parser, run: Callable, argv: list[str] | None = None) -> None:
    """Parse, start JAX's distributed runtime where --distributed asks for it, run."""
    args = parser.parse_args(argv)
    logging.set_verbosity(logging.ERROR)
    with one_line_errors():
        if not start_distributed(vars(args), {k: v for k, v in vars(args).items() if k not in DISTRIBUTED}):
            run(args)
            return
        from ddo_jax import preemption

        with leaving(), preemption.handled():
            run(args)


# Flags that say where the processes of a run meet; each process may have its own.
DISTRIBUTED = {
    "distributed": "several processes: found by JAX (Slurm, GKE, TPU pods, MPI), or by the next three, which imply it",
    "coordinator": "HOST:PORT of process 0, which must be free there (or $JAX_COORDINATOR_ADDRESS, or torchrun's)",
    "num_processes": "how many processes there are (or $JAX_NUM_PROCESSES)",
    "process_id": "of this one, from 0 on (or $JAX_PROCESS_ID)",
}


def start_distributed(
    flags: dict[str, Any], about: dict[str, Any], start_s: float = 60.0, heartbeat_s: float = 40.0
) -> bool:
    """Start JAX's distributed runtime where flags ask for it; whether they do.

    Args:
      flags: those of `DISTRIBUTED`, maybe absent. about, start_s, heartbeat_s: see `hosts.start`.

    Raises:
      UserError: see `hosts.start`.
    """
    if not any(flags.get(key) not in (None, False) for key in DISTRIBUTED):
        return False
    from ddo_jax import hosts

    hosts.start(hosts.given(flags, os.environ), about, start_s=start_s, heartbeat_s=heartbeat_s)
    return True


@contextlib.contextmanager
def leaving() -> Iterator[None]:
    """Around `preemption.handled()`: a process that was asked to leave says what is kept; its exit code tells launchers
    to start it again, or, after Ctrl-C, not to."""
    from ddo_jax import preemption

    try:
        yield
    except preemption.Preempted as e:
        print(e.line, file=sys.stderr)
        sys.exit(e.code)


def add_distributed(p: Parser) -> None:
    p.add_argument("--distributed", action="store_true", help=DISTRIBUTED["distributed"])
    p.add_argument("--coordinator", metavar="HOST:PORT", help=DISTRIBUTED["coordinator"])
    p.add_argument("--num_processes", type=int, metavar="N", help=DISTRIBUTED["num_processes"])
    p.add_argument("--process_id", type=int, metavar="I", help=DISTRIBUTED["process_id"])
