"""Reference statistics: means and covariances of real images, from the public files or computed from a dataset.

    edm       .npz  mu, sigma
    edm2      .pkl  {"fid": {"mu", "sigma"}, "fd_dinov2": {"mu", "sigma"}, "num_images"}
    OpenAI    .npz  mu, sigma, mu_s, sigma_s (sFID), arr_0 (images, for precision and recall)
    DATASET   digits, zip:PATH, folder:PATH, tfds:NAME, an .npz with arr_0 alone: computed, and kept under
              $XDG_CACHE_HOME/ddo_jax/statistics by the content of the images and of the network

The format is told by the content. Pickles are parsed, never executed.
"""

import dataclasses
import functools
import hashlib
import io
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from ddo_jax import files, npz
from ddo_jax.convert import names, pickles
from ddo_jax.convert.inert import UnsafeOrDamaged
from ddo_jax.data import sources
from ddo_jax.data.images import to_levels
from ddo_jax.errors import UserError
from ddo_jax.evaluate import collect, image_sets
from ddo_jax.evaluate.collect import FRECHET, REAL_IMAGES
from ddo_jax.evaluate.features import FeatureNet

NPZ_KEYS = {"fid": ("mu", "sigma"), "sfid": ("mu_s", "sigma_s"), "fd_dinov2": ("mu_dinov2", "sigma_dinov2")}
NPZ_KEYS |= {"fd_efficientnet": ("mu_efficientnet", "sigma_efficientnet")}
LEAST_EIGENVALUE = -1e-6  # of the largest: below is no rounding
LEVELS = {"digits": 17}  # grey levels of datasets that have not 256


@dataclasses.dataclass(frozen=True)
class Gaussian:
    """mu [D], sigma [D, D] and its symmetric root, float64."""

    mu: np.ndarray
    sigma: np.ndarray
    root: np.ndarray


@dataclasses.dataclass(frozen=True)
class Reference:
    """What generated images are compared with.

    Attributes:
      name, digest: of the file (twelve hex digits of its SHA-256) or dataset (its fingerprint).
      gaussians: {"fid", "sfid", "fd_dinov2": those wanted}. num_images: behind them; None: not recorded.
      real: the images for pr, kid and mind, at most 10,000; None: the file has none. shape: of its images, where known.
    """

    name: str
    digest: str
    gaussians: dict[str, Gaussian]
    num_images: int | None
    real: image_sets.ImageSet | None
    shape: tuple[int, ...] | None = None

    @property
    def about(self) -> str:
        """For protocols."""
        return f"{self.name} {self.digest} ({'?' if self.num_images is None else self.num_images} images)"


def gaussian(mu: Any, sigma: Any, length: int, where: str, network: str) -> Gaussian:
    """Checked statistics.

    Args:
      length: features of the network, which is called `network`. where: names file and metric in an error.

    Raises:
      UserError: not numbers, non-finite, of another network, not symmetric, not positive semidefinite.
    """
    mu, sigma = (np.asarray(x) for x in (mu, sigma))
    if mu.dtype.kind not in "fiu" or sigma.dtype.kind not in "fiu":
        raise UserError(f"{where}: mean and covariance are {mu.dtype}, {sigma.dtype}; they must be real numbers")
    mu, sigma = mu.astype(np.float64), sigma.astype(np.float64)
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
        raise UserError(f"{where}: mean {mu.shape}, covariance {sigma.shape}; they must be [D] and [D, D]")
    if len(mu) != length:
        raise UserError(
            f"{where}: {len(mu)} features, but {network} gives {length}: a reference made with another network"
        )
    for what, x in (("mean", mu), ("covariance", sigma)):
        if not np.isfinite(x).all():
            raise UserError(f"{where}: the {what} has {int((~np.isfinite(x)).sum())} non-finite values (NaN, inf)")
    scale = np.abs(sigma).max()
    if np.abs(sigma - sigma.T).max() > 1e-6 * scale:
        raise UserError(f"{where}: the covariance is not symmetric; restore the file")
    w, v = np.linalg.eigh((sigma + sigma.T) / 2)  # check and root cost one eigenproblem
    if w[0] < LEAST_EIGENVALUE * max(w[-1], 0) or w[-1] < 0:
        raise UserError(
            f"{where}: the covariance has the eigenvalue {w[0]:.3g} (largest {w[-1]:.3g}); allowed: none below "
            f"{LEAST_EIGENVALUE:g} of the largest"
        )
    return Gaussian(mu, sigma, (v * np.sqrt(np.maximum(w, 0))) @ v.T)


