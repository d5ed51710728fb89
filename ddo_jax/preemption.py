"""Leaving on SIGTERM and Ctrl-C: at the next step, all processes of a run at the same one.

A command wraps its work in `handled()`; loops call `check()` where they can stop, the same number of times in every
process of a run. A second signal, a second later or more, leaves at once: launchers pass on what a terminal has sent to
every process already.
"""

import contextlib
import ctypes
import os
import signal
import time
from collections.abc import Iterator

import jax
from jax.experimental import multihost_utils

PREEMPTED = 75  # exit code, EX_TEMPFAIL of sysexits.h: launchers start the same command again
INTERRUPTED = 130  # of Ctrl-C, as shells have it: they do not
AGAIN_S = 1.0  # a signal so soon after the first one is the same one


class Preempted(BaseException):
    """The process was asked to leave. No Exception: what recovers from errors must not recover from this one.

    Args:
      kept: what was saved on the way out, in words.

    Attributes:
      code: to exit with. line: to say.
    """

    def __init__(self, kept: str = ""):
        super().__init__(kept)
        signum = _Asked.signum
        self.code = INTERRUPTED if signum == signal.SIGINT else PREEMPTED
        asked = "another process was told to leave" if signum is None else signal.Signals(signum).name
        self.line = f"{asked}: {kept or 'what was finished is kept'}; the same command continues"


class _Asked:
    """signum: of the first signal. at: when it came. checks: how often this process has asked `reached`."""

    signum: int | None = None
    at = 0.0
    checks = 0


def reached() -> bool:
    """Whether to leave now. In a run of several processes all get the same answer, at their next common call.

    That is the work of JAX's preemption service: a signal to any host sets the step, one behind the furthest host's.
    """
    if jax.process_count() == 1:
        return _Asked.signum is not None
    _Asked.checks += 1
    return multihost_utils.reached_preemption_sync_point(_Asked.checks)


def check() -> None:
    """
    Raises:
      Preempted: it is time to leave.
    """
    if reached():
        raise Preempted


@contextlib.contextmanager
def handled() -> Iterator[None]:
    """Within, the first SIGTERM or SIGINT only asks `reached` to say so; a second one ends the process.

    To be entered by the main thread, after `jax.distributed.initialize`.
    """
    notify = _service() if jax.distributed.is_initialized() else lambda signum: None

    def on_signal(signum, frame):
        if _Asked.signum is not None:
            if time.monotonic() - _Asked.at >= AGAIN_S:
                os._exit(128 + signum)
            return
        _Asked.signum, _Asked.at = signum, time.monotonic()
        name = signal.Signals(signum).name
        os.write(2, f"\n{name}: leaving at the next step; once more leaves at once\n".encode())
        notify(signal.SIGTERM)

    before = {signum: signal.signal(signum, on_signal) for signum in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
        _Asked.signum = None


def _service():
    """JAX's own handler of SIGTERM, which tells the other hosts.

    It is set in C++, so that Python's `signal` neither calls nor returns it: Python's handler would replace it, and
    the hosts would learn nothing. The C library knows its address.
    """
    libc = ctypes.CDLL(None)
    libc.signal.restype, libc.signal.argtypes = ctypes.c_void_p, (ctypes.c_int, ctypes.c_void_p)
    address = libc.signal(signal.SIGTERM, None)
    if address in (None, 1):  # SIG_DFL, SIG_IGN: the service is switched off (jax_enable_preemption_service)
        return lambda signum: None
    return ctypes.CFUNCTYPE(None, ctypes.c_int)(address)
