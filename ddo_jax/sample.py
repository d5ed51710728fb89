"""`python -m ddo_jax.sample --checkpoint=WHAT --out=DIR --seeds=0-49999`: generate images.

WHAT is a workdir or checkpoint of ours, a released .pkl/.pth/.safetensors file, a known name, hf://..., gs://...
An image depends on its seed and label alone. The same command again makes only what is missing.
"""

import argparse
import sys

from absl import logging

from ddo_jax.errors import UserError

SAMPLER = {"num_steps": int, **dict.fromkeys(("sigma_min", "sigma_max", "rho", "s_churn", "s_min", "s_max"), float)}
SAMPLER["s_noise"] = float


class Parser(argparse.ArgumentParser):
    """One line and exit code 2, as everywhere."""

    def error(self, message):
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)


def parser() -> Parser:
    p = Parser(prog="python -m ddo_jax.sample", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--checkpoint", required=True, metavar="WHAT")
    p.add_argument("--out", required=True, metavar="DIR|FILE.npz")
    p.add_argument("--seeds", default="0-63", help="ranges and numbers, as in 0-49999 (default: 0-63)")
    p.add_argument("--labels", default="balanced", help="balanced (by position), random (by seed), or a class id")
    p.add_argument("--batch", type=int, default=64, help="images at a time, over all devices (default: 64)")
    p.add_argument("--subdirs", action="store_true", help="one folder per thousand seeds")
    p.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the image path")
    p.add_argument("--precision", default="highest", choices=("default", "high", "highest"))
    p.add_argument(
        "--rng",
        default="jax",
        choices=("jax", "torch-cpu"),
        help="torch-cpu: the released sampler's CPU streams (published figures used CUDA's generator)",
    )
    p.add_argument("--distributed", action="store_true", help="several hosts, see launch/")
    for name, kind in SAMPLER.items():
        p.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS if name != "num_steps" else "sampler steps")
    return p


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    logging.set_verbosity(logging.ERROR)
    if args.distributed:
        import jax

        jax.distributed.initialize()
    from ddo_jax.run import compilation, sampling

    given = {name: getattr(args, name) for name in SAMPLER if getattr(args, name) is not None}
    try:
        if args.batch < 1:
            raise UserError(f"--batch: {args.batch}; allowed: at least 1")
        request = sampling.Request(
            args.checkpoint,
            sampling.parse_seeds(args.seeds),
            args.labels,
            args.batch,
            given,
            args.rng,
            args.dtype,
            args.precision,
        )
        with compilation.cache():
            print(f"{sampling.run(request, args.out, args.subdirs)} images written to {args.out}")
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
