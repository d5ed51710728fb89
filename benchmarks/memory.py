"""Memory plan of the DDO step of the large configs: bytes per device by part, from shapes; nothing is allocated.

    python benchmarks/memory.py [--configs edm2_in64 edm2_in512 var_in256 var_in256:d30]

The estimate of `--dry_run` (ddo_jax/plan/memory.py) for 1, 8 and 64 devices, with and without rematerialisation, and
the largest batch that one device of 80 GB takes without accumulation. It is before fusion: compiled programs need less
on GPUs, half without rematerialisation (benchmarks/aot.py), so "largest" is on the safe side.

Expected of edm2_in64, from 280 million parameters: 1.12 GB a copy, 4.48 GB for parameters, EMA and two moments;
activations in proportion to the batch, several times smaller with rematerialisation.
"""

import argparse
import importlib
import resource
import sys
import time

from common import ROOT, report

sys.path.insert(0, str(ROOT))
from ddo_jax.families import get_family  # noqa: E402
from ddo_jax.plan import memory

BUDGET = 80 * 10**9
MESHES = ((1, 1), (8, 1), (8, 8), (64, 64))  # devices, fsdp


def step_bytes(config, remat: bool, batch: int, devices: int = 1, fsdp: int = 1) -> dict[str, int]:
    """Of the DDO step, see `memory.step_bytes`."""
    config = config.copy_and_resolve_references()
    config.remat = remat
    config.ddo.update(batch=batch, accumulation=1)
    return memory.step_bytes(get_family(config), config.ddo, "ddo", devices, fsdp)


def largest_batch(config, remat: bool, budget: int = BUDGET) -> int:
    """Real images a step (with as many fakes) that fit into `budget` bytes on one device.

    Bytes grow by the same amount with every pair once there are some tens of them: two batch sizes tell it.
    """
    few, many = (step_bytes(config, remat, batch) for batch in (32, 64))
    each = (many["total"] - few["total"]) / 32
    return int((budget - many["total"]) / each) + 64


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--configs", nargs="+", default=["edm2_in64", "edm2_in512", "var_in256"])
    for name in p.parse_args().configs:
        file, _, variant = name.partition(":")
        config = importlib.import_module(f"configs.{file}").get_config(variant)
        for remat in (True, False):
            for devices, fsdp in MESHES:
                for batch in (64, 512):
                    began = time.perf_counter()
                    parts = step_bytes(config, remat, batch, devices, fsdp)
                    report(
                        f"memory/{name}",
                        **dict(remat=remat, devices=devices, fsdp=fsdp, batch=batch, bytes_per_device=parts),
                        trace_s=round(time.perf_counter() - began, 1),
                        process_peak_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
                    )
            report(f"memory/{name}/largest", remat=remat, budget=BUDGET, batch=largest_batch(config, remat))


if __name__ == "__main__":
    main()
