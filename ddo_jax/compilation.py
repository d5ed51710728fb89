"""JAX's persistent compilation cache: the second start skips most of the compilation, and says so."""

import contextlib
import os
import sys

import jax
from etils import epath
from jax.experimental.compilation_cache import compilation_cache

from ddo_jax import files


@contextlib.contextmanager
def cache():
    """Use $JAX_COMPILATION_CACHE_DIR, else ~/.cache/ddo_jax/xla, if writable; at the end, one line on what it saved."""
    saved, hits = [], []

    def on_duration(event: str, seconds: float, **_):
        if event.endswith("/compile_time_saved_sec"):
            saved.append(seconds)

    def on_event(event: str, **_):
        if event.endswith("/cache_hits"):
            hits.append(event)

    if where := os.environ.get("JAX_COMPILATION_CACHE_DIR", ""):
        if where.startswith("~"):
            jax.config.update("jax_compilation_cache_dir", os.path.expanduser(where))
    else:
        jax.config.update("jax_compilation_cache_dir", str(files.cache_dir("xla")))
    _check_folder()
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)  # a run has dozens of small programs
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    jax.monitoring.register_event_duration_secs_listener(on_duration)
    jax.monitoring.register_event_listener(on_event)
    yield
    if hits:
        print(
            f"compilation cache: {len(hits)} programs reused, {max(sum(saved), 0):.0f} s of compilation saved "
            f"({jax.config.jax_compilation_cache_dir})",
            file=sys.stderr,
        )


def share(folder: epath.PathLike) -> None:
    """Use a folder that all hosts see, in a run of several processes: the first process alone writes to JAX's cache,
    and on their own disks the others would compile everything again at every start."""
    if jax.process_count() == 1 or os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return
    jax.config.update("jax_compilation_cache_dir", os.fspath(folder))
    compilation_cache.reset_cache()  # it is opened at the first compilation, which was before


def _check_folder() -> None:
    """Go without a cache, with a note, where its folder cannot be written: JAX would warn of every program."""
    where = jax.config.jax_compilation_cache_dir
    if where is None or "://" in where:
        return
    folder = epath.Path(where)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        files.write_bytes(folder / ".writable", b"")
        (folder / ".writable").unlink(missing_ok=True)
    except OSError as e:
        print(f"note: no compilation cache: {folder}: {e.strerror or e}", file=sys.stderr)
        jax.config.update("jax_compilation_cache_dir", None)
