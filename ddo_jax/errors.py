"""The one exception of the project for mistakes a user can mend; other people's exceptions in one line; what has
another name today."""

import warnings


class UserError(Exception):
    """One line: the thing, the value seen, the values allowed, the mend.

    `ddo_jax.main` and the other commands print it without a traceback and exit with code 2.
    """


def one_line(error: Exception, most: int = 160) -> str:
    r"""The message of somebody else's exception, or its kind where it says nothing; at most `most` characters.

    >>> one_line(ValueError("two\nlines")), one_line(MemoryError())
    ('two lines', 'MemoryError')
    """
    return (" ".join(str(error).split()) or type(error).__name__)[:most]


def deprecated(old: str, new: str, gone: str, stacklevel: int = 2) -> None:
    """Warn that `old` is called `new` today, and that release `gone` will know the new name only.

    A FutureWarning, which Python shows by default: those who write configs are no less concerned than programmers.
    tests/test_public_api.py finds every call, and fails once `gone` is the release that is made.
    """
    warnings.warn(f"{old} is {new} today; ddo_jax {gone} will not know {old}", FutureWarning, stacklevel + 1)
