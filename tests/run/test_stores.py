"""A workdir on an object store: claims and records without rename and append; a whole run, killed, and by two jobs."""

import json
import logging
import subprocess
import sys
import threading
import time

import pytest
from etils import epath

from ddo_jax import files, stores
from ddo_jax.errors import UserError
from ddo_jax.run import jobs, record
from tests import gcs
from tests.run import test_kill, test_processes

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def store():
    """The root of a store of this machine; this process's and its children's gs:// is there."""
    port = test_processes.free_port()
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.gcs", str(port)],
        cwd=test_kill.ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    logging.getLogger("gcsfs").setLevel(logging.ERROR)  # it looks for credentials at every call
    with pytest.MonkeyPatch.context() as patch:
        address = f"http://127.0.0.1:{port}"
        for name in ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL"):
            patch.setenv(name, address)
        patch.setenv("GOOGLE_CLOUD_PROJECT", "tests")
        root = epath.Path(f"gs://{gcs.BUCKET}")
        deadline = time.monotonic() + 30
        while True:
            try:
                stores.reach(root)
                break
            except UserError:
                assert time.monotonic() < deadline and server.poll() is None
                time.sleep(0.1)
        yield root
    server.kill()
    server.wait()


def test_one_creates_one_removes(store):
    """Breaks if two jobs can claim one task, or a slow one takes away the claim of a faster one."""
    path, found = store / "create/claim.json", []
    threads = [threading.Thread(target=lambda i=i: found.append(stores.create(path, b"%d" % i))) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == [False] * 5 + [True]
    content = path.read_bytes()
    assert not stores.remove_if(path, b"another") and path.read_bytes() == content
    assert stores.remove_if(path, content) and not path.exists()
    assert not stores.remove_if(path, content)


def test_a_replaced_claim_is_not_removed(store, monkeypatch):
    """Breaks if the claim is looked at and removed in two steps between which another job can come."""
    path = store / "replaced/claim.json"
    path.write_bytes(b"dead")
    fs = stores.filesystem(path)
    read = fs.cat_file

    def replaced_then(name):
        seen = read(name)
        path.write_bytes(b"faster")
        return seen

    monkeypatch.setattr(fs, "cat_file", replaced_then)
    assert not stores.remove_if(path, b"dead")
    monkeypatch.undo()
    assert path.read_bytes() == b"faster"


def test_claims(store):
    """Breaks if a dead job's task is not taken over, a living one's is, or a release leaves the claim."""
    directory = store / "claims"
    assert jobs.take(directory, 60.0) and jobs.take(directory, 60.0), "mine"
    dead = {"job": "other", "host": "elsewhere", "pid": 1, "time": 0.0}
    (directory / "claim.json").write_text(json.dumps(dead))
    assert not jobs.take(directory, 0.2)
    time.sleep(0.3)
    assert jobs.take(directory, 0.2)
    assert json.loads((directory / "claim.json").read_text())["job"] == jobs.JOB
    (directory / "claim.json").unlink()
    assert jobs.divide([jobs.Task(directory, lambda: {"x": 1})], 60.0) == [{"x": 1}]
    assert not (directory / "claim.json").exists() and jobs.result_of(directory) == {"x": 1}


def test_records_without_append(store, monkeypatch):
    """Breaks if lines are lost, or a record is not cut back to the step that a run resumes from."""
    path = store / "records/metrics.jsonl"
    log = record.JsonLines(path)
    for step in (1, 2, 3):
        log.write({"step": step})
    log.close()
    assert [r["step"] for r in files.read_jsonl(path)] == [1, 2, 3]
    log = record.JsonLines(path, 2)
    log.write({"step": 3, "again": True})
    assert [r["step"] for r in files.read_jsonl(path)] == [1, 2], "not every line is a request"
    monkeypatch.setattr(record, "REMOTE_S", 0.0)
    log.write({"step": 4})
    assert [r["step"] for r in files.read_jsonl(path)] == [1, 2, 3, 4]


def test_what_cannot_be_reached(store, monkeypatch):
    with pytest.raises(UserError, match=r"^foo://bucket: Protocol not known: foo; allowed: a folder, gs://"):
        stores.reach("foo://bucket")

    def no_library(*_):
        raise ImportError("Please install gcsfs")

    monkeypatch.setattr(stores, "filesystem", no_library)
    with pytest.raises(UserError, match=r"^gs://b: Please install gcsfs; gs:// needs: python -m pip install"):
        stores.reach("gs://b")
    stores.reach("/a/folder")


@pytest.mark.slow
def test_a_run_killed_and_divided(store, tmp_path):
    """Breaks if a run on an object store is another one than on a disk, after a kill -9 or between two jobs."""
    config = test_processes.config_file(tmp_path, "kill.py")
    test_kill.finish(test_kill.start(config, tmp_path / "disk", tmp_path))
    job = test_kill.start(config, f"{store}/killed", tmp_path)
    test_kill.kill_at(job, store / "killed/rounds/001/a4_b0.1/samples/00000020.png", 0.0)
    test_kill.finish(test_kill.start(config, f"{store}/killed", tmp_path))
    pair = [test_kill.start(config, f"{store}/divided", tmp_path) for _ in range(2)]
    for job in pair:
        test_kill.finish(job)
    best = (tmp_path / "disk/best/params.safetensors").read_bytes()
    for name in ("killed", "divided"):
        assert (store / name / "best/params.safetensors").read_bytes() == best, name
        assert test_processes.scores(store / name) == test_processes.scores(tmp_path / "disk")
    assert not [name for name in stores.filesystem(store).find(f"{store}/divided") if name.endswith("claim.json")]
