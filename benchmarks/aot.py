"""Compile the real DDO step ahead of time for accelerators that are not here: memory, FLOPs, collectives.

    python -m benchmarks.aot --target=h100:1 --batch=512 --accumulation=8        # one H100 of 80 GB
    python -m benchmarks.aot --target=h100:8 --fsdp=8                            # eight of them
    python -m benchmarks.aot --target=v5e:4x4 --fsdp=16 --config=edm2_in512      # a slice of 16 chips
    python -m benchmarks.aot --target=v5e:2x2 --config=digits:unet               # small: does it work here?

Prints one JSON line; minutes per program of the real size. Needs no accelerator and no driver, only the compilers:
`pip install 'jax[tpu]==V'` (libtpu), or `pip install --no-deps jax-cuda13-plugin==V jax-cuda13-pjrt==V` with V the
version of jax. Nothing of the real size is allocated: shapes go in, a program comes out.

"expected" is the estimate of `--dry_run` (ddo_jax/plan/memory.py), computed before the compiler is asked; the bytes
are of one device. A program that does not fit is an error on a TPU, which is recorded, and none on a GPU: compare
peak_memory_bytes with memory_bytes. "flops" are those of products and convolutions of one step over all devices, with
what remat computes again. Compiled with the fast settings (`effort`), which over-estimate memory a little; without a
GPU nothing is autotuned, so the workspace of cuDNN's convolutions is not in these figures.
"""

import argparse
import math
import os
import re
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

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
# device_memory_size above, and what libtpu names in its error for a program that is too large (0.0.42.1)
MEMORY = {"h100": 84942979072, "v5e": int(15.75 * 2**30), "v5p": int(95.74 * 2**30), "v6e": int(31.25 * 2**30)}


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--target", required=True, help="h100:N, or a slice of TPUs as v5e:4x4, v5p:2x2x2, v6e:4x4")
    p.add_argument("--config", default="edm2_in64", help="of configs/, with a variant: var_in256:d30")
    p.add_argument("--batch", type=int, help="real images a step, over all devices; default: the config's")
    p.add_argument("--accumulation", type=int, default=1)
    p.add_argument("--fsdp", type=int, default=1)
    p.add_argument("--remat", action=argparse.BooleanOptionalAction, help="default: the config's")
    p.add_argument("--effort", type=float, default=-1.0, help="-1: compile fast; 0: the compiler's default")
    p.add_argument("--text", help="file to write the compiled program to, for benchmarks.hlo")
    a = p.parse_args()
    if not re.fullmatch(r"h100:[1-9]\d*|(v5e|v5p|v6e):[1-9]\d*(x[1-9]\d*){1,2}", a.target):
        p.error(f"--target={a.target}; allowed: h100:N, v5e:NxN, v5p:NxNxN, v6e:NxN")
    return a


def environment(target: str) -> None:
    """Must come before jax is imported."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    chips = math.prod(map(int, target.partition(":")[2].split("x")))
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={chips}"  # encoders ask how many there are
    if target.startswith("h100"):  # neither autotuning nor Triton's search works without a device
        os.environ["XLA_FLAGS"] += " --xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"
    else:
        os.environ.update(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")


def devices_of(target: str):
    import jax
    from jax.experimental import topologies

    jax.devices()  # registers the plugins
    chip, _, shape = target.partition(":")
    if chip != "h100":
        return topologies.get_topology_desc(platform="tpu", topology_name=target).devices
    described = topologies.get_topology_desc(
        platform="cuda", topology_name="", target_config=H100, topology=f"1x1x{shape}"
    )
    return described.devices


def configuration(a):
    """The config of the file, with what the command line sets."""
    import importlib

    file, _, variant = a.config.partition(":")
    config = importlib.import_module(f"configs.{file}").get_config(variant)
    config.ddo.update(batch=a.batch or config.ddo.batch, accumulation=a.accumulation)
    config.remat = config.remat if a.remat is None else a.remat
    config.mesh.fsdp = a.fsdp
    return config


def traced(config, mesh):
    """The DDO step of a run (run/step.py), traced for the devices of `mesh` from shapes alone."""
    import jax
    import jax.numpy as jnp

    from ddo_jax import sharding
    from ddo_jax.families import get_family
    from ddo_jax.plan import memory
    from ddo_jax.run import state, step

    family, c = get_family(config), config.ddo
    training = step.Training(family, mesh, c, "ddo", warmup=5e5, total=6.4e6)
    params, frozen = memory.abstract(family)
    shapes = jax.eval_shape(lambda p: state.new_state(p, c), params)
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
    return step.make_step(training).trace(sharding.abstract(mesh, shapes), rest[0], inputs)


def products(jaxpr) -> float:
    """FLOPs of the products and convolutions of a program, loops as often as they run."""
    from ddo_jax.plan.memory import inner_programs

    total = 0.0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in ("dot_general", "conv_general_dilated"):
            total += 2 * math.prod(eqn.outvars[0].aval.shape) * summed(eqn)
        inside = sum(products(p) for p in inner_programs(eqn))
        total += inside * (eqn.params["length"] if eqn.primitive.name == "scan" else 1)
    return total


def summed(eqn) -> int:
    """How many products are summed for one number of what an equation gives."""
    left, right = (v.aval.shape for v in eqn.invars[:2])
    if eqn.primitive.name == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        return math.prod(left[i] for i in contracted)
    _, inputs, *window = eqn.params["dimension_numbers"].rhs_spec
    return math.prod(right[i] for i in (inputs, *window))


def main() -> None:
    a = arguments()
    environment(a.target)
    import hlo
    import jax
    from common import report

    from ddo_jax import sharding
    from ddo_jax.families import get_family
    from ddo_jax.plan import memory

    jax.config.update("jax_exec_time_optimization_effort", a.effort)
    jax.config.update("jax_memory_fitting_effort", a.effort)
    described = devices_of(a.target)
    mesh, config = sharding.make_mesh(a.fsdp, described), configuration(a)
    numbers = {
        "expected": memory.step_bytes(get_family(config), config.ddo, "ddo", mesh.size, a.fsdp),
        "memory_bytes": MEMORY[a.target.partition(":")[0]],
    }
    print("expected", numbers, file=sys.stderr, flush=True)
    began = time.perf_counter()
    program = traced(config, mesh)
    numbers["flops"] = products(program.jaxpr.jaxpr)
    lowered = program.lower(lowering_platforms=("cuda" if a.target.startswith("h100") else "tpu",))
    numbers["lower_s"] = round(time.perf_counter() - began, 1)
    began = time.perf_counter()
    try:
        compiled = lowered.compile()
        found, text = compiled.memory_analysis(), compiled.as_text()
        names = [n for n in dir(found) if n.endswith("_in_bytes") and not n.startswith(("host", "_"))]
        numbers |= {n.removesuffix("_in_bytes") + "_bytes": getattr(found, n) for n in sorted(names)}
        numbers["collectives"] = hlo.summary(text)
        if a.text:
            Path(a.text).write_text(text)
    except jax.errors.JaxRuntimeError as e:
        numbers["error"] = str(e)[:600]
    numbers["compile_s"] = round(time.perf_counter() - began, 1)
    own = {**vars(a), "batch": config.ddo.batch, "remat": config.remat, "devices": mesh.size}
    report(f"aot/{a.config}", **own, device=described[0].device_kind, **numbers)


if __name__ == "__main__":
    main()
