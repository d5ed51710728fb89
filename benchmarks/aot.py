"""Compile the real DDO step ahead of time for accelerators that are not here: memory per chip and collectives.

    python benchmarks/aot.py --target=cuda --devices=1 --batch=64 --remat      # one H100 of 80 GB
    python benchmarks/aot.py --target=cuda --devices=8 --batch=512 --fsdp=8    # eight of them
    python benchmarks/aot.py --target=tpu --batch=512 --fsdp=16                # v5e:4x4
    python benchmarks/aot.py --target=tpu --small                              # a tiny network: does it work here?

Prints one JSON line; minutes per program, so no test runs it. Needs no accelerator and no driver, only the compilers:
`pip install 'jax[tpu]==V'` (libtpu), or `pip install --no-deps jax-cuda13-plugin==V jax-cuda13-pjrt==V` with V the
version of jax. Nothing of the real size is allocated: shapes go in, a program comes out.

"expected" is the estimate of `--dry_run` (ddo_jax/plan/memory.py), computed before the compiler is asked. A program
that does not fit is an error on a TPU, which is recorded, and none on a GPU: compare peak_bytes with memory_bytes.
Compiled with the fast settings (`effort`), which over-estimate memory a little; without a GPU nothing is autotuned,
so the workspace of cuDNN's convolutions is not in these figures.
"""

import argparse
import collections
import math
import os
import re
import sys
import time
from pathlib import Path

# The values of openxla/xla, xla/backends/gpu/target_config/specs/h100_sxm.txtpb (commit 0774019d97e7, Apache-2.0):
# what XLA needs to know of an H100 SXM to compile for it; the versions are that file's dnn_version and runtime_version.
# Rates per data type are left to XLA's defaults.
H100 = """
gpu_device_info {
  name: "NVIDIA H100 80GB HBM3"  device_vendor: "NVIDIA Corporation"
  cuda_compute_capability { major: 9 }
  core_count: 132  fpus_per_core: 128  clock_rate_ghz: 1.98
  threads_per_warp: 32  threads_per_block_limit: 1024  threads_per_core_limit: 2048
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
  shared_memory_per_block: 49152  shared_memory_per_core: 233472  shared_memory_per_block_optin: 232448
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000  l2_cache_size: 52428800  device_memory_size: 84942979072
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
runtime_version { major: 12 minor: 8 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
H100_BYTES = 84942979072  # device_memory_size above
V5E_BYTES = int(15.75 * 2**30)  # what the compiler says a chip has
COLLECTIVES = r"\b(all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--target", choices=("tpu", "cuda"), required=True)
    p.add_argument("--topology", help="default: tpu v5e:4x4; cuda 1x1xN of --devices")
    p.add_argument("--devices", type=int, default=8, help="cuda: GPUs of one machine")
    p.add_argument("--config", default="edm2_in64", help="of configs/, with a variant: var_in256:d30")
    p.add_argument("--batch", type=int, default=512, help="real images a step, over all devices; as many fakes")
    p.add_argument("--accumulation", type=int, default=1)
    p.add_argument("--fsdp", type=int, default=1)
    p.add_argument("--remat", action=argparse.BooleanOptionalAction, default=True)
    p.add_argument("--effort", type=float, default=-1.0, help="-1: compile fast; 0: the compiler's default")
    p.add_argument("--small", action="store_true", help="a tiny network on 8 x 8 images")
    return p.parse_args()


def environment(target: str) -> None:
    """Must come before jax is imported."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    if target == "tpu":
        os.environ.update(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
    else:  # neither autotuning nor Triton's search works without a device
        os.environ["XLA_FLAGS"] = "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"


def topology(a):
    import jax
    from jax.experimental import topologies

    jax.devices()  # registers the plugins
    if a.target == "tpu":
        return topologies.get_topology_desc(platform="tpu", topology_name=a.topology or "v5e:4x4")
    shape = a.topology or f"1x1x{a.devices}"
    return topologies.get_topology_desc(platform="cuda", topology_name="", target_config=H100, topology=shape)


def configuration(a):
    """The config of the file, with what the command line sets."""
    import importlib

    file, _, variant = a.config.partition(":")
    config = importlib.import_module(f"configs.{file}").get_config("runlocal" if a.small else variant)
    config.ddo.update(batch=a.batch, accumulation=a.accumulation)
    config.remat = a.remat
    config.mesh.fsdp = a.fsdp
    return config


def lower(config, mesh):
    """The DDO step of a run (run/step.py), lowered for the devices of `mesh` from shapes alone."""
    import jax
    import jax.numpy as jnp

    from ddo_jax import sharding
    from ddo_jax.families import get_family
    from ddo_jax.plan import memory
    from ddo_jax.run import state, step

    family, c = get_family(config), config.ddo
    training = step.Training(family, mesh, c, "ddo", warmup=5e5, total=6.4e6)
    params, frozen = memory.abstract(family)
    shapes = jax.eval_shape(lambda p: state.new_state(p, training.optimizer, c.ema_stds), params)
    whole = sharding.replicated(mesh)

    def placed(tree, where):
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree)

    record = placed(memory.record(family, c.batch), sharding.batch_sharding(mesh))
    number = jax.ShapeDtypeStruct((), jnp.float32, sharding=whole)
    totals, key = jax.eval_shape(lambda: (step.zero_totals(family, "ddo"), jax.random.key(0)))
    rest = placed((totals, key), whole)
    said = jax.ShapeDtypeStruct((c.batch,), jnp.float32, sharding=sharding.batch_sharding(mesh))
    asked = family.spec.exact  # the reference, in a program of its own
    inputs = step.Inputs(
        frozen=placed(frozen, whole),
        real=record,
        fake=record,
        key=rest[1],
        hyper=step.Hyper(number, number, number, (number, number)),
        ref=None if asked else sharding.abstract(mesh, params),
        s_ref=(said, said) if asked else None,
    )
    traced = step.make_step(training).trace(sharding.abstract(mesh, shapes), rest[0], inputs)
    return traced.lower(lowering_platforms=(mesh.devices.flat[0].platform.replace("gpu", "cuda"),))


