"""--profile_steps=20-30: a trace of these steps, for https://ui.perfetto.dev and TensorBoard's profile plugin."""

import re

import jax
from etils import epath

from ddo_jax import stores
from ddo_jax.errors import UserError


def parse_steps(text: str) -> tuple[int, int]:
    """
    >>> parse_steps("20-30")
    (20, 30)

    Raises:
      UserError: not two steps, the first one not above the second one.
    """
    match = re.fullmatch(r"(\d{1,9})-(\d{1,9})", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise UserError(f"--profile_steps: {text!r}; allowed: FIRST-LAST, as in 20-30; steps count from 1")
    return int(match[1]), int(match[2])


class Profile:
    """Traces the first phase of a section that comes to the first of the steps; once.

    Args:
      steps: first and last; None: nothing is traced. section: of the config, whose phases count. directory: where the
        trace goes. say: is told so.
    """

    def __init__(self, steps: tuple[int, int] | None = None, section: str = "ddo", directory=None, say=print):
        self._steps, self._section, self._directory, self._say = steps, section, directory, say
        self._on = False

    def before(self, section: str, step: int) -> None:
        if self._steps is not None and section == self._section and step == self._steps[0]:
            jax.profiler.start_trace(self._directory, create_perfetto_trace=True)
            self._on = True

    def after(self, step: int, results) -> None:
        """results: what the step computes, to be waited for."""
        if self._on and step >= self._steps[1]:
            self.stop(step, results)

    @property
    def waits(self) -> bool:
        """Whether no phase has come to the first of the steps."""
        return self._steps is not None and not self._on

    def stop(self, step: int, results) -> None:
        """End a trace that goes on; step: the last one in it."""
        if self._on:
            jax.block_until_ready(results)
            jax.profiler.stop_trace()
            self._say(f"trace of steps {self._steps[0]} to {step}: {self._directory}")
            self._on, self._steps = False, None


def of_flag(text: str | None, config, workdir: epath.PathLike, say) -> Profile:
    """The profile that a flag asks for: of the rounds, or of pretraining where there are none.

    Raises:
      UserError: see `parse_steps`; or the workdir is on an object store, where the profiler does not write.
    """
    if text is None:
        return Profile()
    steps = parse_steps(text)
    if stores.is_remote(workdir):
        raise UserError(f"--profile_steps: {text} with --workdir={workdir}; allowed: a local --workdir")
    section = "ddo" if config.ddo.rounds else "pretrain"
    return Profile(steps, section, str(epath.Path(workdir) / "profile"), say)
