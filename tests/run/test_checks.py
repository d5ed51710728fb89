"""What is asked for is held against the machine and the formats before it is made."""

import time

import numpy as np
import pytest

from ddo_jax import config as configs
from ddo_jax import limits
from ddo_jax.data.images import encode_png
from ddo_jax.errors import UserError
from ddo_jax.plan import dry_run
from ddo_jax.run import checks
from ddo_jax.run.checks import check_network, check_sizes

SIZES = [
    ("ddo.alpha", (4.0, 4.0), "values that differ in their first six digits"),
    ("ddo.beta", (0.1, 0.10000001), "values that differ in their first six digits"),
    ("control.lrs", (1e-3, 1e-3), "values that differ in their first six digits"),
    ("model.blocks", -1, "whole numbers from 0"),
    ("model.blocks", 10**6, "at most 256"),
    ("model.width", 10**9, "whole numbers from 0 to 1,000,000"),
    ("model.width", 10**6, "parameters; training needs at least .* TiB, this machine has"),
    ("model.width", 1, "width is 1: it must be at least 8"),
    ("model.img_resolution", 10**5, "1 to 16,384"),
    ("model.label_dim", 2**31 - 1, "whole numbers from 0"),
    ("model.channel_mult", (), "one number a level"),
    ("model.patch_nums", (10**5,), "one number a level"),
    ("sampler.num_steps", 10**9, "2 to 10,000|1 to 10,000"),
    ("pretrain.batch", 10**9, "training needs at least .*GiB, this machine has"),
    ("eval.batch", 10**9, "sampling needs at least .*GiB, this machine has"),
    ("ddo.pool", 1, "at least ddo.batch = 16, the fakes of a step"),
    ("ddo.pool", 10**11, "at most the 2,294,967,296 seeds"),
    ("ddo.pool", 2 * 10**9, "a pool needs at least .*GiB, this machine has"),
    ("eval.num", 10**10, "at most the 1,000,000,000 seeds"),
    ("eval.select_num", 2 * 10**9, "at most the 1,000,000,000 seeds"),
    ("eval.report_seeds", 10**9, "at most the 1,000,000,000 seeds"),
    ("eval.grid", 10**9, "at most 10,000, the images of one picture"),
    ("pretrain.length.steps", 10**20, "at most 2,147,483,647 steps"),
    ("ddo.eval_every.steps", 10**19, "at most 2,147,483,647 steps"),
    ("control.factor", 10**12, "at most 2,147,483,647 steps in all"),
    ("ddo.rounds", 10**9, "0 to 999"),
]


@pytest.mark.parametrize("key, value, words", SIZES)
def test_sizes_are_refused_before_they_are_made(micro, key, value, words, monkeypatch):
    """Breaks if the size ends in a MemoryError, an aborted process, minutes of tracing, or runs as something else."""
    monkeypatch.setattr(limits, "host_bytes", lambda: 16 * 2**30)  # whatever this machine has
    with micro.unlocked():
        *path, last = key.split(".")
        node = micro
        for part in path:
            node = node[part]
        node[last] = value
    began = time.monotonic()
    with pytest.raises(UserError, match=words) as e:
        checks.check(micro)
    assert "\n" not in str(e.value) and key.split(".")[0] in str(e.value)
    assert time.monotonic() - began < 60


def test_one_step_of_dpmv3_is_refused(micro):
    """Breaks if the mean image is taken for a sample."""
    micro.sampler.update(solver="dpmv3", num_steps=1)
    with pytest.raises(UserError, match="num_steps is 1: allowed are 2 to 10,000 with dpmv3"):
        checks.check(micro)


def test_what_fits_passes(micro):
    """Breaks if a lower bound is above what a run needs."""
    check_sizes(micro, check_network(micro)[0], 1438)
    assert 2**28 < limits.host_bytes() <= limits.device_bytes()


def test_a_plan_is_for_other_machines(micro, monkeypatch):
    """Breaks if a laptop refuses to plan a run that is meant for a pod."""
    monkeypatch.setattr(limits, "host_bytes", lambda: 2**12)
    assert "parameters" in dry_run.plan(micro, "runs/x", None)
    with pytest.raises(UserError, match="parameters; training needs at least .*this machine has 4.0 KiB"):
        checks.check(micro)


def test_durations_are_counted_in_32_bits():
    """Breaks if epochs or millions of images become a number of steps that no counter holds."""
    duration = configs.base().ddo.length
    with duration.unlocked():
        duration.epochs = 1e18
    with pytest.raises(UserError, match="ddo.length.epochs: 1e.18; allowed: at most 2,147,483,647 steps"):
        configs.steps(duration, 128, 1438, "ddo.length")


def test_a_classifier_needs_labels(micro, tmp_path):
    """Breaks if images without classes reach the fitting, after a workdir was made for them."""
    rng = np.random.default_rng(0)
    for i in range(20):
        (tmp_path / f"{i}.png").write_bytes(encode_png(rng.integers(0, 17, (8, 8, 1)).astype(np.uint8)))
    micro.data.update(name=f"folder:{tmp_path}", holdout="")
    micro.model.label_dim = 0
    micro.eval.network = "classifier"
    with pytest.raises(UserError, match="a classifier of folder:.*: 0 classes; .* set inception, dinov2, eff"):
        checks.check(micro)
