"""A search for beta in little: what it decides, resumed, side by side, when parts of it fail."""

import contextlib
import shutil

import jax
import numpy as np
import pytest

from ddo_jax import files
from ddo_jax.errors import UserError
from ddo_jax.evaluate.records import read_round
from ddo_jax.plan import dry_run
from ddo_jax.run import checks, costs, loop, main_job, search
from ddo_jax.store.checkpoint import restore_ema
from tests.harness import micro_config


def searching(folder, fitted, **changes):
    """A config of one round of six steps, compared after one and two, and its workdir with the classifier in it."""
    config = micro_config()
    config.control.enabled = False
    config.ddo.update({"search": "auto", "beta": (0.1,), **changes})
    config.ddo.length.steps = 6
    config.keep = "all"
    folder.mkdir(exist_ok=True)
    (folder / "features-digits.npz").write_bytes(fitted[1].read_bytes())
    return config, folder


@pytest.fixture(scope="module")
def done(tmp_path_factory, fitted):
    """A finished search of two rounds: (config, workdir)."""
    config, workdir = searching(tmp_path_factory.mktemp("search"), fitted, rounds=2)
    main_job.run(config, workdir)
    return config, workdir


def record_of(workdir, number=1):
    return files.read_sealed(workdir / f"rounds/{number:03d}/search/result.json")


def test_what_a_search_decides(done):
    """Breaks if losers are trained on, a winner is not the best of its round, or a decision has no reason."""
    config, workdir = done
    found = record_of(workdir)
    assert found["origin"] == "probe" and [h["step"] for h in found["halvings"]] == [1, 2, 6]
    assert [len(h["verdicts"]) for h in found["halvings"]] == [len(found["tried"]), *map(going, found["halvings"][:2])]
    for halving in found["halvings"]:
        scores, verdicts = halving["scores"], halving["verdicts"]
        assert verdicts[min(scores, key=scores.get)]["why"] == "best"
        assert all(v["why"] and v["within"] is not None for v in verdicts.values())
    trained = {c: files.read_sealed(workdir / f"rounds/001/{c}/result.json") for c in found["tried"]}
    last = {c: max(h["step"] for h in found["halvings"] if c in h["verdicts"]) for c in found["tried"]}
    assert {c: r["steps"] for c, r in trained.items()} == last and list(last.values()).count(6) == 1
    best = read_round(files.read_sealed(workdir / "rounds/001/best.json"))
    assert best.best.score == min(r["best"]["fd_x100"] for r in trained.values())
    assert found["tried"][best.candidate] == found["best"]
    later = record_of(workdir, 2)
    assert later["origin"] == "best of round 1" and later["center"] == found["best"]
    assert not (workdir / "rounds/002/probe").exists()


def going(halving):
    return sum(v["goes_on"] for v in halving["verdicts"].values())


def test_the_probe_follows_the_spread(done):
    """Breaks if the beta of the probe is not that of the spread that it found, or it stays where it began."""
    _, workdir = done
    probe = files.read_sealed(workdir / "rounds/001/probe/result.json")
    assert probe["length"] == len(probe["history"]) == 2  # a third of the round
    assert probe["history"][0][1] == 4.0 and probe["beta"] == record_of(workdir)["center"]
    assert np.isclose(probe["beta"], min(4.0, 0.2 * 4.0 / probe["std"]), rtol=0.06)  # two digits


def test_report_of_a_search(done):
    """Breaks if the report does not say who stopped, where and why."""
    _, workdir = done
    text = (workdir / "report/report.md").read_text()
    assert "## Search" in text and "| goes on |" in text and "| stops: " in text and "![plane](plane.png)" in text
    assert (workdir / "report/plane.png").stat().st_size > 5000
    line = files.read_jsonl(workdir / "evals.jsonl")
    of_rounds = [e for e in line if e["phase"].startswith("rounds/") and e["step"]]
    assert all(len(e["influence"]) == 48 for e in of_rounds)  # blocks of one image


def without_times(record):
    if isinstance(record, dict):
        return {k: without_times(v) for k, v in record.items() if k != "time"}
    return [without_times(v) for v in record] if isinstance(record, list) else record


@pytest.mark.parametrize("lost", ["probe", "search", "until-00000001", "checkpoints", "result.json", "everything"])
def test_a_search_is_resumed(done, tmp_path, lost):
    """Breaks if a search that was killed ends in other numbers."""
    config, workdir = done
    again = tmp_path / "again"
    shutil.copytree(workdir, again)
    winner = read_round(files.read_sealed(workdir / "rounds/001/best.json")).candidate
    own = again / "rounds/001" / (lost if lost in ("probe", "search") else f"{winner}/{lost}")
    gone = again.glob("rounds/001/*") if lost == "everything" else [own, own.parent / "result.json"]
    for path in [*gone, *(again / f"rounds/001/{name}" for name in ("best.json", "ratios")), again / "rounds/002"]:
        if path.exists():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    main_job.run(config, again)
    for name in ("rounds/001/search", "rounds/001/probe", "rounds/002/search", "report/scores/ddo"):
        a, b = (files.read_sealed(folder / name / "result.json") for folder in (workdir, again))
        assert without_times(a) == without_times(b), name


