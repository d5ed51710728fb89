"""`python -m ddo_jax.data [encode] SRC DST [--resolution=64] [--crop=center-dhariwal] ...`: make a set.

    python -m ddo_jax.data ~/imagenet/train imagenet-64x64.zip --resolution=64 --crop=center-dhariwal
    python -m ddo_jax.data tfds:cifar10 cifar10-32x32.zip
    python -m ddo_jax.data cifar10-32x32.zip ~/tensorflow_datasets/my_cifar/1.0.0
    python -m ddo_jax.data encode imagenet-512x512.zip imagenet-512-sd.zip --vae=sd-vae.safetensors

Exit codes: 0 done, 2 something the user can mend (one line says what).
"""

import sys

from ddo_jax import cli
from ddo_jax.errors import UserError


def add_image_flags(p: cli.Parser) -> None:
    """SRC, and what is done to its images: the same for both commands."""
    p.add_argument("src", metavar="SRC", help="folder (one subfolder a class, or dataset.json), .zip, or tfds:NAME")
    p.add_argument("--resolution", type=int, metavar="N", help="N x N pixels (default: as they are)")
    p.add_argument(
        "--crop",
        default="none",
        metavar="HOW",
        help="center: central square, Lanczos (EDM). center-dhariwal: ADM's rule (ImageNet in EDM2). var: shorter side "
        "to 1.125 N, Lanczos, central square (VAR's evaluation). none (default): Lanczos of square images",
    )
    p.add_argument("--channels", type=int, default=3, metavar="C", help="3: RGB (default), 1: greyscale")
    p.add_argument(
        "--exif",
        default="apply",
        metavar="HOW",
        help="apply (default): photographs are turned upright by their EXIF orientation. ignore: pixels as they lie, "
        "as EDM's and ADM's ImageNet was made",
    )
    p.add_argument(
        "--alpha", default="white", metavar="HOW", help="behind transparent images; refuse: they are refused"
    )
    p.add_argument("--max_images", type=int, metavar="N", help="only the first N, evenly over the classes")
    p.add_argument("--split", default="train", help="of SRC: train (default), train[:90%%], with TFDS also test ...")
    p.add_argument("--data_dir", metavar="DIR", help="of TFDS sets (default: $TFDS_DATA_DIR or ~/tensorflow_datasets)")


def parser() -> cli.Parser:
    p = cli.Parser(
        prog="python -m ddo_jax.data",
        allow_abbrev=False,
        description="Make a set of equal images from a folder, a zip or a prepared TFDS set. Every image becomes "
        "RGB (on white where it is transparent) and lossless PNG; the order is that of the sorted names. Hidden files "
        "are never data; "
        "subfolders are classes, in the order of their names or numbers, and the table of classes is printed.",
        epilog="python -m ddo_jax.data encode SRC DST --vae=WHAT makes a set of latents instead: see "
        "python -m ddo_jax.data encode --help (a folder named encode is ./encode).",
    )
    add_image_flags(p)
    p.add_argument(
        "dst", metavar="DST", help="FILE.zip (EDM's format), or ROOT/NAME/VERSION of an array_record TFDS set"
    )
    return p


def encode_parser() -> cli.Parser:
    p = cli.Parser(
        prog="python -m ddo_jax.data encode",
        allow_abbrev=False,
        description="Make EDM2's set of latents: the images of SRC, first made equal as by python -m ddo_jax.data, are "
        "encoded by an SD-VAE. Mean and standard deviation of the posterior are stored as float32; they are sampled "
        "when they are used.",
    )
    add_image_flags(p)
    p.add_argument("dst", metavar="DST", help="FILE.zip of 00000/img-mean-std-00000000.npy ... and dataset.json")
    p.add_argument("--vae", required=True, metavar="WHAT", help="file, known name or hf://owner/repository/file")
    p.add_argument("--batch", type=int, default=8, metavar="B", help="images at a time (default 8)")
    p.add_argument(
        "--precision",
        default="highest",
        metavar="HOW",
        help="of products: highest (default, float32), high, default (TF32 on GPUs, bfloat16 on TPUs)",
    )
    return p


def run(options: dict) -> None:
    from ddo_jax.data import labels, sources

    encodes = "vae" in options
    if encodes:
        from ddo_jax.data.encode import encode as work  # only here: it loads Flax
    else:
        from ddo_jax.data.make import make as work
    try:
        path = work(options.pop("src"), options.pop("dst"), **options)
        made = sources.open_source(str(path), "train")
    except UserError as e:
        raise UserError(str(e).replace("config.data.name", "SRC")) from None
    shape, kind = "x".join(map(str, made.image_shape)), "latents (mean, std)" if encodes else "images"
    named = labels.table_line(labels.class_table(made.num_classes, made.class_names, made.class_counts))
    print(f"{path}: {len(made)} {kind} of {shape}, {made.num_classes} classes, CRC {made.fingerprint}{named}")


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    encodes = argv[:1] == ["encode"]
    cli.main(encode_parser() if encodes else parser(), lambda args: run(vars(args)), argv[encodes:])


if __name__ == "__main__":
    main()
