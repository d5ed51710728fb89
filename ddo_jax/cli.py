"""What the commands share: flags -> a call of the library; a mistake is one line and exit code 2.

A command is a module with `parser() -> Parser`, `run(args)` and `main(argv=None)`, which is `cli.main`. `ddo_jax.main`
takes absl's flags instead, for config files have theirs, and the same ends.
"""

import argparse
import contextlib
import os
import re
import sys
from collections.abc import Callable, Iterator

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


def main(parser: Parser, run: Callable, argv: list[str] | None = None) -> None:
    """Parse, start JAX's distributed runtime where --distributed asks for it, run."""
    args = parser.parse_args(argv)
    logging.set_verbosity(logging.ERROR)
    if getattr(args, "distributed", False):
        start_distributed()
    with one_line_errors():
        run(args)


def start_distributed() -> None:
    import jax

    jax.distributed.initialize()


def add_distributed(p: Parser) -> None:
    p.add_argument("--distributed", action="store_true", help="several hosts, see launch/")