def best_params(workdir, config):
    best = read_round(files.read_sealed(workdir / "rounds/001/best.json"))
    family = checks.check_network(config)[0]
    shapes = jax.eval_shape(family.init, jax.random.key(0))[0]
    return best.candidate, restore_ema(workdir / "rounds/001" / best.candidate / "checkpoints", best.best.step, shapes)


def test_side_by_side_is_one_after_the_other(tmp_path, fitted):
    """Breaks if candidates that are trained together see other pairs, or depend on who is beside them."""
    found = {}
    for together in (1, 2, 3):
        config, workdir = searching(
            tmp_path / str(together), fitted, search="grid", beta=(0.05, 0.1, 0.2), together=together
        )
        main_job.run(config, workdir)
        results = [files.read_sealed(p) for p in sorted(workdir.glob("rounds/001/a4_*/result.json"))]
        found[together] = best_params(workdir, config), [r["best"]["fd_x100"] for r in results]
    assert found[2][1] == found[3][1] and found[2][0][0] == found[3][0][0]
    jax.tree.map(np.testing.assert_array_equal, found[2][0][1], found[3][0][1])
    np.testing.assert_allclose(found[1][1], found[2][1], rtol=1e-3)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found[1][0][1], found[2][0][1])


@pytest.mark.parametrize("ratio", [0.5, 2.0])
def test_another_number_of_fakes(tmp_path, fitted, ratio):
    """Breaks if fakes and their draws are not those of their rows where the reference is asked outside the step."""
    found = []
    for together in (1, 2):
        changes = dict(beta=(0.1, 0.2), fake_ratio=ratio, accumulation=2, together=together)
        config, workdir = searching(tmp_path / str(together), fitted, search="grid", **changes)
        config.ddo.length.steps = 2
        main_job.run(config, workdir)
        log = [line for line in files.read_jsonl(workdir / "rounds/001/a4_b0.1/metrics.jsonl") if "ddo/margin" in line]
        found.append([log[-1][key] for key in ("loss/real", "loss/fake", "ddo/r_real_std", "ddo/r_fake_std")])
    np.testing.assert_allclose(*found, rtol=1e-4)


def test_candidates_at_different_steps_continue_together(tmp_path, fitted, monkeypatch):
    """Breaks if a job that was killed between two candidates' checkpoints ends in other parameters."""
    config, whole = searching(tmp_path / "whole", fitted, search="grid", beta=(0.05, 0.2), together=2)
    main_job.run(config, whole)
    config, killed = searching(tmp_path / "killed", fitted, search="grid", beta=(0.05, 0.2), together=2)

    class Stop(Exception):
        pass

    save = loop._Loop.save

    def stop(self, done, state, evaluate):
        if done == 3 and self.phase.name.endswith("a4_b0.2"):
            raise Stop
        save(self, done, state, evaluate)

    with monkeypatch.context() as patch:
        patch.setattr(loop._Loop, "save", stop)
        with pytest.raises(Stop):
            main_job.run(config, killed)
    at = {
        c: max(int(p.name) for p in (killed / f"rounds/001/{c}/checkpoints").iterdir()) for c in ("a4_b0.05", "a4_b0.2")
    }
    assert at == {"a4_b0.05": 3, "a4_b0.2": 2}
    main_job.run(config, killed)
    for c in at:
        a, b = (files.read_sealed(folder / f"rounds/001/{c}/result.json") for folder in (whole, killed))
        assert without_times(a) == without_times(b)


def test_one_that_is_ahead_is_not_left_behind(tmp_path, fitted, monkeypatch):
    """Breaks if a candidate whose checkpoint is ahead stops where the last of the others diverges."""
    config, workdir = searching(tmp_path / "run", fitted, search="grid", beta=(0.05, 0.2), together=2)
    save, write = loop._Loop.save, loop._Loop.write

    class Stop(Exception):
        pass

    def stop(self, done, state, evaluate):
        if done == 3 and self.phase.name.endswith("a4_b0.2"):
            raise Stop
        save(self, done, state, evaluate)

    def diverge(self, done, totals):
        if self.phase.name.endswith("a4_b0.2"):
            raise loop.Diverged(f"{self.phase.name}: loss/real is nan")
        write(self, done, totals)

    for name, changed, raised in (("save", stop, Stop), ("write", diverge, None)):
        with monkeypatch.context() as patch, pytest.raises(raised) if raised else contextlib.nullcontext():
            patch.setattr(loop._Loop, name, changed)
            main_job.run(config, workdir)
        shutil.rmtree(workdir / "rounds/001/a4_b0.2/checkpoints", ignore_errors=True)  # begins anew, three steps behind
    ends = {c: files.read_sealed(workdir / f"rounds/001/{c}/result.json") for c in ("a4_b0.05", "a4_b0.2")}
    assert ends["a4_b0.05"]["steps"] == 6 and ends["a4_b0.2"]["failed"] and ends["a4_b0.2"]["steps"] == 1


