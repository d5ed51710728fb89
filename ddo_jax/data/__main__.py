"""`python -m ddo_jax.data SRC DST [--resolution=64] [--crop=center-dhariwal] ...`: make a set of equal images.

    python -m ddo_jax.data ~/imagenet/train imagenet-64x64.zip --resolution=64 --crop=center-dhariwal
    python -m ddo_jax.data tfds:cifar10 cifar10-32x32.zip
    python -m ddo_jax.data cifar10-32x32.zip ~/tensorflow_datasets/my_cifar/1.0.0

Exit codes: 0 done, 2 something the user can mend (one line says what).
"""

import argparse
import sys

from ddo_jax.errors import UserError


def fail(message: str):
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


class Parser(argparse.ArgumentParser):
    """argparse, with errors in one line."""

    def error(self, message):
        fail(f"{message}; see python -m ddo_jax.data --help")


def parser() -> Parser:
    p = Parser(
        prog="python -m ddo_jax.data",
        allow_abbrev=False,
        description="Make a set of equal images from a folder, a zip or a prepared TFDS set. Every image becomes "
        "RGB (alpha is dropped) and lossless PNG; the order is that of the sorted names.",
    )
    p.add_argument("src", metavar="SRC", help="folder (one subfolder a class, or dataset.json), .zip, or tfds:NAME")
    p.add_argument(
        "dst", metavar="DST", help="FILE.zip (EDM's format), or ROOT/NAME/VERSION of an array_record TFDS set"
    )
    p.add_argument("--resolution", type=int, metavar="N", help="N x N pixels (default: as they are)")
    p.add_argument(
        "--crop",
        default="none",
        metavar="HOW",
        help="center: central square, Lanczos (EDM). center-dhariwal: ADM's rule (ImageNet in EDM2). none (default): "
        "Lanczos of square images",
    )
    p.add_argument("--channels", type=int, default=3, metavar="C", help="3: RGB (default), 1: greyscale")
    p.add_argument("--max_images", type=int, metavar="N", help="only the first N")
    p.add_argument("--split", default="train", help="of SRC: train (default), train[:90%%], with TFDS also test ...")
    p.add_argument("--data_dir", metavar="DIR", help="of TFDS sets (default: $TFDS_DATA_DIR or ~/tensorflow_datasets)")
    return p


def main(argv: list[str] | None = None) -> None:
    options = vars(parser().parse_args(argv))
    from ddo_jax.data import make, sources

    try:
        path = make.make(options.pop("src"), options.pop("dst"), **options)
        made = sources.open_source(str(path), "train")
    except UserError as e:
        fail(str(e).replace("config.data.name", "SRC"))
    shape = "x".join(map(str, made.image_shape))
    print(f"{path}: {len(made)} images of {shape}, {made.num_classes} classes, CRC {made.fingerprint}")


if __name__ == "__main__":
    main()
