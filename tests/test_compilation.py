"""Where compiled programs are kept."""

import jax
import pytest

from ddo_jax import compilation


@pytest.fixture
def folder():
    """The session's cache, put back at the end."""
    before, seconds = jax.config.jax_compilation_cache_dir, jax.config.jax_persistent_cache_min_compile_time_secs
    yield before
    jax.config.update("jax_compilation_cache_dir", before)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", seconds)
    compilation.compilation_cache.reset_cache()


def test_several_processes_share_a_cache(folder, tmp_path, monkeypatch):
    """Breaks if all hosts but the first compile everything again, or a folder that was given is not used."""
    compilation.share(tmp_path)
    assert jax.config.jax_compilation_cache_dir == folder  # one process
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    compilation.share(tmp_path)
    assert jax.config.jax_compilation_cache_dir == folder  # the environment names one
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    compilation.share(tmp_path)
    assert jax.config.jax_compilation_cache_dir == str(tmp_path)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.jit(lambda x: x @ x + 3.25)(jax.numpy.ones((7, 7))).block_until_ready()
    assert list(tmp_path.iterdir())
