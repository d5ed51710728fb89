"""Class labels of generated sets, and the table of classes that a run keeps: id, name, images in the data."""

import numpy as np

from ddo_jax.errors import UserError

SHOWN = 20  # classes that a table shows


def balanced_labels(positions: np.ndarray, num_classes: int, classes: np.ndarray | None = None) -> np.ndarray:
    """label(position) = position mod num_classes: class counts of 0..n-1 differ by at most one.

    It depends on the position in the list, not on the image's seed (specs/edm2.md section 15).

    Args:
      positions: int array [N].
      num_classes: 0 for an unconditional model (all labels are then 0 = "no label").
      classes: int [K], the ids to take instead of all: a class of which the data have no image is not asked for.

    Returns:
      int32 [N].
    """
    positions = np.asarray(positions)
    if num_classes and classes is not None:
        return np.asarray(classes)[positions % len(classes)].astype(np.int32)
    return (positions % max(num_classes, 1)).astype(np.int32)


def balanced_rule(classes: np.ndarray | None) -> str:
    """`balanced_labels` in words, for records."""
    return "balanced by position" + ("" if classes is None else f" over the {len(classes)} classes with images")


def data_labels(n: int, counts: np.ndarray) -> np.ndarray:
    """Labels of n generated images with the class frequencies of the data, evenly mixed.

    Args:
      n: images. counts: int [K], images of every class in the data, not all 0.

    Returns:
      int32 [n]: the class of every position. Numbers are those of the largest remainders, so every class is within one
      of its share.

    >>> data_labels(8, np.array([6, 0, 2]))
    array([0, 0, 2, 0, 0, 0, 2, 0], dtype=int32)
    """
    share = n * np.asarray(counts, np.float64) / np.sum(counts)
    numbers = np.floor(share).astype(np.int64)
    numbers[np.argsort(numbers - share, kind="stable")[: n - numbers.sum()]] += 1
    labels = np.repeat(np.arange(len(numbers)), numbers)
    at = np.concatenate([(np.arange(k) + 0.5) / k for k in numbers if k])  # where in the set an image of a class lies
    return labels[np.argsort(at, kind="stable")].astype(np.int32)


def present_classes(counts: np.ndarray | None) -> np.ndarray | None:
    """The ids of classes with images, or None if all have some, or nobody looked."""
    if counts is None or not len(counts) or np.all(counts):
        return None
    return np.flatnonzero(counts)


# -- the table ---------------------------------------------------------------------------------------------


def class_table(num_classes: int, names: tuple[str, ...] = (), counts: np.ndarray | None = None) -> list[dict]:
    """[{"id", "name" (None: nobody named it), "images" (None: not counted)}] of every class."""
    return [
        {"id": i, "name": names[i] if names else None, "images": None if counts is None else int(counts[i])}
        for i in range(num_classes)
    ]


def table_text(table: list[dict]) -> str:
    """The table for a person: one line a class; unnamed classes in one line.

    >>> print(table_text(class_table(2, ("cat", "dog"), np.array([190, 10]))))
    class id images
    cat    0    190
    dog    1     10
    >>> print(table_text(class_table(3, (), np.array([5, 4, 5]))))
    3 classes of 4 to 5 images
    """
    if not table:
        return "no classes"
    counts = [row["images"] for row in table if row["images"] is not None]
    if table[0]["name"] is None:
        return f"{len(table)} classes" + (f" of {min(counts)} to {max(counts)} images" if counts else "")
    rows = [("class", "id", "images")]
    rows += [(row["name"], str(row["id"]), "?" if row["images"] is None else str(row["images"])) for row in table]
    shown = rows[: SHOWN + 1]
    widths = [max(len(row[i]) for row in shown) for i in range(3)]
    lines = [f"{a.ljust(widths[0])} {b.rjust(widths[1])} {c.rjust(widths[2])}" for a, b, c in shown]
    return "\n".join(lines + ([f"... and {len(rows) - len(shown)} more"] if len(rows) > len(shown) else []))


def table_line(table: list[dict]) -> str:
    """The named classes of a table in one line; "" where nobody named them.

    >>> table_line(class_table(2, ("cat", "dog"), np.array([190, 10])))
    '; cat is class 0 (190 images), dog is class 1 (10 images)'
    """
    if not table or table[0]["name"] is None:
        return ""
    shown = [f"{row['name']} is class {row['id']} ({row['images']} images)" for row in table[:SHOWN]]
    return "; " + ", ".join(shown) + (f" and {len(table) - SHOWN} more" if len(table) > SHOWN else "")


def named_classes(rule: str, num_classes: int, names: tuple[str, ...]) -> list[int]:
    """The classes that `--labels` names: ids and names, one or several, "3,5", "cat", "cat,5".

    A text that could be the id of one class and the name of another is refused; "id:2" and "name:2" say which.

    Raises:
      UserError: no class of this model; says which there are.
    """
    index = {name: i for i, name in enumerate(names)}
    parts = [rule] if rule in index else [part.strip() for part in rule.split(",")]

    def one(part: str) -> int:
        kind, _, rest = part.partition(":")
        as_name = index.get(rest if kind == "name" else part)
        digits = rest if kind == "id" else part
        as_id = int(digits) if digits.isascii() and digits.isdecimal() and len(digits) < 10 else None
        as_id = as_id if as_id is not None and as_id < num_classes else None
        if kind == "name" and as_name is not None:
            return as_name
        if None not in (as_id, as_name) and as_id != as_name:
            raise UserError(
                f"--labels: {part!r} is the name of class {as_name} and the id of {names[as_id]!r}; write id:{part} or "
                f"name:{part}"
            )
        found = as_id if as_name is None else as_name
        if found is None:
            shown = f" ({', '.join(names[:10])}{', ...' if len(names) > 10 else ''})" if names else ""
            raise UserError(
                f"--labels: {part!r}; allowed: balanced, random, or a class 0-{num_classes - 1}{shown}, "
                "or several, as in 0,1"
            )
        return found

    return [one(part) for part in parts]
