"""WHAT -> a trained model: one grammar for `init`, `ddo_jax.load` and the commands.

WHAT is a workdir, a phase's or checkpoint directory of ours, a released .pkl/.pth/.safetensors file, a known
name ("edm-cifar10-uncond-vp-ddo"), hf://owner/repository/file, gs://... or https://...
"""

import zlib
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from ddo_jax import config as configs
from ddo_jax import convert, files, sharding, stores
from ddo_jax.convert import names
from ddo_jax.convert.inert import UnsafeOrDamaged
from ddo_jax.core.dpm_solver import DPMSettings
from ddo_jax.errors import UserError
from ddo_jax.families import KINDS, from_released, get_family
from ddo_jax.families.base import Family
from ddo_jax.store import classes
from ddo_jax.store.checkpoint import Checkpoints, restore_ema


class Loaded(NamedTuple):
    """A model ready to sample from and to fine-tune."""

    family: Family
    params: dict
    frozen: dict


class Ours(NamedTuple):
    """A run of ours: its config, its checkpoints, the step (None: the newest), where its buffers are."""

    config: ConfigDict
    checkpoints: epath.Path
    step: int | None
    root: epath.Path


def find(what: str) -> Ours | convert.Released:
    """Resolve WHAT.

    Raises:
      UserError: nothing there, or a file that is damaged or unsafe; says what was looked for.
    """
    scheme, remote, _ = what.partition("://")
    if not remote or scheme in ("gs", "s3", "file"):  # of others epath knows nothing
        path = epath.Path(what).expanduser()
        stores.reach(path)
        if path.is_dir():
            return _find_ours(path)
    local = names.resolve(what)
    try:
        released = convert.read(local)
    except UnsafeOrDamaged as e:
        raise UserError(str(e)) from None
    if released.kind not in KINDS:
        raise UserError(f"{local}: not a generator of a kind that can be used; allowed: {', '.join(KINDS)}")
    return released


def _find_ours(path: epath.Path) -> Ours:
    what, step = path, None
    if path.name.isdigit() and path.parent.name == "checkpoints":
        step, path = int(path.name), path.parent
    if path.name != "checkpoints":
        candidates = [path / "best" / "checkpoints", path / "checkpoints"]
        path = next((p for p in candidates if p.exists()), candidates[0])
    for parent in files.literal(path).parents:
        try:
            config = files.read_sealed(parent / "config.json")
        except files.Damaged as e:
            raise UserError(f"{e}; put back a copy of it: it says what network the weights are of") from None
        if config is not None and path.exists():
            return Ours(ConfigDict(config), path, step, parent)
    raise UserError(f"{what}: no finished run (no {path} with a config.json above it); is it still training?")


def fingerprint(found: Ours | convert.Released) -> str:
    """Eight hex digits that change with the weights that `find` found: of the file, or of a checkpoint's digests."""
    if isinstance(found, Ours):
        steps = [int(p.name) for p in found.checkpoints.iterdir() if p.name.isdigit()]
        step = max(steps) if found.step is None else found.step
        content = (found.checkpoints / str(step) / "meta" / "metadata").read_bytes()
        return f"{zlib.crc32(content):08x}"
    crc = 0
    for name, array in found.state_dict.items():
        crc = zlib.crc32(np.ascontiguousarray(array), zlib.crc32(name.encode(), crc))
    return f"{crc:08x}"


def save_frozen(root: epath.Path, frozen) -> None:
    """Keep a run's buffers beside its config, once; a network without buffers leaves nothing."""
    if jax.tree.leaves(frozen):
        with Checkpoints(root / "frozen") as checkpoints:  # the folder may be there without them: a killed first start
            if not sharding.agree(checkpoints.latest_step() is not None):
                checkpoints.save(0, {"ema": frozen}, {"step": 0})


def class_table(found: Ours | convert.Released) -> list[dict]:
    """What the weights' maker said of their classes (`data.labels.class_table`): of a run's classes.json, or of an
    exported file's names; [] if nothing is known.

    Raises:
      UserError: what is there is no such table.
    """
    if isinstance(found, Ours):
        return classes.of_run(found.root) or classes.of_run(found.root.parent)
    return classes.of_metadata(found.extras.get("metadata", {}))


def _named(params) -> dict[str, Any]:
    """{"net.input.weight": leaf}."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _difference(family: Family, wanted) -> str:
    """The first parameter in which a family's network is not `wanted`, in words; "" if it is."""
    have, want = (
        {name: leaf.shape for name, leaf in _named(params).items()}
        for params in (jax.eval_shape(family.init, jax.random.key(0))[0], wanted)
    )
    differing = [name for name in {**want, **have} if have.get(name) != want.get(name)]
    if not differing:
        return ""
    name = differing[0]
    there, here = (f"shape {shapes[name]}" if name in shapes else "absent" for shapes in (have, want))
    return f"parameter {name} is {there} there and {here} here ({len(differing)} differ)"


