"""Adapting a given network to other classes: what is drawn anew, what is kept, what is refused."""

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from ddo_jax import config as configs
from ddo_jax import files
from ddo_jax.config.loading import ours
from ddo_jax.core.ema import decay_to_half_life
from ddo_jax.data import sources
from ddo_jax.data.images import encode_png
from ddo_jax.errors import UserError
from ddo_jax.families import get_family
from ddo_jax.run import checks, main_job
from ddo_jax.store import load
from ddo_jax.store.checkpoint import restore_ema
from tests.config.test_keys import load as load_config
from tests.harness import micro_config
from tests.run.test_fill import write

FULL = {  # config: what depends on the number of classes
    "edm_cifar10_cond": "map_label.weight",
    "edm_in64_adm": "map_label.weight",
    "edm2_in64": "emb_label.weight",
    "var_in256": "class_emb.weight",
}


def ours_of(config):
    """What `load.find` gives for a run of ours, without files."""
    return load.Ours(ConfigDict(config.to_dict()), None, 0, None)


@pytest.mark.parametrize("name", FULL)
@pytest.mark.parametrize("classes", [7, 2000])
def test_full_size_networks_change_their_classes_only(name, classes):
    """Breaks if something else than the class embedding of a released network is drawn anew, in any family."""
    config = load_config(ours() / f"{name}.py").get_config()
    other = config.copy_and_resolve_references()
    other.model.label_dim = classes
    family = get_family(other)
    theirs = load.donor(ours_of(config), family)
    assert theirs.spec.num_classes != classes == family.spec.num_classes
    given, fresh = (jax.eval_shape(f.init, jax.random.key(0))[0] for f in (theirs, family))
    params, drawn = load.graft(given, fresh)
    assert jax.tree.structure(params) == jax.tree.structure(fresh)
    assert len(drawn) == 1 and drawn[0].endswith(FULL[name])
    assert [x.shape for x in jax.tree.leaves(params)] == [x.shape for x in jax.tree.leaves(fresh)]


def test_an_unconditional_network_gets_classes():
    """Breaks if an embedding that was not there cannot be added, or one cannot be dropped."""
    config = load_config(ours() / "edm_cifar10_uncond.py").get_config()
    other = config.copy_and_resolve_references()
    other.model.label_dim = 3
    families = [get_family(c) for c in (config, other)]
    shapes = [jax.eval_shape(f.init, jax.random.key(0))[0] for f in families]
    assert load.donor(ours_of(config), families[1]) == families[0]
    assert (
        load.graft(*shapes)[1] == ("net.map_label.bias", "net.map_label.weight") and load.graft(*shapes[::-1])[1] == ()
    )


def test_another_network_is_refused():
    """Breaks if a wider network takes the parameters that happen to fit."""
    config = micro_config()
    other = config.copy_and_resolve_references()
    other.model.update(label_dim=3, width=16)
    with pytest.raises(UserError, match="config.init: parameter net.block0.* differ.; config.adapt changes the"):
        load.donor(ours_of(config), get_family(other))


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """(workdir, its best parameters) of a run on two classes of grey 8 x 8 pictures."""
    root = tmp_path_factory.mktemp("given")
    config = micro_config()
    config.model.update(label_dim=2, levels=256)
    config.data.update(name=write(root / "set", 40, (8, 8), ("a", "b"), "L"), holdout="")
    config.eval.network = "none"
    config.ddo.rounds = 0
    main_job.run(config, root / "run")
    return root / "run"


def adapted(init, fitted, workdir, steps=3):
    config = micro_config()
    config.init = str(init)
    config.adapt.update(batch=16, ema_mimg=16e-6, lr=1e-3)
    config.adapt.length.steps = steps
    config.ddo.update(rounds=1, beta=(0.1,))
    config.control.enabled = False
    workdir.mkdir(exist_ok=True)
    (workdir / "features-digits.npz").write_bytes(fitted[1].read_bytes())
    main_job.run(config, workdir)
    return config


