"""Checkpoints: what is kept, what is restored, what a flipped bit does, what a folder may be called."""

import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from ddo_jax import files, sharding
from ddo_jax.errors import UserError
from ddo_jax.store import checkpoint
from ddo_jax.store.checkpoint import Checkpoints, restore_ema

MESH = sharding.make_mesh()


def tree(value: float):
    rows = jnp.arange(20_000, dtype=jnp.float32).reshape(100, 200) + value
    return sharding.place(MESH, {"ema": {"w": rows, "b": jnp.full((3,), value)}, "step": jnp.int32(value)})


def abstract():
    return sharding.abstract(MESH, jax.eval_shape(lambda: tree(0.0)))


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def test_round_trip(tmp_path):
    """Breaks if state or meta come back changed."""
    with Checkpoints(tmp_path) as c:
        c.save(3, tree(3.0), {"step": 3, "evals": [{"fd": 1.5}]})
    with Checkpoints(tmp_path) as c:
        state, meta = c.restore_latest(abstract())
    assert same(state, tree(3.0)) and meta["step"] == 3 and meta["evals"] == [{"fd": 1.5}]
    with Checkpoints(tmp_path / "empty") as c:
        assert c.restore_latest(abstract()) is None


def test_latest_and_best_are_kept(tmp_path):
    """Breaks if retention drops the best because it is old, or the latest because it is not the best."""
    with Checkpoints(tmp_path) as c:
        for step, score in ((1, 9.0), (2, 1.0), (3, 5.0), (4, None), (5, 8.0), (6, None)):
            c.save(step, tree(float(step)), {"step": step}, score)
    kept = sorted(int(p.name) for p in tmp_path.iterdir() if p.name.isdigit())
    assert 2 in kept and 6 in kept and len(kept) <= 3
    assert same(restore_ema(tmp_path, 2, abstract()["ema"]), tree(2.0)["ema"])