def test_a_probe_that_diverges(tmp_path, fitted, monkeypatch, capsys):
    """Breaks if a search without its probe gives up instead of looking around the config's beta."""
    config, workdir = searching(tmp_path / "run", fitted)
    monkeypatch.setattr(search, "spread_of", lambda totals: np.nan)
    main_job.run(config, workdir)
    found = record_of(workdir)
    assert found["center"] == 0.1 and {0.2, 0.1, 0.05} <= set(found["tried"].values())
    assert "the probe diverged at step 1; around config.ddo.beta 0.1" in capsys.readouterr().err


def test_candidates_that_fail(tmp_path, fitted, monkeypatch, capsys):
    """Breaks if one diverging candidate ends a search, or a search of nothing but those goes on."""
    write = loop._Loop.write

    def failing(name):
        def diverge(self, done, totals):
            if "/a4_" in self.phase.name and name in self.phase.name:
                raise loop.Diverged(f"{self.phase.name}: loss/real is nan between steps 1 and 1")
            write(self, done, totals)

        return diverge

    config, workdir = searching(tmp_path / "one", fitted)
    monkeypatch.setattr(search, "probe", lambda *_: {"beta": 0.1, "std": 8.0, "length": 1, "history": []})
    monkeypatch.setattr(loop._Loop, "write", failing("a4_b0.05"))
    main_job.run(config, workdir)
    found = record_of(workdir)
    assert found["halvings"][0]["verdicts"]["a4_b0.05"]["why"] == "failed" and found["best"] != 0.05
    assert "the other candidates go on" in capsys.readouterr().err
    config, workdir = searching(tmp_path / "all", fitted)
    monkeypatch.setattr(loop._Loop, "write", failing(""))
    with pytest.raises(UserError, match="all other candidates diverged"):
        main_job.run(config, workdir)


def test_a_grid_is_not_used(tmp_path, fitted, capsys):
    """Breaks if nobody is told which of the two wins."""
    config, workdir = searching(tmp_path / "run", fitted, alpha=(2.0, 4.0), beta=(0.1, 0.2))
    main_job.run(config, workdir)
    assert "search: auto wins over the grid of alpha (2.0, 4.0), beta (0.1, 0.2): alpha is 2" in capsys.readouterr().err
    assert all(name.startswith("a2_") for name in record_of(workdir)["tried"])


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"ddo.search": "random"}, "config.ddo.search: 'random'; allowed: fixed, grid, auto"),
        ({"ddo.search": "fixed"}, "config.ddo.beta: (0.1, 0.2); allowed: one value: ddo.search is 'fixed'"),
        ({"ddo.fake_ratio": 0.3}, "config.ddo.fake_ratio: 0.3; allowed: such that 16 times it is a whole number"),
        ({"ddo.fake_ratio": 0.25, "ddo.accumulation": 8}, "such that 4 fakes are a multiple of ddo.accumulation"),
        ({"ddo.fake_ratio": 0.5, "method": "cca"}, "config.ddo.fake_ratio: 0.5; allowed: 1 with method 'cca'"),
        ({"ddo.together": 0}, "config.ddo.together: 0; allowed: at least 1"),
        (
            {"ddo.search": "auto", "method": "mle", "ddo.beta": (0.1,)},
            "config.ddo.search: 'auto'; allowed: fixed, grid with method 'mle'",
        ),
        (
            {"ddo.search": "auto", "eval.network": "none", "control.enabled": False},
            "config.ddo.search: 'auto'; allowed: fixed, grid: eval.network = 'none' scores nothing",
        ),
    ],
)
def test_what_cannot_be(micro, changes, message):
    micro.update_from_flattened_dict(changes)
    with pytest.raises(UserError) as e:
        checks.check(micro)
    assert message in str(e.value) and "\n" not in str(e.value)


def test_plan_of_a_search(micro, tmp_path):
    """Breaks if the plan counts a whole grid, or forgets that candidates share the reference."""
    micro.ddo.update(search="auto", together=3)
    micro.ddo.length.steps = 12
    text = dry_run.plan(micro, str(tmp_path))
    assert (
        "typically 4 values of beta tried to step 2, one of them of 12 steps of 16 + 16 images, 3 side by side" in text
    )
    row = next(line for line in text.splitlines() if line.strip().startswith("each round")).split()
    assert row[2] == str((3 * 2 + 12) * 16) and row[4] == str(48 * (1 + 3 * 2 + 12))
    micro.ddo.update(search="grid", together=1)
    alone = dry_run.plan(micro, str(tmp_path))
    assert "2 candidates of 12 steps of 16 + 16 images" in alone and "side by side" not in alone
    micro.ddo.fake_ratio = 0.5
    fewer = dry_run.plan(micro, str(tmp_path))
    assert "12 steps of 16 + 8 images" in fewer
    assert costs.passes(micro, "ddo") == 6
