"""Classes of a run's data: frequencies looked at, the pool's labels, the table kept and exported, names in requests."""

import dataclasses
import json
import types

import numpy as np
import pytest

from ddo_jax import config as configs
from ddo_jax import files, sample
from ddo_jax.convert import read
from ddo_jax.data import pool, sources, tree
from ddo_jax.errors import UserError
from ddo_jax.generate.labels import class_labels
from ddo_jax.run import main_job, prepare, rounds
from ddo_jax.run.checks import check_data
from ddo_jax.store import checkpoint, classes, load

NAMES = tuple("zero one two three four five six seven eight nine".split())


@pytest.fixture(autouse=True)
def every_warning():
    """A warning is said once a process; here once a test."""
    tree.warn.cache_clear()


def uneven(source):
    """The digits without ones and with few sevens, and with names."""
    rows = np.flatnonzero((source.labels != 1) & ((source.labels != 7) | (np.arange(len(source)) % 20 == 0)))
    return dataclasses.replace(source, images=source.images[rows], labels=source.labels[rows], class_names=NAMES)


@pytest.fixture(scope="module")
def done(tmp_path_factory, fitted):
    """(workdir, labels of its pool, class counts of its data) of a run on uneven classes."""
    from tests.harness import micro_config

    workdir, found = tmp_path_factory.mktemp("uneven"), {}
    (workdir / "features-digits.npz").write_bytes(fitted[1].read_bytes())
    config = micro_config()
    config.ddo.update(beta=(0.1,), pool_labels="data")
    config.control.enabled = False
    whole = sources.open_digits
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "open_digits", lambda split, directory: uneven(whole(split, directory)))
        patch.setattr(rounds, "tidy", lambda directory, best: {"removed": 0})
        main_job.run(config, workdir)
        found["counts"] = sources.open_digits("train", None).class_counts
    return workdir, pool.open_pool(workdir / "rounds/001/pool").labels, found["counts"]


def test_fakes_have_the_frequencies_of_the_data(done):
    """Breaks if a class without images gets fakes or is evaluated, or pool_labels=data is not what the pool has."""
    workdir, labels, counts = done
    assert counts[1] == 0 and 1 not in labels
    assert np.abs(np.bincount(labels, minlength=10) - len(labels) * counts / counts.sum()).max() < 1
    assert files.read_json(workdir / "rounds/001/pool/result.json")["labels"] == "frequencies of the data"
    evals = files.read_jsonl(workdir / "evals.jsonl")
    assert {e["protocol"]["labels"] for e in evals} == {"balanced by position over the 9 classes with images"}


def test_the_table_is_kept_and_exported(done):
    """Breaks if a workdir or an exported file forgets which class an id is."""
    workdir, _, counts = done
    table = files.read_json(workdir / "classes.json")
    assert [(row["id"], row["name"], row["images"]) for row in table] == list(
        zip(range(10), NAMES, counts, strict=True)
    )
    assert files.read_json(workdir / "best/classes.json") == table
    exported = read(workdir / "best/params.safetensors").extras["metadata"]
    assert json.loads(exported["ddo_jax_classes"]) == list(NAMES)


@pytest.mark.parametrize("rule, expected", [("three,nine", [3, 9]), ("8,three", [8, 3]), ("balanced", [0, 2, 3])])
def test_requests_by_name(done, rule, expected):
    """Breaks if a workdir's names are not known to sample, or balanced makes a class that the data had not."""
    found = load.find(str(done[0]))
    got = class_labels(rule, np.arange(3), 10, "jax", load.class_table(found))
    assert got.tolist() == [expected[i % len(expected)] for i in range(3)]


def test_sample_by_name(done, tmp_path, capsys):
    """Breaks if the command does not take names, or an unknown one is no line."""
    flags = [f"--checkpoint={done[0]}", "--seeds=0-3", "--batch=4"]
    sample.main([*flags, f"--out={tmp_path / 'x.npz'}", "--labels=two,five"])
    with np.load(tmp_path / "x.npz") as made:
        assert made["labels"].tolist() == [2, 5, 2, 5]
    with pytest.raises(SystemExit) as e:
        sample.main([*flags, f"--out={tmp_path / 'y.npz'}", "--labels=ten"])
    assert e.value.code == 2 and "a class 0-9 (zero, one, " in capsys.readouterr().err


