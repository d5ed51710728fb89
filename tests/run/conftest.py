"""What the tests of the harness share: digits prepared once, a micro config, one prepared run and its steps.

optax's Adam fails under strict dtype promotion (0.9 ** int32), so these tests run under the standard one.
"""

import shutil

import jax
import pytest

from ddo_jax.run import config as configs
from ddo_jax.run import prepare


@pytest.fixture(scope="session", autouse=True)
def digits_directory(tmp_path_factory):
    directory = tmp_path_factory.getbasetemp() / "tfds"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TFDS_DATA_DIR", str(directory))
        yield directory


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(tmp_path_factory):
    """Setups of one config compile the same programs: once a session is enough."""
    options = {
        "jax_compilation_cache_dir": str(tmp_path_factory.getbasetemp() / "xla"),
        "jax_persistent_cache_min_compile_time_secs": 0.1,
    }
    before = {name: getattr(jax.config, name) for name in options}
    for name, value in options.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(scope="session", autouse=True)
def standard_promotion():
    with jax.numpy_dtype_promotion("standard"):
        yield


def micro_config():
    """The whole job with a network of 8 units: a few steps, a few images."""
    c = configs.base()
    c.name = "micro"
    c.model.update(arch="mlp", img_resolution=8, img_channels=1, label_dim=10, levels=17)
    with c.unlocked():
        c.model.update(width=8, blocks=1)
    c.sampler.num_steps = 2
    for phase in ("pretrain", "ddo", "control"):
        c[phase].update(batch=16, ema_mimg=16e-6)
    c.pretrain.length.steps = 3
    c.ddo.update(rounds=1, beta=(0.1, 0.2), pool=40, lr=1e-3)
    c.ddo.length.steps = 2
    c.ddo.eval_every.steps = 1
    c.control.update(enabled=True, factor=1, lrs=(1e-3,))
    c.control.eval_every.steps = 1
    c.eval.update(num=48, batch=32, report_seeds=2, grid=10)
    c.log.update(every=1, tensorboard=False)
    return c


@pytest.fixture
def micro():
    return micro_config()


class Quiet:
    """A console that collects."""

    def __init__(self):
        self.lines = []

    def status(self, text, *, done=False):
        self.lines.append(text)

    line = status


@pytest.fixture(scope="session")
def fitted(tmp_path_factory):
    """The classifier's weights, trained once: a workdir that has them does not train it again."""
    directory = tmp_path_factory.mktemp("features")
    setup = prepare.prepare(micro_config(), directory, Quiet())
    return setup, directory / "features-digits.npz"


@pytest.fixture
def new_workdir(tmp_path, fitted):
    """A function that makes workdirs with the fitted classifier in them."""

    def make(name: str):
        (tmp_path / name).mkdir()
        shutil.copy(fitted[1], tmp_path / name)
        return tmp_path / name

    return make


@pytest.fixture(scope="session")
def setup(fitted):
    """A prepared run of the micro config; its jitted steps and sampler are shared by all tests."""
    return fitted[0]
