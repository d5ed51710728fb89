"""What an accelerator should tell us, in order of worth: one command, cut off anywhere.

    python -m benchmarks.accelerator --minutes=8 --out=DIR [--only=arithmetic,parity,...] [--fashion=idx:DIR]

Every check is a process of its own with a time budget, and its JSON lines go to DIR/accelerator.jsonl at once. On a CPU
the same checks run in little (networks of a few thousand parameters): that the script works, not what the machine does.
`python -m benchmarks.accelerator --list` prints the checks with their budgets and what was expected of them.

Compiling for a GPU is most of the time (the CIFAR-10 network's MLE step on an H100, beside five other jobs: 76 s), so
what is timed is compiled first, all at once, into a cache of this run; compile_s of such a check is a look-up.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PYTHON = sys.executable


class Check(NamedTuple):
    """One process.

    Attributes:
      seconds: its budget. expected: written before it was run. command: (small, options) -> argv. timed: alone on the
        machine, and compiled beforehand.
    """

    name: str
    seconds: int
    expected: str
    command: Callable
    timed: bool = True


# ----------------------------------------------------------------------------------------------------
# Measured here, in a child: `--child=NAME`


def arithmetic(small: bool) -> None:
    """Which arithmetic float32 products and convolutions get, by their error against float64."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from benchmarks import common

    n, rng = (256 if small else 2048), np.random.default_rng(0)
    a, b = rng.standard_normal((2, n, n)).astype(np.float32)
    x, w = rng.standard_normal((4, 16, 16, 64), np.float32), rng.standard_normal((3, 3, 64, 64), np.float32)
    exact_dot = a.astype(np.float64) @ b.astype(np.float64)
    padded = np.pad(x.astype(np.float64), ((0, 0), (1, 1), (1, 1), (0, 0)))
    exact_conv = sum(padded[:, i : i + 16, j : j + 16] @ w[i, j].astype(np.float64) for i in range(3) for j in range(3))
    errors = {}
    for precision in ("default", "high", "highest"):

        def conv(x, w, precision=precision):
            numbers = ("NHWC", "HWIO", "NHWC")
            return jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=numbers, precision=precision)

        for name, f, args, exact in (
            ("dot", lambda a, b, precision=precision: jnp.dot(a, b, precision=precision), (a, b), exact_dot),
            ("conv", conv, (x, w), exact_conv),
        ):
            error = float(np.abs(np.asarray(jax.jit(f)(*args), np.float64) - exact).max() / np.abs(exact).max())
            errors[f"{name}_{precision}"] = {
                "error": float(f"{error:.2g}"),
                "like": "float32" if error < 1e-5 else "tf32",
            }
    common.report("accelerator/arithmetic", **errors, device=jax.devices()[0].device_kind)


def edm2_step(config, objective: str, params, frozen, repeats: int) -> None:
    """Seconds of one kind of training step, and its memory beside the plan's."""
    import jax
    import numpy as np

    from benchmarks import common
    from ddo_jax import sharding
    from ddo_jax.families import get_family
    from ddo_jax.plan import memory
    from ddo_jax.run import state, step

    family, mesh, key, rng = get_family(config), sharding.make_mesh(), jax.random.key(0), np.random.default_rng(0)
    c = config.ddo if objective == "ddo" else config.pretrain
    images = rng.integers(0, family.spec.levels, (2, c.batch, *family.spec.image_shape)).astype(np.uint8)
    labels = np.arange(c.batch, dtype=np.int32) % family.spec.num_classes
    real, fake = (sharding.put_batch(mesh, {"image": i, "label": labels}) for i in images)
    training = step.Training(family, mesh, c, objective, warmup=0.0, total=1e6)
    partners = dict(ref=params, fake=fake) if objective == "ddo" else dict(fake=None)
    inputs = step.Inputs(frozen, real, key=key, hyper=step.Hyper(4.0, 0.05, 1e-6, (-0.8, 1.6)), **partners)
    own = jax.tree.map(np.array, params)  # the state is donated
    held = [
        sharding.place(mesh, state.new_state(own, c)),
        sharding.replicate(mesh, step.zero_totals(family, objective)),
    ]
    began = time.perf_counter()
    compiled = step.make_step(training).lower(*held, inputs).compile()
    compile_s, m = time.perf_counter() - began, compiled.memory_analysis()
    seconds = []
    for _ in range(repeats + 2):
        began = time.perf_counter()
        held = list(jax.block_until_ready(compiled(*held, inputs)))
        seconds.append(time.perf_counter() - began)
    peak = m.argument_size_in_bytes + m.output_size_in_bytes + m.temp_size_in_bytes - m.alias_size_in_bytes
    common.report(
        f"accelerator/edm2_in64/{objective}",
        batch=c.batch,
        ms=common.spread([1000 * s for s in seconds[2:]]),
        images_per_s=common.spread([c.batch / s for s in seconds[2:]]),
        compile_s=round(compile_s, 1),
        peak_mb=peak >> 20,
        expected_mb=memory.step_bytes(family, c, objective, 1, 1)["total"] >> 20,
        device_peak_mb=(jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0) >> 20,
        device=jax.devices()[0].device_kind,
    )


