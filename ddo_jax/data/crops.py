"""Squares of images of any size: EDM's central crop, and VAR's rule (specs/var.md section 10)."""

import numpy as np
from PIL import Image

CROPS = ("", "center", "var")  # "": images as they are stored


def center_box(image: Image.Image, size: int) -> Image.Image:
    """The central size x size pixels; an odd rest stays at the right and at the bottom."""
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def crop_center(image: Image.Image, size: int) -> Image.Image:
    """EDM: the central square, then Lanczos to size x size."""
    return center_box(image, min(image.size)).resize((size, size), Image.Resampling.LANCZOS)


def crop_var(image: Image.Image, size: int, draw: np.ndarray | None = None) -> Image.Image:
    """VAR: size x size pixels of an image; it is mirrored first, then resized by Lanczos, then cropped.

    Args:
      draw: [3] in [0, 1): mirrored if the first is below 0.5; the others place the crop, y then x, every offset being
        equally likely. None: not mirrored, the central crop.
    """
    if draw is not None and draw[0] < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    # No JPEG draft, no reducing_gap, no resize(box=...): faster, but each gives other pixels.
    short, shorter = round(1.125 * size), min(image.size)
    image = image.resize(tuple(int(short * side / shorter) for side in image.size), Image.Resampling.LANCZOS)
    spare_y, spare_x = image.height - size, image.width - size
    if draw is None:
        top, left = round(spare_y / 2), round(spare_x / 2)
    else:
        top, left = int(draw[1] * (spare_y + 1)), int(draw[2] * (spare_x + 1))
    return image.crop((left, top, left + size, top + size))
