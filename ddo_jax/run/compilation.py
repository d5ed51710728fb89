"""JAX's persistent compilation cache: the second start skips most of the compilation, and says so."""

import contextlib
import os
import sys

import jax
from etils import epath


@contextlib.contextmanager
def cache():
    """Use $JAX_COMPILATION_CACHE_DIR, else ~/.cache/ddo_jax/xla; at the end, one line on what it saved."""
    saved, hits = [], []

    def on_duration(event: str, seconds: float, **_):
        if event.endswith("/compile_time_saved_sec"):
            saved.append(seconds)

    def on_event(event: str, **_):
        if event.endswith("/cache_hits"):
            hits.append(event)

    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        home = epath.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        jax.config.update("jax_compilation_cache_dir", str(home / "ddo_jax" / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
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
