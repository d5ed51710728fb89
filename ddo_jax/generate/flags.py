"""How images are made, as flags of `ddo_jax.sample` and `ddo_jax.evaluate`."""

import argparse
import math

from ddo_jax.errors import UserError

SAMPLER = {"solver": str, "num_steps": int}  # flags that override the checkpoint's own sampler
SAMPLER |= dict.fromkeys(("sigma_min", "sigma_max", "rho", "s_churn", "s_min", "s_max", "s_noise"), float)
SAMPLER |= {"top_k": int, "top_p": float, "more_smooth": None}  # of VARs
DTYPES = ("float32", "bfloat16", "float16")


def add_flags(p: argparse.ArgumentParser) -> None:
    """Those of both commands."""
    p.add_argument(
        "--solver",
        help="heun, dpmv3 (DPM-Solver-v3); of a SiT also euler, flow_heun, sde (default: the checkpoint's own)",
    )
    p.add_argument("--num_steps", type=int, help="sampler steps (default: the checkpoint's own; dpmv3: 25)")
    p.add_argument("--guide", metavar="WHAT", help="a second network: unconditional (CFG) or weaker (autoguidance)")
    p.add_argument(
        "--guidance",
        type=float,
        help="with --guide: D_guide + guidance (D - D_guide), 1 is none.\nVAR, which guides itself: t = guidance "
        "s/(S-1) at scale s, 0 is none; SiT, too: 1 is none (default: none; of their runs the config's)",
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
    """The Request that the flags of a command mean.

    Raises:
      UserError: flags that contradict each other.
    """
    from ddo_jax.generate.request import Request  # JAX and Flax: not for --help

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
    return Request(args.checkpoint, seeds, args.labels, args.batch, given, *made)
