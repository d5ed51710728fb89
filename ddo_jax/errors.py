"""The one exception of the project for mistakes a user can mend; other people's exceptions in one line."""


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
