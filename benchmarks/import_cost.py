"""Seconds and modules that `import ddo_jax` costs in a fresh process, beside those of `import jax` alone.

python benchmarks/import_cost.py
"""

from common import process, python, report, spread


def main() -> None:
    found = {"jax": [], "ddo_jax": []}
    for _ in range(5):  # in turn
        for module, seconds in found.items():
            seconds.append(process(python("-c", f"import {module}"))["wall_s"])
    report("import", **{f"{module}_s": spread(seconds) for module, seconds in found.items()})


if __name__ == "__main__":
    main()
