"""What a tree of files says of classes: labels, names, and splits that keep every class.

One rule for zips and folders. Order and labels as in specs/edm.md section 14.2 and specs/edm2.md section 11: sorted by
name, labels looked up by name in dataset.json, or else one class a subfolder.
"""

import dataclasses
import json
import re

import numpy as np

from ddo_jax.data.tree import LABELS, warn
from ddo_jax.errors import UserError

_EDM_NAME = re.compile(r"\d{5}/img(-mean-std-)?\d{8}\.\w+")
_SPLIT = re.compile(r"train(?:\[(-?\d+%?)?:(-?\d+%?)?\])?")
MOST_CLASSES = 10**6  # a label above is none, and tables of classes would fill the memory
_PARTS = {"train", "training", "test", "testing", "val", "valid", "validation", "dev", "eval", "holdout"}


@dataclasses.dataclass(frozen=True)
class Labelling:
    """Labels of N images.

    Attributes:
      labels: int32 [N]. num_classes: 0 without labels (they are then all 0). names: of the classes, by id; () where
        nobody named them.
    """

    labels: np.ndarray
    num_classes: int
    names: tuple[str, ...] = ()

    def named(self, label: int) -> str:
        """A class in words: `cat (class 3)`, or `class 3`."""
        return f"{self.names[label]} (class {label})" if self.names else f"class {label}"


def say_missing(whole: Labelling, where: str) -> None:
    """A word on classes without images, of which dataset.json may have some."""
    missing = np.flatnonzero(np.bincount(whole.labels, minlength=whole.num_classes) == 0) if whole.num_classes else ()
    if len(missing):
        shown = ", ".join(map(str, missing[:5])) + (", ..." if len(missing) > 5 else "")
        warn(f"{where}: no image of {len(missing)} of its {whole.num_classes} classes ({shown})")


def unlabelled(n: int) -> Labelling:
    """N images of no class."""
    return Labelling(np.zeros(n, np.int32), 0)


# -- dataset.json ------------------------------------------------------------------------------------------


def _unique_keys(pairs: list) -> dict:
    keys = [key for key, _ in pairs]
    if len(set(keys)) < len(keys):
        raise ValueError(f"the key {max(keys, key=keys.count)!r} is there twice")
    return dict(pairs)


def parse_labels(text: bytes, names: list[str], where: str) -> Labelling:
    """Labels from EDM's dataset.json: {"labels": [[name, class], ...] or null}, and, if it has them, the names of the
    classes: {"classes": ["cat", ...]}.

    Raises:
      UserError: not such a file; an image without label, with two, or a label without image; float vectors; names that
        are no list of different texts, one a class.
    """
    try:
        found = json.loads(text, object_pairs_hook=_unique_keys)
        entries, classes = found.get("labels"), found.get("classes")
        pairs = [(str(name).replace("\\", "/"), label) for name, label in entries or ()]
    except (ValueError, AttributeError, TypeError, RecursionError) as e:
        raise UserError(f'{where}: {e}; it must hold {{"labels": [["name", class], ...]}} or null') from None
    if entries is None:
        return unlabelled(len(names))
    table: dict = {}
    for name, label in pairs:
        if name in table:
            both = f"labels {str(table[name])[:40]} and {str(label)[:40]}"
            raise UserError(f"{where}: {name} is there twice ({both}); every image must have one label")
        table[name] = label
    for missing, what in (
        (set(names) - set(table), "no label for"),
        (set(table) - set(names), "a label, but no image,"),
    ):
        if missing:
            raise UserError(f"{where}: {what} {min(missing)} ({len(missing)} such); every image must have one label")
    for name in names:
        label = table[name]
        if type(label) is not int or not 0 <= label < MOST_CLASSES:
            kind = "vectors are not supported: " if isinstance(label, list) else ""
            allowed = f"class numbers 0, 1, 2 ... below {MOST_CLASSES:,}"
            raise UserError(f"{where}: {kind}label {str(label)[:40]} of {name}; allowed: {allowed}")
    labels = np.array([table[name] for name in names], np.int32)
    return Labelling(labels, *_classes(classes, int(labels.max()) + 1, where))


