"""The evaluator: a set of images in, its numbers with their protocol out; of the loop, the report and the command."""

import dataclasses
import sys
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import numpy as np

from ddo_jax.core.stats import metrics, mind
from ddo_jax.data.images import to_levels
from ddo_jax.evaluate import collect, image_sets
from ddo_jax.evaluate.collect import DINOV2, MAIN, Collected
from ddo_jax.evaluate.features import FeatureNet
from ddo_jax.evaluate.records import Evaluation, Protocol, now, versions
from ddo_jax.evaluate.references import Reference


@dataclasses.dataclass(frozen=True)
class Images:
    """A set to be scored, read once.

    Attributes:
      name: heads its column. num, shape, levels, num_classes: of the images. records: {"image", "label", "id"}.
      made: how they were made, as fields of `Protocol`. lossy: see `image_sets.ImageSet`.
    """

    name: str
    num: int
    shape: tuple[int, ...]
    levels: int
    num_classes: int
    records: Iterable[dict]
    made: dict
    lossy: Collection[str] = ()


class First:
    """The records of a set as they pass, of which the first `num` images are kept."""

    def __init__(self, records: Iterable[dict], num: int) -> None:
        self._records, self._num = records, num
        self._parts: list[np.ndarray] = []

    def __iter__(self) -> Iterator[dict]:
        left = self._num
        for record in self._records:
            self._parts.append(record["image"][: max(left, 0)])
            left -= len(record["image"])
            yield record

    def images(self) -> np.ndarray:
        """uint8 [n, H, W, C], n <= num."""
        return np.concatenate(self._parts)


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """What judges.

    Attributes:
      networks: {MAIN, DINOV2: those that are needed}; a run's or a command's own network is MAIN. {}: nothing is
        scored, an evaluation says only how its images were made.
      references: {name: real images' statistics}; the first one counts; {} where only "is" is wanted.
      real: features of real images, for `collect.COMPARED`, or None.
    """

    networks: dict[str, FeatureNet]
    references: dict[str, Reference]
    real: np.ndarray | None = None

    def levels(self, have: int) -> int:
        """Grey levels that the networks take; `have`, those of the images, without any."""
        return next((network.levels for network in self.networks.values()), have)

    def collect(self, images: Images, wanted: Iterable[str]) -> Collected:
        """The set through the networks."""
        want = self.levels(images.levels)
        records = (r | {"image": to_levels(r["image"], images.levels, want)} for r in images.records)
        return collect.collect(self.networks, wanted, records, images.num)

    def score(self, images: Images, wanted: list[str], paired: bool = False) -> Evaluation:
        """Numbers and protocol of a set; the first metric is the one that counts.

        Args:
          wanted: of `collect.METRICS`. paired: with `Evaluation.influence`, if the first one is "fid".
        """
        if not (paired and wanted[:1] == ["fid"]):
            return self.of_collected(images, wanted, self.collect(images, wanted))
        collected = self.collect(images, [*wanted, "bootstrap"])
        first = next(iter(self.references.values()))
        blocks = collect.influence(collected, first, self.networks[MAIN])
        return dataclasses.replace(self.of_collected(images, wanted, collected), influence=blocks)

    def of_collected(self, images: Images, wanted: list[str], collected: Collected) -> Evaluation:
        """`score` of what `collect` kept."""
        values = collect.compute(wanted, collected, self.references, self.networks, self.real)
        return Evaluation(next(iter(values), ""), values, self.protocol(images, wanted, collected))

    def protocol(self, images: Images, wanted: Iterable[str], collected: Collected) -> Protocol:
        """How the numbers of a set were made."""
        first = next(iter(self.references.values()), None)
        kinds = {n.kind: n for n in self.networks.values()}
        return Protocol(
            n_samples=collected.num,
            content=collected.content,
            class_balance=balance(images, collected.labels),
            **image_sets.stored(images.name, images.shape, images.lossy, None if first is None else first.shape),
            **images.made,
            references={name: reference.about for name, reference in self.references.items()} or None,
            features={kind: f"{n.name} {n.digest}" for kind, n in kinds.items()},
            accuracy={kind: n.accuracy for kind, n in kinds.items() if n.accuracy} or None,
            resize={kind: n.resize for kind, n in kinds.items()},
            scale={kind: n.scale for kind, n in kinds.items()},
            feature_precision="float32, highest; statistics float64",
            covariance="1 / (N - 1)",
            metrics=self._settings(wanted, collected) or None,
            real=self._about_real(first),
            time=now(),
            **dict[str, Any](versions()),
        )

    def _about_real(self, first: Reference | None) -> str | None:
        if self.real is None or first is None or first.real is None:
            return None
        return f"{len(self.real)} images of {first.real.name}"

    def _settings(self, wanted: Iterable[str], collected: Collected) -> dict[str, str]:
        """What the metrics beside the Fréchet distances depend on."""
        found = {}
        if "is" in wanted:
            order = collect.is_order(collected.labels, collected.num)
            shuffled = f"permuted, seed {collect.IS_SEED}: the images lie by class"
            found["is"] = f"blocks of {collect.IS_BLOCK}, {'file order' if order is None else shuffled}, no bias"
        if "pr" in wanted:
            found["pr"] = "k = 3, float64"
        if "kid" in wanted and self.real is not None:
            found["kid"] = f"100 subsets of {min(collect.KID_SIZE, collected.num, len(self.real))}, seed 2020"
        if "mind" in wanted:
            found["mind"] = f"{mind.DIRECTIONS} directions, seed {mind.SEED}, factor 3 D; unequal sizes by quantiles"
        if "fid_inf" in wanted:
            found["fid_inf"] = f"{collect.INF_POINTS} subsets of {collect.INF_LEAST} to {collected.num}, seed 0"
        return found


def balance(images: Images, labels: np.ndarray | None) -> dict:
    """Class balance of a set; a word on stderr if its labels are not balanced."""
    if labels is None or images.num_classes < 2:
        return {"verdict": "one class" if images.num_classes == 1 else "unknown"}
    try:
        found = metrics.class_balance(labels, images.num_classes)
    except ValueError as e:
        return {"verdict": f"unknown ({e})"}
    low, high = int(found.counts.min()), int(found.counts.max())
    if found.verdict == "unbalanced":
        print(
            f"warning: {images.name}: {low} to {high} images a class: not balanced; a distance to the whole set then "
            "compares class frequencies, too",
            file=sys.stderr,
        )
    return {"verdict": found.verdict, "sigmas": round(found.sigmas, 2), "least": low, "most": high}


def with_real_features(evaluator: Evaluator, wanted: Iterable[str]) -> Evaluator:
    """The same with the features of real images that pr, kid and mind compare with, where they are wanted."""
    if not collect.COMPARED & set(wanted):
        return evaluator
    first = next(iter(evaluator.references.values()))
    assert first.real is not None, "`references` gives images wherever they are compared"
    return dataclasses.replace(evaluator, real=collect.features_of(evaluator.networks[MAIN], first.real))


__all__ = ["DINOV2", "MAIN", "Evaluator", "First", "Images", "balance", "with_real_features"]
