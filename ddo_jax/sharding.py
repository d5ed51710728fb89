"""One mesh, one rule: parameters over "fsdp", batches over both axes. One device is the trivial mesh.

Beside `errors` and `files` at the bottom of the package: training, sampling and evaluation all use it.
"""

import contextlib
import contextvars
import functools
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ("data", "fsdp")
SMALL = 2**12  # elements; smaller leaves are replicated: a gather costs more than they weigh


def make_mesh(fsdp: int = 1, devices=None) -> Mesh:
    """All devices (of all hosts) as (data, fsdp)."""
    devices = jax.devices() if devices is None else devices
    return jax.make_mesh(
        (len(devices) // fsdp, fsdp), AXES, axis_types=(AxisType.Auto,) * 2, devices=np.asarray(devices)
    )


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def replicate(mesh: Mesh, tree):
    """Put a small pytree onto every device."""
    rule = replicated(mesh)

    def put(x):
        if not jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.device_put(x, rule)
        # device_put takes no keys onto the devices of other hosts
        return jax.random.wrap_key_data(jax.device_put(jax.random.key_data(x), rule), impl=jax.random.key_impl(x))

    return jax.tree.map(put, tree)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The first axis of every example over all devices."""
    return NamedSharding(mesh, P(AXES))


def leaf_spec(shape: tuple[int, ...], fsdp: int) -> P:
    """The largest axis that `fsdp` divides is sharded; small leaves and scalars are replicated.

    >>> leaf_spec((3, 3, 256, 512), 8) == P(None, None, None, "fsdp"), leaf_spec((256,), 8) == P()
    (True, True)
    """
    divisible = [i for i, n in enumerate(shape) if n % fsdp == 0]
    if fsdp == 1 or not divisible or np.prod(shape) < SMALL:
        return P()
    axis = max(divisible, key=lambda i: shape[i])
    return P(*(["fsdp" if i == axis else None for i in range(axis + 1)]))


_MESH = contextvars.ContextVar("mesh", default=None)  # of the program that is being traced


@contextlib.contextmanager
def rows_over(mesh: Mesh):
    """Around the trace of a program: `rows` keeps its batches over all devices, `whole` gathers its weights."""
    token = _MESH.set(mesh)
    try:
        yield
    finally:
        _MESH.reset(token)


def rows(x):
    """x [B,...] with the first axis over all devices, where a program is traced for some; else x.

    For networks that look rows up in sharded tables: XLA would follow the table's sharding, and every device would hold
    the whole batch.
    """
    mesh = _MESH.get()
    return x if mesh is None else jax.lax.with_sharding_constraint(x, batch_sharding(mesh))


def whole(weight, platform: str | None = None):
    """A weight as it is multiplied: gathered on every device, where a program is traced for some; else as it is.

    Left to itself XLA exchanges the small activations of AdaLN instead, and gathers no kernel of a convolution on a
    TPU: every convolution becomes a loop over the shards, which go round the ring while a slice of the channels is
    computed (docs/scaling.md). The gradient is scattered.

    Args:
      platform: gather there only ("tpu").
    """
    mesh = _MESH.get()
    if mesh is None or mesh.shape["fsdp"] == 1 or platform not in (None, mesh.devices.flat[0].platform):
        return weight
    return _gathered(weight, mesh)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gathered(weight, mesh):
    return jax.lax.with_sharding_constraint(weight, replicated(mesh))


def _scattered(mesh, _, gradient):
    rule = NamedSharding(mesh, leaf_spec(gradient.shape, mesh.shape["fsdp"]))
    summed = jax.lax.with_sharding_constraint(gradient, replicated(mesh))  # else XLA makes a loop of it, too
    return (jax.lax.with_sharding_constraint(summed, rule),)


_gathered.defvjp(lambda weight, mesh: (_gathered(weight, mesh), None), _scattered)


def tree_sharding(mesh: Mesh, tree):
    """The rule for every leaf of parameters, optimizer state, EMA, reference (arrays or their shapes)."""
    return jax.tree.map(lambda x: NamedSharding(mesh, leaf_spec(np.shape(x), mesh.shape["fsdp"])), tree)


def abstract(mesh: Mesh, tree):
    """ShapeDtypeStructs with the rule's shardings: what a checkpoint is restored onto."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, tree_sharding(mesh, tree)
    )


def place(mesh: Mesh, tree):
    """Put a pytree onto the mesh by the rule."""
    return jax.device_put(tree, tree_sharding(mesh, tree))


class Parked:
    """A pytree in the memory of the hosts instead of that of the devices; called, it is back on these.

    Every host keeps each of its shards once, however many of its devices hold it. For parameters that a run needs
    again, but not in its steps: there they would take the place of activations.
    """

    def __init__(self, tree):
        self._tree = jax.tree.map(_on_host, tree)

    def __call__(self):
        return jax.tree.map(_on_devices, self._tree, is_leaf=lambda x: isinstance(x, _Shards))


class _Shards(NamedTuple):
    """An array's shape and sharding, and this host's shards of it by their place."""

    shape: tuple[int, ...]
    sharding: jax.sharding.Sharding
    data: dict[tuple, np.ndarray]


def _place(index: tuple[slice, ...]) -> tuple:
    return tuple((s.start, s.stop) for s in index)


def _on_host(x: jax.Array) -> _Shards:
    once = {_place(s.index): s for s in x.addressable_shards}
    return _Shards(x.shape, x.sharding, {place: np.asarray(s.data) for place, s in once.items()})


def _on_devices(x: _Shards) -> jax.Array:
    return jax.make_array_from_callback(x.shape, x.sharding, lambda index: x.data[_place(index)])


def own_rows(batch: int) -> slice:
    """This host's rows of a global batch."""
    share = batch // jax.process_count()
    return slice(jax.process_index() * share, (jax.process_index() + 1) * share)


def put_batch(mesh: Mesh, record):
    """This host's rows (NumPy, first axis) -> global arrays over all devices."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), record)


def to_host(x) -> np.ndarray:
    """A global array as NumPy on every host."""
    if jax.process_count() == 1 or x.is_fully_replicated:
        return np.asarray(x)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def agree(value: bool) -> bool:
    """Process 0's decision on every process: hosts must not act on what they see in the file system alone."""
    return bool(agree_on(value))


def agree_on(value: int) -> int:
    """Process 0's number, below 2**31, on every process."""
    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    return int(multihost_utils.broadcast_one_to_all(np.asarray(value, np.int32)))