def test_from_two_classes_to_ten(given, fitted, tmp_path):
    """Breaks if the rounds do not start from the adapted network, or the report does not say what was new."""
    config = adapted(given, fitted, tmp_path / "run")
    text = (tmp_path / "run" / "report" / "report.md").read_text()
    assert (
        f"`{given.name}` after MLE on digits:train" in text
        and "drawn anew for 10 classes: net.map_label.weight" in text
    )
    (start,) = (e for e in files.read_jsonl(tmp_path / "run/evals.jsonl") if e["phase"] == "rounds/001")
    assert start["protocol"]["ema"].startswith("adapt: half-life 1.6e-05")
    family = get_family(config)
    abstract = jax.eval_shape(family.init, jax.random.key(0))[0]
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0])),
        abstract,
    )
    after = restore_ema(tmp_path / "run/adapt/checkpoints", 3, abstract)
    before = load.load(str(given)).params
    moved = np.abs(np.asarray(after["net"]["input"]["weight"]) - before["net"]["input"]["weight"]).max()
    assert 0 < moved < 0.02  # three steps of 1e-3 from what was given
    assert not (tmp_path / "run" / "pretrain").exists()


def test_from_an_exported_file(given, fitted, tmp_path):
    """Breaks if weights that come as a file cannot be adapted, or give another start than the run that wrote them."""
    for name, init in (("run", given), ("file", given / "best" / "params.safetensors")):
        adapted(init, fitted, tmp_path / name)
    digests = [files.read_sealed(tmp_path / name / "inputs.json")["start"] for name in ("run", "file")]
    weights = [
        files.read_sealed(tmp_path / name / "rounds/001/best.json")["protocol"]["weights"] for name in ("run", "file")
    ]
    assert digests[0] == digests[1] and weights[0] == weights[1]


@pytest.mark.slow
def test_what_was_learnt_of_half_the_digits_helps_with_all(fitted, tmp_path):
    """Breaks if adapting starts from nothing: 0 to 4 are learnt first, then all ten in 300 steps, beside 300 alone."""
    train = sources.open_source("digits", "train")
    for i in np.flatnonzero(train.labels < 5):
        path = tmp_path / "half" / str(train.labels[i]) / f"{i:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode_png(train.images[i]))

    def run(name, **given):
        config = load_config(ours() / "digits.py").get_config()
        config.ddo.rounds, config.eval.report_seeds, config.log.tensorboard = 0, 1, False
        config.adapt.update(batch=128, lr=2e-3, ema_mimg=decay_to_half_life(0.98, 128) / 1e6)
        with config.unlocked():
            for key, value in given.items():
                *path, last = key.split("__")
                part = config
                for step in path:
                    part = part[step]
                part[last] = value
        (tmp_path / name).mkdir()
        (tmp_path / name / "features-digits.npz").write_bytes(fitted[1].read_bytes())
        main_job.run(config, tmp_path / name)
        return files.read_jsonl(tmp_path / name / "evals.jsonl")

    half = {"data__name": f"folder:{tmp_path / 'half'}", "data__holdout": "", "model__label_dim": 5}
    run("first", **half, eval__network="none", pretrain__length__steps=2000)
    (adapted,) = run("adapted", init=str(tmp_path / "first"), adapt__length__steps=300)
    alone = {"pretrain__length__steps": 300, "pretrain__ema_mimg": decay_to_half_life(0.98, 128) / 1e6}
    (scratch,) = run("scratch", **alone)
    assert adapted["fd_x100"] < 0.9 * scratch["fd_x100"]


def test_the_same_start_is_demanded_when_continued(given, fitted, tmp_path):
    """Breaks if a finished adaptation is done again, or on other weights."""
    config = adapted(given, fitted, tmp_path / "run")
    before = (tmp_path / "run/adapt/result.json").stat().st_mtime_ns
    main_job.run(config, tmp_path / "run")
    assert (tmp_path / "run/adapt/result.json").stat().st_mtime_ns == before
    config.adapt.length.steps = 4
    with pytest.raises(UserError, match="config.adapt.length.steps: 3 -> 4"):
        main_job.run(config, tmp_path / "run")


def test_without_a_start_there_is_nothing_to_adapt(micro):
    micro.adapt.length.steps = 3
    with pytest.raises(UserError, match="config.adapt.length: 'set'; allowed: unset with init = 'scratch'"):
        checks.check(micro)


def test_other_classes_without_adapting_name_it(given, micro, tmp_path):
    """Breaks if who has other classes does not learn that config.adapt exists."""
    micro.init = str(given)
    with pytest.raises(UserError, match="shape .2, 4. there and shape .10, 4. here .*set config.adapt.length if only"):
        main_job.run(micro, tmp_path / "run")
    assert configs.is_set(micro.adapt.length) is False