# ----------------------------------------------------------------------------------------------------
# Files


def _read_npz(path: Path) -> tuple[dict, int | None]:
    """({metric: (mu, sigma)}, num_images) of an .npz."""
    try:
        there = npz.names(path)
        wanted = {metric: keys for metric, keys in NPZ_KEYS.items() if all(key in there for key in keys)}
        arrays = npz.read(path, {key for keys in wanted.values() for key in keys} | {"num_images"} & set(there))
    except (npz.Damaged, OSError) as e:
        raise UserError(f"{path}: damaged reference statistics ({e}); restore the file") from None
    num = arrays.get("num_images")
    if num is not None and not (num.shape == () and num.dtype.kind in "iu" and 0 < num < 2**63):
        raise UserError(f"{path}: num_images is {num.dtype} {num.shape}; it must be one whole number above 0")
    found = {metric: tuple(arrays[key] for key in keys) for metric, keys in wanted.items()}
    return found, None if num is None else int(num)


def _read_pickle(path: Path) -> tuple[dict, int | None]:
    try:
        value = pickles.loads(path.read_bytes())
    except UnsafeOrDamaged as e:
        raise UserError(f"{path}: {e}") from None
    if isinstance(value, dict) and "mu" in value:
        value = {"fid": value}
    if not isinstance(value, dict):
        raise UserError(f'{path}: a {type(value).__name__}; it must hold {{"fid": {{"mu", "sigma"}}, ...}}')
    found = {
        metric: (part["mu"], part["sigma"])
        for metric, part in value.items()
        if metric in FRECHET and isinstance(part, dict) and {"mu", "sigma"} <= set(part)
    }
    num = value.get("num_images")
    return found, num if isinstance(num, int) else None


def is_statistics(path: Path) -> bool:
    """Whether a file holds statistics (pickle, or .npz that is not of images alone)."""
    if not path.is_file():
        return False
    if not image_sets.is_npz(path):
        with open(path, "rb") as f:
            return f.read(4) != b"PK\x03\x04"
    there = npz.names(path)
    return "arr_0" not in there or "mu" in there


def load_file(path: Path, lengths: dict[str, int], networks: dict[str, FeatureNet]) -> Reference:
    """Reference statistics of a file in one of the three formats.

    Args:
      lengths: {metric: feature length}, of those wanted. networks: {MAIN, DINOV2: network}.

    Raises:
      UserError: not such a file, without what a metric needs, or statistics that cannot be (see `gaussian`).
    """
    with open(path, "rb") as f:
        start = f.read(1)
        f.seek(0)
        digest = hashlib.file_digest(f, "sha256").hexdigest()[:12]
    is_npz = image_sets.is_npz(path)
    if not is_npz and start != b"\x80":
        raise UserError(f"{path}: no reference statistics; allowed: .npz (edm, OpenAI), .pkl (edm2), or a dataset")
    found, num = _read_npz(path) if is_npz else _read_pickle(path)
    real = None
    if collect.COMPARED & set(lengths):
        if not is_npz or not _has_images(path):
            raise UserError(
                f"{path}: no images (arr_0), which pr, kid and mind need; take the OpenAI file of the set, or a dataset"
            )
        real = dataclasses.replace(image_sets.of_npz(path), name=path.name)
        if real.num > REAL_IMAGES:
            real = image_sets.first(real, REAL_IMAGES)
    shape = None if real is None else real.shape
    return Reference(path.name, digest, _gaussians(found, lengths, networks, str(path)), num, real, shape)


def _has_images(path: Path) -> bool:
    return "arr_0" in npz.names(path)


def needed(wanted: Iterable[str]) -> list[str]:
    """Of metrics, the statistics they need.

    >>> needed(["is", "fid_inf"])
    ['fid']
    """
    own = [metric for metric in FRECHET if metric in wanted]
    return list(dict.fromkeys(own + ["fid" for metric in ("fid_inf", "bootstrap") if metric in wanted]))


def _gaussians(found: dict, lengths: dict[str, int], networks: dict[str, FeatureNet], where: str) -> dict:
    result = {}
    for metric in needed(lengths):
        if metric not in found:
            keys = " and ".join(NPZ_KEYS[metric])
            raise UserError(
                f"{where}: no statistics for {metric} ({keys}); it has {', '.join(found) or 'none'}: "
                "take another reference file, or a dataset"
            )
        length = lengths.get(metric, lengths.get("fid_inf", lengths.get("bootstrap", 0)))
        network = networks[FRECHET[metric][0]].name
        mu, sigma = found[metric]
        result[metric] = gaussian(mu, sigma, length, f"{where}: {metric}", network)
    return result


