"""Neon, the line search of a round, the first gradients: in little, resumed, against arithmetic."""

import shutil
import types

import jax
import numpy as np
import pytest

from ddo_jax import config as configs
from ddo_jax import files, sharding
from ddo_jax.errors import UserError
from ddo_jax.evaluate.records import read_round
from ddo_jax.families import get_family
from ddo_jax.plan import dry_run
from ddo_jax.run import checks, lines, main_job, signal
from ddo_jax.store.checkpoint import restore_ema
from tests.harness import micro_config, random_variables


def started(folder, fitted, **changes):
    """A config of one round, and its workdir with the classifier in it."""
    config = micro_config()
    config.control.enabled = False
    config.ddo.update(beta=(0.1,), **changes.pop("ddo", {}))
    config.keep = "all"
    config.update(changes)
    folder.mkdir(exist_ok=True)
    (folder / "features-digits.npz").write_bytes(fitted[1].read_bytes())
    return config, folder


def params_of(workdir, name, step, config):
    family = checks.check_network(config)[0]
    shapes = jax.eval_shape(family.init, jax.random.key(0))[0]
    return restore_ema(workdir / name / "checkpoints", step, shapes)


@pytest.fixture(scope="module")
def neon(tmp_path_factory, fitted):
    """A finished run of Neon: (config, workdir)."""
    config, workdir = started(tmp_path_factory.mktemp("neon"), fitted, method="neon")
    config.neon.w, config.log.signal = (0.5, 2.0), 2
    main_job.run(config, workdir)
    return config, workdir


def test_neon_steps_away_from_its_own_samples(neon):
    """Breaks if the merge has another sign or weight, if the fakes are not what is trained on, or w is not chosen."""
    config, workdir = neon
    ref = params_of(workdir, "pretrain", 3, config)
    own = params_of(workdir, "rounds/001/neon", 2, config)
    scores = {}
    for w in config.neon.w:
        merged = params_of(workdir, f"rounds/001/w-{w:g}", 2, config)
        expected = jax.tree.map(lambda a, b, w=w: (1 + w) * a - w * b, ref, own)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), merged, expected)
        result = files.read_sealed(workdir / f"rounds/001/w-{w:g}/result.json")
        scores[f"w-{w:g}"] = result["best"]["fd_x100"]
    best = read_round(files.read_sealed(workdir / "rounds/001/best.json"))
    assert best.candidate == min(scores, key=scores.get) and best.best.score == min(scores.values())
    logged = files.read_jsonl(workdir / "rounds/001/neon/metrics.jsonl")
    assert all("loss/mle" in line for line in logged) and not list((workdir / "rounds/001/neon").glob("samples"))


def test_report_of_a_line(neon):
    """Breaks if the points, the gradients or the cost are missing from the report or the records."""
    _, workdir = neon
    text = (workdir / "report/report.md").read_text()
    assert "| after Neon |" in text and "* Neon changed fd_x100" in text
    assert "## Line search" in text and "| 1 | neon | -2 |" in text and "| 1 | neon | -0.5 |" in text
    assert "## First gradients" in text and "## Cost" in text and "a round's FLOPs: training" in text
    phases = {e["phase"] for e in files.read_jsonl(workdir / "evals.jsonl")}
    assert {"rounds/001/w-0.5", "rounds/001/w-2"} <= phases
    logged = [r for r in files.read_jsonl(workdir / "metrics.jsonl") if "signal/real_norm" in r]
    assert [r["step"] for r in logged] == [0] and all(v >= 0 for r in logged for k, v in r.items() if "/" in k[6:])


@pytest.mark.parametrize("lost", ["w-2/result.json", "w-2", "neon", "neon/checkpoints"])
def test_a_line_is_resumed(neon, tmp_path, fitted, lost):
    """Breaks if a killed line search ends in other numbers, or does again what was done."""
    config, workdir = neon
    again = tmp_path / "again"
    shutil.copytree(workdir, again)
    for name in ("rounds/001/best.json", f"rounds/001/{lost}", "rounds/001/ratios", "report", "best"):
        path = again / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    kept = (again / "rounds/001/w-0.5/result.json").stat().st_mtime_ns
    main_job.run(config, again)
    assert (again / "rounds/001/w-0.5/result.json").stat().st_mtime_ns == kept
    for name in ("rounds/001/best.json", "rounds/001/w-2/result.json", "report/scores/ddo/result.json"):
        a, b = (files.read_sealed(folder / name) for folder in (workdir, again))
        for record in (a, b, *a.get("evals", ()), *b.get("evals", ())):
            record.get("protocol", {}).pop("time", None)
            record.get("best", {}).get("protocol", {}).pop("time", None)
        assert a == b


