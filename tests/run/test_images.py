"""One's own images from the folder to the report; runs that nothing scores; what small sets are told."""

import re

import pytest
from PIL import Image

from ddo_jax import files
from ddo_jax.data import tree
from ddo_jax.errors import UserError
from ddo_jax.evaluate import __main__ as evaluate_command
from ddo_jax.evaluate import classifier
from ddo_jax.run import checks, main_job
from tests.harness import SHAPES, exit_code, micro_config, shapes
from tests.run.test_fill import of_images, write


@pytest.fixture(autouse=True)
def every_warning():
    """A warning is said once a process; here once a test."""
    tree.warn.cache_clear()


def little(config):
    """A few steps of a few images."""
    config.sampler.num_steps = 2
    config.pretrain.length.steps, config.pretrain.warmup.steps = 3, 1
    config.ddo.length.steps, config.ddo.eval_every.steps, config.ddo.warmup.steps = 2, 1, 1
    config.control.eval_every.steps = 2
    for phase in ("pretrain", "ddo", "control"):
        config[phase].batch = 16
    config.ddo.pool = 64
    config.eval.update(num=40, select_num=40, batch=40, grid=9)
    config.log.tensorboard = False
    return config


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """(workdir, what it said on stderr before) of `--config=images:runlocal` on 600 shapes, shortened."""
    root = tmp_path_factory.mktemp("shapes")
    config = little(of_images(shapes(root / "set"), "runlocal"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(classifier.Design, "steps", 200)
        main_job.run(config, root / "run")
    return root / "run"


def test_from_a_folder_to_a_report(done):
    """Breaks if one's own pictures do not go through the whole job, or the classifier's accuracy is not told."""
    text = (done / "report" / "report.md").read_text()
    assert "training images from one another" in text and "every tenth training image" in text
    recorded = files.read_sealed(done / "config.json")
    assert recorded["model"]["img_resolution"] == 16 and recorded["model"]["label_dim"] == 3
    assert [row["name"] for row in files.read_json(done / "classes.json")] == list(SHAPES)
    with Image.open(done / "report" / "samples.png") as picture:
        assert picture.size[0] > 100
    (accuracy,) = {e["protocol"]["accuracy"]["classifier"] for e in files.read_jsonl(done / "evals.jsonl")}
    assert re.fullmatch(r"0\.\d+ on 60 images .*", accuracy)


def test_a_run_is_scored_later_by_its_own_classifier(done, capsys):
    """Breaks if `evaluate --network=classifier` is another network than the run's, or needs the run's data for it."""
    scored = next(e for e in files.read_jsonl(done / "evals.jsonl") if e["phase"] == "ddo")
    flags = ["--network=classifier", f"--checkpoint={done}", f"--ref=folder:{done.parent / 'set'}", "--metrics=fid"]
    flags += ["--seeds=0-39", "--batch=40", f"--out={done.parent / 'later.jsonl'}"]
    assert exit_code(evaluate_command.main, flags) == 2  # which classifier?
    assert "--weights=WORKDIR/features-classifier.npz" in capsys.readouterr().err
    assert exit_code(evaluate_command.main, [*flags, f"--weights={done / 'features-classifier.npz'}"]) == 0
    (later,) = files.read_jsonl(done.parent / "later.jsonl")
    assert later["fd_x100"] == pytest.approx(scored["fd_x100"], rel=1e-6)
    assert later["protocol"]["features"] == scored["protocol"]["features"]
    damaged = done.parent / "damaged.npz"
    damaged.write_bytes((done / "features-classifier.npz").read_bytes()[:-300])
    assert exit_code(evaluate_command.main, [*flags, f"--weights={damaged}"]) == 2
    assert "no classifier of a run" in capsys.readouterr().err


def unjudged(name):
    config = little(of_images(name, "runlocal"))
    config.eval.network = "none"
    return config


@pytest.fixture(scope="module")
def unscored(tmp_path_factory):
    """(workdir, set) of a run on 12 images without classes."""
    root = tmp_path_factory.mktemp("unscored")
    name = write(root / "set", 12, (8, 8), (), "L")
    main_job.run(unjudged(name), root / "run")
    return root / "run", name


def test_nothing_is_scored(unscored):
    """Breaks if a run without a feature network stops, chooses by something, or claims a number."""
    workdir, _ = unscored
    text = (workdir / "report" / "report.md").read_text()
    assert "Nothing was scored" in text and "fd" not in text.split("## Samples")[0] and "curves.png" not in text
    best = files.read_sealed(workdir / "rounds/001/best.json")
    assert best["improved"] and best["start"] is None and best["step"] == 2  # the last of its two evaluations
    assert {e["metric"] for e in files.read_jsonl(workdir / "evals.jsonl")} == {""}
    assert len(list((workdir / "rounds/001").glob("a4*/samples/*.png"))) == 2
    assert not list(workdir.glob("features-*")) and (workdir / "best" / "params.safetensors").exists()


def test_few_images_are_told_of(unscored):
    """Breaks if a report on 12 images does not say what its distances mean."""
    text = (unscored[0] / "report" / "report.md").read_text()
    assert re.search(r"has 12 images, fewer than 500: .* samples are \d+\.\d+ from .* one another \d+\.\d+;", text)


def test_again_it_does_nothing(unscored):
    """Breaks if an unscored run cannot be continued."""
    workdir, name = unscored
    before = {p: p.stat().st_mtime_ns for p in workdir.glob("rounds/**/checkpoints/*")}
    main_job.run(unjudged(name), workdir)
    assert before and before == {p: p.stat().st_mtime_ns for p in workdir.glob("rounds/**/checkpoints/*")}


@pytest.mark.parametrize(
    "key, value, words",
    [
        ("ddo.beta", (0.1, 0.2), "ddo.beta: .*; allowed: one value: eval.network = 'none' scores nothing"),
        ("control.lrs", (0.1, 0.2), "control.lrs: .*; allowed: one value"),
        ("eval.metrics", ("pr",), r"eval.metrics: \('pr',\); allowed: \(\): eval.network = 'none' scores nothing"),
        ("eval.select", "fid", "eval.select: 'fid'; allowed: unset: "),
        ("eval.reference", "x.npz", "eval.reference: 'x.npz'; allowed: unset"),
    ],
)
def test_nothing_can_choose_without_scores(micro, key, value, words):
    """Breaks if a grid is searched by no number."""
    micro.eval.network = "none"
    micro.ddo.beta = (0.1,)
    section, name = key.split(".")
    micro[section][name] = value
    with pytest.raises(UserError, match=f"config.{words}"):
        checks.check(micro)


def small(name, **model):
    """The micro config on a folder of 8 x 8 images."""
    config = micro_config()
    config.model.update(dict(img_channels=3, label_dim=2, levels=256) | model)
    config.data.update(name=name, holdout="")
    config.eval.network = "none"
    config.ddo.beta = (0.1,)
    return config


def test_bad_sets_are_one_line(tmp_path):
    """Breaks if one of these ends in a traceback, or in a run of something else."""

    def check(name, **model):
        checks.check(small(name, **model))

    with pytest.raises(UserError, match="config.data.name: .*; allowed: two images or more; this set has one"):
        check(write(tmp_path / "one", 1, (8, 8), ()), label_dim=0)
    name = write(tmp_path / "half", 6, (8, 8))
    (tmp_path / "half" / "a" / "0.png").rename(tmp_path / "half" / "0.png")
    with pytest.raises(UserError, match="0.png lies beside subfolders, .*; allowed: all or none, or dataset.json"):
        check(name)
    name = write(tmp_path / "unreadable", 6, (8, 8))
    (tmp_path / "unreadable" / "b" / "3.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="b/3.png: damaged image .not an image"):
        check(name, levels=17)
    config = small(write(tmp_path / "whole", 6, (8, 8)))
    config.data.holdout = "test"
    with pytest.raises(UserError, match="split 'test' of folder:whole:?.*; allowed: train, train"):
        checks.check(config)


def test_small_classes_are_told_of(tmp_path, capsys):
    """Breaks if a class of one image, or more classes than images of a batch, pass without a word."""
    write(tmp_path / "set", 40, (8, 8), [f"{i:02d}" for i in range(20)])
    (tmp_path / "set" / "07" / "7.png").unlink()
    checks.check(small(f"folder:{tmp_path / 'set'}", label_dim=20))
    said = capsys.readouterr().err
    assert "one image in each of 1 classes (7: 07): samples of them can only be copies" in said
    assert "20 classes, more than ddo.batch = 16: not every class is in each of them" in said
    assert "39 images, fewer than 500" in said
