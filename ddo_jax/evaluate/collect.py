"""One pass over a set of images, and the metrics from what the pass kept.

    collect(networks, metrics, records) -> Collected     means and covariances; features only where a metric needs them
    compute(metrics, collected, reference, networks) -> {name: value}

Images are never held, features only for is (logits), pr, kid, mind, fid_inf and the bootstrap (float32, 410 MB at
50,000).
"""

import dataclasses
import functools
import itertools
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from ddo_jax.core.stats import frechet, metrics, mind
from ddo_jax.data.images import to_levels
from ddo_jax.errors import UserError
from ddo_jax.evaluate.features import FeatureNet
from ddo_jax.evaluate.image_sets import ImageSet
from ddo_jax.evaluate.records import named

CHUNK = 256  # images that go through a network at a time
ROWS = 1024  # features of a subset that are merged at a time
REAL_IMAGES = 10_000  # of the reference, for the metrics that compare features
COMPARED = {"pr", "kid", "mind"}  # those
IS_BLOCK, IS_SEED = 5000, 0
KID_SIZE = 1000
BLOCKS = 64  # of images, whose share in a score is recorded
INF_POINTS, INF_LEAST = 15, 5000  # subsets of fid_inf: how many, smallest

# Of a dict of networks: the one of --network, and second opinions beside it.
MAIN, DINOV2, EFFICIENTNET = "main", "dinov2", "efficientnet"
FRECHET = {"fid": (MAIN, "features"), "sfid": (MAIN, "spatial")}
FRECHET |= {"fd_dinov2": (DINOV2, "features"), "fd_efficientnet": (EFFICIENTNET, "features")}
KEPT = {"is": (MAIN, "logits"), **dict.fromkeys(("pr", "kid", "mind", "fid_inf", "bootstrap"), (MAIN, "features"))}
METRICS = ("fid", "sfid", "is", "pr", "kid", "mind", "fd_dinov2", "fd_efficientnet", "fid_inf")


# ----------------------------------------------------------------------------------------------------
# One pass


def rechunk(records: Iterable[dict], size: int = CHUNK) -> Iterator[dict]:
    """The same images in records of `size`, whatever size they come in."""
    held, n = [], 0
    for record in records:
        held.append(record)
        n += len(record["image"])
        if n >= size:
            whole = _joined(held)
            for i in range(0, n - size + 1, size):
                yield {k: v[i : i + size] for k, v in whole.items()}
            left = n % size
            held, n = ([{k: v[len(v) - left :] for k, v in whole.items()}] if left else []), left
    if held:
        yield _joined(held)


def _joined(records: list[dict]) -> dict:
    if len(records) == 1:
        return records[0]
    arrays = {k: np.concatenate([r[k] for r in records]) for k in records[0] if k != "id"}
    return arrays | {"id": list(itertools.chain(*(r["id"] for r in records)))}


class Accumulator:
    """Mean and covariance of features that come in batches of any size."""

    def __init__(self) -> None:
        self._moments: frechet.Moments | None = None

    def add(self, rows: np.ndarray) -> None:
        part = frechet.moments_of(rows)
        self._moments = part if self._moments is None else frechet.merge(self._moments, part)

    def finalize(self) -> tuple[np.ndarray, np.ndarray]:
        """(mu, sigma) of everything added."""
        assert self._moments is not None
        return frechet.finalize(self._moments)


@dataclasses.dataclass(frozen=True)
class Collected:
    """What a pass kept.

    Attributes:
      num: images. content: CRC-32 of their pixels.
      moments: {metric of FRECHET: (mu, sigma)}. kept: {(network, vector): float32 [N, D]}.
      labels: int32 [N] or None. ids: their names. accuracy: share of images that the main network puts into their own
        class; None where it is no classifier, or nobody knows the classes.
    """

    num: int
    content: str
    moments: dict[str, tuple[np.ndarray, np.ndarray]]
    kept: dict[tuple[str, str], np.ndarray]
    labels: np.ndarray | None
    ids: list[str]
    accuracy: float | None = None


def networks_of(wanted: Iterable[str]) -> set[str]:
    """The networks (MAIN, DINOV2, EFFICIENTNET) that metrics need."""
    return {{**FRECHET, **KEPT}[metric][0] for metric in wanted}


