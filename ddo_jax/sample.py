"""`python -m ddo_jax.sample --checkpoint=WHAT --out=DIR --seeds=0-49999`: generate images.

WHAT is a workdir or checkpoint of ours, a released .pkl/.pth/.safetensors file, a known name, hf://..., gs://...
An image depends on its seed and label alone. The same command again makes only what is missing.
"""

import argparse

from ddo_jax import cli
from ddo_jax.generate import flags


def parser() -> cli.Parser:
    p = cli.Parser(prog="python -m ddo_jax.sample", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--checkpoint", required=True, metavar="WHAT")
    p.add_argument("--out", required=True, metavar="DIR|FILE.npz")
    p.add_argument("--seeds", default="0-63", help="ranges and numbers, as in 0-49999 (default: 0-63)")
    p.add_argument(
        "--labels", default="balanced", help="balanced (by position), random (by seed), or classes, as in 3,5 or cat"
    )
    p.add_argument("--batch", type=int, default=64, help="images at a time, over all devices (default: 64)")
    p.add_argument("--subdirs", action="store_true", help="one folder per thousand seeds")
    flags.add_flags(p)
    cli.add_distributed(p)
    return p


def run(args) -> None:
    from ddo_jax import compilation
    from ddo_jax.generate import folder, seeds

    wanted = flags.request(args, seeds.parse_seeds(args.seeds))
    with compilation.cache():
        print(f"{folder.run(wanted, args.out, args.subdirs)} images written to {args.out}")


def main(argv: list[str] | None = None) -> None:
    cli.main(parser(), run, argv)


if __name__ == "__main__":
    main()
