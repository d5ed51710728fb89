"""Which part of a token model's round trip carries DDO's gain? One round of digits_var for every way to make fakes.

    python benchmarks/roundtrip.py --workdir=/tmp/roundtrip --seeds=0,1,2 > lines.jsonl
    python benchmarks/roundtrip.py --figure=docs/roundtrip.png --lines=lines.jsonl

Fakes are tokens. The authors decode them to pixels and encode those again. The ways:

    none         tokens as the sampler drew them: exact samples, for which theory gives no first-order signal
    quantiser    f_hat of the tokens quantised again, without decoder and encoder
    unclipped    decoded, not clipped to [-1, 1], encoded
    full         decoded, clipped, encoded: the default
    levels       decoded, clipped, rounded to the grey levels of the data, encoded
    both         full, and the real images' tokens take one round trip more: decode(encode(x)) on both sides

Expected (specs/ddo.md section 10, one seed): `none` gains nothing, `full` everything. One JSON line a run.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

from common import ROOT, report

sys.path.insert(0, str(ROOT))
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

from configs import digits_var  # noqa: E402
from ddo_jax import files  # noqa: E402
from ddo_jax.families import var  # noqa: E402
from ddo_jax.families.codecs import in_parts, to_uint8, to_unit  # noqa: E402
from ddo_jax.run import main_job  # noqa: E402

WAYS = ("none", "quantiser", "unclipped", "full", "levels", "both")


@dataclasses.dataclass(frozen=True)
class Family(var.VARFamily):
    """VAR whose fakes are made in another way."""

    way: str = "full"

    def round_trip(self, frozen, examples):
        f_hat = self.tokenizer(frozen, examples["tokens"], method="f_hat")
        if self.way == "quantiser":
            return self.tokenizer(frozen, f_hat, method="quantize")[0]
        if self.way == "unclipped":
            decode = lambda f: self.tokenizer(frozen, f, method="decode_unclipped")  # noqa: E731
            return self.tokens_of(frozen, in_parts(decode, f_hat, var.TOGETHER * jax.device_count()))
        pixels = self.pixels_of(frozen, examples)
        if self.way == "levels":
            levels = self.model["levels"]
            pixels = to_unit(to_uint8(pixels, levels), levels)
        return self.tokens_of(frozen, pixels)

    def encode(self, frozen, record, key):
        examples = super().encode(frozen, record, key)
        if self.way != "both" or record["image"].ndim != 4:
            return examples
        return {**examples, "tokens": self.round_trip(frozen, {"tokens": examples["tokens"].astype(jnp.int32)})}


def make(config):
    """The family of a config whose `remark` names the way."""
    plain = var.make(config)
    fields = {f.name: getattr(plain, f.name) for f in dataclasses.fields(plain)}
    return Family(**fields, way=config.remark)


def config_of(seed: int, way: str, start: str):
    config = digits_var.get_config()
    config.name, config.remark, config.seed = f"round trip: {way}", way, seed
    config.family = f"{Path(__file__).stem}:make"
    config.ddo.rounds = 1 if start != "scratch" else 0
    config.ddo.reencode = way != "none"
    config.control.enabled, config.eval.also, config.init = False, (), start
    return config


def draw(lines: list[dict], path: str) -> None:
    """What the round came to in every way, a dot a seed, beside its start on the same seeds of sampling."""
    from matplotlib.figure import Figure

    figure = Figure((7, 3.4), layout="constrained")
    axes = figure.subplots()
    for i, way in enumerate(WAYS):
        own = [line for line in lines if line["way"] == way]
        axes.plot([i - 0.12] * len(own), [line["reference"] for line in own], "o", color="#888888", mfc="none")
        axes.plot([i + 0.12] * len(own), [line["best_of_round"] for line in own], "o", color="#1f6fb4")
        for line in own:
            axes.plot([i - 0.12, i + 0.12], [line["reference"], line["best_of_round"]], color="#1f6fb4", lw=0.8)
    axes.set_xticks(range(len(WAYS)), WAYS)
    axes.set_ylabel("FD × 100")
    axes.set_title("digits_var, round 1: reference (ring) and best of four evaluations (dot)", fontsize=10)
    axes.grid(axis="y", alpha=0.25)
    figure.savefig(path, dpi=120)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--workdir", type=Path, default=Path("/tmp/roundtrip"))
    p.add_argument("--lines", type=Path, help="of earlier calls; draws --figure instead of running")
    p.add_argument("--figure")
    p.add_argument("--seeds", default="0,1,2")
    p.add_argument("--ways", default=",".join(WAYS))
    args = p.parse_args()
    if args.lines is not None:
        draw(files.read_jsonl(args.lines), args.figure)
        return
    for seed in map(int, args.seeds.split(",")):
        start = args.workdir / f"start-{seed}"
        main_job.run(config_of(seed, "full", "scratch"), start)
        for way in args.ways.split(","):
            workdir = args.workdir / f"{way}-{seed}"
            main_job.run(config_of(seed, way, str(start)), workdir)
            played = files.read_sealed(workdir / "rounds/001/best.json")
            (log,) = (workdir / "rounds/001").glob("a*/metrics.jsonl")
            last = [line for line in files.read_jsonl(log) if "ddo/margin" in line][-1]
            final = {s: files.read_sealed(workdir / f"report/scores/{s}/result.json") for s in ("start", "ddo")}
            mean = {s: sum(e["fd_x100"] for e in r["evals"]) / len(r["evals"]) for s, r in final.items()}
            signal = files.read_sealed(workdir / "rounds/001/signal/result.json")
            report(
                "roundtrip/digits_var",
                way=way,
                seed=seed,
                start=round(mean["start"], 2),
                after=round(mean["ddo"], 2),
                reference=round(played["start"], 2),
                best_of_round=round(played["fd_x100"], 2),
                step=played["step"],
                improved=played["improved"],
                margin=round(last["ddo/margin"], 3),
                accuracy=round(last["ddo/accuracy"], 3),
                signal={k: {n: round(v, 2) for n, v in signal[k].items()} for k in ("real", "fake")},
            )


if __name__ == "__main__":
    main()
