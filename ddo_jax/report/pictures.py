"""Grids of images, as arrays and PNG bytes."""

import io

import numpy as np
from PIL import Image

from ddo_jax.data.images import to_levels


def tile(images: np.ndarray, columns: int, gap: int = 1) -> np.ndarray:
    """[N, H, W, C] -> one picture, `gap` pixels between images, black where none is left."""
    n, h, w, c = images.shape
    rows = -(-n // columns)
    filled = np.zeros((rows * columns, h + gap, w + gap, c), images.dtype)
    filled[:n, :h, :w] = images
    grid = filled.reshape(rows, columns, h + gap, w + gap, c).swapaxes(1, 2)
    return grid.reshape(rows * (h + gap), columns * (w + gap), c)[: -gap or None, : -gap or None]


def grid(images: np.ndarray, levels: int) -> np.ndarray:
    """A square grid, uint8 with the full range 0..255 ([h, w, 3] or [h, w] for grey)."""
    picture = tile(images, columns=max(1, round(len(images) ** 0.5)))
    return np.squeeze(to_levels(picture, levels, 256))


def png(images: np.ndarray, levels: int) -> bytes:
    """The grid as an enlarged PNG; each image at least 48 pixels wide."""
    picture = Image.fromarray(grid(images, levels))
    factor = max(1, 48 // images.shape[2])
    buffer = io.BytesIO()
    picture.resize((picture.width * factor, picture.height * factor), Image.NEAREST).save(buffer, format="PNG")
    return buffer.getvalue()
