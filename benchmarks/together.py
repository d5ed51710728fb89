"""Candidates side by side over one after the other: seconds of a step of each, without evaluations, as a ratio.

    python benchmarks/together.py --configs=digits,digits:unet,digits_var,edm2_in64:runlocal --candidates=4

Expected (specs/ddo.md section 7): (6 n + 2) / 8 n forward-equivalents, 0.81 at n = 4; of tokens, whose reference's
answers are kept from candidate to candidate as it is, about 1; more gain where the host's work counts. Both ways in
one process, in turn. One JSON line a config.
"""

import argparse
import dataclasses
import functools
import itertools
import tempfile
import time
from pathlib import Path

import jax
import runs  # noqa: F401  puts the repository on the path
from common import report, spread
from ml_collections import ConfigDict

from ddo_jax.config.loading import Parser
from ddo_jax.data import pool as pools
from ddo_jax.run import candidates, fakes, loop, record, rounds
from ddo_jax.run.prepare import prepare


def prepared(name: str, together: int, batch: int | None, steps: int, scratch: Path):
    """(setup, make): make(n, tag) gives n candidates of round 1 in a folder of their own."""
    config = ConfigDict(Parser().parse(name).to_dict())
    config.ddo.update(search="grid", together=together, batch=batch or config.ddo.batch)
    config.ddo.pool = min(config.ddo.pool, 4 * config.ddo.batch)
    config.log.every = 10**6
    config.ddo.length.update(steps=steps, mimg=None, epochs=None)
    setup = prepare(config, scratch, record.Console())
    ref = jax.jit(setup.family.init)(jax.random.key(0))[0]
    first, make_anchor = rounds.anchors(setup.family, setup.mesh, lambda: ref)
    anchor = make_anchor()
    directory = setup.workdir / "pool"
    if config.ddo.pool:
        directory.mkdir()
        pools.files.write_sealed(directory / pools.MARKER, fakes.make_pool(setup, directory, lambda: ref, 0))
    pool = functools.cache(lambda: pools.open_pool(directory))

    def make(n: int, tag: str, steps: int) -> list[loop.Phase]:
        shared = rounds.partners(setup, anchor, 0, pool, True)
        given = dict(objective="ddo", seed=7, partners=shared, steps=steps)
        made = []
        for i in range(n):
            hyper = candidates.hyper(config.ddo, grid=(4.0, 0.1 + 0.01 * i))
            phase = candidates.phase(setup, "ddo", f"{tag}/{i}", first, hyper=hyper, **given)
            made.append(dataclasses.replace(phase, eval_every=None, save_every=None))
        return made

    return setup, make


def seconds(setup, phases) -> float:
    began = time.perf_counter()
    if setup.config.ddo.together > 1:
        loop.train_together(phases, setup)
    else:
        for phase in phases:
            loop.train(phase, setup)
    return time.perf_counter() - began


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--configs", default="digits,digits:unet,digits_var,edm2_in64:runlocal")
    p.add_argument("--candidates", type=int, default=4)
    p.add_argument("--steps", type=int, default=30)
    p.add_argument("--batch", type=int)
    p.add_argument("--repeats", type=int, default=5)
    args = p.parse_args()
    for name in args.configs.split(","):
        with tempfile.TemporaryDirectory() as a, tempfile.TemporaryDirectory() as b:
            ways = [prepared(name, n, args.batch, 3 * args.steps, Path(d)) for n, d in ((1, a), (args.candidates, b))]
            found = ([], [])
            for i in itertools.count():
                short, long = (
                    [seconds(setup, make(args.candidates, f"{i}-{steps}", steps)) for setup, make in ways]
                    for steps in (args.steps, 3 * args.steps)
                )  # the difference leaves start and end of a phase out
                if i:
                    for times, few, many in zip(found, short, long, strict=True):
                        times.append((many - few) / (2 * args.steps * args.candidates))
                if i == args.repeats:
                    break
        ratios = [y / x for x, y in zip(*found, strict=True)]
        report(
            "together",
            config=name,
            candidates=args.candidates,
            batch=ways[0][0].config.ddo.batch,
            one_after_the_other_s=spread(found[0]),
            together_s=spread(found[1]),
            ratio=spread(ratios),
        )


if __name__ == "__main__":
    main()
