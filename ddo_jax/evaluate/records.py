"""One scored set of images as a record: its numbers, and the protocol without which they mean nothing.

A line of evals.jsonl is `Evaluation.record()`, in a run and of the command. `SCHEMA` counts its forms; `read` knows
all of them.
"""

import dataclasses
import datetime
import functools
import importlib.metadata
import subprocess
from pathlib import Path
from typing import Any

import jax

import ddo_jax

SCHEMA = 2  # 1: before 2026-12, without a number
FULL = 50_000  # images; a score of fewer is never called "fid"
FREE = {"kid", "kid_std", "fid_inf", "fid_inf_slope", "accuracy"}  # names that say nothing of the number of images
FREE |= {"fd_x100", "fd"}  # of small networks, whose scores are compared with their like only


def named(metric: str, num: int) -> str:
    """A metric's name for `num` images: what depends on their number says it below 50,000.

    >>> named("fid", 5000), named("is", 50_000), named("fd_dinov2", 10_000), named("kid", 10)
    ('fid5k', 'is', 'fd_dinov2_10k', 'kid')
    """
    if num >= FULL or metric in FREE:
        return metric
    return f"{metric}{'_' if metric[-1].isdigit() else ''}{num / 1000:g}k"


@functools.cache
def versions() -> dict[str, str]:
    """What made a number: commit of this project (or its version, where it is installed without one), device."""
    packages = {p: importlib.metadata.version(p) for p in ("jax", "flax")}
    return {"commit": commit(Path(ddo_jax.__file__).parents[1]), **packages, "device": jax.devices()[0].device_kind}


def commit(root: Path) -> str:
    """The commit of the repository whose top is `root`; of any other repository around it nothing is said."""
    version = f"ddo_jax {ddo_jax.__version__}"
    if not (root / ".git").exists() or not (root / "ddo_jax" / "core" / "ddo.py").is_file():
        return version
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=False)
    return git.stdout.strip() if git.returncode == 0 else version


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How a number was made. What does not apply is None and left out of the record.

    Attributes:
      n_samples, content, size: of the images: how many, CRC-32 of their pixels, shape. files: of lossy kinds.
      labels: the rule in words. class_balance: the verdict on the labels as they came. quantised_to: grey levels.
      images: the set of files that was scored. subset: which of them. checkpoint: WHAT of the network that made them.
      weights: digest of its parameters. ema: the average they are. seeds: as ranges. purpose: "select" or "report".
      sampler, nfe, guidance, rng, dtype, precision: how they were sampled.
      references: {name: what they were compared with}; the first counts. features, resize, scale: {network: ...}.
      accuracy: {network: in words}, of those that were fitted here, on images that they had not seen.
      feature_precision, covariance: of the arithmetic. metrics: {metric: its settings}. real: for
        pr, kid and mind.
      time, commit, jax, flax, device: of the making.
    """

    n_samples: int
    content: str
    size: str
    quantised_to: str
    labels: str = "none"
    class_balance: dict | None = None
    files: str | None = None
    images: str | None = None
    subset: str | None = None
    checkpoint: str | None = None
    weights: str | None = None
    ema: str | None = None
    seeds: str | None = None
    purpose: str | None = None
    sampler: dict | None = None
    nfe: int | None = None
    guidance: dict | None = None
    rng: str | None = None
    dtype: str | None = None
    precision: str | None = None
    references: dict | None = None
    features: dict | None = None
    accuracy: dict | None = None
    resize: dict | None = None
    scale: dict | None = None
    feature_precision: str | None = None
    covariance: str | None = None
    metrics: dict | None = None
    real: str | None = None
    time: str = ""
    commit: str = ""
    jax: str = ""
    flax: str = ""
    device: str = ""

    def record(self) -> dict:
        return {k: v for k, v in dataclasses.asdict(self).items() if v is not None}


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The numbers of one set of images.

    Attributes:
      metric: the one that selects; "" where nothing is scored. values: {name: number}, all of them.
      protocol: how they were made.
      phase, step, images: where in a run: directory, optimizer steps, real images seen; or what was scored.
      influence: of equal blocks of the images on the score, to first order (`collect.influence`); () where nobody asks.
    """

    metric: str
    values: dict[str, float]
    protocol: Protocol
    phase: str = ""
    step: int = 0
    images: int = 0
    influence: tuple[float, ...] = ()

    @property
    def score(self) -> float | None:
        """What selects; None where nothing is scored."""
        return self.values[self.metric] if self.metric else None

    def record(self) -> dict:
        """One line of evals.jsonl."""
        place = {"phase": self.phase, "step": self.step, "images": self.images}
        blocks = {"influence": list(self.influence)} if self.influence else {}
        numbers = {"metric": self.metric, **self.values, **blocks}
        return {"schema": SCHEMA, **place, **numbers, "protocol": self.protocol.record()}


PLACE = {"schema", "phase", "step", "images", "metric", "protocol", "what", "round", "improved", "start", "candidate"}


def read(record: dict) -> Evaluation:
    """The evaluation of a record, of this version or an older one.

    Raises:
      ValueError: no such record, or one of a later version.
    """
    try:
        schema = record.get("schema", 1)
        if schema > SCHEMA:
            raise ValueError(f"schema {schema}: written by a later version of ddo_jax")
        protocol = record["protocol"] if schema == SCHEMA else _protocol_of_1(record["protocol"])
        values = {k: float(v) for k, v in record.items() if k not in PLACE and isinstance(v, int | float)}
        place = (record.get("phase", record.get("what", "")), record.get("step", 0), record.get("images", 0))
        return Evaluation(record["metric"], values, Protocol(**protocol), *place, tuple(record.get("influence", ())))
    except (KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"no record of an evaluation: {type(e).__name__}: {e}") from None


_NOTES = ("is", "pr", "kid", "fid_inf", "bootstrap", "against")


def _protocol_of_1(old: dict) -> dict[str, Any]:
    """The fields of `Protocol` from a record of schema 1, in a run or of the command."""
    new = {k: v for k, v in old.items() if k in Protocol.__dataclass_fields__}
    new |= {"content": old.get("content", "not recorded"), "size": old.get("size", "not recorded")}
    if isinstance(old.get("seeds"), list):
        new["seeds"] = "-".join(map(str, old["seeds"]))
    if isinstance(old.get("ema"), dict):
        new["ema"] = "; ".join(f"{phase}: {length}" for phase, length in old["ema"].items())
    for key in ("features", "scale"):
        if key in old and not isinstance(old[key], dict):
            new[key] = {"main": old[key]}
    if old.get("guidance") is not None and not isinstance(old["guidance"], dict):
        new["guidance"] = {"cfg": old["guidance"]}
    if old.get("reference") is not None:
        new["references"] = {"reference": old["reference"]}
    notes = {k: old[k] for k in _NOTES if k in old}
    return new | ({"metrics": notes} if notes else {})


@dataclasses.dataclass(frozen=True)
class Round:
    """How a round ended.

    Attributes:
      number: from 1. improved: whether its best is better than its reference; else that one is kept.
      start: the reference's own score, None where nothing is scored. candidate: directory of the best candidate.
      best: its best evaluation.
    """

    number: int
    improved: bool
    start: float | None
    candidate: str
    best: Evaluation

    def record(self) -> dict:
        """best.json."""
        own = {"round": self.number, "improved": self.improved, "start": self.start, "candidate": self.candidate}
        return own | self.best.record()


def read_round(record: dict) -> Round:
    """The inverse of `Round.record`, of any version."""
    return Round(record["round"], record["improved"], record["start"], record["candidate"], read(record))