def edm2_sample(config, params, frozen, n: int) -> None:
    """Images a second of 32 steps in bfloat16."""
    import jax
    import numpy as np

    from benchmarks import common
    from ddo_jax import sharding
    from ddo_jax.families import get_family
    from ddo_jax.generate.sampler import make_sampler

    config.eval.dtype = "bfloat16"
    family = get_family(config)
    settings = family.settings(config.sampler)
    run = make_sampler(family, settings, sharding.make_mesh(), n)
    labels, seconds = np.arange(n, dtype=np.int32) % family.spec.num_classes, []
    for i in range(3):
        began = time.perf_counter()
        for _ in run(params, frozen, np.arange(i * n, (i + 1) * n), labels):
            pass
        seconds.append(time.perf_counter() - began)
    common.report(
        "accelerator/edm2_in64/sample",
        batch=n,
        dtype="bfloat16",
        nfe=settings.nfe,
        images_per_s=common.spread([n / s for s in seconds[1:]]),
        first_call_s=round(seconds[0], 1),
        device=jax.devices()[0].device_kind,
    )


def edm2(small: bool) -> None:
    """EDM2-S at 64 x 64: an MLE step, a DDO step, sampling."""
    import jax

    from configs import edm2_in64
    from ddo_jax.families import get_family

    config = edm2_in64.get_config("runlocal" if small else "")
    config.ddo.batch = config.pretrain.batch = 8 if small else 64
    params, frozen = jax.jit(get_family(config).init)(jax.random.key(0))
    for objective in ("mle", "ddo"):
        edm2_step(config, objective, params, frozen, repeats=2 if small else 6)
    edm2_sample(config, params, frozen, 4 if small else 128)


CHILDREN = {f.__name__: f for f in (arithmetic, edm2)}


# ----------------------------------------------------------------------------------------------------
# The list


def child(name: str) -> Callable:
    return lambda small, options: [PYTHON, "-m", "benchmarks.accelerator", f"--child={name}", *["--small"] * small]


def script(name: str, *large: str, small: tuple[str, ...] = ()) -> Callable:
    return lambda little, options: [PYTHON, f"benchmarks/{name}.py", *(small if little else large)]


def parity(small: bool, options) -> list[str]:
    """The goldens and the contract of the families, on this device."""
    chosen = (
        ["tests/parity/test_edm2.py", "-k", "test_elementwise"]
        if small
        else ["tests/parity", "tests/families/test_contract.py"]
    )
    workers = [] if small or not importlib.util.find_spec("xdist") else ["-n", "8"]
    return [
        PYTHON,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-m",
        "not slow",
        "-W",
        "default",
        *workers,
        *chosen,
    ]


def flow(small: bool, options) -> list[str]:
    """SiT, beside PyTorch where that is installed."""
    size = ("--size=sit-s-2", "--batch=1", "--budget=1") if small else ("--size=sit-xl-2", "--batch=32", "--budget=4")
    beside = ["--torch"] * bool(importlib.util.find_spec("torch") and not small)
    return [PYTHON, "-m", "benchmarks.sit", "--what=forward,sample,half,ddo", *size, *beside]


def main_job(config: str, little: str) -> Callable:
    """A whole run of the main command."""

    def command(small: bool, options) -> list[str]:
        name = little if small else config
        data = [f"--config.data.name={options.fashion}"] if name.startswith("fashion") and options.fashion else []
        workdir = Path(options.out) / name.replace(":", "_")
        return [PYTHON, "-m", "ddo_jax.main", f"--config={name}", f"--workdir={workdir}", *data]

    return command


WARM_S = 200  # for compiling all that is timed
CHECKS = (
    Check("arithmetic", 60, "highest: float32; default: TF32 on an H100, float32 on a CPU", child("arithmetic"), False),
    Check("parity", 150, "r = 0 at the reference; every golden within its tolerance of the CPU", parity, False),
    Check("digits", 180, "14.62 -> 6.63, control 13.84 up to rounding", main_job("digits", "digits:runlocal"), False),
    Check(
        "edm",
        60,
        "DDO / MLE 2.67; sampling in bfloat16 at least twice as fast as in float32",
        script("edm", "--what=mle,ddo,sample", "--batches=128", "--budget=3", small=("--small", "--batches=2")),
    ),
    Check("edm2", 60, "DDO / MLE 2.67", child("edm2")),
    Check(
        "var",
        60,
        "asking the reference costs 2 of 8 forwards",
        script(
            "var_step",
            *("--config=var_in256", "--batch=25", "--repeats=5"),
            small=("--batch=8", "--repeats=2"),
        ),
    ),
    Check(
        "sit",
        90,
        "as fast as eager PyTorch; sampling in bfloat16 at least twice as fast as in float32",
        flow,
    ),
    Check("fashion", 300, "a whole run within 5 minutes", main_job("fashion:gpu", "fashion:runlocal"), False),
    Check(
        "torch",
        300,
        "at least 1.5 times eager PyTorch and as fast as torch.compile",
        script("edm", "--what=mle,ddo", "--batches=128", "--torch", small=("--small", "--what=forward", "--batches=2")),
        False,
    ),
)


