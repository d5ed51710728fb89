"""`python -m ddo_jax.sample --checkpoint=WHAT --out=DIR --seeds=0-49999`: generate images.

WHAT is a workdir or checkpoint of ours, a released .pkl/.pth/.safetensors file, a known name, hf://..., gs://...
An image depends on its seed and label alone. The same command again makes only what is missing.
"""

import argparse
import math
import sys

from absl import logging

from ddo_jax.arguments import PathParser
from ddo_jax.errors import UserError

SAMPLER = {"solver": str, "num_steps": int}  # flags that override the checkpoint's own sampler
SAMPLER |= dict.fromkeys(("sigma_min", "sigma_max", "rho", "s_churn", "s_min", "s_max", "s_noise"), float)
SAMPLER |= {"top_k": int, "top_p": float, "more_smooth": None}  # of VARs
DTYPES = ("float32", "bfloat16", "float16")


class Parser(PathParser):
    """One line and exit code 2, as everywhere."""

    def error(self, message):
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)


def add_sampler_flags(p: argparse.ArgumentParser) -> None:
    """How images are made; shared with ddo_jax.evaluate."""
    p.add_argument("--solver", choices=("heun", "dpmv3"), help="dpmv3: DPM-Solver-v3 (default: the checkpoint's own)")
    p.add_argument("--num_steps", type=int, help="sampler steps (default: the checkpoint's own; dpmv3: 25)")
    p.add_argument("--guide", metavar="WHAT", help="a second network: unconditional (CFG) or weaker (autoguidance)")
    p.add_argument(
        "--guidance",
        type=float,
        help="with --guide: D_guide + guidance (D - D_guide), 1 is none.\nVAR, which guides itself: t = guidance "
        "s/(S-1) at scale s, 0 is none (default: none; of a VAR run its config's)",
    )
    p.add_argument("--top_k", type=int, help="VAR: keep the k likeliest codes; 0: all (default: the checkpoint's own)")
    p.add_argument("--top_p", type=float, help="VAR: keep the likeliest codes of this total probability; 0: all")
    p.add_argument(
        "--more_smooth", action="store_true", default=None, help="VAR: soft codes, for pictures to look at, not for FID"
    )
    p.add_argument("--vae", metavar="WHAT", help="autoencoder or tokenizer (default: the checkpoint's own)")
    p.add_argument("--dtype", default="float32", choices=DTYPES, help="of the image path when sampling")
    p.add_argument("--precision", default="highest", choices=("default", "high", "highest"), help="of the sampler")
    p.add_argument(
        "--rng",
        default="jax",
        choices=("jax", "torch-cpu"),
        help="torch-cpu: the released sampler's CPU streams (published figures used CUDA's generator)",
    )
    for name, kind in SAMPLER.items():
        if name.startswith(("s_", "sigma_")) or name == "rho":
            p.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)


def request(args, seeds):
    """The Request that the flags of a command mean."""
    from ddo_jax.run import sampling

    given = {name: getattr(args, name) for name in SAMPLER if getattr(args, name) is not None}
    if args.batch < 1:
        raise UserError(f"--batch: {args.batch}; allowed: at least 1")
    if args.guidance is not None and not math.isfinite(args.guidance):
        raise UserError(f"--guidance: {args.guidance}; allowed: a finite number")
    swept = (getattr(args, "sweep", None) or "").startswith("guidance=")
    if args.guide is not None and args.guidance in (None, 1) and not swept:
        raise UserError(
            f"--guide={args.guide} with --guidance={args.guidance}: set --guidance=1.4 or another weight, too"
        )
    made = (args.rng, args.dtype, args.precision, args.guide, args.guidance, args.vae)
    return sampling.Request(args.checkpoint, seeds, args.labels, args.batch, given, *made)


def parser() -> Parser:
    p = Parser(prog="python -m ddo_jax.sample", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--checkpoint", required=True, metavar="WHAT")
    p.add_argument("--out", required=True, metavar="DIR|FILE.npz")
    p.add_argument("--seeds", default="0-63", help="ranges and numbers, as in 0-49999 (default: 0-63)")
    p.add_argument(
        "--labels", default="balanced", help="balanced (by position), random (by seed), or classes, as in 3,5 or cat"
    )
    p.add_argument("--batch", type=int, default=64, help="images at a time, over all devices (default: 64)")
    p.add_argument("--subdirs", action="store_true", help="one folder per thousand seeds")
    add_sampler_flags(p)
    p.add_argument("--distributed", action="store_true", help="several hosts, see launch/")
    return p


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    logging.set_verbosity(logging.ERROR)
    if args.distributed:
        import jax

        jax.distributed.initialize()
    from ddo_jax.run import compilation, sampling

    try:
        wanted = request(args, sampling.parse_seeds(args.seeds))
        with compilation.cache():
            print(f"{sampling.run(wanted, args.out, args.subdirs)} images written to {args.out}")
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
