"""Snapshots of power-function EMAs, and averages of other lengths made from them afterwards (specs/edm2.md section 9).

A snapshot is one file `<anything>-<thousands of images>-<std>.safetensors` (or a released .pkl) with the released
names, parameters in float16. Buffers (`BUFFERS`) are constants: never averaged, never rounded.
"""

import json
import mmap
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from etils import epath
from tqdm import tqdm

from ddo_jax import convert, files, sharding
from ddo_jax.convert import origin, safetensors
from ddo_jax.convert.inert import UnsafeOrDamaged
from ddo_jax.convert.read import CONFIG_KEY, ENCODER_KEY, KIND_KEY
from ddo_jax.core import phema
from ddo_jax.errors import UserError

IMAGES_KEY, STD_KEY = "ddo_jax_images", "ddo_jax_std"  # metadata: exact images, EMA length
MADE_KEY = "ddo_jax_posthoc"  # metadata of reconstructions, so that they are not taken for snapshots
BUFFERS = (".freqs", ".phases", ".resample_filter")  # how their names end

_NAME = re.compile(r"[^.].*-(\d{1,12})-(\d+\.\d+)\.(pkl|safetensors)")


class Snapshot(NamedTuple):
    """A file. kimg: the number in its name. images: its exact time. std: its EMA length."""

    path: Path
    kimg: int
    images: int
    std: float


def file_name(prefix: str, kimg: int, std: float) -> str:
    """
    >>> file_name("network-snapshot", 1048, 0.05)
    'network-snapshot-0001048-0.050.safetensors'
    """
    return f"{prefix}-{kimg:07d}-{std:.3f}.safetensors"


def encode(arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str], images: int, std: float) -> bytes:
    """The bytes of a file: parameters in float16, buffers as they are.

    Raises:
      UserError: a value that float16 does not have.
    """
    half = {}
    for name, array in arrays.items():
        with np.errstate(over="ignore"):
            half[name] = array if name.endswith(BUFFERS) else np.asarray(array).astype(np.float16)
        if not np.isfinite(half[name]).all():
            largest = np.abs(array).max()
            raise UserError(f"{name}: |x| up to {largest:g}; allowed in float16: up to 65504; this network diverged")
    return safetensors.dumps(half, {**metadata, IMAGES_KEY: str(images), STD_KEY: f"{std}"})


# -- training ---------------------------------------------------------------------------------------------