def _classes(classes, least: int, where: str) -> tuple[int, tuple[str, ...]]:
    """(number, names) of the classes of which labels use `least`."""
    if classes is None:
        return least, ()
    texts = isinstance(classes, list) and all(isinstance(name, str) for name in classes)
    if not texts or len(set(classes)) < len(classes) or len(classes) < least:
        raise UserError(
            f'{where}: "classes" is {str(classes)[:60]}; allowed: a list of {least} or more different names, by class'
        )
    return len(classes), tuple(classes)


def find_labels(files: list[str], names: list[str], where: str) -> tuple[str, str] | None:
    """(path of dataset.json, folder that its names start from: "" or "my/"), or None if there is none.

    One that lies deeper is the set's own if all images lie below it: a folder that was packed with its name.

    Raises:
      UserError: there is one, and it does not speak of all images.
    """
    found = sorted(f for f in files if f.rsplit("/", 1)[-1] == LABELS)
    if not found:
        return None
    if LABELS in found:
        return LABELS, ""
    prefix = found[0].removesuffix(LABELS)
    if len(found) > 1 or not all(name.startswith(prefix) for name in names):
        raise UserError(
            f"{where}: {found[0]} does not speak of all images; name the folder {prefix[:-1]} itself, or put one "
            f"{LABELS} beside all images"
        )
    return found[0], prefix


# -- subfolders --------------------------------------------------------------------------------------------


def common_folder(names: list[str]) -> str:
    """The folders, as "my/set/", around all classes: a zip of `my/cat/0.png` and `my/dog/0.png` has two classes.

    >>> common_folder(["my/cat/0.png", "my/dog/0.png"]), common_folder(["cat/0.png", "cat/1.png"])
    ('my/', '')
    """
    prefix = ""
    while True:
        rests = [name[len(prefix) :].split("/") for name in names]
        if len({rest[0] for rest in rests}) > 1 or min(map(len, rests)) < 3:
            return prefix
        prefix += rests[0][0] + "/"


def class_order(names: set[str]) -> list[str]:
    """Names of subfolders by class id: sorted; as numbers if all are numbers, so that folder 10 of 0 to 11 is class 10.

    >>> class_order({"b", "a"}), class_order({"10", "9", "0"})
    (['a', 'b'], ['0', '9', '10'])
    """
    numbers = all(name.isascii() and name.isdecimal() for name in names)
    return sorted(names, key=(lambda name: (int(name), name)) if numbers else None)


def folder_labels(names: list[str], where: str) -> Labelling:
    """Labels of a set without dataset.json: one class a subfolder (`class_order`); none if it has none.

    Raises:
      UserError: images both beside and inside subfolders, or subfolders that are parts of a set (train, test).
    """
    prefix = common_folder(names)
    names = [n.removeprefix(prefix) for n in names]
    nested = [n for n in names if "/" in n]
    if not nested or all(_EDM_NAME.fullmatch(n) for n in names):  # 00000/img00000000.png: folders are no classes
        return unlabelled(len(names))
    if len(nested) < len(names):
        flat = min(set(names) - set(nested))
        raise UserError(
            f"{where}: {prefix}{flat} lies beside subfolders, {prefix}{nested[0]} in one; allowed: all or none, "
            f"or {LABELS}"
        )
    of_name = [n.split("/")[0] for n in names]
    folders = set(of_name)
    if len(folders) > 1 and {f.lower() for f in folders} <= _PARTS:
        raise UserError(
            f"{where}: the subfolders {', '.join(sorted(folders))} are parts of a set, not classes; name one of them, "
            f"as in {where}/{prefix}{min(folders)} (a zip: pack one of them)"
        )
    order = class_order(folders)
    index = {folder: i for i, folder in enumerate(order)}
    return Labelling(np.array([index[folder] for folder in of_name], np.int32), len(order), tuple(order))


# -- splits ------------------------------------------------------------------------------------------------


