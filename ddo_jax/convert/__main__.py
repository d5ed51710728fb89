"""`python -m ddo_jax.convert SRC DST [--dry_run] [--force]`: a released checkpoint in, a checked one out.

SRC is a file, a known name, hf://..., gs:// or https://; nothing of it is executed. DST ends in .safetensors (released
names, for the original programs and for `read`), .pth (the same for torch.load: a bare state dict, so that neither kind
nor config is recorded) or .npz (config, param/<name>). Every parameter is listed with shape, dtype and whether our
network has it; anything missing, unknown or of another shape is a refusal. What is written went through our layout and
back and equals SRC byte for byte, dtypes included (EDM2's float16; bfloat16 only in a .pth, elsewhere it is widened);
only the attention of old SD-VAE files gets today's names. Exit codes: 0 done, 2 something the user can mend.
"""

import dataclasses
import io
import json
import os

import numpy as np

from ddo_jax import cli, convert, files
from ddo_jax.convert import names, origin, safetensors, torch_write
from ddo_jax.convert.inert import UnsafeOrDamaged
from ddo_jax.convert.read import CONFIG_KEY, ENCODER_KEY, KIND_KEY, Released, count, read, same_bytes
from ddo_jax.errors import UserError

SUFFIXES, ALLOWED = (".safetensors", ".pth", ".npz"), ".safetensors, .pth or .npz"
BUFFERS = (".freqs", ".phases", ".resample_filter")  # how the names of constants end: EDM, EDM2
BUFFERS += ("lvl_1L", "attn_bias_for_masking", "zero_k_bias", "ema_vocab_hit_SV")  # VAR and its tokenizer


def parser() -> cli.Parser:
    p = cli.Parser("python -m ddo_jax.convert", description=__doc__.split("\n\n")[1])
    p.add_argument("src", metavar="SRC", help="file, known name or URL")
    p.add_argument("dst", metavar="DST", nargs="?", help=f"output: {ALLOWED}; not needed with --dry_run")
    p.add_argument("--dry_run", action="store_true", help="print the table and stop")
    p.add_argument("--force", action="store_true", help="replace DST if it exists")
    return p


def check_destination(dst: str, force: bool):
    """Before any work: a format we write, in a place where nothing is lost."""
    if os.path.isdir(dst) or not dst.endswith(SUFFIXES):
        # Our own checkpoint directory is written here once the run package offers a function for it.
        raise UserError(f"{dst}: cannot be written; DST must be a file ending in {ALLOWED}")
    if os.path.exists(dst) and not force:
        raise UserError(f"{dst}: exists; choose another name or pass --force to replace it")
    if not os.path.isdir(os.path.dirname(dst) or "."):
        raise UserError(f"{dst}: its folder does not exist; create it first")


def table(released: Released, expected: dict) -> tuple[str, str | None]:
    """(aligned lines: name, shape, dtype, matched or not; the first mismatch or None)."""
    rows, mismatch = [], None
    state, dtypes = released.state_dict, released.extras["dtypes"]
    for name in [*state, *(n for n in expected if n not in state)]:
        if name not in expected:
            status = "UNKNOWN"
        elif name not in state:
            status = "MISSING"
        elif state[name].shape != expected[name]:
            status = f"SHAPE, expected {list(expected[name])}"
        else:
            status = "matched"
        shape = list(state[name].shape if name in state else expected[name])
        rows.append((name, str(shape), dtypes.get(name, "-"), status))
        if status != "matched" and mismatch is None:
            mismatch = f"{name}: {status.lower()}; shape {shape}"
    widths = [max((len(row[i]) for row in rows), default=0) for i in range(3)]
    return "\n".join("  ".join(f"{v:<{w}}" for v, w in zip(row, [*widths, 0], strict=True)) for row in rows), mismatch


