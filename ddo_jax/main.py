"""`python -m ddo_jax.main --config=digits --workdir=DIR [--config.ddo.alpha=4 ...] [--dry_run]`.

Flags -> config -> run; no logic. Exit codes: 0 done, 2 something the user can mend (one line says what), 75 SIGTERM (a
launcher starts the same command again, and it continues), 130 Ctrl-C (the same command continues, too).
"""

import ast
import os
import sys
import warnings

from absl import app, flags, logging
from ml_collections import config_flags

from ddo_jax import cli, files
from ddo_jax.config import loading
from ddo_jax.errors import UserError

DEFAULT_CONFIG = "digits"

FLAGS = flags.FLAGS
_CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "Config file, or the name of one of ours, with an optional variant: my.py, digits:runlocal, edm2_in64 (default: "
    "digits)",
)
FLAGS["config"].parser = loading.Parser()
_WORKDIR = flags.DEFINE_string("workdir", None, "Everything goes here; unset: runs/<name of the config>")
_DISTRIBUTED = {
    "distributed": flags.DEFINE_bool("distributed", False, cli.DISTRIBUTED["distributed"]),
    "coordinator": flags.DEFINE_string("coordinator", None, cli.DISTRIBUTED["coordinator"]),
    "num_processes": flags.DEFINE_integer("num_processes", None, cli.DISTRIBUTED["num_processes"]),
    "process_id": flags.DEFINE_integer("process_id", None, cli.DISTRIBUTED["process_id"]),
}
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print the resolved config, sizes and the plan, and stop")
_PROFILE_STEPS = flags.DEFINE_string(
    "profile_steps", None, "FIRST-LAST, as in 20-30: a trace of these steps of a round, in WORKDIR/profile"
)
_IMAGES_PER_S = flags.DEFINE_list(
    "images_per_s",
    None,
    "With --dry_run, for hours: TRAIN[,SAMPLE], real images of DDO steps and images sampled a second",
)


def parse(argv):
    """absl's parser; its many exceptions become one line and exit code 2."""
    # No default in the flag itself: ml_collections would read the overrides while this module is imported.
    if not any(a.lstrip("-") == "config" or a.lstrip("-").startswith("config=") for a in argv[1:]):
        argv = [argv[0], f"--config={DEFAULT_CONFIG}", *argv[1:]]
    try:
        argv, nones = loading.take_nones(FLAGS.read_flags_from_files(argv, force_gnu=False))
        rest = FLAGS(argv)
        for key in nones:
            loading.unset(FLAGS["config"].value, key)
        return rest
    except (flags.Error, UserError, AttributeError, KeyError, TypeError, ValueError, OSError, ImportError) as e:
        cli.fail(one_line(str(e)))


def one_line(text: str) -> str:
    r"""The message of a parser's exception: absl and ml_collections wrap whole tracebacks into it.

    >>> one_line("flag --config=x.py: Traceback (most recent call last):\n ...\nValueError: unknown variant")
    'ValueError: unknown variant'
    >>> one_line(repr("'alhpa'\nDid you mean 'alpha' instead of 'alhpa'?"))
    "unknown config key: 'alhpa'. Did you mean 'alpha' instead of 'alhpa'?"
    """
    if text[:1] in "'\"" and text[:1] == text[-1:]:  # the representation of a KeyError's string
        text = ast.literal_eval(text)
        return "unknown config key: " + ". ".join(line.strip() for line in text.splitlines() if line.strip())
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return "unknown config key: " + ". ".join(lines) if len(lines) == 2 else lines[-1]


def default_workdir() -> str:
    """runs/digits, runs/digits-runlocal, ..."""
    path, variant = loading.split(config_flags.get_config_filename(FLAGS["config"]))
    return os.path.join("runs", path.stem + (f"-{variant}" if variant else "").replace(":", "-"))


def _stray(unraisable) -> None:
    """TensorStore's threads report to an event loop that Orbax closes at the first error: that one is told."""
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def main(argv):
    if len(argv) > 1:
        cli.fail(f"unexpected argument {argv[1]!r}; flags are written --config=... --workdir=...")
    if _IMAGES_PER_S.value and not _DRY_RUN.value:
        cli.fail("--images_per_s only adds hours to --dry_run; leave it out, or add --dry_run")
    logging.set_verbosity(logging.FATAL)  # Orbax logs what it raises, too, page after page; our lines use the console
    sys.unraisablehook = _stray
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)  # of the same origin
    from ddo_jax import compilation, preemption
    from ddo_jax import config as configs
    from ddo_jax.plan import dry_run
    from ddo_jax.run import main_job

    workdir = os.path.expanduser(_WORKDIR.value or default_workdir())
    config = _CONFIG.value
    try:
        configs.check_hosts(config)
        given = {key: flag.value for key, flag in _DISTRIBUTED.items()}
        about = {f"config.{key}": value for key, value in configs.leaves(config) if key != "data.dir"}
        cli.start_distributed(given, about, config.hosts.start_s, config.hosts.heartbeat_s)
        with compilation.cache(), cli.leaving(), preemption.handled():
            if _DRY_RUN.value:
                print(dry_run.plan(config, workdir, _IMAGES_PER_S.value))
            else:
                kept = f"{workdir} keeps what is finished, up to the last whole checkpoint; make room: the same command"
                with files.full_disk(f"{kept} continues"):
                    main_job.run(config, workdir, _PROFILE_STEPS.value)
    except UserError as e:
        cli.fail(str(e))
    except OSError as e:  # a file of the run: it cannot be read, it is a folder, the file system is gone
        if e.filename is None:
            raise
        cli.fail(
            f"{os.fspath(e.filename)}: {e.strerror}; nothing is lost: the same command continues once it is mended"
        )
    except KeyboardInterrupt:  # before there is anything to keep
        print("interrupted; the same command continues", file=sys.stderr)
        sys.exit(preemption.INTERRUPTED)


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