def even_order(labels: np.ndarray) -> np.ndarray:
    """Images in an order of which every beginning has equally many of every class, while there are any.

    Args:
      labels: int [N]. Returns: int64 [N]; within a class by position.

    >>> even_order(np.array([0, 0, 0, 1, 1]))
    array([0, 3, 1, 4, 2])
    """
    return np.lexsort((labels, _ranks(labels)[0]))


def proportional_order(labels: np.ndarray) -> np.ndarray:
    """Images in an order of which every stretch has the classes in the proportions of the whole, as far as it can."""
    ranks, sizes = _ranks(labels)
    return np.lexsort((labels, (ranks + 0.5) / sizes))


def _ranks(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(the how many-th of its class every image is, from 0; the size of its class), int64 [N]."""
    _, inverse, counts = np.unique(labels, return_inverse=True, return_counts=True)
    ranks = np.empty(len(labels), np.int64)
    ranks[np.argsort(inverse, kind="stable")] = np.concatenate([np.arange(count) for count in counts])
    return ranks, counts[inverse]


def split_indices(split: str, n: int, name: str, labelling: Labelling | None = None) -> np.ndarray:
    """The images that a split means, int64 [n], rising: "train" is all, "train[:90%]" and "train[45000:]" as in TFDS.

    Without classes a part is one of the sorted names. With classes it is one of a fixed random order (seed 0), per
    cents of every class by itself; two parts that meet, train[:90%] and train[90%:], share nothing and leave nothing.

    Raises:
      UserError: another split, an empty one, or one that leaves a class out.
    """
    match = _SPLIT.fullmatch(split)
    if not match:
        raise UserError(
            f"split {split!r} of {name}: files have no splits; allowed: train, train[:90%], train[45000:] ..."
        )
    if n == 0 or labelling is None or labelling.num_classes < 2 or not (match[1] or match[2]):
        chosen = np.arange(n)[_slice(match, n)]
    else:
        chosen = _classwise(match, labelling)
    if not len(chosen):
        raise UserError(f"split {split!r} of {name}: empty; the set has {n} images")
    if labelling is not None:
        check_classes(split, name, labelling, chosen)
    return chosen


def _slice(match: re.Match, n: int, inner: bool = False) -> slice:
    """The positions that a split's text means among n; inner: a per cent between 0 and 100 is neither none nor all."""

    def position(text: str | None) -> int | None:
        if text is None:
            return None
        if not text.endswith("%"):
            return int(text)
        percent = int(text[:-1])
        percent = max(percent + 100, 0) if text.startswith("-") else percent  # -0% is the end
        at = round(percent * n / 100)
        return min(max(at, 1), n - 1) if inner and n > 1 and 0 < percent < 100 else at

    return slice(position(match[1]), position(match[2]))


def _classwise(match: re.Match, labelling: Labelling) -> np.ndarray:
    """A part of a labelled set, rising."""
    labels = labelling.labels
    shuffled = np.random.RandomState(0).permutation(len(labels))
    absolute = [text for text in match.groups() if text and not text.endswith("%")]
    if absolute:  # numbers of images, over all classes
        order = shuffled[proportional_order(labels[shuffled])]
        return np.sort(order[_slice(match, len(labels))])
    by_class = [shuffled[labels[shuffled] == label] for label in np.unique(labels)]
    return np.sort(np.concatenate([rows[_slice(match, len(rows), inner=True)] for rows in by_class]))


def check_classes(split: str, name: str, whole: Labelling, chosen: np.ndarray) -> None:
    """Refuse a part of a set in which a class of the whole has no image.

    Raises:
      UserError: names the class.
    """
    if whole.num_classes == 0 or len(chosen) == len(whole.labels):
        return
    here = np.bincount(whole.labels[chosen], minlength=whole.num_classes)
    counts = np.bincount(whole.labels, minlength=whole.num_classes)
    missing = np.flatnonzero((here == 0) & (counts > 0))
    if len(missing):
        label = int(missing[0])
        others = f" and of {len(missing) - 1} other classes" if len(missing) > 1 else ""
        raise UserError(
            f"split {split!r} of {name}: no image of {whole.named(label)}, which has {counts[label]} in all{others}; "
            "take a larger part, or the whole set"
        )
