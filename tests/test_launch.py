"""The launch scripts, against stand-ins for srun, sbatch, scontrol, gcloud, kubectl that write down their arguments."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
FLAGS = ["--config=digits:runlocal", "--workdir=/shared/a run"]


@pytest.fixture
def world(tmp_path):
    """run(script, *arguments, **environment) -> (done, the calls of the stand-ins); stand-ins end with $CODE."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("srun", "sbatch", "scontrol", "gcloud", "kubectl"):
        text = f"import json, os, sys\ncall = [{name!r}, *sys.argv[1:]]\n"
        text += "with open(os.environ['CALLS'], 'a') as f:\n    print(json.dumps(call), file=f)\n"
        text += "print(sys.stdin.read() if call[0] == 'kubectl' else '', end='')\n"
        text += f"sys.exit(int(os.environ.get('CODE', 0)) if {name!r} == 'srun' else 0)\n"
        (tools / name).write_text(f"#!{sys.executable}\n{text}")
        (tools / name).chmod(0o755)

    def run(script, *arguments, **environment):
        calls = tmp_path / "calls"
        calls.unlink(missing_ok=True)
        clean = {k: v for k, v in os.environ.items() if not k.startswith("SLURM")}
        env = {**clean, "PATH": f"{tools}:{os.environ['PATH']}", "CALLS": str(calls), "PYTHON": sys.executable}
        env |= {"LOGS": str(tmp_path / "logs"), "PAUSE": "0", **environment}
        command = ["bash", str(LAUNCH / script), *arguments]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False, cwd=tmp_path)
        return done, [json.loads(line) for line in calls.read_text().splitlines()] if calls.exists() else []

    return run


@pytest.mark.parametrize(
    ("script", "needed"),
    [("local.sh", {}), ("slurm.sh", {}), ("tpu_pod.sh", {"TPU_NAME": "t", "ZONE": "z"}), ("gke.sh", {"IMAGE": "i"})],
)
def test_print_starts_nothing(world, script, needed, tmp_path):
    done, calls = world(script, "--print", *FLAGS, **needed)
    assert done.returncode == 0 and calls == [] and "a run" in done.stdout.replace("\\", "")
    assert "digits:runlocal" in done.stdout and not (tmp_path / "logs").exists()


def test_slurm_submits_itself(world):
    done, (call,) = world("slurm.sh", *FLAGS, NODES="2", PARTITION="gpu", SBATCH="--qos=low --mem=0")
    assert done.returncode == 0, done.stderr
    assert call[0] == "sbatch" and call[-3:] == [str(LAUNCH / "slurm.sh"), *FLAGS]
    for flag in ("--nodes=2", "--partition=gpu", "--qos=low", "--mem=0", "--requeue", "--signal=TERM@120"):
        assert flag in call


@pytest.mark.parametrize(
    ("code", "requeued"), [(0, False), (2, False), (130, False), (75, True), (134, True), (1, True)]
)
def test_slurm_requeues_what_can_go_on(world, code, requeued):
    """Breaks if a job that was preempted ends, or one that cannot go on is started again and again."""
    done, calls = world("slurm.sh", *FLAGS, CODE=str(code), SLURM_JOB_ID="7")
    assert done.returncode == code
    assert calls[0][0] == "srun" and calls[0][-4:] == ["ddo_jax.main", "--distributed", *FLAGS]
    assert any("%N" in argument for argument in calls[0]), "a log a host"
    assert calls[1:] == ([["scontrol", "requeue", "7"]] if requeued else [])


def test_tpu_pod(world, tmp_path):
    done, (call,) = world("tpu_pod.sh", *FLAGS, TPU_NAME="pod", ZONE="us-west4-a", DIR="my code")
    assert done.returncode == 0 and call[:6] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "pod"]
    assert "--worker=all" in call and f"--output-directory={tmp_path / 'logs'}" in call
    remote = next(a for a in call if a.startswith("--command=")).removeprefix("--command=")
    expected = ["cd", "my code", "&&", "launch/restart.sh", "python", "-m", "ddo_jax.main", "--distributed", *FLAGS]
    assert shlex.split(remote) == expected


