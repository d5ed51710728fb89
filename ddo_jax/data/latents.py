"""One file of latents -> float32 and back; what is wrong with it is said with its name.

EDM2's format (specs/edm2.md section 11): an .npy with the posterior of a VAE, [2 C, H, W], first the C channels of
the mean, then those of the standard deviation, raw (without any scale factor); [8, 64, 64] for ImageNet 512.
"""

import io
import math

import numpy as np

from ddo_jax.errors import UserError, one_line

EXTENSION = ".npy"
ALLOWED = "float32 or float16 (2 C, H, W), C channels of mean, then C of standard deviation"
_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def _header(data: bytes, where: str) -> tuple[tuple[int, ...], bool, np.dtype, int]:
    """(shape, whether in Fortran order, dtype, offset of the values) of an .npy; executes nothing of it."""
    file = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(file)
        if version not in _HEADERS:
            raise ValueError(f".npy version {version}")
        return *_HEADERS[version](file), file.tell()
    except Exception as e:  # numpy evaluates the header as a literal: a damaged one raises whatever the parser raises
        raise UserError(f"{where}: damaged latents ({one_line(e, 100)}; {len(data)} bytes); restore the file") from None


def check(moments: np.ndarray, where: str) -> None:
    """Refuse moments [2 C, H, W] that no posterior has.

    Raises:
      UserError: NaN, infinity, or a negative standard deviation (a logarithm of the variance, say); names `where`.
    """
    if not np.isfinite(moments).all():
        raise UserError(f"{where}: holds NaN or infinity; restore the file, or encode the images again")
    channels = len(moments) // 2
    if (least := moments[channels:].min()) < 0:
        raise UserError(
            f"{where}: {least:.3g} in channels {channels} to {2 * channels - 1}, the standard deviation; "
            "allowed: 0 or more; encode the images again"
        )


def decode(data: bytes, where: str) -> np.ndarray:
    """Content of an .npy [2 C, H, W] -> float32 [H, W, 2 C], exactly as stored (float16 is widened).

    Never unpickles; nothing is allocated beyond what the file itself holds, whatever its header says.

    Raises:
      UserError: damaged, another dtype or shape, or no posterior (`check`); names `where`.
    """
    shape, fortran, dtype, start = _header(data, where)
    seen = f"{where}: {str(dtype)[:40]} {shape}"
    if dtype.kind != "f" or dtype.itemsize not in (2, 4):
        pickled = " (a pickle, which is never opened)" if dtype.hasobject else ""
        raise UserError(f"{seen}{pickled}; allowed: {ALLOWED}")
    if len(shape) != 3 or min(shape) < 1 or shape[0] % 2:
        raise UserError(f"{seen}; allowed: {ALLOWED}")
    size = math.prod(shape) * dtype.itemsize
    if len(data) - start != size:
        raise UserError(f"{seen}: damaged latents ({len(data) - start} of {size} bytes); restore the file")
    moments = np.frombuffer(data, dtype, offset=start).reshape(shape, order="F" if fortran else "C")
    moments = moments.astype(np.float32, copy=False)
    check(moments, where)
    return moments.transpose(1, 2, 0)


def encode(mean: np.ndarray, std: np.ndarray, where: str) -> bytes:
    """Mean and standard deviation, float32 [H, W, C] each -> .npy of float32 [2 C, H, W].

    Raises:
      UserError: they are no posterior (`check`); names `where`.
    """
    moments = np.ascontiguousarray(np.concatenate([mean, std], -1).transpose(2, 0, 1), dtype=np.float32)
    check(moments, where)
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, moments, version=(1, 0), allow_pickle=False)
    return buffer.getvalue()
