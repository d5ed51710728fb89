"""The names promised to users and how they are called, against what was promised.

A change that is meant: `python tests/test_public_api.py > tests/goldens/public_api.txt`; a name that goes, or an
argument, warns for one release first.
"""

import inspect
from pathlib import Path

import ddo_jax

PROMISED = Path(__file__).parent / "goldens" / "public_api.txt"


def line(name: str) -> str:
    """A name and its parameters: kinds and defaults count, annotations do not."""
    value = getattr(ddo_jax, name)
    given = inspect.signature(value).parameters.values()
    bare = inspect.Signature([p.replace(annotation=inspect.Parameter.empty) for p in given])
    return f"{name}{bare}"


def public_api() -> str:
    return "".join(f"{line(name)}\n" for name in sorted(ddo_jax.__all__))


def test_what_is_promised_is_there():
    """Breaks if a promised name is gone, or is called in another way."""
    assert public_api() == PROMISED.read_text()


if __name__ == "__main__":
    print(public_api(), end="")
