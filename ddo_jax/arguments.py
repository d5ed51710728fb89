"""argparse for the commands: a path is what the user typed."""

import argparse
import os
import re

PATHS = re.compile("DIR|FILE|WHAT|SRC|DST|DATASET")  # in metavar


class PathParser(argparse.ArgumentParser):
    """Expands a leading `~` of every argument whose metavar names a path: shells leave it as it is after `=`.

    Other names (hf://..., known names) have none; those with a kind in front (folder:~/x) are expanded where they are
    opened.
    """

    def parse_known_args(self, args=None, namespace=None):
        found, rest = super().parse_known_args(args, namespace)
        for action in self._actions:
            value = getattr(found, action.dest, None)
            if isinstance(value, str) and isinstance(action.metavar, str) and PATHS.search(action.metavar):
                setattr(found, action.dest, os.path.expanduser(value))
        return found, rest