def _check_architecture(found: Ours, wanted) -> None:
    """A run's network must have the parameters of `wanted`; Orbax would speak of damage.

    Raises:
      UserError: names the first parameter that differs.
    """
    if difference := _difference(family_of(found), wanted):
        raise UserError(
            f"{found.checkpoints}: {difference}: a network of other arguments; set config.family and config.model as "
            f"in {found.root / 'config.json'} (label_dim {found.config.model.get('label_dim')}), set "
            "config.adapt.length if only the classes are others, or config.init = 'scratch'"
        )


def donor(found: Ours | convert.Released, family: Family) -> Family:
    """The family of weights that `family` is adapted from: the same network but for the classes.

    Raises:
      UserError: it differs in more; names the first parameter.
    """
    theirs = family_of(found)
    wanted = jax.eval_shape(family.init, jax.random.key(0))[0]
    same = theirs
    if theirs.spec.num_classes != family.spec.num_classes:
        same = family_of(found, **{"model.label_dim": family.spec.num_classes})
    if difference := _difference(same, wanted):
        raise UserError(
            f"config.init: {difference}; config.adapt changes the number of classes only: set config.family and the "
            "rest of config.model as they are in the given network"
        )
    return theirs


def graft(given, fresh) -> tuple[Any, tuple[str, ...]]:
    """(parameters of the structure of `fresh`: those of `given` where the shapes agree; the names of the others).

    >>> graft({"a": np.zeros(2), "b": np.zeros(3)}, {"a": np.ones(2), "b": np.ones(4)})[1]
    ('b',)
    """
    have, want = _named(given), _named(fresh)
    drawn = tuple(name for name, leaf in want.items() if name not in have or have[name].shape != leaf.shape)
    leaves = [leaf if name in drawn else have[name] for name, leaf in want.items()]
    return jax.tree.unflatten(jax.tree.structure(fresh), leaves), drawn


def parameters(found: Ours | convert.Released, family: Family, mesh) -> tuple[Any, Any]:
    """(params, frozen) of what `find` found, for a family of the same architecture, placed on the mesh.

    `frozen` is what the network itself holds; `complete` adds the weights of other files.

    Raises:
      UserError: damaged, or of another architecture; names the first parameter that differs.
    """
    params, frozen = jax.eval_shape(family.init, jax.random.key(0))
    if isinstance(found, Ours):
        _check_architecture(found, params)  # first: a partial restore takes what it finds of other networks
        params = restore_ema(found.checkpoints, found.step, sharding.abstract(mesh, params))
        if jax.tree.leaves(frozen):
            root = found.root if (found.root / "frozen").exists() else found.root.parent
            frozen = restore_ema(root / "frozen", 0, sharding.abstract(mesh, frozen))
        return params, frozen
    return sharding.place(mesh, family.imported(found))


def complete(family: Family, mesh, frozen: dict) -> dict:
    """`frozen` with the weights of other files that the family needs (an autoencoder), placed on the mesh.

    Raises:
      UserError: one of them is not at hand.
    """
    return {**frozen, **sharding.place(mesh, family.companions())}


def load(what: str) -> Loaded:
    """A trained model, on this machine's devices.

    Args:
      what: WHAT, see the top of this module.

    Returns:
      (family, params, frozen): `family.sample`, `family.score` and the rest take params and frozen.

    Raises:
      UserError: nothing usable there.
    """
    found, mesh = find(what), sharding.make_mesh(1)
    family = family_of(found)
    params, frozen = parameters(found, family, mesh)
    return Loaded(family, params, complete(family, mesh, frozen))


def family_of(found: Ours | convert.Released, **overrides) -> Family:
    """The family of what `find` found; overrides are dotted config keys ("eval.dtype"="bfloat16")."""
    config = configs.base()
    if isinstance(found, Ours):
        with config.unlocked():
            config.update(found.config)
    else:
        from_released(config, found)
    for key, value in overrides.items():
        section, _, name = key.rpartition(".")
        part = config[section] if section else config
        with part.unlocked():  # an argument of the network that the config leaves to its default
            part[name] = value
    return get_family(config)


def settings_of(found: Ours | convert.Released, family: Family, overrides: dict):
    """The sampler settings a run or a released checkpoint was evaluated with, with overrides.

    Another solver comes with its own usual number of steps: 25 of DPM-Solver-v3.
    """
    config = configs.base()
    if isinstance(found, Ours):
        config.sampler.update(found.config.sampler)
    else:
        with config.unlocked():
            from_released(config, found)
    if overrides.get("solver", config.sampler.solver) != config.sampler.solver == "heun":
        config.sampler.update(num_steps=DPMSettings().num_steps, s_churn=0.0)
    config.sampler.update(overrides)
    return family.settings(config.sampler)
