"""The one exception of the project for mistakes a user can mend."""


class UserError(Exception):
    """One line: the thing, the value seen, the values allowed, the mend.

    `ddo_jax.main` and the other commands print it without a traceback and exit with code 2.
    """
