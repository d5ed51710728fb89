"""python -m ddo_jax.posthoc: from snapshots of a small network to a checkpoint that is read and sampled from."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ddo_jax import convert, posthoc, sample
from ddo_jax.convert import safetensors
from ddo_jax.errors import UserError
from ddo_jax.store import snapshots

ROOT = Path(__file__).parents[1]
GOLDENS = ROOT / "tests" / "goldens"
TIMES, STDS = (1_500_000, 3_000_100), (0.05, 0.1)  # no multiples of 1024: the names do not tell the times


def network(name):
    """(config, state dict) of a golden file."""
    with np.load(GOLDENS / f"{name}.npz") as golden:
        state = {k.removeprefix("param/"): golden[k] for k in golden.files if k.startswith("param/")}
        return json.loads(str(golden["config"])), state


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A workdir with the snapshots of a DDPM++ and, file by file, the state dicts in them."""
    config, state = network("edm_ddpmpp_small")
    config = {k: v for k, v in config.items() if k != "class_name"} | {"model_type": "SongUNet"}
    metadata = {"ddo_jax_kind": "edm", "ddo_jax_config": json.dumps(config)}
    workdir, rng, states = tmp_path_factory.mktemp("run"), np.random.default_rng(0), []
    (workdir / "pretrain" / "snapshots").mkdir(parents=True)
    for images in TIMES:
        for std in STDS:
            states.append({})
            for name, w in state.items():
                noise = 0 if name.endswith("resample_filter") else 0.1 * rng.normal(size=w.shape)
                states[-1][name] = (w + noise).astype(np.float32)
            path = workdir / "pretrain" / "snapshots" / snapshots.file_name("network-snapshot", images // 1000, std)
            path.write_bytes(snapshots.encode(states[-1], metadata, images, std))
    return workdir, states


def half(state):
    return {k: v if k.endswith("resample_filter") else v.astype(np.float16) for k, v in state.items()}


@pytest.mark.slow
def test_to_a_file_that_is_sampled_from(run, tmp_path, capsys):
    """Breaks if the sum, its names or its metadata are not those of the network."""
    workdir, states = run
    posthoc.main([str(workdir), "--std=0.05,0.07,...,0.11", f"--out={tmp_path / 'made'}"])
    names = [f"phema-0003000-{std}.safetensors" for std in ("0.050", "0.070", "0.090", "0.110")]
    assert sorted(p.name for p in (tmp_path / "made").iterdir()) == names
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and all("from 4 snapshots" in line for line in lines)
    x, _ = snapshots.fit(snapshots.find(str(workdir)), TIMES[1], [0.05, 0.07, 0.09, 0.11])
    for name, shares in zip(names, x.T, strict=True):
        released = convert.read(tmp_path / "made" / name)
        assert released.kind == "edm" and list(released.state_dict) == list(states[0])
        for key, value in released.state_dict.items():
            wide = [half(s)[key].astype(np.float64) for s in states]
            expected = sum(a * b for a, b in zip(shares, wide, strict=True))
            np.testing.assert_allclose(value, expected, rtol=2**-11, atol=1e-6, err_msg=key)
    for key, value in half(states[2]).items():  # a length that was tracked: its own last snapshot
        np.testing.assert_array_equal(convert.read(tmp_path / "made" / names[0]).state_dict[key], value)
    out = f"--out={tmp_path / 'images'}"
    sample.main([f"--checkpoint={tmp_path / 'made' / names[1]}", out, "--seeds=0-1", "--num_steps=2", "--batch=2"])
    assert len(list((tmp_path / "images").rglob("*.png"))) == 2


def test_an_earlier_end(run, tmp_path, capsys):
    """Breaks if later snapshots take part, or --force is needed without need, or does nothing."""
    workdir, states = run
    out = tmp_path / "one.safetensors"
    for _ in range(2):
        posthoc.main([str(workdir), "--std=0.1", "--kimg=1500", f"--out={out}", "--force"])
    assert capsys.readouterr().out.count("from 2 snapshots") == 2
    metadata = convert.read(out).extras["metadata"]
    assert (metadata["ddo_jax_images"], metadata["ddo_jax_std"]) == ("1500000", "0.1")
    for key, value in convert.read(out).state_dict.items():
        np.testing.assert_array_equal(value, half(states[1])[key])


def test_results_are_not_snapshots(run, tmp_path):
    """Breaks if results lying beside the snapshots enter the next sum."""
    folder = tmp_path / "s"
    folder.mkdir()
    for path in (run[0] / "pretrain" / "snapshots").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    posthoc.main([str(folder), "--std=0.07", f"--out={folder}"])
    posthoc.main([str(folder), "--std=0.08", f"--out={folder / 'mine-0003000-0.080.safetensors'}"])
    assert len(list(folder.iterdir())) == 6 and len(snapshots.find(str(folder))) == 4


def test_dry_run_shows_what_cannot_be_rebuilt(run, tmp_path, capsys):
    """Breaks if a user does not see that these snapshots are too few for a length."""
    posthoc.main([str(run[0]), "--std=0.01,0.05", "--dry_run"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["snapshot", "images", "0.010", "0.050"] and len(lines) == 6
    assert lines[3].split()[1:] == ["3000100", lines[3].split()[2], "+1.0000"]
    rest = [float(v.rstrip("%")) for v in lines[-1].split()[-2:]]
    assert rest[0] > 40 and rest[1] == 0


def released_pickle(tmp_path, config, state, kimg, std):
    """A file as EDM2's training writes it, by the builders of the converter's tests."""
    from .convert import conftest as build

    data = build.nvidia(config, state)
    (tmp_path / f"edm-{kimg:07d}-{std:.3f}.pkl").write_bytes(data)


def test_released_pickles(tmp_path):
    """Breaks if the time of a released file is not the next multiple of 1024 images, or a pickle is executed."""
    config, state = network("edm_ddpmpp_small")
    states = [{k: v * (i + 1) if "weight" in k else v for k, v in state.items()} for i in range(3)]
    for (kimg, std), own in zip(((8388, 0.05), (16777, 0.05), (16777, 0.1)), states, strict=True):
        released_pickle(tmp_path, config, own, kimg, std)
    found = snapshots.find(str(tmp_path))
    assert [s.images for s in found] == [8388608, 16777216, 16777216]
    out = tmp_path / "out.safetensors"
    posthoc.main([str(tmp_path), "--std=0.08", f"--out={out}"])
    x, _ = snapshots.fit(found, 16777216, [0.08])
    made = convert.read(out)
    assert made.kind == "edm" and made.config == config
    for key, value in made.state_dict.items():
        share = float(x[:, 0] @ [1, 2, 3]) if "weight" in key else 1.0
        expected = state[key] * (1.0 if key.endswith("resample_filter") else share)
        np.testing.assert_allclose(value, expected, rtol=2**-10, atol=1e-6, err_msg=key)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("0.075", [0.075]),
        ("0.1,0.05", [0.1, 0.05]),
        ("0.010,0.015,...,0.250", [round(0.005 * k, 3) for k in range(2, 51)]),
        ("0.2,0.15,...,0.05,0.01", [0.2, 0.15, 0.1, 0.05, 0.01]),
    ],
)
def test_lengths(text, expected):
    """Breaks if a series stops early, goes too far or drifts."""
    assert posthoc.parse_lengths(text) == expected


BAD = ["", "x", "0.05,", "...,0.1", "0.05,...,0.1", "0.05,0.06,...", "0.05,0.05,...,0.1", "0.05,0.07,...,0.1"]
BAD += [
    "0.1,0.15,...,0.05",
    "0.05,0.06,...,0.06",
    "0",
    "-0.1",
    "0.3",
    "nan",
    "0.05,0.0501",
    "0.1,0.1,...,0.1",
    "1e-400",
]


@pytest.mark.parametrize("text", BAD)
def test_lengths_that_make_no_sense(text):
    """Breaks if a mistake in --std makes other averages than the ones meant."""
    with pytest.raises(UserError, match=r"^--std: .*; allowed: "):
        posthoc.parse_lengths(text)


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--std=0.07"], "--out: missing; give a folder, a .safetensors file, or --dry_run"),
        (["--std=0.07", "--kimg=7", "--dry_run"], "--kimg: 7; allowed: the number of a snapshot, as [1500, 3000]"),
        (["--std=0.07,0.08", "--out={tmp}/a.safetensors"], "a.safetensors is one file for 2 lengths; give a folder"),
        (["--std=0.07", "--out={tmp}/nowhere/a.safetensors"], "its folder does not exist; create it first"),
        (["--std=0.07", "--out={tmp}/a.pkl"], "a.pkl; allowed: a folder, or a file ending in .safetensors"),
        (["--std=0.07", "--out={tmp}/there"], "phema-0003000-0.070.safetensors: exists; choose another --out"),
        (["--out={tmp}"], "the following arguments are required: --std"),
        (["--std=0.07", "--kimg=x"], "argument --kimg: invalid int value: 'x'"),
    ],
)
def test_mistakes_are_one_line(run, tmp_path, capsys, flags, words):
    """Breaks if a mistake ends in a traceback, in another exit code, or overwrites something."""
    there = tmp_path / "there" / "phema-0003000-0.070.safetensors"
    there.parent.mkdir()
    there.write_bytes(b"precious")
    with pytest.raises(SystemExit) as e:
        posthoc.main([str(run[0]), *(flag.format(tmp=tmp_path) for flag in flags)])
    error = capsys.readouterr().err
    assert e.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1 and words in error
    assert there.read_bytes() == b"precious" and len(list(tmp_path.rglob("*"))) == 2


def test_the_command(tmp_path):
    """Breaks if the module is no command, or --help does not say what it takes."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}

    def command(*flags):
        line = [sys.executable, "-m", "ddo_jax.posthoc", *flags]
        return subprocess.run(line, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)

    assert "0.010,0.015,...,0.250" in command("--help").stdout
    done = command(str(tmp_path / "nowhere"), "--std=0.1", "--dry_run")
    assert done.returncode == 2 and "nowhere: no snapshots" in done.stderr and done.stderr.count("\n") == 1


def test_a_torn_snapshot_is_named(run, tmp_path):
    """Breaks if half a file makes half a network."""
    for path in (run[0] / "pretrain" / "snapshots").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    torn = sorted(tmp_path.iterdir())[1]
    arrays, metadata = safetensors.loads(torn.read_bytes())
    torn.write_bytes(safetensors.dumps(arrays, metadata)[:-10])
    with pytest.raises(UserError, match=torn.name):
        snapshots.find(str(tmp_path))