def test_the_line_of_ddo(tmp_path, fitted):
    """Breaks if w = 1 is not what was trained, w is not between, or the best point is not the round's result."""
    config, workdir = started(tmp_path / "run", fitted, ddo=dict(line=(-1.0, 0.5, 1.0)))
    main_job.run(config, workdir)
    round_ = workdir / "rounds/001"
    candidate = files.read_sealed(round_ / "a4_b0.1/result.json")
    best = candidate["best"]
    one = files.read_sealed(round_ / "w1/result.json")
    assert one["best"]["fd_x100"] == best["fd_x100"] and one["through"] == "a4_b0.1"
    assert one["best"]["protocol"]["weights"] == best["protocol"]["weights"]
    ref, theta = params_of(workdir, "pretrain", 3, config), params_of(round_, "a4_b0.1", best["step"], config)
    minus = params_of(round_, "w-1", best["step"], config)
    jax.tree.map(lambda a, b, c: np.testing.assert_allclose(c, 2 * a - b, rtol=1e-5, atol=1e-6), ref, theta, minus)
    scores = {d: files.read_sealed(round_ / d / "result.json")["best"]["fd_x100"] for d in ("w-1", "w0.5", "w1")}
    summary = read_round(files.read_sealed(round_ / "best.json"))
    lowest = min(*scores.values(), best["fd_x100"])
    assert summary.best.score == lowest
    if lowest == best["fd_x100"]:
        assert summary.candidate == "a4_b0.1"  # of equals the one that was trained


def test_a_merge_is_projected():
    """Breaks if a point of EDM2's line, where a length of weights means nothing, is not what the network executes."""
    config = configs.base()
    config.family = "edm2"
    config.model.update(arch="UNet", img_resolution=8, img_channels=1, label_dim=10, levels=17)
    with config.unlocked():
        config.model.update(model_channels=8, channel_mult=(1,), num_blocks=1, attn_resolutions=(), channels_per_head=8)
    family = get_family(config)
    setup = types.SimpleNamespace(family=family, mesh=sharding.make_mesh(1, jax.devices()[:1]))
    ref, theta = (random_variables(lambda key: family.init(key)[0], seed=seed) for seed in (0, 1))
    merged = lines.merger(setup, ref)(ref, theta, -0.5)
    again = jax.jit(lambda params: family.project(params, "ddo"))(merged)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), merged, again)
    alone = jax.jit(lambda params: family.project(params, "ddo"))(theta)
    assert any(not np.allclose(a, b) for a, b in zip(*map(jax.tree.leaves, (merged, alone)), strict=True))


def test_signal_against_one_gradient_at_a_time():
    """Breaks if the norms are not those of the mean and of its noise."""
    rng = np.random.default_rng(0)
    gradients = rng.standard_normal((6, 10)) + 0.3
    total, squares = np.sum(np.sum(gradients, 0) ** 2), np.sum(gradients**2)
    found = signal.norms(float(total), float(squares), 6)
    np.testing.assert_allclose(found["norm"], np.linalg.norm(gradients.mean(0)))
    np.testing.assert_allclose(found["noise"], np.sqrt(np.sum(np.var(gradients, 0, ddof=1)) / 6))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"method": "neon", "ddo.pool": 0}, "config.ddo.pool: 0; allowed: at least ddo.batch = 16: method neon trains"),
        ({"method": "neon", "neon.w": (0.0,)}, "config.neon.w: 0.0; allowed: finite numbers above 0"),
        ({"method": "neon", "neon.w": ()}, "config.neon.w: (); allowed: at least one value"),
        ({"method": "neon", "ddo.line": (2.0,)}, "config.ddo.line: (2.0,); allowed: (): method neon has its own"),
        ({"method": "neon", "ddo.beta": (0.1, 0.2)}, "allowed: one value: method neon uses neither alpha nor beta"),
        ({"ddo.line": (0.5, 0.0)}, "config.ddo.line: 0.0; allowed: finite numbers but 0"),
        ({"ddo.line": (2.0, 2.0)}, "values that differ in their first six digits"),
        ({"method": "neon", "objective": "cca"}, "config.method: 'neon', but config.objective, its older name, is"),
        ({"method": "gan"}, "config.method: 'gan'; allowed: ddo, neon, mle, cca"),
        ({"ddo.fakes_cfg": 1.0}, "config.ddo.fakes_cfg: 1.0; allowed: 0.0: family edm does not use it"),
        ({"log.signal": 1}, "config.log.signal: 1; allowed: 0 (not measured), or at least 2"),
        (
            {"ddo.line": (2.0,), "eval.network": "none", "ddo.beta": (0.1,), "control.enabled": False},
            "config.ddo.line: (2.0,); allowed: (): eval.network = 'none' scores nothing",
        ),
    ],
)
def test_what_cannot_be(micro, changes, message):
    micro.ddo.beta = (0.1,)
    micro.update_from_flattened_dict(changes)
    with pytest.raises(UserError) as e:
        checks.check(micro)
    assert message in str(e.value) and "\n" not in str(e.value)


def test_plan_of_neon_and_of_a_line(micro, tmp_path):
    """Breaks if the plan forgets the points, or what each part of a round is for."""
    micro.ddo.beta, micro.method, micro.neon.w = (0.1,), "neon", (0.5, 1.0)
    text = dry_run.plan(micro, str(tmp_path))
    assert "40 fakes, then 1 candidates of 2 steps of 16 fakes images, 2 points of a line; 3 evaluations of 48" in text
    row = next(line for line in text.splitlines() if line.strip().startswith("each round")).split()
    assert row[2:5] == ["32", "40", "144"]  # trained, fakes, judged
    assert "a round's FLOPs: training " in text
    micro.method, micro.ddo.line = "ddo", (2.0,)
    text = dry_run.plan(micro, str(tmp_path))
    assert "2 steps of 16 + 16 images, 1 points of a line; 4 evaluations of 48" in text
