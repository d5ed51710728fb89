"""One encoded image -> uint8 pixels and back; what is wrong with it is said with its name.

What a file shows is what a person sees in front of white: transparent images are composited on it, palettes and single
bits become colours and greys. Nothing deeper than 8 bits is cut down, and no ink (CMYK) guessed at.
"""

import io
import struct
import zlib
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageOps

from ddo_jax.errors import UserError

# What Pillow reads of them where it is installed: some builds lack AVIF, JPEG 2000 or WebP.
EXTENSIONS = tuple(
    extension
    for extension in (
        *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".dib", ".gif", ".ppm", ".pgm", ".pbm", ".pnm"),
        *(".tif", ".tiff", ".webp", ".avif", ".jp2", ".tga", ".qoi"),
    )
    if Image.registered_extensions().get(extension) in Image.OPEN
)
ALPHA = ("white", "refuse")
ALLOWED = "8-bit RGB or greyscale"
Note = Callable[[str, str], None]  # (where, what it is): told of an image that is not kept as it is stored
_CHANNELS = {"L": 1, "RGB": 3}
_GREY, _COLOUR = ("1", "L", "LA"), ("P", "PA", "RGB", "RGBA", "RGBa")
_PNG_BIT_DEPTH = 24  # offset of the byte in a PNG file; Pillow reads 16-bit RGB as 8-bit without a word


def describe(data: bytes, image: Image.Image) -> str:
    """An image in words: 32x32 RGB PNG, or 32x32 16-bit I;16 PNG."""
    depth = data[_PNG_BIT_DEPTH] if image.format == "PNG" else 8
    bits = "" if depth == 8 else f"{depth}-bit "
    return f"{image.width}x{image.height} {bits}{image.mode} {image.format}"


def open_image(data: bytes, where: str) -> tuple[Image.Image, str]:
    """(the image, pixels read; its description).

    Raises:
      UserError: not an image, torn, corrupted, or deeper than 8 bits; names `where`.
    """
    try:
        image = Image.open(io.BytesIO(data))
        seen = describe(data, image)
        image.load()
    except (OSError, ValueError, SyntaxError, EOFError, IndexError, struct.error, zlib.error) as e:
        reason = "not an image" if isinstance(e, Image.UnidentifiedImageError) else str(e)
        raise UserError(f"{where}: damaged image ({reason}; {len(data)} bytes); restore the file") from None
    except Image.DecompressionBombError as e:
        raise UserError(f"{where}: {e}") from None
    if "16-bit" in seen or image.mode.startswith(("I", "F")):
        raise UserError(f"{where}: {seen}; allowed: {ALLOWED}; save it with 8 bits a channel")
    return image, seen


def on_white(image: Image.Image) -> Image.Image:
    """A grey or coloured image as "L" or "RGB", in front of white where it is transparent."""
    mode = "L" if image.mode in _GREY else "RGB"
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(mode)


def decode(data: bytes, where: str, note: Note | None = None) -> np.ndarray:
    """Encoded image -> uint8 [H, W, C], C = 1 or 3; exactly as stored, or as it looks on white (`on_white`).

    Args:
      note: told of images with alpha, a palette, or fewer than 8 bits. None: they are refused.

    Raises:
      UserError: as `open_image`, another kind of image, or one that would have to be noted; names `where`.
    """
    image, seen = open_image(data, where)
    plain = image.mode in _CHANNELS and not image.has_transparency_data
    plain = plain and not (image.format == "PNG" and data[_PNG_BIT_DEPTH] != 8)
    if not plain:
        if image.mode not in (*_GREY, *_COLOUR):
            raise UserError(f"{where}: {seen}; allowed: {ALLOWED}; save it as RGB")
        if note is None:
            mend = "python -m ddo_jax.data makes a set in which they lie on white"
            raise UserError(f"{where}: {seen}; allowed: {ALLOWED}, without alpha or palette; {mend}")
        note(where, seen)
        image = on_white(image)
    return np.asarray(image).reshape(image.height, image.width, _CHANNELS[image.mode])


def convert(data: bytes, where: str, mode: str, note: Note | None = None, *, turn: bool = False) -> Image.Image:
    """An encoded image of any mode as "RGB" or "L", on white where it is transparent.

    note: as in `decode`, of transparent images only. turn: as a person sees it, by its EXIF orientation; else as the
    pixels lie, which is how ImageNet is read.

    Raises:
      UserError: as `open_image`, a mode that Pillow cannot convert, or transparent without a note; names `where`.
    """
    image, seen = open_image(data, where)
    if turn:
        image = _turned(image)
    transparent = image.has_transparency_data
    if transparent and note is None:
        raise UserError(f"{where}: {seen} is transparent; allowed: opaque images")
    if transparent:
        note(where, seen)
    try:
        return (on_white(image) if transparent else image).convert(mode)
    except ValueError as e:
        raise UserError(f"{where}: {seen}: {e}; save it as RGB") from None


def _turned(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except (OSError, ValueError, TypeError, SyntaxError, KeyError, struct.error, zlib.error):  # damaged EXIF data
        return image


def lossy_kind(data: bytes) -> str:
    """How an encoded image lost detail, by its first bytes: "JPEG", "WebP", "AVIF"; "" where it lost nothing."""
    if data[:3] == b"\xff\xd8\xff":
        return "JPEG"
    if data[:4] == b"RIFF" and data[8:16] == b"WEBPVP8 ":
        return "WebP"
    return "AVIF" if data[4:12] in (b"ftypavif", b"ftypavis") else ""


def to_levels(images: np.ndarray, have: int, want: int) -> np.ndarray:
    """Grey levels 0..have-1 spread over 0..want-1: the one rule for files, pictures and feature networks.

    >>> to_levels(np.array([0, 8, 16], np.uint8), 17, 256)
    array([  0, 128, 255], dtype=uint8)
    """
    return images if have == want else np.round(images * ((want - 1) / (have - 1))).astype(np.uint8)


def in_colour(pixels: np.ndarray) -> np.ndarray:
    """Three channels, as the .npz of OpenAI's evaluator has them."""
    return np.repeat(pixels, 3, axis=-1) if pixels.shape[-1] == 1 else pixels


def encode_png(pixels: np.ndarray, compress_level: int = 0) -> bytes:
    """uint8 [H, W, C], C = 1 or 3 -> PNG; without compression it is 1.5 times larger and faster to read."""
    buffer = io.BytesIO()
    image = Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels)
    image.save(buffer, "PNG", compress_level=compress_level)
    return buffer.getvalue()
