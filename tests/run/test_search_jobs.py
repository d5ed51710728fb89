"""A search divided among three jobs of which one is killed, and on eight devices, against one job on one device."""

import json
import os
import time

import numpy as np
import pytest

from tests.run import test_kill

CONFIG = test_kill.CONFIG.replace("    c.log.update", '    c.ddo.update(search="auto", {more})\n    c.log.update')


def record(workdir):
    return json.loads((workdir / "rounds/001/search/result.json").read_text())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(folder, the workdir of one job)."""
    folder = tmp_path_factory.mktemp("jobs")
    (folder / "one.py").write_text(CONFIG.format(more=""))
    (folder / "two.py").write_text(CONFIG.format(more="together=2"))
    test_kill.finish(test_kill.start(folder / "one.py", folder / "whole", folder))
    return folder, folder / "whole"


@pytest.mark.slow
def test_three_jobs_one_killed(whole):
    """Breaks if jobs decide differently, or a heat whose job is gone is lost or done in another way."""
    folder, alone = whole
    workdir = folder / "shared"
    jobs = [test_kill.start(folder / "one.py", workdir, folder) for _ in range(3)]
    deadline = time.monotonic() + 120
    while not (heats := list(workdir.glob("rounds/001/*/until-*/claim.json"))) and time.monotonic() < deadline:
        time.sleep(0.002)
    assert heats
    jobs[0].kill()
    jobs[0].communicate()
    for job in jobs[1:]:
        test_kill.finish(job)
    assert record(alone) == record(workdir)
    assert (alone / "best/params.safetensors").read_bytes() == (workdir / "best/params.safetensors").read_bytes()


@pytest.mark.slow
def test_side_by_side_and_killed(whole):
    """Breaks if a group of candidates that was killed goes on from another place than its own."""
    folder, alone = whole
    test_kill.finish(test_kill.start(folder / "two.py", folder / "pair", folder))
    job = test_kill.start(folder / "two.py", folder / "killed", folder)
    names = list(record(folder / "pair")["tried"])
    test_kill.kill_at(job, folder / f"killed/rounds/001/{names[0]}/samples/00000050.png", 0.01)
    test_kill.finish(test_kill.start(folder / "two.py", folder / "killed", folder))
    assert record(folder / "pair") == record(folder / "killed")
    best = [(folder / name / "best/params.safetensors").read_bytes() for name in ("pair", "killed")]
    assert best[0] == best[1]
    assert record(alone)["tried"] == record(folder / "pair")["tried"]  # and as one after the other


@pytest.mark.slow
def test_eight_devices_decide_alike(whole, monkeypatch):
    """Breaks if a search depends on the number of devices by more than the order of sums."""
    folder, alone = whole
    config = (folder / "one.py").read_text().replace("batch=50, report", "batch=56, report")
    (folder / "eight.py").write_text(config)
    monkeypatch.setitem(os.environ, "JAX_NUM_CPU_DEVICES", "8")
    job = test_kill.start(folder / "eight.py", folder / "eight", folder)
    test_kill.finish(job)
    one, eight = record(alone), record(folder / "eight")
    assert one["tried"] == eight["tried"] and one["best"] == eight["best"]
    for a, b in zip(one["halvings"], eight["halvings"], strict=True):
        assert a["scores"].keys() == b["scores"].keys()
        np.testing.assert_allclose(list(a["scores"].values()), list(b["scores"].values()), rtol=2e-2)