def convert_checked(released: Released) -> dict:
    """The state dict after a round trip through our layout, equal byte for byte; prints the table.

    Raises:
      UserError: a kind without converter, or a parameter that does not fit.
    """
    if released.kind not in convert.KINDS:
        keys = ", ".join(list(released.state_dict)[:2])
        allowed = ", ".join(convert.KINDS)
        raise UserError(
            f"{len(released.state_dict)} parameters ({keys}, ...) of no kind we convert; allowed: {allowed}"
        )
    try:
        expected = convert.layout(released.kind, released.config)
        lines, mismatch = table(released, expected)
        print(lines)
        if mismatch:
            raise UserError(mismatch)
        _, variables = convert.from_torch(released.kind, released.config, released.state_dict)
        state = convert.to_torch(released.kind, released.config, variables)
    except (ValueError, TypeError) as e:
        raise UserError(str(e)) from None
    if not same_bytes(state, released.state_dict):
        raise UserError("a resample_filter differs in its last bits from the one of the configuration")
    buffers = sum(name.endswith(BUFFERS) for name in state)
    print(f"kind {released.kind}; {len(state) - buffers} parameter tensors, {buffers} buffers, {count(state):,} values")
    print(f"config {json.dumps(released.config)}")
    if assumed := released.extras.get("assumed"):
        print(f"the file does not record, and no shape shows: {json.dumps(assumed)} (assumed)")
    return state


def with_todays_names(released: Released) -> Released:
    """The attention of an SD-VAE as diffusers calls it today (specs/edm2.md section 13); prints what that changes.

    Raises:
      UserError: a layer is there under both names.
    """
    if released.kind != "sdvae":
        return released
    from ddo_jax.convert.sdvae import renamed  # imports flax, which --help does not need

    try:
        state = renamed(released.state_dict)
    except ValueError as e:
        raise UserError(str(e)) from None
    if changed := [name for name in released.state_dict if name not in state]:
        print(f"{len(changed)} parameters ({changed[0]}, ...) have old names; they are written under today's")
    dtypes = dict(zip(state, released.extras["dtypes"].values(), strict=True))
    return dataclasses.replace(released, state_dict=state, extras=released.extras | {"dtypes": dtypes})


def shapes(released: Released) -> dict:
    return {name: array.shape for name, array in released.state_dict.items()}


def metadata(released: Released, src: str) -> dict:
    """What a .safetensors says besides its arrays: what SRC said, kind and config, the encoder of EDM2's pickles, and
    that it is made from SRC."""
    kept = dict(released.extras.get("metadata", {}))
    kept |= origin.made_from(src, origin.of_metadata(kept) or origin.SCRATCH).metadata()
    if "encoder" in released.extras:
        kept[ENCODER_KEY] = json.dumps(released.extras["encoder"])
    return kept | {"format": "pt", KIND_KEY: released.kind, CONFIG_KEY: json.dumps(released.config)}


def describe(released: Released, dst: str | None):
    """Prints how DST differs from SRC besides its format."""
    torch = dst is not None and dst.endswith(".pth")
    if wide := sum(dtype == "bfloat16" for dtype in released.extras["dtypes"].values()):
        print(f"{wide} bfloat16 tensors {'stay so' if torch else 'are widened to float32, without loss'}")
    if torch:
        print("a .pth holds the parameters alone: kind and config are not recorded, nor an encoder's constants")


def save(src: str, dst: str, released: Released, state: dict):
    """Write DST, whole or not at all.

    Raises:
      UserError: the disk is full, or the like.
    """
    try:
        if dst.endswith(".pth"):
            torch_write.write(dst, state, released.extras["dtypes"])
        elif dst.endswith(".npz"):
            buffer, arrays = io.BytesIO(), {f"param/{k}": v for k, v in state.items()}
            np.savez(buffer, config=json.dumps(released.config), kind=released.kind, **arrays)
            files.write_bytes(dst, buffer.getvalue())
        else:
            files.write_bytes(dst, safetensors.dumps(state, metadata(released, src)))
    except OSError as e:
        raise UserError(f"{dst}: cannot be written ({e.strerror})") from None


def run(args) -> None:
    if args.dst is None and not args.dry_run:
        raise UserError(f"DST is missing; give a {ALLOWED} file, or --dry_run")
    if args.dst is not None and not args.dry_run:
        check_destination(args.dst, args.force)
    try:
        source = read(names.resolve(args.src))
    except UnsafeOrDamaged as e:
        raise UserError(str(e)) from None
    released = with_todays_names(source)
    state = convert_checked(released)
    describe(released, args.dst)
    if not args.dry_run:
        save(args.src, args.dst, released, state)
        same = shapes(released) == shapes(source)
        print(f"wrote {args.dst}, equal to the source {'byte for byte' if same else 'but for the names it had'}")


def main(argv: list[str] | None = None) -> None:
    cli.main(parser(), run, argv)


if __name__ == "__main__":
    main()
