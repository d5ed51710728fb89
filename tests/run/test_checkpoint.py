"""Checkpoints: what is kept, what is restored, what a flipped bit does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from ddo_jax import sharding
from ddo_jax.errors import UserError
from ddo_jax.run import checkpoint
from ddo_jax.run.checkpoint import Checkpoints, restore_ema

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