# ----------------------------------------------------------------------------------------------------
# Datasets


def cache_dir() -> Path:
    """$XDG_CACHE_HOME/ddo_jax/statistics, by default ~/.cache/ddo_jax/statistics."""
    return files.cache_dir("statistics")


def statistics(images: image_sets.ImageSet, network: FeatureNet, owner: str) -> dict:
    """{metric: (mu, sigma)} of a set of real images by one network: computed in one pass, or taken from the cache.

    Args:
      owner: MAIN or DINOV2. Of networks that are fitted here nothing is kept: the next run has another one.
    """
    path = cache_dir() / f"{images.content}-{network.digest}-{owner}-{network.levels}.npz"
    if not network.fitted and os.path.isfile(path):  # False, too, in a folder that may not be looked into
        try:
            return _read_npz(path)[0]
        except UserError:  # a torn copy of a cache: made again
            pass
    vectors = network.apply(np.zeros((1, *images.shape), np.uint8))
    metrics = [m for m, (name, vector) in FRECHET.items() if name == owner and vector in vectors]
    records = images.records(network.chunk)
    records = (r | {"image": to_levels(r["image"], images.levels, network.levels)} for r in records)
    found = collect.collect({owner: network}, metrics, records, images.num).moments
    if not network.fitted:
        buffer = io.BytesIO()
        arrays: dict[str, Any] = {key: x for m in metrics for key, x in zip(NPZ_KEYS[m], found[m], strict=True)}
        np.savez(buffer, num_images=np.int64(images.num), **arrays)
        files.keep(path, buffer.getvalue(), "statistics")
    return found


def open_dataset(name: str, split: str, directory: str | None) -> Callable[[int | None], image_sets.ImageSet]:
    """(name -> ImageSet of all images, or of a limited number) of a dataset source or an .npz of images.

    Raises:
      UserError: nothing of that name.
    """
    path = Path(name).expanduser()
    if path.is_file() and image_sets.is_npz(path):
        whole = image_sets.of_npz(path)
        return lambda limit: whole if limit is None or whole.num <= limit else image_sets.first(whole, limit)
    try:
        source: Any = None
        if name == "digits":
            source = sources.open_source(name, split, directory)
        else:
            source = image_sets.Streamed(sources.open_records(name, split, directory))
    except UserError as e:
        raise UserError(str(e).replace("config.data.name", "--ref")) from None
    return functools.partial(image_sets.of_source, source, levels=LEVELS.get(name, 256))


def of_images(opened: Any, lengths: dict[str, int], networks: dict[str, FeatureNet]) -> Reference:
    """Statistics of a set of real images.

    Args:
      opened: limit or None -> ImageSet, of all images or so many. lengths, networks: see `load_file`.
    """
    images, found = opened(None), dict[str, tuple]()
    for owner in sorted({FRECHET[metric][0] for metric in needed(lengths)}):
        found |= statistics(images, networks[owner], owner)
    real = opened(REAL_IMAGES) if collect.COMPARED & set(lengths) else None
    gaussians = _gaussians(found, lengths, networks, images.name)
    return Reference(images.name, images.content, gaussians, images.num, real, images.shape)


def open_reference(
    what: str,
    lengths: dict[str, int],
    networks: dict[str, FeatureNet],
    split: str = "train",
    directory: str | None = None,
) -> Reference:
    """A reference by name: a file of statistics, else a dataset.

    Args:
      what: FILE, known name or DATASET, see the top of this module. lengths: {metric: feature length}, of those wanted.
      networks: {MAIN, DINOV2: network}. split, directory: of a dataset (`sources.open_source`).

    Raises:
      UserError: nothing usable there.
    """
    if what in names.SOURCES:
        what = names.resolve(what)
    path = Path(what).expanduser()
    if path.suffix.lower() in (".npz", ".pkl") and not path.exists():
        raise UserError(f"--ref: {what}: no such file")
    try:
        if is_statistics(path):
            return load_file(path, lengths, networks)
    except OSError as e:
        raise UserError(f"--ref: {what}: {e.strerror or e}") from None
    return of_images(open_dataset(what, split, directory), lengths, networks)