def main() -> None:
    a = arguments()
    environment(a.target)
    sys.path.insert(0, str(Path(__file__).parent.parent))
    import jax
    from common import report

    from ddo_jax import sharding
    from ddo_jax.families import get_family
    from ddo_jax.plan import memory

    jax.config.update("jax_exec_time_optimization_effort", a.effort)
    jax.config.update("jax_memory_fitting_effort", a.effort)
    described = topology(a)
    mesh = sharding.make_mesh(a.fsdp, described.devices)
    config = configuration(a)
    devices = math.prod(mesh.shape.values())
    numbers = {
        "expected": memory.step_bytes(get_family(config), config.ddo, "ddo", devices, a.fsdp),
        "memory_bytes": {"tpu": V5E_BYTES, "cuda": H100_BYTES}[a.target],
    }
    print("expected", numbers, file=sys.stderr, flush=True)
    began = time.perf_counter()
    lowered = lower(config, mesh)
    numbers["lower_s"] = round(time.perf_counter() - began, 1)
    began = time.perf_counter()
    try:
        compiled = lowered.compile()
        found = compiled.memory_analysis()
        names = [n for n in dir(found) if n.endswith("_in_bytes") and not n.startswith(("host", "_"))]
        numbers |= {n.removesuffix("_in_bytes") + "_bytes": getattr(found, n) for n in sorted(names)}
        numbers["collectives"] = dict(collections.Counter(re.findall(COLLECTIVES, compiled.as_text())))
    except jax.errors.JaxRuntimeError as e:
        numbers["error"] = str(e)[:600]
    numbers["compile_s"] = round(time.perf_counter() - began, 1)
    report(
        "aot/" + ("small" if a.small else a.config),
        **{**vars(a), "devices": devices},
        device=described.devices[0].device_kind,
        **numbers,
    )


if __name__ == "__main__":
    main()
