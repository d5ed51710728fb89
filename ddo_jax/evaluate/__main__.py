"""`python -m ddo_jax.evaluate --images=DIR|zip|npz|pool --ref=FILE|DATASET --metrics=fid,is,...`
`python -m ddo_jax.evaluate --checkpoint=WHAT --ref=... --seeds=0-49999`: generate and score in one pass.

Prints a table and appends one line per set, with its whole protocol, to evals.jsonl.
"""

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ddo_jax import cli
from ddo_jax.errors import UserError
from ddo_jax.generate import flags

if TYPE_CHECKING:  # --help loads no jax
    from ddo_jax.evaluate.collect import Collected
    from ddo_jax.evaluate.evaluator import Evaluator
    from ddo_jax.evaluate.records import Evaluation


def parser() -> cli.Parser:
    raw = argparse.RawTextHelpFormatter
    p = cli.Parser(prog="python -m ddo_jax.evaluate", description=__doc__, formatter_class=raw)
    what = p.add_mutually_exclusive_group(required=True)
    what.add_argument("--images", metavar="DIR|ZIP|NPZ|POOL", help="images to score")
    what.add_argument("--checkpoint", metavar="WHAT", help="generate and score (as in ddo_jax.sample)")
    p.add_argument(
        "--ref",
        metavar="FILE|DATASET",
        help="statistics: edm .npz, edm2 .pkl, OpenAI .npz, edm2-img64-ref; or digits, zip:, folder:, tfds:",
    )
    p.add_argument(
        "--metrics",
        default="fid",
        help="of fid, sfid, is, pr, kid, mind, fd_dinov2, fd_efficientnet, fid_inf (default: fid)",
    )
    p.add_argument(
        "--seeds", action="append", metavar="RANGE", help="as in 0-49999 (default); repeated: minimum, mean, deviation"
    )
    p.add_argument("--num", type=int, help="only so many images: the first seeds; of files a random choice, seed 0")
    p.add_argument(
        "--labels", default="balanced", help="balanced (by position), random (by seed), or classes, as in 3,5 or cat"
    )
    flags.add_flags(p)
    p.add_argument(
        "--sweep", metavar="KEY=V1,V2", help="guidance=0,0.5,1 (or another sampler setting): a table and a picture"
    )
    p.add_argument("--plot", metavar="FILE.png", help="picture of --sweep (default: sweep-KEY.png beside --out)")
    p.add_argument("--batch", type=int, default=64, help="images sampled at a time, over all devices (default: 64)")
    p.add_argument(
        "--network",
        default="inception",
        choices=("inception", "digits", "classifier", "efficientnet"),
        help="features (default: inception); classifier: the one of a run, --weights=WORKDIR/features-classifier.npz",
    )
    p.add_argument("--weights", metavar="FILE", help="of the network (default: its known name)")
    p.add_argument("--dinov2_weights", metavar="FILE", help="of fd_dinov2 (default: its known name)")
    p.add_argument("--keep", metavar="DIR|FILE.npz", help="also write the images; .npz: arr_0 for the OpenAI evaluator")
    p.add_argument("--out", default="evals.jsonl", metavar="FILE", help="records are appended (default: evals.jsonl)")
    p.add_argument("--bootstrap", action="store_true", help="95%% interval of the difference to --against")
    p.add_argument("--against", metavar="DIR|ZIP|NPZ|POOL", help="another set of as many images")
    p.add_argument("--split", default="train", help="of a --ref DATASET (default: train)")
    p.add_argument("--data_dir", metavar="DIR", help="of a --ref DATASET (default: $TFDS_DATA_DIR)")
    cli.add_distributed(p)
    return p


# ----------------------------------------------------------------------------------------------------
# Where images come from


def of_files(what: str, num: int | None, levels: int) -> Any:
    """A set of files."""
    from ddo_jax.evaluate import collect, image_sets
    from ddo_jax.evaluate.evaluator import Images

    found = image_sets.open_images(what, num, levels)
    made = {"images": found.name, "labels": "as stored", "quantised_to": "uint8 as stored"}
    made |= {} if num is None else {"subset": f"{found.num} at random, seed 0"}
    records = collect.rechunk(found.records(collect.CHUNK))
    return Images(found.name, found.num, found.shape, found.levels, found.num_classes, records, made, found.lossy)


