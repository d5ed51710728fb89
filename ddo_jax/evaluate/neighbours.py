"""Nearest neighbours in pixels: the evidence that samples are no copies of the training set."""

from typing import Any

import numpy as np


def some_images(source: Any, limit: int = 10_000) -> np.ndarray:
    """All images of a source, or `limit` of them, evenly spread (the classes may lie one after the other); never more
    than 2^27 values, which are compared in float64."""
    limit = min(limit, max(1, 2**27 // int(np.prod(source.image_shape))))
    indices = np.linspace(0, len(source) - 1, min(limit, len(source))).round().astype(np.int64)
    return source.read(indices)["image"]


def distance_among(train: np.ndarray, levels: int, num: int = 1024) -> float:
    """Mean distance of a training image, of `num` evenly spread ones, to the nearest of the others: the yardstick where
    no images are held out. Units as `nearest_distance`."""
    rows = np.unique(np.linspace(0, len(train) - 1, min(num, len(train))).round().astype(int))
    squared = _squared_distances(train[rows], train, levels)
    squared[np.arange(len(rows)), rows] = np.inf
    return float(np.sqrt(np.maximum(squared.min(1), 0)).mean())


def nearest_distance(images: np.ndarray, train: np.ndarray, levels: int) -> float:
    """Mean Euclidean distance of an image to its nearest training image, pixels in [-1, 1].

    Beside that of held-out images to the training set it tells copying (much smaller) from modelling.
    """
    return float(np.sqrt(np.maximum(_squared_distances(images, train, levels).min(1), 0)).mean())


def _squared_distances(images: np.ndarray, train: np.ndarray, levels: int) -> np.ndarray:
    scale = 2 / (levels - 1)
    a, b = (x.reshape(len(x), -1).astype(np.float64) * scale for x in (images, train))
    return (a**2).sum(1)[:, None] - 2 * a @ b.T + (b**2).sum(1)[None]
