"""Strict JAX for every test: silent rank or dtype promotion is the classic bug of per-example losses.

One compilation cache for the session and all its workers; compiled programs are dropped between modules, so that a
worker does not grow.
"""

import os
import shutil
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # tests never wait for a network
# Compiling is most of the work, and code for a few rows need not be fast; `XLA_FLAGS= pytest` compiles as users do.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import jax
import pytest

from ddo_jax.run.prepare import prepare
from tests.harness import Quiet, micro_config

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

HARNESS = ("run", "store", "plan", "generate")  # folders whose tests train: optax's Adam fails under strict promotion


MOST_BYTES = 3 * 2**28  # of a worker: above, compiled programs are dropped between modules


def _cache() -> Path:
    """Compiled programs, for all workers, their child processes and later sessions of this user."""
    given = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    name = f"ddo_jax-tests-{os.getuid()}-{jax.__version__}"
    return Path(given) if given else Path(tempfile.gettempdir()) / name


def pytest_configure(config):
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(_cache())
    for name, value in (("MIN_COMPILE_TIME_SECS", 0.1), ("MIN_ENTRY_SIZE_BYTES", -1)):
        os.environ[f"JAX_PERSISTENT_CACHE_{name}"] = str(value)
        jax.config.update(f"jax_persistent_cache_{name.lower()}", value)
    jax.config.update("jax_compilation_cache_dir", str(_cache()))


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture(scope="session", autouse=True)
def digits_directory(tmp_path_factory):
    """The digits are prepared once a session, never in the user's own directory."""
    directory = tmp_path_factory.getbasetemp() / "tfds"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TFDS_DATA_DIR", str(directory))
        yield directory


@pytest.fixture(scope="module", autouse=True)
def fresh_programs():
    yield
    if _resident_bytes() > MOST_BYTES:
        jax.clear_caches()


@pytest.fixture(scope="module", autouse=True)
def promotion(request):
    folder = Path(request.path).relative_to(Path(__file__).parent).parts[0]
    with jax.numpy_dtype_promotion("standard" if folder in HARNESS else "strict"):
        yield


@pytest.fixture
def micro():
    return micro_config()


@pytest.fixture(scope="session")
def fitted(tmp_path_factory):
    """The classifier's weights, trained once: a workdir that has them does not train it again."""
    directory = tmp_path_factory.mktemp("features")
    with jax.numpy_dtype_promotion("standard"):
        setup = prepare(micro_config(), directory, Quiet())
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