@pytest.mark.parametrize("damage", ["flip", "truncate"])
def test_damage_falls_back_to_the_newest_good_one(tmp_path, capsys, damage):
    """Breaks if a flipped bit in array data is restored silently (Orbax does), or stops the run."""
    with Checkpoints(tmp_path) as c:
        for step in (1, 2):
            c.save(step, tree(float(step)), {"step": step})
    data = max((p for p in (tmp_path / "2").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 4
    data.write_bytes(content if damage == "flip" else content[: len(content) // 2])
    with pytest.raises(UserError, match="/2: .*damaged"):
        restore_ema(tmp_path, 2, abstract()["ema"])
    with Checkpoints(tmp_path) as c:
        state, meta = c.restore_latest(abstract())
    assert meta["step"] == 1 and same(state, tree(1.0))
    assert "/2 is damaged" in capsys.readouterr().err


@pytest.mark.parametrize("file", ["meta/metadata", "state/_METADATA", "state/manifest.ocdbt", "_CHECKPOINT_METADATA"])
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff" * 40])
def test_no_damaged_file_of_a_checkpoint_stops_a_run(tmp_path, capsys, file, content):
    """Breaks if the library raises before the older checkpoint is tried."""
    with Checkpoints(tmp_path) as c:
        for step in (1, 2):
            c.save(step, tree(float(step)), {"step": step, "evals": []}, 5.0 - step)
    (tmp_path / "2" / file).write_bytes(content)
    with Checkpoints(tmp_path, alone=True) as c:
        state, meta = c.restore_latest(abstract())
        assert same(state, tree(float(meta["step"])))
        if meta["step"] == 1:
            c.save(2, tree(2.0), {"step": 2, "evals": []}, 3.0)
    assert meta["step"] == 1 or file == "_CHECKPOINT_METADATA"  # which holds times only
    assert same(restore_ema(tmp_path, 2, abstract()["ema"]), tree(2.0)["ema"])


def test_a_changed_score_is_seen(tmp_path, capsys):
    """Breaks if one digit of a score in a checkpoint's record makes another candidate win."""
    with Checkpoints(tmp_path) as c:
        for step in (1, 2):
            c.save(step, tree(float(step)), {"step": step, "evals": [{"fd": 12.5}]})
    path = tmp_path / "2" / "meta" / "metadata"
    path.write_text(path.read_text().replace("12.5", "11.5"))
    with Checkpoints(tmp_path) as c:
        assert c.restore_latest(abstract())[1]["step"] == 1
    assert "does not match its checksum" in capsys.readouterr().err
    with pytest.raises(UserError, match="does not match its checksum"):
        restore_ema(tmp_path, 2, abstract()["ema"])


def test_the_best_is_known_after_a_restart(tmp_path):
    """Breaks if a job that goes on deletes the best of the job before, also one of an older version."""
    with Checkpoints(tmp_path) as c:
        c.save(1, tree(1.0), {"step": 1, "evals": [{"step": 1, "metric": "fd", "fd": 2.0}]}, 2.0)
    path = tmp_path / "1" / "meta" / "metadata"  # as an older version wrote it
    old = {k: v for k, v in json.loads(path.read_text()).items() if k not in ("checksum", "score")}
    path.write_text(json.dumps(old))
    for step in (2, 3, 4, 5):
        with Checkpoints(tmp_path) as c:
            c.save(step, tree(float(step)), {"step": step, "evals": []}, 10.0 + step)
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.isdigit()) == ["1", "4", "5"]


def test_unfinished_saves_are_removed(tmp_path):
    """Breaks if every kill in the middle of a save leaves a checkpoint's worth of bytes for ever."""
    with Checkpoints(tmp_path) as c:
        c.save(1, tree(1.0), {"step": 1})
    left = tmp_path / "7.orbax-checkpoint-tmp"
    left.mkdir()
    (left / "data").write_bytes(b"x" * 1000)
    with Checkpoints(tmp_path):  # perhaps another job's
        assert left.exists()
    with Checkpoints(tmp_path, alone=True) as c:
        c.save(2, tree(2.0), {"step": 2})
    assert not left.exists() and (tmp_path / "1").exists()


def test_missing_step_is_named(tmp_path):
    """Breaks if the line does not say which steps there are."""
    with Checkpoints(tmp_path) as c:
        c.save(7, tree(7.0), {"step": 7})
    with pytest.raises(UserError, match=r"no checkpoint of step 8 \(there are: 7\)"):
        restore_ema(tmp_path, 8, abstract()["ema"])
    with pytest.raises(UserError, match="no such checkpoint directory"):
        restore_ema(tmp_path / "nowhere", None, abstract()["ema"])


def test_digest_sees_every_bit_and_every_place():
    """Breaks if the digest ignores low bits, the order of elements, or a dtype."""
    x = jnp.linspace(0, 1, 1000)
    base = int(checkpoint.digest(x))
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    for i in (0, 1, 31):
        flipped = jax.lax.bitcast_convert_type(bits.at[500].set(bits[500] ^ jnp.uint32(1 << i)), jnp.float32)
        assert int(checkpoint.digest(flipped)) != base
    swapped = x.at[3].set(x[4]).at[4].set(x[3])
    assert int(checkpoint.digest(swapped)) != base
    for other in (x.astype(jnp.bfloat16), x > 0.5, jnp.arange(5, dtype=jnp.int32)):
        assert checkpoint.digest(other).dtype == jnp.uint32


def test_digest_does_not_depend_on_the_sharding():
    """Breaks if a restart on another mesh would call a good checkpoint damaged."""
    x = jnp.arange(64.0).reshape(8, 8)
    a = jax.jit(checkpoint.digest, in_shardings=NamedSharding(MESH, P(None, "data")))(x)
    assert int(a) == int(checkpoint.digest(x))


NAMES = ["run[1]", "a*", "a?b", "**", "a#b%20", "{x,y}", "a:b", "sp ", "new\nline", "x[!1]/y"]


@pytest.mark.parametrize("name", NAMES)
def test_any_name_holds_checkpoints(tmp_path, name):
    """Breaks if Orbax, which takes the folder for a pattern, does not find the stores it wrote, or a neighbour's."""
    for folder, value in ((name, 1.0), ("run1", 2.0), ("ab", 2.0), ("aXb", 2.0)):
        with Checkpoints(tmp_path / folder) as c:
            c.save(0, tree(value), {"step": 0})
    assert same(restore_ema(tmp_path / name, 0, abstract()["ema"]), tree(1.0)["ema"])
    with Checkpoints(tmp_path / name) as c:
        assert same(c.restore_latest(abstract())[0], tree(1.0))


def test_stores_of_the_processes_alone(tmp_path):
    """Breaks if a checkpoint of an older version in `run[1]`, whose arrays lie there without an index, is given up."""
    with Checkpoints(tmp_path) as c:
        c.save(0, tree(1.0), {"step": 0})
    for _ in range(2):
        (tmp_path / "0" / "state" / "manifest.ocdbt").unlink()
        shutil.rmtree(tmp_path / "0" / "state" / "d")
        assert same(restore_ema(tmp_path, 0, abstract()["ema"]), tree(1.0)["ema"])
    (tmp_path / "0" / "state" / "manifest.ocdbt").unlink()
    with Checkpoints(tmp_path) as c:
        assert same(c.restore_latest(abstract())[0], tree(1.0))


@pytest.mark.parametrize("name, words", [("a\\b", "a backslash"), (os.fsdecode(b"a\xff"), "not UTF-8")])
def test_names_that_are_refused(tmp_path, name, words):
    """Breaks if arrays go to another folder (TensorStore takes a backslash for a slash) without a word."""
    for attempt in (Checkpoints, checkpoint.try_out, lambda d: restore_ema(d, 0, abstract()["ema"])):
        with pytest.raises(UserError, match=words) as e:
            attempt(tmp_path / name)
        assert ascii(name)[1:-1] in str(e.value)
    assert list(tmp_path.iterdir()) == []


def test_first_save_is_read_back(tmp_path, monkeypatch):
    """Breaks if a folder that does not give back what was saved is found out after training, or a trial stays."""
    checkpoint.try_out(tmp_path)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(files, "matching", lambda *_: [])  # as if the stores were not found
    with pytest.raises(UserError, match="cannot be read back") as e:
        checkpoint.try_out(tmp_path)
    assert str(tmp_path) in str(e.value) and "\n" not in str(e.value)
    assert list(tmp_path.iterdir()) == []


def test_what_messages_advise(tmp_path, capsys):
    """Breaks if a message tells to remove what may be readable elsewhere, or its advice is of rounds in pretrain/."""
    directory = tmp_path / "pretrain" / "checkpoints"
    with Checkpoints(directory) as c:
        c.save(1, tree(1.0), {"step": 1})
    (directory / "1" / "state" / "_METADATA").write_text("damaged")
    (directory / "1" / "state" / "manifest.ocdbt").write_bytes(b"damaged")
    with pytest.raises(UserError) as first, Checkpoints(directory) as c:
        c.restore_latest(abstract())
    with pytest.raises(UserError) as second:
        restore_ema(directory, 1, abstract()["ema"])
    for text in (str(first.value), str(second.value)):
        assert "remove" not in text and "delete" not in text and "aside" in text
        assert f"{tmp_path / 'pretrain'} " in text


def test_a_phase_without_an_average_has_its_parameters(tmp_path):
    """Breaks if what a VAR has made is not found, or a run of an older version, whose average was a copy, is lost."""
    tree = {"params": {"w": jnp.arange(4.0)}, "step": jnp.int32(1)}
    shapes = sharding.abstract(MESH, tree)
    for name, saved in (("new", tree), ("old", {**tree, "ema": tree["params"]})):
        with Checkpoints(tmp_path / name) as checkpoints:
            checkpoints.save(1, sharding.place(MESH, saved), {"step": 1})
        with Checkpoints(tmp_path / name) as checkpoints:
            restored, _ = checkpoints.restore_latest(shapes)
        assert same(restored, tree)
        assert same(restore_ema(tmp_path / name, 1, shapes["params"]), tree["params"])
