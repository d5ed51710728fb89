"""Bytes of a training step on one device, from shapes alone: nothing of the real size is allocated."""

import math

import jax
import jax.numpy as jnp
from jax.extend import core

from ddo_jax import config as configs
from ddo_jax import sharding
from ddo_jax.core.ddo import Pair
from ddo_jax.run import state, step

PARKED = 2  # copies of the parameters in the memory of the hosts: the start of the run and the last best
LOOPS = ("scan", "while")  # what they give back lies beside what their body makes


def leaf_bytes(x, fsdp: int = 1) -> int:
    """Bytes of one array of the training state, or of its shape, on one device under the sharding rule.

    >>> leaf_bytes(jax.ShapeDtypeStruct((64, 128), "float32"), 8), leaf_bytes(jax.ShapeDtypeStruct((8,), "float32"), 8)
    (4096, 32)
    """
    size = math.prod(x.shape) * x.dtype.itemsize
    return size // fsdp if any(sharding.leaf_spec(x.shape, fsdp)) else size


def tree_bytes(tree, fsdp: int = 1) -> int:
    """`leaf_bytes` of a pytree."""
    return sum(leaf_bytes(x, fsdp) for x in jax.tree.leaves(tree))


def record(family, batch: int) -> dict:
    """Shapes of `batch` records as training reads them: of latents, where the family has them."""
    fastest = family.spec.data[-1]
    return {
        "image": jax.ShapeDtypeStruct((batch, *fastest.shape), fastest.dtype),
        "label": jax.ShapeDtypeStruct((batch,), jnp.int32),
    }


def abstract(family) -> tuple:
    """Shapes of (params, frozen), the latter with what training needs of other files."""
    params, frozen = jax.eval_shape(family.init, jax.random.key(0))
    return params, {**frozen, **family.companion_shapes()}


def inner_programs(eqn):
    """The jaxprs of one equation: of a call, a loop's body, the branches of a condition."""
    found = [x for p in eqn.params.values() for x in (p if isinstance(p, tuple | list) else (p,))]
    return [x.jaxpr if isinstance(x, core.ClosedJaxpr) else x for x in found if hasattr(x, "eqns")]


def peak_bytes(jaxpr: core.Jaxpr) -> int:
    """The most that a program holds at once beside its inputs, if it is executed in the order written.

    Every value is held from the equation that makes it to the last one that reads it. A compiler fuses equations
    and shares buffers, so that it needs less; it may also reorder them.
    """
    last = {v: i for i, e in enumerate(jaxpr.eqns) for v in e.invars if isinstance(v, core.Var)}
    last |= {v: len(jaxpr.eqns) for v in jaxpr.outvars if isinstance(v, core.Var)}
    held, now, peak = {}, 0, 0
    for i, eqn in enumerate(jaxpr.eqns):
        made = {v: leaf_bytes(v.aval) for v in eqn.outvars}
        inside = max((peak_bytes(p) for p in inner_programs(eqn)), default=0)
        both = sum(made.values()) + inside if eqn.primitive.name in LOOPS else max(sum(made.values()), inside)
        peak = max(peak, now + both)
        kept = {v: n for v, n in made.items() if v in last}
        over = {v for v in eqn.invars if isinstance(v, core.Var) and v in held and last[v] == i}
        now += sum(kept.values()) - sum(held.pop(v) for v in over)
        held |= kept
    return peak


def workspace_bytes(family, c, objective: str, params, frozen, devices: int) -> int:
    """Bytes on one device of all that a training step makes until it has its gradients, these included.

    Weights and gradients are taken to be whole on every device: under fsdp they are gathered, layer by layer.
    """
    rows, fakes = (
        max(1, n // (devices * c.accumulation)) * c.accumulation for n in (c.batch, configs.fakes_of_a_step(c))
    )
    hyper = step.Hyper(1.0, 1.0, 1.0, (0.0, 1.0))

    def ddo(params, ref, frozen, real, fake, key):
        inputs = step.Inputs(frozen, real, fake, key, hyper, ref)

        def loss(p, part, j):
            return step.pair_objective(family, objective, p, inputs, part)

        real, fake = (family.encode(frozen, r, key) for r in (real, fake))
        said = (jnp.zeros((rows,)), jnp.zeros((fakes,))) if family.spec.exact else None  # asked outside the step
        batch = Pair(real, fake, family.pair_draw(key, max(rows, fakes), hyper.sigma_law), said)
        return step.accumulated(loss, family.project(params, objective), batch, c.accumulation)

    def mle(params, ref, frozen, real, fake, key):
        def loss(p, part, j):
            return step.mle_objective(family, p, frozen, part, key)

        batch = family.augment(family.encode(frozen, real, key), key), family.draw(key, rows, hyper.sigma_law)
        return step.accumulated(loss, family.project(params, objective), batch, c.accumulation)

    real, fake = record(family, rows), record(family, fakes)
    key = jax.eval_shape(lambda: jax.random.key(0))
    gradients = mle if objective == "mle" else ddo
    program = jax.make_jaxpr(gradients)(params, params, frozen, real, fake, key)
    return peak_bytes(program.jaxpr)


def step_bytes(family, c, objective: str, devices: int, fsdp: int, together: int = 1) -> dict[str, int]:
    """{part: bytes on one of `devices` devices} of a training step, and their "total"; of `together` candidates.

    Before the compiler fuses and shares, so it is more than a GPU needs; a TPU may need more. What compiled programs
    took stands beside it in benchmarks/results/2026-11-aot.jsonl. Trace only: seconds at 800 million parameters.

    Args:
      c: a phase's config. objective: "ddo", "cca" or "mle". devices: of the mesh. fsdp: of config.mesh.
    """
    params, frozen = abstract(family)
    held = jax.eval_shape(lambda p: state.new_state(p, c), params)
    parts = {
        "params": together * tree_bytes(held["params"], fsdp),
        "ema": together * tree_bytes([v for k, v in held.items() if k.startswith("ema")], fsdp),
        "moments": together * tree_bytes(held["opt"], fsdp),
        "reference": tree_bytes(params, fsdp) if objective != "mle" else 0,
        "workspace": workspace_bytes(family, c, objective, params, frozen, devices),
    }
    return parts | {"total": sum(parts.values())}