def test_gke(world):
    import yaml

    done, (call,) = world("gke.sh", *FLAGS, IMAGE="image:1", HOSTS="8", NAMESPACE="research")
    assert call == ["kubectl", "apply", "--namespace=research", "-f", "-"], done.stderr
    job = yaml.safe_load(done.stdout)
    workers = job["spec"]["replicatedJobs"][0]["template"]["spec"]
    container = workers["template"]["spec"]["containers"][0]
    assert (workers["parallelism"], workers["completions"], container["image"]) == (8, 8, "image:1")
    assert container["args"] == [*FLAGS, "--config.hosts.start_s=600"]
    assert workers["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [2]
    assert "$" not in done.stdout
    done, _ = world("gke.sh", "--print", "--config.hosts.start_s=5", IMAGE="i")
    assert "start_s=600" not in done.stdout


@pytest.mark.parametrize(("script", "name"), [("tpu_pod.sh", "TPU_NAME"), ("gke.sh", "IMAGE")])
def test_what_is_unset_is_named(world, script, name):
    done, calls = world(script, *FLAGS)
    assert done.returncode != 0 and f"{name}: unset" in done.stderr and calls == []


def test_local_has_a_process_a_number(world):
    done, _ = world("local.sh", "--print", "2", *FLAGS, PORT="4000")
    lines = [shlex.split(line) for line in done.stdout.splitlines()]
    assert len(lines) == 2
    for i, line in enumerate(lines):
        assert line[-5:] == [*FLAGS, "--coordinator=127.0.0.1:4000", "--num_processes=2", f"--process_id={i}"]
        assert f"JAX_LOCAL_DEVICE_IDS={i}" in line


# -- restart.sh -------------------------------------------------------------------------------------------

COUNT = "n=$(cat n 2>/dev/null || echo 0); echo $((n + 1)) >n; "


@pytest.mark.parametrize(
    ("script", "code", "times"),
    [
        ("exit 0", 0, 1),
        ("exit 2", 2, 1),
        ("exit 130", 130, 1),
        ("[ $n -lt 2 ] && exit 75; exit 0", 0, 3),
        ("[ $n -lt 2 ] && kill -ABRT $$; exit 2", 2, 3),
        ("exit 75", 75, 4),
    ],
)
def test_what_is_started_again(world, tmp_path, script, code, times):
    log = tmp_path / "logs" / "host.log"
    done, _ = world("restart.sh", "bash", "-c", f"{COUNT}echo run $n; {script}", RESTARTS="3", LOG=str(log))
    assert done.returncode == code and int((tmp_path / "n").read_text()) == times
    assert [f"run {i}" in log.read_text() for i in range(times)] == [True] * times


SLOW_KILL = '() { builtin kill "$@"; code=$?; sleep 0.5; return "$code"; }'  # as on a machine with much to do


@pytest.mark.parametrize("kill", [None, SLOW_KILL], ids=["", "slow"])
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_the_run_and_ends_the_script(tmp_path, signum, kill):
    """Breaks if a launcher that is stopped leaves its run behind, starts it again, or forgets the code of a run that
    is over before the shell looks."""
    run = "import signal, sys, time\n"
    run += "for s in (signal.SIGTERM, signal.SIGINT): signal.signal(s, lambda s, f: (print(s), sys.exit(75)))\n"
    run += "print('up', flush=True)\ntime.sleep(30)"
    command = ["bash", str(LAUNCH / "restart.sh"), sys.executable, "-c", run]
    env = os.environ | ({"BASH_FUNC_kill%%": kill} if kill else {})
    job = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=tmp_path, start_new_session=True, env=env)
    assert job.stdout.readline() == "up\n"
    began = time.monotonic()
    job.send_signal(signum)
    rest = job.communicate(timeout=20)[0]
    assert job.returncode == 75 and rest.split() == [str(int(signum))] and time.monotonic() - began < 20
