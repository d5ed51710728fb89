"""WHAT -> a trained model: one grammar for `init`, `ddo_jax.load` and the commands."""

from typing import NamedTuple

import jax
from etils import epath
from ml_collections import ConfigDict

from ddo_jax import files, sharding
from ddo_jax.errors import UserError
from ddo_jax.families import get_family
from ddo_jax.families.base import Family
from ddo_jax.run import state
from ddo_jax.run.checkpoint import restore_ema


class Loaded(NamedTuple):
    """A model ready to sample from and to fine-tune."""

    family: Family
    params: dict
    frozen: dict


class Found(NamedTuple):
    """Where WHAT lies: its config, its checkpoints, the step (None: the newest)."""

    config: ConfigDict
    checkpoints: epath.Path
    step: int | None


def find(what: str) -> Found:
    """Resolve a workdir, a phase's directory or a checkpoint directory of ours.

    Raises:
      UserError: nothing there; says what was looked for.
    """
    path = epath.Path(what)
    if not path.exists():
        raise UserError(f"{what}: no such file or directory; allowed: a workdir or a checkpoint of a run")
    step = None
    if path.name.isdigit() and path.parent.name == "checkpoints":
        step, path = int(path.name), path.parent
    if path.name != "checkpoints":
        candidates = [path / "best" / "checkpoints", path / "checkpoints"]
        path = next((p for p in candidates if p.exists()), candidates[0])
    for parent in path.absolute().parents:
        config = files.read_json(parent / "config.json")
        if config is not None and path.exists():
            return Found(ConfigDict(config), path, step)
    raise UserError(f"{what}: no finished run (no {path} with a config.json above it); is it still training?")


def load_params(what: str, setup):
    """The EMA parameters of WHAT for the network of a prepared run, placed on its mesh."""
    found = find(what)
    shapes = jax.eval_shape(setup.tools.family.init, jax.random.key(0))[0]
    return restore_ema(found.checkpoints, found.step, sharding.abstract(setup.tools.mesh, shapes))


def load(what: str) -> Loaded:
    """A trained model by path, on this machine's devices.

    Args:
      what: a workdir, a phase's directory or a checkpoint directory of ours.

    Returns:
      (family, params, frozen): `family.sample`, `family.score` and the rest take params and frozen.

    Raises:
      UserError: nothing usable there.
    """
    found = find(what)
    family, mesh = get_family(found.config), sharding.make_mesh(1)
    params, frozen = jax.eval_shape(family.init, jax.random.key(0))
    params = restore_ema(found.checkpoints, found.step, sharding.abstract(mesh, params))
    frozen = jax.jit(lambda key: family.init(key)[1])(state.derive(found.config.seed, "init"))
    return Loaded(family, params, frozen)
