"""What benchmarks of finished runs share: the run prepared once more beside itself, its best parameters round by round.

The run is only read.
"""

import shutil
import sys
from pathlib import Path

from common import ROOT

sys.path.insert(0, str(ROOT))
from ml_collections import ConfigDict  # noqa: E402

from ddo_jax import config as configs  # noqa: E402
from ddo_jax import files  # noqa: E402
from ddo_jax.evaluate.records import read_round  # noqa: E402
from ddo_jax.run import jobs, record, rounds  # noqa: E402
from ddo_jax.run.prepare import prepare  # noqa: E402
from ddo_jax.run.scoring import evaluations  # noqa: E402
from ddo_jax.store.checkpoint import restore_ema  # noqa: E402


def beside(run: Path, scratch: Path, metrics: tuple[str, ...] = (), **given):
    """A run's `Setup` in a scratch workdir; its fitted network is taken along.

    Args:
      metrics: in place of config.eval.metrics. given: changes of the sampler's settings.
    """
    config = configs.base()  # also of a run from before there were all of its keys
    with config.unlocked(), config.ignore_type():
        config.update(ConfigDict(files.read_sealed(run / "config.json")))
    if config.family != "var":
        config.ddo.dropped_row_loss = configs.base().ddo.dropped_row_loss  # an older default
    config.eval.metrics = metrics
    config.sampler.update(given)
    for path in run.glob("features-*.npz"):
        shutil.copy(path, scratch)
    return prepare(config, scratch, record.Console())


def start(setup, run: Path):
    """What the rounds started from."""
    if setup.init is not None:
        return setup.init()
    step = jobs.result_of(run / "pretrain")["steps"]
    return restore_ema(run / "pretrain/checkpoints", step, rounds.abstract_params(setup))


def played(setup, run: Path):
    """(`Round`, its best parameters or None) of every round; None: the reference was kept."""
    shapes = rounds.abstract_params(setup)
    for path in sorted(run.glob("rounds/*/best.json")):
        found = read_round(files.read_sealed(path))
        best = path.parent / found.candidate / "checkpoints"
        yield found, restore_ema(best, found.best.step, shapes) if found.improved else None


def controls(setup, run: Path):
    """(learning rate's name, its best parameters) of every control whose checkpoint is still there."""
    for path in sorted(run.glob("control/*/")):
        result = jobs.result_of(path)
        best = min(evaluations(result), key=lambda e: e.score)
        if (path / "checkpoints" / str(best.step)).is_dir():
            yield path.name, restore_ema(path / "checkpoints", best.step, rounds.abstract_params(setup))