def lines_of(check: Check, text: str) -> list[dict]:
    """What a check says: its own JSON lines, and the last lines of a test run or of the main command."""
    found = []
    for line in text.splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            found.append(value)
    if not found:
        words = ("passed", "failed", "FAILED", "ERROR", "fd_x100", "report:")
        found = [{"said": [line for line in text.splitlines() if any(w in line for w in words)][-40:]}]
    return found


def start(check: Check, options, where=subprocess.PIPE) -> subprocess.Popen:
    """Its process, a group of its own."""
    cache = {"MIN_COMPILE_TIME_SECS": "0", "MIN_ENTRY_SIZE_BYTES": "-1"}
    return subprocess.Popen(
        check.command(options.small, options),
        cwd=ROOT,
        env={
            **{"JAX_PLATFORMS": "", "XLA_FLAGS": "", **os.environ},
            "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
            "JAX_COMPILATION_CACHE_DIR": str(Path(options.out).resolve() / "xla"),
            **{f"JAX_PERSISTENT_CACHE_{name}": value for name, value in cache.items()},
        },
        stdout=where,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def kill(process: subprocess.Popen) -> None:
    """It and its children."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def run(check: Check, options, left: float) -> list[dict]:
    """Its JSON lines, with how it ended."""
    patience = 4 if options.small else 1  # in little nothing is compiled beforehand, and two cores may be busy
    budget, began = min(patience * check.seconds, left), time.perf_counter()
    process = start(check, options)
    try:
        text, _ = process.communicate(timeout=budget)
        result = f"exit {process.returncode}"
    except subprocess.TimeoutExpired:
        kill(process)
        text, result = process.communicate()[0], f"cut off after {budget:.0f} s"
    ended = {"check": check.name, "expected": check.expected, "result": result}
    ended["seconds"] = round(time.perf_counter() - began, 1)
    if result != "exit 0":
        ended["last_lines"] = text.splitlines()[-5:]
    return [*({"check": check.name, **line} for line in lines_of(check, text)), ended]


def compile_first(checks: list[Check], options, left: float) -> dict:
    """Run what is timed all at once, for its compiled programs; what it measures like that is thrown away."""
    began = time.perf_counter()
    processes = {c.name: start(c, options, subprocess.DEVNULL) for c in checks}
    finished = []
    for name, process in processes.items():
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, min(WARM_S, left / 2) - (time.perf_counter() - began)))
            finished.append(name)
        kill(process)
    return {"check": "compile", "finished": finished, "seconds": round(time.perf_counter() - began, 1)}


def emit(out: Path, lines: list[dict]) -> None:
    text = "".join(json.dumps(line) + "\n" for line in lines)
    with open(out / "accelerator.jsonl", "a") as f:
        f.write(text)
    print(text, end="", flush=True)


def main(options) -> None:
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    ends = time.perf_counter() + 60 * options.minutes
    chosen = [check for check in CHECKS if check.name in options.only]
    to_compile = [] if options.small else [check for check in chosen if check.timed]
    for check in chosen:
        if check.timed and to_compile:
            emit(out, [compile_first(to_compile, options, ends - time.perf_counter())])
            to_compile = []
        left = ends - time.perf_counter()
        emit(out, run(check, options, left) if left > 5 else [{"check": check.name, "result": "NOT RUN: no time left"}])


def is_cpu() -> bool:
    """Of the device that a child would see; asked in a child: this process holds no device."""
    code = "import jax; print(jax.default_backend())"
    return subprocess.run([PYTHON, "-c", code], capture_output=True, text=True, check=True).stdout.split()[-1] == "cpu"


def parse(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--out", default="accelerator")
    parser.add_argument("--only", default=",".join(c.name for c in CHECKS))
    parser.add_argument("--fashion", help="config.data.name of Fashion-MNIST, where it is not at the config's place")
    parser.add_argument("--small", action="store_true", help="in little; always on a CPU")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--child", choices=CHILDREN, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    options.only = options.only.split(",")
    if unknown := set(options.only) - {c.name for c in CHECKS}:
        parser.error(f"--only: {', '.join(sorted(unknown))}; allowed: {', '.join(c.name for c in CHECKS)}")
    return options


if __name__ == "__main__":
    given = parse()
    if given.child:
        CHILDREN[given.child](given.small)
    elif given.list:
        print(*(f"{c.name:12}{c.seconds:4} s  {c.expected}" for c in CHECKS), sep="\n")
    else:
        given.small = given.small or is_cpu()
        main(given)
