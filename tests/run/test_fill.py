"""What a config leaves unset: read off the data, kept by the workdir, said in one line."""

import numpy as np
import pytest
from PIL import Image

from ddo_jax import config as configs
from ddo_jax.config.loading import ours
from ddo_jax.convert import names
from ddo_jax.data import sources
from ddo_jax.errors import UserError
from ddo_jax.evaluate import features
from ddo_jax.plan import dry_run
from ddo_jax.run import fill
from ddo_jax.run.checks import check_network
from ddo_jax.store.workdir import open_workdir
from tests.config.test_keys import load
from tests.harness import idx


def of_images(name="digits", variant=""):
    config = load(ours() / "images.py").get_config(variant)
    config.data.name = name
    return config


def write(folder, number=12, size=(16, 16), classes=("a", "b"), mode="RGB"):
    rng = np.random.default_rng(0)
    for i in range(number):
        path = folder / (classes[i % len(classes)] if classes else "") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (*size[::-1], 3)).astype(np.uint8)
        Image.fromarray(pixels).convert(mode).save(path)
    return f"folder:{folder}"


def test_the_digits(tmp_path):
    """Breaks if grey levels, classes or the held-out split are not read off the data, or the network does not fit."""
    said = []
    config = fill.filled(of_images(), tmp_path, said.append)
    model = config.model
    assert (model.img_resolution, model.img_channels, model.label_dim, model.levels) == (8, 1, 10, 17)
    assert (config.data.holdout, config.eval.network) == ("test", "classifier")
    assert (model.arch, model.patch) == ("mixer", 2) and config.ddo.beta == (0.2,) and config.ddo.pool == 2048
    assert config.pretrain.length.steps and config.ddo.length.steps and config.control.eval_every.steps
    assert len(said) == 1 and "model.levels = 17" in said[0] and said[0].startswith("digits:train, ")
    check_network(config)
    assert fill.filled(config, tmp_path, pytest.fail) is config  # nothing is unset any more


@pytest.mark.parametrize(
    "classes, mode, label_dim, channels, network",
    [(("a", "b"), "RGB", 2, 3, "classifier"), ((), "L", 0, 1, "none"), (("a",), "RGB", 0, 3, "none")],
)
def test_folders(tmp_path, classes, mode, label_dim, channels, network, monkeypatch):
    """Breaks if images of one class or of none are conditioned on it, or judged by a classifier that learns nothing."""
    monkeypatch.setattr(names, "PACKAGED", {"efficientnet-lite0": ("no_such_package", "x.pth", "x")})
    config = fill.filled(of_images(write(tmp_path / "set", classes=classes, mode=mode)), tmp_path / "run")
    assert (config.model.label_dim, config.model.img_channels, config.eval.network) == (label_dim, channels, network)
    assert (config.model.levels, config.data.holdout) == (256, "")


def test_without_classes_a_network_of_photographs_judges(tmp_path, monkeypatch):
    """Breaks if EfficientNet is at hand and is not taken."""
    monkeypatch.setattr(features, "check", lambda *args: None)
    config = fill.filled(of_images(write(tmp_path / "set", classes=())), tmp_path / "run")
    assert config.eval.network == "efficientnet"
    check_network(config)


def test_idx_has_a_held_out_split(tmp_path):
    rng = np.random.default_rng(0)
    for part, n in (("train", 20), ("t10k", 10)):
        (tmp_path / f"{part}-images-idx3-ubyte").write_bytes(idx(rng.integers(0, 256, (n, 28, 28))))
        (tmp_path / f"{part}-labels-idx1-ubyte").write_bytes(idx(np.arange(n) % 5))
    config = fill.filled(of_images(f"idx:{tmp_path}"), tmp_path / "run")
    assert (config.data.holdout, config.model.label_dim, config.model.patch) == ("test", 5, 4)


def test_a_given_value_stays_and_a_workdir_has_the_last_word(tmp_path, monkeypatch):
    """Breaks if a flag is overwritten, or a run that is continued on another machine becomes another run."""
    config = of_images(variant="runlocal")
    config.ddo.beta, config.model.levels = (0.5,), 256
    config.pretrain.length.steps = 7
    first = fill.filled(config, tmp_path)
    assert first.ddo.beta == (0.5,) and first.model.levels == 256 and first.pretrain.length.steps == 7
    open_workdir(first, tmp_path, {"data": "x"})
    monkeypatch.setattr(fill.jax, "default_backend", lambda: "gpu")
    assert fill.filled(config, tmp_path) == first
    other = fill.filled(config, tmp_path / "other")
    assert other.model.arch == "SongUNet" and "patch" not in other.model
    check_network(other)


@pytest.mark.parametrize(
    "shape", [(8, 8, 1), (16, 16, 3), (25, 25, 3), (28, 28, 1), (23, 23, 1), (31, 31, 3), (64, 64, 3)]
)
@pytest.mark.parametrize("accelerator", [False, True])
def test_every_size_has_a_network(shape, accelerator, tmp_path):
    """Breaks if the recipe names a network that cannot be built, or matrix products where they are slow."""
    config = of_images()
    data = sources.ArraySource("x", np.zeros((2, *shape), np.uint8), np.zeros(2, np.int32), 0)
    found = fill.recipe(shape, 600, accelerator)
    assert (found["model.arch"] == "mixer") == (shape[0] <= 28 and shape[0] != 23 and not accelerator)
    with config.unlocked():
        config.eval.network, config.data.holdout = "none", ""
        for key, value in (fill.of_data(config, data) | found).items():
            section, _, name = key.rpartition(".")
            part = config
            for step in section.split("."):
                part = part[step]
            part[name] = value
    check_network(config)


def test_what_cannot_be_read_off(tmp_path):
    """Breaks if images of no square, or a crop to no size, end in a traceback or a network of their height."""
    with pytest.raises(
        UserError, match="images of 12 x 16; allowed where .* square images .*--config.data.crop=center"
    ):
        fill.filled(of_images(write(tmp_path / "wide", size=(16, 12))), tmp_path)
    config = of_images(write(tmp_path / "mixed", 3))
    config.data.crop = "center"
    with pytest.raises(UserError, match="config.model.img_resolution: None; allowed: a number: data.crop = 'center'"):
        fill.filled(config, tmp_path)
    config.model.img_resolution = 8
    assert fill.filled(config, tmp_path).model.img_channels == 3
    with pytest.raises(UserError, match="config.data.name: ''; allowed: digits, zip:PATH"):
        fill.filled(of_images(""), tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty: no images among 0 files"):
        fill.filled(of_images(f"folder:{tmp_path / 'empty'}"), tmp_path)


def test_a_plan_fills_too(tmp_path, capsys):
    text = dry_run.plan(of_images(), str(tmp_path / "run"))
    assert "model.img_resolution = 8" in text and "digits:train" in capsys.readouterr().out
    assert not (tmp_path / "run").exists() and configs.base().model.arch == "mlp"