def probe(networks: dict[str, FeatureNet], wanted: Iterable[str], shape: tuple[int, ...]) -> dict[str, int]:
    """Feature length of every metric, by one black image: what cannot work fails before anything is generated.

    Raises:
      UserError: a network that does not take such images or does not give what a metric needs.
    """
    lengths = {}
    for name, network in networks.items():
        try:
            vectors = network.apply(np.zeros((1, *shape), np.uint8))
        except (TypeError, ValueError) as e:
            reason = str(e).splitlines()[0][:120]
            raise UserError(
                f"{network.name} does not take images of {shape}: {reason}; take another --network"
            ) from None
        for metric in wanted:
            owner, vector = {**FRECHET, **KEPT}[metric]
            if owner == name and vector not in vectors:
                raise UserError(f"--metrics: {metric} needs {vector}, which {network.name} has not; use inception")
            if owner == name:
                lengths[metric] = vectors[vector].shape[1]
    return lengths


class _Kept:
    """Rows kept in one array, allocated once where their number is known."""

    def __init__(self, num: int) -> None:
        self._num, self._at = num, 0
        self._rows = np.empty((0, 0), np.float32)

    def add(self, rows: np.ndarray) -> None:
        if not self._at:
            self._rows = np.empty((self._num, rows.shape[1]), np.float32)
        self._rows[self._at : self._at + len(rows)] = rows
        self._at += len(rows)

    def rows(self) -> np.ndarray:
        return self._rows[: self._at]


def collect(networks: dict[str, FeatureNet], wanted: Iterable[str], records: Iterable[dict], num: int) -> Collected:
    """Run images through the networks once.

    Args:
      networks: {MAIN: ..., DINOV2: ...}, those that are needed. wanted: metrics, and "bootstrap".
      records: {"image": uint8 [n, H, W, C], "label" and "id" where known}; each goes through the networks and into the
        moments as it comes (see `rechunk`). num: images in all, at most.

    Raises:
      UserError: fewer than 2 images.
    """
    wanted = list(wanted)
    sums = {metric: Accumulator() for metric in wanted if metric in FRECHET}
    if "bootstrap" in wanted:
        sums.setdefault("fid", Accumulator())
    kept = {KEPT[metric]: _Kept(num) for metric in wanted if metric in KEPT}
    labels, ids, crc, right, n = [], [], 0, None, 0
    for record in records:
        images = np.ascontiguousarray(record["image"])
        crc = zlib.crc32(images.data, crc)
        vectors = {name: network.apply(images) for name, network in networks.items()}
        for metric, moments in sums.items():
            owner, vector = FRECHET[metric]
            moments.add(vectors[owner][vector])
        for (owner, vector), rows in kept.items():
            rows.add(vectors[owner][vector])
        n += len(images)
        ids.extend(record.get("id", ()))
        if "label" in record:
            labels.append(record["label"])
            if (logits := vectors.get(MAIN, {}).get("class_logits")) is not None:
                right = (right or 0) + int(np.sum(np.argmax(logits, 1) == record["label"]))
    if n < 2:
        raise UserError(f"{n} images: a score needs at least 2")
    return Collected(
        n,
        f"{crc:08x}",
        {metric: moments.finalize() for metric, moments in sums.items()},
        {key: rows.rows() for key, rows in kept.items()},
        np.concatenate(labels) if labels else None,
        ids,
        None if right is None else right / n,
    )


def features_of(network: FeatureNet, images: ImageSet) -> np.ndarray:
    """Features of a set, float32 [N, D]."""
    kept = _Kept(images.num)
    for record in images.records(CHUNK):
        kept.add(network.apply(to_levels(record["image"], images.levels, network.levels))["features"])
    return kept.rows()


# ----------------------------------------------------------------------------------------------------
# Metrics


def check(wanted: Iterable[str], num: int) -> None:
    """Refuse before any image is made what so few images cannot give."""
    if "fid_inf" in wanted and num < 2 * INF_LEAST:
        raise UserError(
            f"--metrics: fid_inf of {num} images; it extrapolates from {INF_LEAST} and more: at least {2 * INF_LEAST}"
        )
    for metric, least in (("pr", 4), ("kid", 2), ("mind", 2)):
        if metric in wanted and num < least:
            raise UserError(f"--metrics: {metric} of {num} images; at least {least}")


def is_order(labels: np.ndarray | None, num: int) -> np.ndarray | None:
    """A permutation where the images lie class by class, else None: file order."""
    if labels is None or not (np.diff(labels) >= 0).all() or labels[0] == labels[-1]:
        return None
    return np.random.RandomState(IS_SEED).permutation(num)


def _inception_score(collected: Collected) -> dict[str, float]:
    order = is_order(collected.labels, collected.num)
    found = metrics.inception_score(collected.kept[MAIN, "logits"], block=IS_BLOCK, order=order)
    return {named("is", collected.num): found.mean, named("is_std", collected.num): found.std}


