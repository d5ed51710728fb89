"""One label a seed: balanced by position, drawn from the seed's own stream, or the classes that a flag names."""

from collections.abc import Sequence

import numpy as np

from ddo_jax.core.torch_rng import TorchCpuStream
from ddo_jax.data.labels import balanced_labels, named_classes


def class_labels(rule: str, seeds: np.ndarray, num_classes: int, rng: str, table: Sequence[dict] = ()) -> np.ndarray:
    """One label a seed: by position over all classes or those named, or drawn from the seed's own stream.

    Args:
      rule: "balanced", "random", or classes by id or name, as in "3,5" or "cat". table: of `data.labels.class_table`,
        for names, and for classes of which the data had no image: they are not made.

    Raises:
      UserError: another rule.
    """
    if num_classes == 0:
        return np.zeros(len(seeds), np.int32)
    if rule == "balanced":
        present = np.array([row["id"] for row in table if row["images"] != 0])
        return balanced_labels(np.arange(len(seeds)), num_classes, present if len(table) == num_classes else None)
    if rule != "random":
        names = tuple(row["name"] for row in table if row["name"] is not None)
        wanted = named_classes(rule, num_classes, names)
        return balanced_labels(np.arange(len(seeds)), num_classes, np.array(wanted))
    if rng == "jax":
        return np.array([np.random.default_rng((int(s), 1)).integers(num_classes) for s in seeds], np.int32)
    raise AssertionError("torch-cpu labels come with the latents")


def torch_labels(seeds: np.ndarray, shape, num_classes: int) -> np.ndarray:
    """The released sampler's random labels: the draw after the latents."""
    labels = np.zeros(len(seeds), np.int32)
    for i, seed in enumerate(seeds):
        stream = TorchCpuStream(int(seed))
        stream.normal(shape)
        labels[i] = stream.integer(num_classes)
    return labels
