"""`python -m ddo_jax.posthoc DIR --std=0.075 --out=DIR|FILE`: EMAs of any length, after training.

DIR holds the snapshots of a run: ours (a workdir or a phase's directory will do) or released EDM2 .pkl files.
--std is a length, several (0.05,0.10), or a series (0.010,0.015,...,0.250). All snapshots up to --kimg take part.
The results, phema-<kimg>-<std>.safetensors, are checkpoints for ddo_jax.sample, .evaluate and .convert.
"""

import argparse
from pathlib import Path

from ddo_jax import cli
from ddo_jax.core.phema import MAX_STD
from ddo_jax.errors import UserError


def parser() -> cli.Parser:
    p = cli.Parser(prog="python -m ddo_jax.posthoc", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("snapshots", metavar="DIR", help="folder of snapshots, or a phase directory or workdir of ours")
    p.add_argument("--std", required=True, metavar="STD,...", help="wanted EMA lengths, relative standard deviations")
    p.add_argument("--out", metavar="DIR|FILE", help="a folder, or a .safetensors file for a single length")
    p.add_argument("--kimg", type=int, metavar="N", help="end at the snapshots with this number (default: the last)")
    p.add_argument("--dry_run", action="store_true", help="print snapshots and coefficients, and stop")
    p.add_argument("--force", action="store_true", help="replace outputs that exist")
    return p


def parse_lengths(text: str) -> list[float]:
    """EMA lengths; "..." goes on in the steps of the two numbers before it, to the one after it.

    >>> parse_lengths("0.05"), parse_lengths("0.010,0.015,...,0.030")
    ([0.05], [0.01, 0.015, 0.02, 0.025, 0.03])

    Raises:
      UserError: something else, a length out of range, or two that agree in three decimals.
    """
    lengths, items = [], text.split(",")
    try:
        for i, item in enumerate(items):
            if item != "...":
                lengths.append(float(item))
                continue
            (start, second), end = lengths[-2:], float(items[i + 1])
            count = round((end - second) / (second - start))
            if count < 1 or abs(second + count * (second - start) - end) > 1e-9:
                raise ValueError
            lengths += [round(second + k * (second - start), 9) for k in range(1, count)]
    except (ValueError, IndexError, ZeroDivisionError):
        series = "a length, several, or a series that arrives at its end, as in 0.010,0.015,...,0.250"
        raise UserError(f"--std: {text!r}; allowed: {series}") from None
    for std in lengths:
        if not 0 < std < MAX_STD:
            raise UserError(f"--std: {std}; allowed: above 0 and below {MAX_STD:.4f}")
    if len({f"{std:.3f}" for std in lengths}) < len(lengths):
        raise UserError(f"--std: {text!r}; allowed: lengths that differ in three decimals, as their files' names do")
    return lengths


def outputs(out: str | None, names: list[str], force: bool) -> list[Path]:
    """Where each result goes; nothing that exists is replaced without --force.

    Raises:
      UserError: see the words.
    """
    if out is None:
        raise UserError("--out: missing; give a folder, a .safetensors file, or --dry_run")
    path = Path(out)
    if path.suffix == ".safetensors" and not path.is_dir():
        if len(names) > 1:
            raise UserError(f"--out: {out} is one file for {len(names)} lengths; give a folder")
        if not path.parent.is_dir():
            raise UserError(f"--out: {out}: its folder does not exist; create it first")
        paths = [path]
    elif path.suffix in (".pkl", ".pth", ".pt", ".npz") or path.is_file():
        raise UserError(f"--out: {out}; allowed: a folder, or a file ending in .safetensors")
    else:
        paths = [path / name for name in names]
    for p in paths:
        if p.exists() and not force:
            raise UserError(f"{p}: exists; choose another --out, or pass --force to replace it")
    return paths


def last(found: list, kimg: int | None):
    """The snapshot at which the averages end.

    Raises:
      UserError: none has the number; shows those nearest to it.
    """
    ends = [s for s in found if s.images > 0 and kimg in (None, s.kimg)]
    if not ends:
        have = sorted({s.kimg for s in found if s.images > 0}, key=lambda n: abs(n - (kimg or 0)))
        raise UserError(f"--kimg: {kimg}; allowed: the number of a snapshot, as {have[:2]}")
    return ends[-1]


def table(snapshots, lengths: list[float], x, rest) -> str:
    """Coefficients, a snapshot a row, and what of each profile the snapshots cannot make."""
    rows = [["snapshot", "images", *(f"{std:.3f}" for std in lengths)]]
    rows += [[s.path.name, str(s.images), *(f"{v:+.4f}" for v in own)] for s, own in zip(snapshots, x, strict=True)]
    rows.append(["not rebuilt", "", *(f"{share:.2%}" for share in rest)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(f"{v:>{w}}" for v, w in zip(row, widths, strict=True)) for row in rows)


def run(args) -> None:
    from ddo_jax import files

    with files.full_disk("the files that were named are whole; with --force the same command makes all again"):
        reconstruct(args)


def reconstruct(args) -> None:
    from ddo_jax import files
    from ddo_jax.store import snapshots

    lengths = parse_lengths(args.std)
    found = snapshots.find(args.snapshots)
    end = last(found, args.kimg)
    used = [s for s in found if 0 < s.images <= end.images]
    x, rest = snapshots.fit(used, end.images, lengths)
    if args.dry_run:
        print(table(used, lengths, x, rest))
        return
    paths = outputs(args.out, [snapshots.file_name("phema", end.kimg, std) for std in lengths], args.force)
    states, metadata = snapshots.reconstruct(used, x)
    metadata[snapshots.MADE_KEY] = f"sum of {len(used)} snapshots"
    for path, state, std, share in zip(paths, states, lengths, rest, strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_bytes(path, snapshots.encode(state, metadata, end.images, std))
        print(f"{path}: from {len(used)} snapshots, {share:.2%} of its profile not rebuilt")


def main(argv: list[str] | None = None) -> None:
    cli.main(parser(), run, argv)


if __name__ == "__main__":
    main()
