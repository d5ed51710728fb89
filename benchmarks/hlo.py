"""What a compiled program sends between devices, read off its text: kinds, counts, bytes, and who asked for it.

python -m benchmarks.hlo program.txt [collective-permute]    # the calls behind its collectives, most bytes first
"""

import collections
import math
import re
import sys
from pathlib import Path

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
# Of an instruction `%name = shape kind(operands), attributes`; the asynchronous form is "kind-start".
INSTRUCTION = re.compile(rf"= (.*?) (?:{'|'.join(KINDS)})(-start)?\(")
ARRAY = re.compile(r"\b(pred|[a-z]+\d+)(?:e\d+m\d+\w*)?\[([\d,]*)\]")
COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+)(?: \(.*)? \{$")
CALLED = re.compile(r"\b(?:body|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
CONDITION = re.compile(r"\bcondition=%?([\w.\-]+)")
BOUND = re.compile(r"= s32\[\]\S* constant\((\d+)\)")
SOURCE = re.compile(r'op_name="([^"]*)"')


def array_bytes(shape: str) -> list[int]:
    """Bytes of every array in the text of a shape.

    >>> array_bytes("(f32[8,128]{1,0:T(8,128)}, bf16[4])")
    [4096, 8]
    """
    sizes = {"pred": 8}
    return [
        math.prod(int(n) for n in dims.split(",") if n) * sizes.get(kind, int(re.sub(r"\D", "", kind) or 8)) // 8
        for kind, dims in ARRAY.findall(shape)
    ]


def moved(shape: str, start: bool) -> int:
    """Bytes that one device has after a collective: those of its results.

    An asynchronous one gives (operands, results, more): equally many arrays of each in front, then numbers of its own.
    """
    sizes = array_bytes(shape)
    if not start or len(sizes) == 1:
        return sum(sizes)
    real = [n for n in sizes if n > 4]
    return sum(real[len(real) // 2 :])


def computations(text: str) -> tuple[str, dict[str, list[str]]]:
    """(the name of the entry, {computation: its lines})."""
    found, entry, lines = {}, "", None
    for line in text.splitlines():
        if match := COMPUTATION.match(line):
            lines = found[match[2]] = []
            entry = match[2] if match[1] else entry
        elif lines is not None:
            lines.append(line)
    return entry, found


def trips(line: str, bodies: dict[str, list[str]]) -> int:
    """How often the loop of a line runs: as the compiler says, or as the bound in its condition; else 1."""
    if known := TRIPS.search(line):
        return int(known[1])
    condition = CONDITION.search(line)
    bounds = [int(n) for inner in bodies.get(condition[1], ()) for n in BOUND.findall(inner)] if condition else []
    return bounds[0] if len(bounds) == 1 else 1


def times(entry: str, bodies: dict[str, list[str]]) -> collections.Counter:
    """How often each computation runs in one call of the program; a loop whose length is not to be seen counts once."""
    runs = collections.Counter()

    def walk(name: str, factor: int) -> None:
        runs[name] += factor
        for line in bodies.get(name, ()):
            branches = [name.strip(" %") for found in BRANCHES.findall(line) for name in found.split(",")]
            for inner in CALLED.findall(line) + branches:
                walk(inner, factor * trips(line, bodies))

    walk(entry, 1)
    return runs


def collectives(text: str) -> list[tuple[str, int, int, str]]:
    """(kind, runs in one call of the program, bytes a device has after one run, the operation it came from)."""
    entry, bodies = computations(text)
    found = []
    for name, runs in times(entry, bodies).items():
        for line in bodies.get(name, ()):
            if match := INSTRUCTION.search(line):
                kind = re.search("|".join(KINDS), match[0][match[0].rindex(" ") :])[0]
                source = SOURCE.search(line)
                found.append((kind, runs, moved(match[1], bool(match[2])), source[1] if source else ""))
    return found


def summary(text: str) -> dict[str, dict[str, int]]:
    """{kind: {"written": in the program's text, "run": in one call of it, "bytes": on one device in all}}."""
    total = {}
    for kind, runs, size, _ in collectives(text):
        one = total.setdefault(kind, {"written": 0, "run": 0, "bytes": 0})
        one["written"], one["run"], one["bytes"] = one["written"] + 1, one["run"] + runs, one["bytes"] + runs * size
    return dict(sorted(total.items()))


def shortened(source: str) -> str:
    """An operation's name without what numbers blocks, so that equal ones of all blocks are one.

    >>> shortened("jit(step)/target/UNet.raw/enc/32x32_block2/conv_res0/dot")
    'jit(step)/target/UNet.raw/enc/NxN_blockN/conv_resN/dot'
    """
    return re.sub(r"\d+", "N", source)


def main() -> None:
    text, kinds = Path(sys.argv[1]).read_text(), sys.argv[2:] or KINDS
    groups = collections.Counter()
    for kind, runs, size, source in collectives(text):
        if kind in kinds:
            groups[kind, shortened(source), "bytes"] += runs * size
            groups[kind, shortened(source), "runs"] += runs
    largest = sorted((g for g in groups if g[2] == "bytes"), key=lambda g: -groups[g])
    for kind, source, _ in largest[:60]:
        print(f"{kind:20} {groups[kind, source, 'runs']:8} {groups[kind, source, 'bytes'] / 1e6:12.2f} MB  {source}")


if __name__ == "__main__":
    main()