def test_a_folder_remembers_its_labels(done, tmp_path, capsys):
    """Breaks if a second list of seeds keeps images whose labels it does not mean, or is refused without a reason."""
    flags = [f"--checkpoint={done[0]}", f"--out={tmp_path / 'out'}", "--batch=4", "--num_steps=2"]
    sample.main([*flags, "--seeds=0-1,6"])
    assert files.read_json(tmp_path / "out/labels.json") == {"0": 0, "1": 2, "6": 3}
    with pytest.raises(SystemExit):
        sample.main([*flags, "--seeds=0-6"])
    assert "has seed 6 with label 3, these --seeds give it 7" in capsys.readouterr().err
    sample.main([*flags, "--seeds=0-1,6,20"])  # the list as before, and more
    assert files.read_json(tmp_path / "out/labels.json") == {"0": 0, "1": 2, "6": 3, "20": 4}
    (tmp_path / "out/000006.png").unlink()
    sample.main([*flags, "--seeds=0-6"])  # what is not there may get another label
    assert files.read_json(tmp_path / "out/labels.json")["6"] == 7


def test_init_of_another_number_of_classes(done, micro, tmp_path, fitted, monkeypatch):
    """Breaks if Orbax speaks of damage where a network has other classes."""
    micro.init = str(done[0])
    micro.model.label_dim = 0
    with pytest.raises(UserError, match=r"parameter .*label.* is shape .* there and absent here .*\(label_dim 10\)"):
        prepare.prepare(micro, tmp_path / "new", fitted[0].console)
    three = dataclasses.replace(sources.open_digits("train", None), num_classes=3)
    micro.model.label_dim = 3
    monkeypatch.setattr(sources, "open_digits", lambda split, directory: three)
    with pytest.raises(UserError, match=r"parameter .*label.* is shape \(10, .* there and shape \(3, .* here"):
        prepare.prepare(micro, tmp_path / "new", fitted[0].console)
    assert not (tmp_path / "new").exists()


def test_what_is_said_of_frequencies(capsys):
    """Breaks if an empty class or very uneven ones pass without a word, or an even set is warned of."""
    family, config = types.SimpleNamespace(spec=types.SimpleNamespace(num_classes=3)), configs.base()

    def said(counts, **changes):
        tree.warn.cache_clear()
        given = config.copy_and_resolve_references()
        given.ddo.update(**changes)
        data = types.SimpleNamespace(name="set", class_names=("a", "b", "c"), class_counts=np.array(counts))
        classes.look(given, family, data)
        return capsys.readouterr().err

    assert "1 of 3 classes have no image (1: b)" in said([190, 0, 10])
    assert "from 10 images (2: c) to 190 (0: a) a class" in said([190, 0, 10])
    assert "pool_labels=data" not in said([190, 0, 10], pool_labels="data")
    assert said([732, 1300, 1000]) == ""
    data = types.SimpleNamespace(name="set", class_names=(), class_counts=None)
    config.ddo.pool_labels = "data"
    with pytest.raises(UserError, match="config.ddo.pool_labels: 'data'; allowed: 'balanced', for set is too large"):
        classes.look(config, family, data)


@pytest.mark.parametrize("changes", [{"pool_labels": "even"}, {"pool_labels": "data", "pool": 0}, {"pool_labels": ""}])
def test_pool_labels_are_checked(micro, changes):
    """Breaks if a rule that nobody follows passes."""
    micro.ddo.update(**changes)
    with pytest.raises(UserError, match="config.ddo.pool_labels: .*; allowed: balanced"):
        configs.validate(micro, 1)


def test_images_that_are_not_square(micro, setup):
    """Breaks if a non-square image is only called another shape."""
    data = dataclasses.replace(setup.data, images=np.zeros((2, 8, 12, 1), np.uint8))
    wanted = r"has \(8, 12, 1\); height and width differ, and networks here are square: .*--crop=center"
    with pytest.raises(UserError, match=wanted):
        check_data(micro, setup.family, data)


@pytest.mark.parametrize(
    "text", ['{"a": 1}', "[1]", "torn", '[{"id": 1, "name": "a", "images": 3}]', '[{"id": 0, "name": 5, "images": 3}]']
)
def test_a_table_that_is_none(tmp_path, text):
    """Breaks if a damaged table ends in a traceback or gives wrong names."""
    (tmp_path / "classes.json").write_text(text)
    with pytest.raises(UserError, match="classes.json: no table of classes"):
        classes.of_run(checkpoint.epath.Path(tmp_path))


def test_names_of_a_file_that_are_none():
    """Breaks if odd metadata end in a traceback."""
    for text in ("torn", '{"a": 1}', "[1]"):
        with pytest.raises(UserError, match="metadata ddo_jax_classes: .*; it must be a JSON list of names"):
            classes.of_metadata({"ddo_jax_classes": text})
    assert classes.of_metadata({}) == []
    assert classes.of_metadata({"ddo_jax_classes": '["a", "b"]'})[1] == {"id": 1, "name": "b", "images": None}