def of_checkpoint(args: argparse.Namespace) -> list:
    """One set a seed range, or one a value of --sweep; the network is loaded once."""
    from ddo_jax.generate import request, seeds

    ranges = args.seeds or ["0-49999"]
    numbers = [seeds.parse_seeds(text) for text in ranges]
    if args.num and (short := [t for t, s in zip(ranges, numbers, strict=True) if len(s) < args.num]):
        raise UserError(f"--num: {args.num}, but --seeds={short[0]} has fewer")
    if args.num:
        numbers = [s[: args.num] for s in numbers]
    seeds.check_apart(numbers)
    asked = flags.request(args, numbers[0])
    if args.sweep:
        key, _ = swept(args)
        models = request.sweep(asked, *swept(args))
        return [generated(asked, model, numbers[0], f"{key}={value:g}") for value, model in models]
    model = request.open_generator(asked)
    return [generated(asked, model, s, seeds.seeds_text(s)) for s in numbers]


def swept(args: argparse.Namespace) -> tuple[str, list]:
    """(key, values) of --sweep."""
    from ddo_jax.evaluate import sweep

    return sweep.parse(args.sweep, {"guidance": float} | {k: v for k, v in flags.SAMPLER.items() if v in (int, float)})


def generated(asked: Any, model: Any, numbers: np.ndarray, name: str) -> Any:
    """The images of a list of seeds."""
    from ddo_jax.evaluate import collect
    from ddo_jax.evaluate.evaluator import Images
    from ddo_jax.generate import request, seeds

    spec = model.family.spec
    rules = {"balanced": "balanced by position", "random": f"random by seed ({asked.rng})"}
    made = model.protocol | {
        "labels": rules.get(asked.labels, f"class {asked.labels}") if spec.num_classes else "none",
        "quantised_to": f"uint8, {spec.levels} levels",
        "seeds": seeds.seeds_text(numbers),
    }
    labels = request.labels_of(asked, numbers, model.family, model.classes)  # by its own positions
    records = collect.rechunk(model.images(numbers, labels))
    return Images(name, len(numbers), spec.image_shape, spec.levels, spec.num_classes, records, made)


# ----------------------------------------------------------------------------------------------------
# Images kept


def check_keep(args: argparse.Namespace) -> None:
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


def kept(images: Any, keep: str | None) -> Any:
    """The set, its images written on the way if `keep` says so."""
    import jax
    from etils import epath

    from ddo_jax.generate import writers

    if keep is None or jax.process_index() > 0:
        return images
    path = epath.Path(keep)
    writer: writers.NpzWriter | writers.FolderWriter
    if path.suffix == ".npz":
        writer = writers.NpzWriter(path, images.num, images.shape)
    else:
        writer = writers.FolderWriter(lambda name: path / f"{name}.png")

    def records() -> Iterator[dict]:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            yield from writers.written(images.records, writer, images.levels)
        except OSError as e:
            raise UserError(
                f"--keep: {keep}: {e.strerror or e}; must name a folder or .npz that can be written"
            ) from None

    return dataclasses.replace(images, records=records())


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


def load_networks(args: argparse.Namespace, wanted: list[str]) -> dict:
    """{MAIN, DINOV2, EFFICIENTNET: FeatureNet}, those that the metrics need; absent weights are named before
    anything is made."""
    from ddo_jax.data import sources
    from ddo_jax.evaluate import collect, features, references

    owners = collect.networks_of(wanted)
    asked = {collect.MAIN: (args.network, args.weights), collect.DINOV2: ("dinov2", args.dinov2_weights)}
    asked |= {collect.EFFICIENTNET: ("efficientnet", None)}
    asked = {owner: asked[owner] for owner in sorted(owners)}
    beside = sorted(asked.keys() - {collect.MAIN})
    if args.network == "digits" and beside:
        raise UserError(f"--metrics: fd_{beside[0]} takes photographs, not the digits of --network=digits")
    for name, weights in asked.values():
        features.check(name, weights)
    networks = {}
    for owner, (name, weights) in asked.items():
        fit = None
        if name == "digits":
            train, test = (sources.open_source("digits", split, args.data_dir) for split in ("train", "test"))
            fit = features.Fit(train, test, references.LEVELS["digits"], references.cache_dir() / "features-digits.npz")
        networks[owner] = features.get_features(name, fit, weights)
    return networks


