"""From a set of images to EDM2's set of latents: what `python -m ddo_jax.data encode` does.

The VAE sees uint8 / 255, that is [0, 1] and not [-1, 1]: all released latent networks are trained on such latents
(specs/edm2.md section 12). Mean and standard deviation of the posterior are stored; nothing is sampled here.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from ddo_jax import sharding
from ddo_jax.convert import sdvae
from ddo_jax.data import latents, make
from ddo_jax.errors import UserError

NAME = "img-mean-std-{:08d}.npy"
PRECISIONS = ("highest", "high", "default")

Encoder = Callable[[np.ndarray], tuple[jax.Array, jax.Array]]


def load_vae(what: str):
    """(module, variables) of an SD-VAE by WHAT.

    Raises:
      UserError: not there, damaged, or another network.
    """
    try:
        return sdvae.load(what)
    except UserError as e:
        raise UserError(f"--vae: {e}") from None


def check_shape(shape: tuple[int, ...], module, vae: str) -> None:
    """The VAE must take these images and, decoding, give back their size.

    Raises:
      UserError: another number of channels, or a side that it cannot halve so often.
    """
    if shape[-1] != module.in_channels:
        raise UserError(f"--vae={vae}: takes {module.in_channels} channels, not {shape[-1]}; set --channels")
    if any(side % module.downscale for side in shape[:2]):
        raise UserError(
            f"--vae={vae}: takes heights and widths divisible by {module.downscale}, not {shape[0]}x{shape[1]}; "
            "set --resolution and --crop"
        )


def make_program(module, precision: str):
    """Jitted (variables, uint8 [B, H, W, C]) -> (mean, std), float32 [B, h, w, c] each."""

    @jax.jit
    def program(variables, images):
        with jax.default_matmul_precision(precision):
            return module.apply(variables, images.astype(jnp.float32) / 255, method="encode")

    return program


def encoded(examples: Iterable[tuple[np.ndarray, int]], encoder: Encoder, batch: int) -> Iterator[tuple[bytes, int]]:
    """(.npy, label) of (pixels, label), in padded batches of one size: the program is compiled once.

    Raises:
      UserError: what the encoder gives is no posterior; names the image.
    """
    examples, start = iter(examples), 0
    while rows := list(itertools.islice(examples, batch)):
        images = np.zeros((batch, *rows[0][0].shape), np.uint8)
        images[: len(rows)] = [pixels for pixels, _ in rows]
        mean, std = (np.asarray(x)[: len(rows)] for x in encoder(images))
        for i, (own_mean, own_std, (_, label)) in enumerate(zip(mean, std, rows, strict=True), start):
            yield latents.encode(own_mean, own_std, f"image {i} encoded"), label
        start += len(rows)


def encode(src: str, dst: str, *, vae: str, batch: int = 8, precision: str = "highest", **options) -> Path:
    """Make the set of latents.

    Args:
      src, dst: set of images, FILE.zip. vae: WHAT of an SD-VAE.
      batch: images at a time, rounded up to a multiple of the devices; changes the result by rounding only.
      precision: of matrix products and convolutions. options: of `make.Options`, for the images.

    Returns:
      Its path, as `sources.open_source` takes it.

    Raises:
      UserError: what a user can mend; nothing is left behind.
    """
    if batch < 1:
        raise UserError(f"--batch={batch}; allowed: 1 or more")
    if precision not in PRECISIONS:
        raise UserError(f"--precision={precision}; allowed: {', '.join(PRECISIONS)}")
    if not dst.endswith(".zip"):
        raise UserError(f"DST {dst}: latents are written as a zip; end DST in .zip")
    job = make.plan(src, dst, make.Options(**options))
    module, variables = load_vae(vae)
    check_shape(job.shape(), module, vae)
    mesh = sharding.make_mesh()
    program, variables = make_program(module, precision), sharding.replicate(mesh, variables)
    with make.appearing(job.path) as path:
        made = encoded(
            make.converted(job, lambda pixels: pixels),
            lambda images: program(variables, sharding.put_batch(mesh, images)),
            -(-batch // mesh.size) * mesh.size,
        )
        make.write_zip(path, made, job.records.num_classes, NAME, job.records.class_names)
    return job.path
