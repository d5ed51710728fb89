"""`python -m ddo_jax.evaluate --images=DIR|zip|npz|pool --ref=FILE|DATASET --metrics=fid,is,...`
`python -m ddo_jax.evaluate --checkpoint=WHAT --ref=... --seeds=0-49999`: generate and score in one pass.

Prints a table and appends one line per set, with its whole protocol, to evals.jsonl.
"""

import argparse
import datetime
import json
import os
import sys
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from absl import logging

from ddo_jax.errors import UserError
from ddo_jax.sample import SAMPLER, Parser, add_sampler_flags, request

RESIZE = {
    "inception": "TF1 bilinear 299, (x - 128) / 128",
    "dinov2": "bicubic antialiased 224, float",
    "digits": "none",
}
NETWORK_LEVELS = {"digits": 17}  # grey levels that a network takes, if not 256


def parser() -> Parser:
    p = Parser(prog="python -m ddo_jax.evaluate", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    what = p.add_mutually_exclusive_group(required=True)
    what.add_argument("--images", metavar="DIR|ZIP|NPZ|POOL", help="images to score")
    what.add_argument("--checkpoint", metavar="WHAT", help="generate and score (as in ddo_jax.sample)")
    p.add_argument(
        "--ref",
        metavar="FILE|DATASET",
        help="statistics: edm .npz, edm2 .pkl, OpenAI .npz, edm2-img64-ref; or digits, zip:, folder:, tfds:",
    )
    p.add_argument("--metrics", default="fid", help="of fid, sfid, is, pr, kid, fd_dinov2, fid_inf (default: fid)")
    p.add_argument(
        "--seeds", action="append", metavar="RANGE", help="as in 0-49999 (default); repeated: minimum, mean, deviation"
    )
    p.add_argument("--num", type=int, help="only so many images: the first seeds; of files a random choice, seed 0")
    p.add_argument(
        "--labels", default="balanced", help="balanced (by position), random (by seed), or classes, as in 3,5 or cat"
    )
    add_sampler_flags(p)
    p.add_argument(
        "--sweep", metavar="KEY=V1,V2", help="guidance=0,0.5,1 (or another sampler setting): a table and a picture"
    )
    p.add_argument("--plot", metavar="FILE.png", help="picture of --sweep (default: sweep-KEY.png beside --out)")
    p.add_argument("--batch", type=int, default=64, help="images sampled at a time, over all devices (default: 64)")
    p.add_argument(
        "--network", default="inception", choices=("inception", "digits"), help="features (default: inception)"
    )
    p.add_argument("--weights", metavar="FILE", help="of the network (default: its known name)")
    p.add_argument("--dinov2_weights", metavar="FILE", help="of fd_dinov2 (default: its known name)")
    p.add_argument("--keep", metavar="DIR|FILE.npz", help="also write the images; .npz: arr_0 for the OpenAI evaluator")
    p.add_argument("--out", default="evals.jsonl", metavar="FILE", help="records are appended (default: evals.jsonl)")
    p.add_argument("--bootstrap", action="store_true", help="95%% interval of the difference to --against")
    p.add_argument("--against", metavar="DIR|ZIP|NPZ|POOL", help="another set of as many images")
    p.add_argument("--split", default="train", help="of a --ref DATASET (default: train)")
    p.add_argument("--data_dir", metavar="DIR", help="of a --ref DATASET (default: $TFDS_DATA_DIR)")
    p.add_argument("--distributed", action="store_true", help="several hosts, see launch/")
    return p


class Job(NamedTuple):
    """One set to score.

    Attributes:
      name: heads its column. num, shape, levels, num_classes: of the images. records: the images, once.
      protocol: how they were made. lossy: see `image_sets.ImageSet`.
    """

    name: str
    num: int
    shape: tuple[int, ...]
    levels: int
    num_classes: int
    records: Iterable[dict]
    protocol: dict
    lossy: Collection[str] = ()


# ----------------------------------------------------------------------------------------------------
# Where images come from


def image_job(what: str, num: int | None, levels: int) -> Job:
    """A set of files."""
    from ddo_jax.evaluate import collect, image_sets

    images = image_sets.open_images(what, num, levels)
    subset = {} if num is None else {"subset": f"{images.num} at random, seed 0"}
    made = {"images": images.name, "seeds": None, "labels": "as stored", "quantised_to": "uint8 as stored", **subset}
    return Job(
        images.name,
        images.num,
        images.shape,
        images.levels,
        images.num_classes,
        images.records(collect.CHUNK),
        made,
        images.lossy,
    )


def checkpoint_jobs(args) -> list[Job]:
    """One job a seed range, or one a value of --sweep; the network is loaded once."""
    from ddo_jax.run import sampling

    ranges = args.seeds or ["0-49999"]
    seeds = [sampling.parse_seeds(text) for text in ranges]
    if args.num and (short := [t for t, s in zip(ranges, seeds, strict=True) if len(s) < args.num]):
        raise UserError(f"--num: {args.num}, but --seeds={short[0]} has fewer")
    if args.num:
        seeds = [s[: args.num] for s in seeds]
    ranges = [sampling.seeds_text(s) for s in seeds]
    sampling.check_apart(seeds)
    asked = request(args, seeds[0])
    if args.sweep:
        key, _ = swept(args)
        models = sampling.sweep(asked, *swept(args))
        return [generated(asked, model, ranges[0], seeds[0], f"{key}={value:g}") for value, model in models]
    model = sampling.open_generator(asked)
    return [generated(asked, model, text, s, text) for text, s in zip(ranges, seeds, strict=True)]


def swept(args) -> tuple[str, list]:
    """(key, values) of --sweep."""
    from ddo_jax.evaluate import sweep

    return sweep.parse(args.sweep, {"guidance": float} | {k: v for k, v in SAMPLER.items() if v in (int, float)})


def generated(asked, model, text: str, seeds, name: str) -> Job:
    """The images of a seed range (`text`) as a job."""
    from ddo_jax.run import sampling

    def records(seeds, labels) -> Iterator[dict]:
        at = 0
        for record in model.sampler(model.params, model.frozen, seeds, labels):
            ids = [f"{seed:06d}" for seed in seeds[at : at + len(record["image"])]]
            at += len(ids)
            yield record | {"id": ids}

    family = model.family
    rules = {"balanced": "balanced by position", "random": f"random by seed ({asked.rng})"}
    made = model.protocol | {
        "labels": rules.get(asked.labels, f"class {asked.labels}") if family.num_classes else "none",
        "quantised_to": f"uint8, {family.levels} levels",
        "seeds": text,
    }
    labels = sampling.labels_of(asked, seeds, family, model.classes)  # by its own positions, whatever the other ranges
    shape = family.image_shape
    return Job(name, len(seeds), shape, family.levels, family.num_classes, records(seeds, labels), made)


# ----------------------------------------------------------------------------------------------------
# Images kept


def check_keep(args) -> None:
    """What cannot be written is refused before anything is made."""
    if args.keep is None:
        return
    path = Path(args.keep)
    if path.suffix != ".npz" and args.images:
        raise UserError("--keep: a folder keeps generated images; --images can be written as one .npz only")
    if path.suffix == ".npz" and len(args.seeds or ()) > 1:
        raise UserError(f"--keep: {args.keep} holds one range of seeds, {len(args.seeds)} are given; take a folder")
    if path.suffix == ".npz" and path.exists():
        raise UserError(f"--keep: {args.keep} exists; take another name, or move it aside")


def kept(job: Job, keep: str | None) -> Iterator[dict]:
    """The records of a job, written on the way if `keep` says so."""
    import jax

    from ddo_jax.evaluate import image_sets

    if keep is None or jax.process_index() > 0:
        yield from job.records
        return
    path = Path(keep)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        writer = (
            image_sets.NpzWriter(path, job.num, job.shape) if path.suffix == ".npz" else image_sets.FolderWriter(path)
        )
        try:
            for record in job.records:
                pixels = image_sets.to_levels(record["image"], job.levels, 256)
                writer.add(record, image_sets.in_colour(pixels) if path.suffix == ".npz" else pixels)
                yield record
        except BaseException:
            writer.abort()
            raise
        writer.close()
    except OSError as e:
        raise UserError(f"--keep: {keep}: {e.strerror or e}; must name a folder or .npz that can be written") from None


# ----------------------------------------------------------------------------------------------------
# Scoring


def parse_metrics(text: str, bootstrap: bool) -> list[str]:
    """
    >>> parse_metrics("fid,is", False)
    ['fid', 'is']
    """
    from ddo_jax.evaluate import collect

    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in collect.METRICS:
            raise UserError(f"--metrics: {name!r}; allowed: {', '.join(collect.METRICS)}")
    if not names:
        raise UserError(f"--metrics: {text!r}; allowed: {', '.join(collect.METRICS)}")
    return list(dict.fromkeys(names + (["bootstrap"] if bootstrap else [])))


def load_networks(args, wanted: list[str]) -> dict:
    """{MAIN, DINOV2: FeatureNet}, those that the metrics need; absent weights are named before anything is made."""
    from ddo_jax.data import sources
    from ddo_jax.evaluate import collect, features, references

    owners = collect.networks_of(wanted)
    asked = {collect.MAIN: (args.network, args.weights), collect.DINOV2: ("dinov2", args.dinov2_weights)}
    asked = {owner: asked[owner] for owner in sorted(owners)}
    if args.network == "digits" and collect.DINOV2 in asked:
        raise UserError("--metrics: fd_dinov2 takes photographs, not the digits of --network=digits")
    for name, weights in asked.values():
        features.check(name, weights)
    networks = {}
    for owner, (name, weights) in asked.items():
        train = sources.open_source("digits", "train", args.data_dir) if name == "digits" else None
        cache = str(references.cache_dir()) if name == "digits" else None
        networks[owner] = features.get_features(name, train, cache, weights)
    return networks


def protocol(args, job: Job, wanted, collected, reference, networks, real) -> dict:
    """How a number was made."""
    from ddo_jax.evaluate import collect, image_sets
    from ddo_jax.run import prepare

    names = {collect.MAIN: args.network, collect.DINOV2: "dinov2"}
    found = {
        "n_samples": collected.num,
        "content": collected.content,
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **job.protocol,
        "class_balance": balance(job, collected.labels),
        **image_sets.stored(job.name, job.shape, job.lossy, None if reference is None else reference.shape),
        "reference": None,
        "features": {names[o]: f"{n.name} {n.digest}" for o, n in networks.items()},
        "resize": {names[o]: RESIZE[names[o]] for o in networks},
        "scale": {names[o]: n.scale for o, n in networks.items()},
        "feature_precision": "float32, highest; statistics float64",
        "covariance": "1 / (N - 1)",
        **prepare.versions(),
    }
    if reference is not None:
        images = "?" if reference.num_images is None else reference.num_images
        found["reference"] = f"{reference.name} {reference.digest} ({images} images)"
    if "is" in wanted:
        order = collect.is_order(collected.labels, collected.num)
        shuffled = f"permuted, seed {collect.IS_SEED}: the images lie by class"
        found["is"] = f"blocks of {collect.IS_BLOCK}, {'file order' if order is None else shuffled}, no bias"
    if real is not None:
        found["real"] = f"{len(real)} images of {reference.real.name}"
    if "pr" in wanted:
        found["pr"] = "k = 3, float64"
    if "kid" in wanted:
        found["kid"] = f"100 subsets of {min(collect.KID_SIZE, collected.num, len(real))}, seed 2020"
    if "fid_inf" in wanted:
        found["fid_inf"] = f"{collect.INF_POINTS} subsets of {collect.INF_LEAST} to {collected.num}, seed 0"
    return found


def balance(job: Job, labels) -> dict:
    """Class balance of a set; a word on stderr if its labels are not balanced."""
    from ddo_jax.core import metrics

    if labels is None or job.num_classes < 2:
        return {"verdict": "one class" if job.num_classes == 1 else "unknown"}
    try:
        found = metrics.class_balance(labels, job.num_classes)
    except ValueError as e:
        return {"verdict": f"unknown ({e})"}
    low, high = int(found.counts.min()), int(found.counts.max())
    if found.verdict == "unbalanced":
        print(
            f"warning: {job.name}: {low} to {high} images a class: not balanced; a distance to the whole set then "
            "compares class frequencies, too",
            file=sys.stderr,
        )
    return {"verdict": found.verdict, "sigmas": round(found.sigmas, 2), "least": low, "most": high}


def run_pass(job: Job, keep, networks, wanted, levels: int):
    """One job through the networks."""
    from tqdm import tqdm

    from ddo_jax.evaluate import collect, image_sets

    def records():
        with tqdm(total=job.num, desc=job.name, unit=" images", disable=None) as bar:
            for record in kept(job, keep):
                bar.update(len(record["image"]))
                yield record | {"image": image_sets.to_levels(record["image"], job.levels, levels)}

    return collect.collect(networks, wanted, records(), job.num)


def append(path: str, record: dict) -> None:
    """One more line; a line torn by a kill is closed first."""
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab+") as f:
            torn = False
            if f.seek(0, os.SEEK_END):
                f.seek(-1, os.SEEK_END)
                torn = f.read(1) != b"\n"
            f.write((b"\n" if torn else b"") + json.dumps(record, default=float).encode() + b"\n")
    except OSError as e:
        raise UserError(f"--out: {path}: {e.strerror or e}; must name a file that can be written") from None


def record(path: str, records: list[dict]) -> list[dict]:
    """`append` those that can be written; the others."""
    left = []
    for made in records:
        try:
            append(path, made)
        except UserError:
            left.append(made)
    return left


def table(columns: dict[str, dict[str, float]]) -> str:
    """Values of one or several sets, aligned; of several also minimum, mean and standard deviation (N - 1).

    >>> print(table({"0-4": {"fid": 2.0}, "5-9": {"fid": 4.0}}))
    metric  0-4  5-9  min  mean   std
    fid       2    4    2     3  1.414
    """
    names = list(dict.fromkeys(name for values in columns.values() for name in values))
    rows = [["metric", *columns]]
    if len(columns) > 1:
        rows[0] += ["min", "mean", "std"]
    for name in names:
        values = np.array([values.get(name, np.nan) for values in columns.values()])
        spread = [values.min(), values.mean(), values.std(ddof=1)] if len(columns) > 1 else []
        rows.append([name, *(f"{v:.6g}" if len(columns) == 1 else f"{v:.4g}" for v in [*values, *spread])])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    return "\n".join(lines)


def check(args, wanted: list[str]) -> None:
    """Flags that contradict each other."""
    if args.batch < 1:
        raise UserError(f"--batch: {args.batch}; allowed: at least 1")
    if args.bootstrap != (args.against is not None):
        raise UserError("--bootstrap and --against belong together: the interval is that of a difference of two sets")
    if args.bootstrap and len(args.seeds or ()) > 1:
        raise UserError("--bootstrap: compares two sets; give one range of --seeds")
    if args.sweep and (args.images or args.bootstrap or args.keep or len(args.seeds or ()) > 1):
        raise UserError("--sweep: of one --checkpoint and one range of --seeds, without --keep and --bootstrap")
    if args.plot and Path(args.plot).suffix not in (".png", ".pdf", ".svg"):
        raise UserError(f"--plot: {args.plot}; allowed: a file that ends in .png, .pdf or .svg")
    if args.plot and not args.sweep:
        raise UserError("--plot: the picture of a --sweep, which is missing")
    if args.sweep:
        swept(args)
    if args.images and args.seeds:
        raise UserError("--seeds: of --checkpoint; --images are scored as they are")
    if args.num is not None and args.num < 2:
        raise UserError(f"--num: {args.num}; allowed: at least 2")
    if args.ref is None and wanted != ["is"]:
        raise UserError(f"--ref: missing; {', '.join(m for m in wanted if m != 'is')} need a reference")
    check_keep(args)


def compare(args, collected, reference, networks, wanted, levels: int) -> tuple[dict, dict]:
    """({name: value} of the interval, its protocol)."""
    from ddo_jax.evaluate import collect

    other = image_job(args.against, args.num, levels)
    against = run_pass(other, None, networks, [m for m in wanted if m == "bootstrap"], levels)
    interval, paired = collect.compare(collected, against, reference, networks[collect.MAIN])
    name = networks[collect.MAIN].named(collected.num)
    parts = ("difference", "std", "low", "high")
    values = {f"{name}_{part}": getattr(interval, part) for part in parts}
    how = "paired by name" if paired else "independent"
    return values, {"against": f"{other.name} {against.content}", "bootstrap": f"2000 resamples, 95 %, {how}, seed 0"}


def evaluate(args) -> None:
    """Score what the flags name.

    Raises:
      UserError: anything that cannot be; before images are generated, where it can be known.
    """
    import jax

    from ddo_jax.evaluate import collect, references

    wanted = parse_metrics(args.metrics, args.bootstrap)
    check(args, wanted)
    networks = load_networks(args, wanted)
    levels = NETWORK_LEVELS.get(args.network, 256)
    jobs = checkpoint_jobs(args) if args.checkpoint else [image_job(args.images, args.num, levels)]
    for job in jobs:
        collect.check(wanted, job.num)
    lengths = collect.probe(networks, wanted, jobs[0].shape)
    reference = real = None
    if wanted != ["is"]:
        reference = references.open_reference(args.ref, lengths, networks, levels, args.split, args.data_dir)
    if {"pr", "kid"} & set(wanted):
        real = collect.features_of(networks[collect.MAIN], reference.real, levels)
    columns, records = {}, []
    for job in jobs:
        if job.num < collect.FULL:
            print(f"note: {job.name}: {job.num} images: compare only with the same number", file=sys.stderr)
        collected = run_pass(job, args.keep, networks, wanted, levels)
        plain = [metric for metric in wanted if metric != "bootstrap"]
        values = collect.compute(plain, collected, reference, networks, real)
        made = protocol(args, job, wanted, collected, reference, networks, real)
        if args.bootstrap:
            interval, how = compare(args, collected, reference, networks, wanted, levels)
            values, made = values | interval, made | how
        columns[job.name] = values
        what = args.checkpoint or args.images
        records.append({"what": what, "metric": next(iter(values)), **values, "protocol": made})
        if jax.process_index() == 0:
            records = record(args.out, records)
    if jax.process_index() == 0:
        against = f"against {reference.name} {reference.digest}, " if reference else ""
        nets = ", ".join(f"{n.name} {n.digest}" for n in networks.values())
        print(f"{args.checkpoint or args.images}: {jobs[0].num} images a set, {against}{nets}")
        print(trade_off(args, columns) if args.sweep else table(columns))
        for left in records:  # the numbers stand above, whatever becomes of the file
            append(args.out, left)
        print(f"recorded in {args.out}")


def trade_off(args, columns: dict) -> str:
    """Prints the table of a sweep; its picture is written, and the words below it are returned."""
    from ddo_jax.evaluate import sweep

    key, values = swept(args)
    rows = dict(zip(values, columns.values(), strict=True))
    path = Path(args.plot or Path(args.out).with_name(f"sweep-{key}.png"))
    print(sweep.table(key, rows))  # before the picture, which may not be written
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep.figure(key, rows, f"{args.checkpoint}, {key}").savefig(path, dpi=120)
    except (OSError, ValueError) as e:  # ValueError: a format that matplotlib does not know
        raise UserError(f"--plot: {path}: {e}; must name a .png that can be written") from None
    return f"* best of its column; picture: {path}"


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    logging.set_verbosity(logging.ERROR)
    if args.distributed:
        import jax

        jax.distributed.initialize()
    from ddo_jax.run import compilation

    try:
        with compilation.cache():
            evaluate(args)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