def write(directory: epath.Path, family, frozen, averages: Mapping[float, dict], images: int) -> None:
    """One file for every average {std: params}; all processes take part, process 0 writes.

    Args:
      images: consumed since the averages began.
    """
    frozen = jax.tree.map(sharding.to_host, frozen)
    for std, params in averages.items():
        params = jax.tree.map(sharding.to_host, params)
        if jax.process_index() == 0:
            directory.mkdir(parents=True, exist_ok=True)
            path = directory / file_name("network-snapshot", images // 1000, std)
            files.write_bytes(path, encode(*family.export(params, frozen), images, std))


# -- afterwards -------------------------------------------------------------------------------------------


def find(what: str) -> list[Snapshot]:
    """The snapshots of a folder, in the order (images, std).

    Args:
      what: the folder, or a phase's directory or workdir of ours: then those of its `snapshots/`, or else of
        `pretrain/snapshots/`. Reconstructions lying beside them are left out.

    Raises:
      UserError: none there; two of one time and length; a file that is damaged or has an impossible length.
    """
    if "://" in what:
        raise UserError(f"{what}: snapshots are read from a local folder; copy them to one first")
    root = Path(os.path.expanduser(what))
    for directory in (root, root / "snapshots", *(root / phase / "snapshots" for phase in ("pretrain", "adapt"))):
        matches = [m for p in _entries(directory) if (m := _NAME.fullmatch(p)) and not p.startswith("phema-")]
        found = [s for m in matches if (s := _snapshot(directory / m[0], int(m[1]), m[2])) is not None]
        if found:
            break
    else:
        raise UserError(
            f"{what}: no snapshots (<name>-<thousands of images>-<std>.safetensors or .pkl) in it, its snapshots/ or "
            "its pretrain/snapshots/; a run writes them with ema_stds and snapshot_every"
        )
    found.sort(key=lambda s: (s.images, s.std))
    for a, b in zip(found, found[1:], strict=False):
        if a[2:] == b[2:]:
            raise UserError(f"{b.path}: of the same time and length as {a.path.name}; keep one of them in the folder")
    return found


def _entries(directory: Path) -> list[str]:
    try:
        return sorted(p.name for p in directory.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as e:
        raise UserError(f"{directory}: cannot be read ({e.strerror})") from None


def _snapshot(path: Path, kimg: int, std: str) -> Snapshot | None:
    """Time and length, from the file's own record where it has one; None of a reconstruction."""
    metadata = _metadata(path) if path.suffix == ".safetensors" else {}
    if MADE_KEY in metadata:
        return None
    try:
        images = int(metadata.get(IMAGES_KEY, phema.snapshot_images(kimg)))
        length = float(metadata.get(STD_KEY, std))
    except ValueError as e:
        raise UserError(f"{path}: its record of images and EMA length is damaged ({e})") from None
    if not 0 < length < phema.MAX_STD or images < 0:
        raise UserError(
            f"{path}: an EMA of length {length} after {images} images; allowed: a length above 0 and below "
            f"{phema.MAX_STD:.4f}; if it is no snapshot, move it away"
        )
    return Snapshot(path, kimg, images, length)


def _metadata(path: Path) -> dict:
    """Of a safetensors file; its arrays are not read."""
    try:
        with open(path, "rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return safetensors.read_header(data)[1]
    except (UnsafeOrDamaged, OSError, ValueError) as e:  # ValueError: an empty file cannot be mapped
        raise UserError(f"{path}: {e}; make it again, or move it away") from None


def fit(snapshots: Sequence[Snapshot], images: int, stds: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """How to sum snapshots to averages of the lengths `stds` that end at `images`.

        x [N, M] of `phema.posthoc_coefficients`;    rest [M] = |sum_i x_i p_i - p| / |p|

    Args:
      snapshots: N, all with 0 < images <= `images`, which is one of them.

    Returns:
      (x, rest), float64. rest is the share of the wanted profile p that these snapshots cannot make: 0 is exact.
    """
    t, own = [s.images for s in snapshots], [s.std for s in snapshots]
    x = phema.posthoc_coefficients(t, own, images, stds)
    gram = phema.inner_products(t, own, t, own)
    mixed = phema.inner_products(t, own, images, stds)
    norm = np.array([phema.inner_products(images, std, images, std)[0, 0] for std in stds])
    square = np.sum(x * (gram @ x) - 2 * x * mixed, axis=0) + norm
    return x, np.sqrt(np.maximum(square / norm, 0))


def reconstruct(snapshots: Sequence[Snapshot], x: np.ndarray) -> tuple[list[dict], dict]:
    """Sums of snapshots, one file at a time: memory for M networks in float32 and one file.

    Args:
      snapshots: N, in order; buffers and metadata are those of the last one. x: [N, M] weights.

    Returns:
      (M state dicts {released name: float32 array, buffers as stored}, metadata of the network).

    Raises:
      UserError: a file that is damaged, or of another network than the first one.
    """
    sums, first, names, buffers, metadata = [], None, [], {}, {}
    for snapshot, shares in zip(tqdm(snapshots, "snapshots", disable=None), x, strict=True):
        state, metadata, identity = _read(snapshot.path)
        if first is None:
            first = identity
            zeros = {name: array.shape for name, array in state.items() if not name.endswith(BUFFERS)}
            sums = [{name: np.zeros(shape, np.float32) for name, shape in zeros.items()} for _ in shares]
        _check_same(snapshot.path, identity, snapshots[0].path.name, first)
        for name in sums[0]:
            wide = state[name].astype(np.float32)
            for total, share in zip(sums, shares, strict=True):
                total[name] += np.float32(share) * wide
        names, buffers = list(state), {name: array for name, array in state.items() if name.endswith(BUFFERS)}
        del state  # before the next file is read
    return [{name: {**total, **buffers}[name] for name in names} for total in sums], metadata


def _read(path: Path) -> tuple[dict, dict[str, str], dict]:
    """(state dict, metadata with which `convert.read` and `load` know the network again, what must not differ)."""
    try:
        released = convert.read(path)
    except UnsafeOrDamaged as e:
        raise UserError(str(e)) from None
    metadata = {k: v for k, v in released.extras.get("metadata", {}).items() if k.startswith("ddo_jax_")}
    metadata = {k: v for k, v in metadata.items() if k not in (IMAGES_KEY, STD_KEY)}
    metadata |= origin.made_from(str(path), origin.of_metadata(metadata) or origin.SCRATCH).metadata()
    kind = metadata.setdefault(KIND_KEY, released.kind)
    if kind is None:
        raise UserError(f"{path}: a network of no kind that is known; allowed: {', '.join(sorted(convert.KINDS))}")
    if released.config:
        metadata[CONFIG_KEY] = json.dumps(released.config)
    if released.extras.get("encoder"):
        metadata[ENCODER_KEY] = json.dumps(released.extras["encoder"])
    identity = {"kind": kind, **{f"config.{k}": v for k, v in released.config.items()}}
    identity |= {f"shape of {name}": list(array.shape) for name, array in released.state_dict.items()}
    return released.state_dict, metadata, identity


def _check_same(path: Path, identity: dict, first_name: str, first: dict) -> None:
    for key in dict.fromkeys([*first, *identity]):
        a, b = (v.get(key, "absent") for v in (first, identity))
        if a != b:
            raise UserError(
                f"{path}: {key} is {b}, but {a} in {first_name}; all snapshots of the folder must be of one network"
            )
