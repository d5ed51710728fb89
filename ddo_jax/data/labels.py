"""Class labels of generated sets."""

import numpy as np


def balanced_labels(positions: np.ndarray, num_classes: int) -> np.ndarray:
    """label(position) = position mod num_classes: class counts of 0..n-1 differ by at most one.

    It depends on the position in the list, not on the image's seed (specs/edm2.md section 15).

    Args:
      positions: int array [N].
      num_classes: 0 for an unconditional model (all labels are then 0 = "no label").

    Returns:
      int32 [N].
    """
    positions = np.asarray(positions)
    return (positions % max(num_classes, 1)).astype(np.int32)
