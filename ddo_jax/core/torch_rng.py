"""PyTorch's CPU random streams in NumPy: the released sampler's noise for a seed, without torch.

A stream is the Mersenne twister MT19937 with the classic 32-bit seeding (specs/edm.md section 12). Published
figures used the CUDA generator, whose streams differ: FID agrees statistically, images do not.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import DTypeLike


class TorchCpuStream:
    """The successive draws of one `torch.Generator` on the CPU.

    Args:
      seed: taken modulo 2^32.

    Example:
      >>> stream = TorchCpuStream(0)
      >>> stream.normal((16,)).dtype, stream.integer(10) in range(10)
      (dtype('float32'), True)
    """

    def __init__(self, seed: int):
        self._words = np.random.MT19937()
        self._words._legacy_seeding(int(seed) % 2**32)

    def _raw(self, n: int) -> np.ndarray:
        return self._words.random_raw(n).astype(np.uint64)

    @staticmethod
    def _box_muller(u: np.ndarray) -> np.ndarray:
        """Runs of 16 uniforms -> 16 normals: radius from the first eight, angle from the others.

        In the precision of the draw: float64 arithmetic would be 1e-6 away from torch's float32 values.
        """
        first, second = u.reshape(-1, 2, 8).swapaxes(0, 1)
        radius = np.sqrt(u.dtype.type(-2) * np.log1p(-first))
        angle = u.dtype.type(2 * np.pi) * second
        return np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1).reshape(-1)

    def normal(self, shape: tuple[int, ...], dtype: DTypeLike = np.float32) -> np.ndarray:
        """Unit normals, float32 (24 bits a value) or float64 (53 bits).

        Raises:
          ValueError: a number of values that 16 does not divide, for which torch has another rule.
        """
        n = int(np.prod(shape))
        if n % 16:
            raise ValueError(f"shape {shape}: {n} values; allowed: a multiple of 16")
        if np.dtype(dtype) == np.float32:
            u = (self._raw(n) % 2**24) * 2.0**-24
        else:
            high, low = self._raw(2 * n).reshape(n, 2).T
            u = (((high << np.uint64(32)) + low) % 2**53) * 2.0**-53
        return self._box_muller(u.astype(dtype)).reshape(shape)

    def integer(self, below: int) -> int:
        """Uniform in 0 .. below - 1."""
        return int(self._raw(1)[0] % below)


def edm_streams(
    seeds: Sequence[int] | np.ndarray, shape: tuple[int, int, int], num_classes: int, steps: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What the released EDM sampler draws for every seed (specs/edm.md section 12), as NHWC.

    Args:
      seeds: [N]. shape: (H, W, C). num_classes: 0 draws no label. steps: noise images per seed.

    Returns:
      latents float32 [N, H, W, C], labels int32 [N], normals float32 [steps, N, H, W, C].
    """
    height, width, channels = shape
    latents = np.empty((len(seeds), *shape), np.float32)
    labels = np.zeros(len(seeds), np.int32)
    normals = np.empty((steps, len(seeds), *shape), np.float32)
    for i, seed in enumerate(seeds):
        stream = TorchCpuStream(int(seed))
        latents[i] = stream.normal((channels, height, width)).transpose(1, 2, 0)
        if num_classes:
            labels[i] = stream.integer(num_classes)
        for step in range(steps):
            normals[step, i] = stream.normal((channels, height, width), np.float64).transpose(1, 2, 0)
    return latents, labels, normals