def _distance(reference: Any, metric: str, moments: tuple) -> float:
    g = reference.gaussians[metric]
    return frechet.frechet_distance(g.mu, g.sigma, *moments, root1=g.root)


def fid_infinity(features: np.ndarray, distance: Callable, points: int = INF_POINTS, least: int = INF_LEAST) -> dict:
    """Extrapolation over random subsets of `points` sizes from `least` to all, seed 0.

    Args:
      features: [N, D]. distance: (mu, sigma) -> Frechet distance to the reference.
    """
    sizes = np.linspace(least, len(features), points).round().astype(int)
    rng, values = np.random.RandomState(0), []
    for size in sizes:
        rows, moments = np.sort(rng.choice(len(features), size, replace=False)), Accumulator()
        for i in range(0, size, ROWS):
            moments.add(features[rows[i : i + ROWS]])
        values.append(distance(moments.finalize()))
    intercept, slope = metrics.frechet_infinity(sizes, values)
    return {"fid_inf": intercept, "fid_inf_slope": slope}


def compute(
    wanted: Iterable[str], collected: Collected, references: dict, networks: dict[str, FeatureNet], real: Any = None
) -> dict[str, float]:
    """The values of metrics, named for the number of images.

    Args:
      wanted: of METRICS. collected: of `collect`. references: {name: `references.Reference`}; {} for "is" alone.
        Distances to others than the first have "_NAME" behind their own name.
      real: features of real images [M, D], for COMPARED.

    Returns:
      {"fid5k": ...}; of is, pr and kid several values, as the spread over blocks or subsets; "accuracy", where there is
      one.
    """
    out, num = {}, collected.num
    first = next(iter(references.values()), None)
    for metric in wanted:
        if metric in FRECHET:
            network = networks[FRECHET[metric][0]]
            name = network.named(num) if metric == "fid" else named(metric, num)
            for i, (other, reference) in enumerate(references.items()):
                distance = _distance(reference, metric, collected.moments[metric])
                out[f"{name}_{other}" if i else name] = network.scale * distance
        elif metric == "is":
            out |= _inception_score(collected)
        elif metric == "pr":
            pr = metrics.precision_recall(real, collected.kept[MAIN, "features"])
            names = ("precision", "recall", "density", "coverage")
            out |= {named(name, num): getattr(pr, name) for name in names}
        elif metric == "kid":
            size = min(KID_SIZE, num, len(real))
            kid = metrics.kid(real, collected.kept[MAIN, "features"], size=size)
            out |= {"kid": kid.mean, "kid_std": kid.std}
        elif metric == "mind":
            out[named("mind", num)] = mind.mind(real, collected.kept[MAIN, "features"])
        else:
            line = fid_infinity(collected.kept[MAIN, "features"], functools.partial(_distance, first, "fid"))
            out |= {name: networks[MAIN].scale * value for name, value in line.items()}
    return out | ({} if collected.accuracy is None else {"accuracy": collected.accuracy})


def influence(collected: Collected, reference: Any, network: FeatureNet, blocks: int = BLOCKS) -> tuple[float, ...]:
    """To first order, what each of equal blocks of the images adds to the Frechet distance: score = const + their mean.

    Two sets from the same seeds are compared block by block (`core.search.half_interval`). Needs "bootstrap" among what
    was collected. Images beyond a multiple of `blocks` are left out, as are blocks beyond the images.
    """
    g, blocks = reference.gaussians["fid"], min(blocks, collected.num)
    rows = metrics.frechet_influence(collected.kept[MAIN, "features"], *collected.moments["fid"], g.mu, g.root)
    whole = rows[: len(rows) // blocks * blocks].reshape(blocks, -1)
    return tuple(float(f"{x:.7g}") for x in network.scale * whole.mean(1))


def compare(a: Collected, b: Collected, reference: Any, network: FeatureNet) -> tuple[metrics.Interval, bool]:
    """(95 % interval of the distance of a less that of b, whether the images are paired by their names).

    Raises:
      UserError: sets of different size: the bias of a Frechet distance depends on it.
    """
    if a.num != b.num:
        raise UserError(
            f"--against: {b.num} images against {a.num}; the bias depends on it: take equal numbers (--num)"
        )
    g = reference.gaussians["fid"]
    influences = [
        network.scale * metrics.frechet_influence(c.kept[MAIN, "features"], *c.moments["fid"], g.mu, g.root)
        for c in (a, b)
    ]
    difference = network.scale * (
        _distance(reference, "fid", a.moments["fid"]) - _distance(reference, "fid", b.moments["fid"])
    )
    paired = a.ids == b.ids
    return metrics.bootstrap_difference(difference, *influences, paired=paired), paired