def run_pass(images: Any, keep: str | None, evaluator: "Evaluator", wanted: list[str]) -> "Collected":
    """One set through the networks, with a bar."""
    from tqdm import tqdm

    whole = kept(images, keep)

    def records() -> Iterator[dict]:
        with tqdm(total=images.num, desc=images.name, unit=" images", disable=None) as bar:
            for record in whole.records:
                bar.update(len(record["image"]))
                yield record

    return evaluator.collect(dataclasses.replace(images, records=records()), wanted)


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


def check(args: argparse.Namespace, wanted: list[str]) -> None:
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


def open_evaluator(args: argparse.Namespace, wanted: list[str], shape: tuple[int, ...], networks: dict) -> "Evaluator":
    """The evaluator of the flags, for images of a shape."""
    from ddo_jax.evaluate import collect, references
    from ddo_jax.evaluate.evaluator import Evaluator, with_real_features

    lengths, found = collect.probe(networks, wanted, shape), {}
    if wanted != ["is"]:
        found["ref"] = references.open_reference(args.ref, lengths, networks, args.split, args.data_dir)
    return with_real_features(Evaluator(networks, found), wanted)


def against(args: argparse.Namespace, evaluator: "Evaluator", collected: "Collected") -> tuple[dict, dict]:
    """({name: value} of the interval of --bootstrap, its protocol)."""
    from ddo_jax.evaluate import collect

    other = of_files(args.against, args.num, evaluator.levels(256))
    compared = run_pass(other, None, evaluator, ["bootstrap"])
    network = evaluator.networks[collect.MAIN]
    interval, paired = collect.compare(collected, compared, evaluator.references["ref"], network)
    name = network.named(collected.num)
    parts = ("difference", "std", "low", "high")
    values = {f"{name}_{part}": getattr(interval, part) for part in parts}
    how = "paired by name" if paired else "independent"
    about = {"against": f"{other.name} {compared.content}", "bootstrap": f"2000 resamples, 95 %, {how}, seed 0"}
    return values, about


def score(args: argparse.Namespace, evaluator: "Evaluator", images: Any, wanted: list[str]) -> "Evaluation":
    """The evaluation of one set, with the interval of --bootstrap where it is asked for."""
    collected = run_pass(images, args.keep, evaluator, wanted)
    found = evaluator.of_collected(images, [metric for metric in wanted if metric != "bootstrap"], collected)
    found = dataclasses.replace(found, phase=args.checkpoint or args.images)
    if not args.bootstrap:
        return found
    values, about = against(args, evaluator, collected)
    protocol = dataclasses.replace(found.protocol, metrics={**(found.protocol.metrics or {}), **about})
    return dataclasses.replace(found, values=found.values | values, protocol=protocol)


def evaluate(args: argparse.Namespace) -> None:
    """Score what the flags name.

    Raises:
      UserError: anything that cannot be; before images are generated, where it can be known.
    """
    import jax

    from ddo_jax.evaluate import collect
    from ddo_jax.evaluate.records import FULL

    wanted = parse_metrics(args.metrics, args.bootstrap)
    check(args, wanted)
    networks = load_networks(args, wanted)
    levels = next(iter(networks.values())).levels
    sets = of_checkpoint(args) if args.checkpoint else [of_files(args.images, args.num, levels)]
    for images in sets:
        collect.check(wanted, images.num)
    evaluator = open_evaluator(args, wanted, sets[0].shape, networks)
    columns, records = {}, []
    for images in sets:
        if images.num < FULL:
            print(f"note: {images.name}: {images.num} images: compare only with the same number", file=sys.stderr)
        found = score(args, evaluator, images, wanted)
        columns[images.name] = found.values
        records.append(found.record())
        if jax.process_index() == 0:
            records = record(args.out, records)
    if jax.process_index() == 0:
        reference = "".join(f"against {r.name} {r.digest}, " for r in evaluator.references.values())
        nets = ", ".join(f"{n.name} {n.digest}" for n in networks.values())
        print(f"{args.checkpoint or args.images}: {sets[0].num} images a set, {reference}{nets}")
        print(trade_off(args, columns) if args.sweep else table(columns))
        for left in records:  # the numbers stand above, whatever becomes of the file
            append(args.out, left)
        print(f"recorded in {args.out}")


def trade_off(args: argparse.Namespace, columns: dict) -> str:
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


def run(args: argparse.Namespace) -> None:
    from ddo_jax import compilation

    with compilation.cache():
        evaluate(args)


def main(argv: list[str] | None = None) -> None:
    cli.main(parser(), run, argv)


if __name__ == "__main__":
    main()
