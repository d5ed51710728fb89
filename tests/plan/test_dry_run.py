"""The dry run: bytes, FLOPs, images and hours from shapes alone, against hand-counted and compiled programs."""

import math
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType

from configs import edm2_in64, edm2_in512, sit_in256
from ddo_jax import sharding
from ddo_jax.errors import UserError
from ddo_jax.families import get_family
from ddo_jax.plan import dry_run, memory
from ddo_jax.run import costs, state, step

ROOT = Path(__file__).parents[2]
ROW = jax.ShapeDtypeStruct((1000,), jnp.float32)  # 4000 bytes


def peak(f, *shapes) -> int:
    return memory.peak_bytes(jax.make_jaxpr(f)(*shapes).jaxpr)


def step_of(config, objective="ddo", devices=1, fsdp=1) -> dict:
    section = {"ddo": config.ddo, "mle": config.pretrain}[objective]
    return memory.step_bytes(get_family(config), section, objective, devices, fsdp)


@pytest.fixture
def tiny():
    """The wiring of the real network on 8 x 8 images."""
    return edm2_in64.get_config("runlocal")


# -- bytes ------------------------------------------------------------------------------------------------


def test_peak_of_hand_counted_programs():
    """Breaks if values are freed too late or too early, or unused ones are not counted while they are made."""

    def chain(x):  # never more than the value read and the value made
        return jnp.sin(jnp.cos(jnp.tan(x)))

    def held(x):  # a lives until the end: a, b, c
        a = jnp.tan(x)
        b = jnp.sin(a)
        return jnp.cos(b) * a

    assert peak(chain, ROW) == 2 * 4000
    assert peak(held, ROW) == 3 * 4000


def test_peak_counts_calls_once_and_loops_beside_their_results():
    """Breaks if the body of a jitted call is counted beside its own result, or a loop's body is not."""

    @jax.jit
    def call(x):
        return jnp.sin(jnp.cos(x))

    def loop(x):  # stacked results (3 rows); inside: a sine, its cosine (the carry)
        return jax.lax.scan(lambda carry, _: (jnp.cos(jnp.sin(carry)), jnp.sum(carry)), x, length=3)

    assert peak(call, ROW) == 2 * 4000
    assert 3 * 4000 <= peak(loop, ROW) <= 3 * 4000 + 100


def test_rematerialised_backward_pass_is_smaller():
    def layers(f):
        def loss(x):
            for _ in range(8):
                x = f(x)
            return jnp.sum(x)

        return jax.grad(loss)

    def block(x):
        return jnp.sin(jnp.cos(jnp.sin(jnp.cos(x))))

    plain, remat = peak(layers(block), ROW), peak(layers(jax.checkpoint(block)), ROW)
    assert plain >= 32 * 4000  # one value kept for each of 32 functions
    assert 8 * 4000 <= remat <= 16 * 4000  # one for each block, and one block's own


@pytest.mark.parametrize("shape", [(), (8,), (64, 128), (3, 3, 192, 384), (63, 65)])
def test_leaf_bytes_is_the_sharding_rule(shape):
    mesh = AbstractMesh((2, 8), sharding.AXES, axis_types=(AxisType.Auto,) * 2)
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    local = sharding.tree_sharding(mesh, x).shard_shape(shape)
    assert memory.leaf_bytes(x, 8) == 4 * math.prod(local)


@pytest.mark.slow
def test_parts_of_a_step(tiny):
    """Every copy of the parameters is counted once, on as many devices as share it."""
    family = get_family(tiny)
    params = jax.eval_shape(family.init, jax.random.key(0))[0]
    count = 4 * state.parameter_count(params)
    parts = step_of(tiny)
    assert parts["params"] == parts["reference"] == count and parts["moments"] == 2 * count + 4  # and Adam's counter
    assert parts["ema"] == count and parts["total"] == sum(v for k, v in parts.items() if k != "total")
    pretraining = step_of(tiny, "mle")
    assert pretraining["reference"] == 0 and pretraining["ema"] == 2 * count  # two lengths
    shared = step_of(tiny, devices=4, fsdp=4)
    assert count / 4 < shared["params"] < count and shared["workspace"] < parts["workspace"] / 2


@pytest.mark.slow
def test_workspace_of_batch_remat_and_accumulation(tiny):
    sizes = {}
    for remat in (False, True):
        tiny.remat = remat
        for batch, accumulation in ((64, 1), (128, 1), (128, 2)):
            tiny.ddo.update(batch=batch, accumulation=accumulation)
            sizes[remat, batch, accumulation] = step_of(tiny)["workspace"]
    assert 1.9 < sizes[False, 128, 1] / sizes[False, 64, 1] < 2.01
    assert 1 < sizes[False, 128, 2] / sizes[False, 64, 1] < 1.3  # half the activations; inputs and one more gradient
    assert 2 < sizes[False, 64, 1] / sizes[True, 64, 1] < 10


@pytest.mark.slow
def test_against_the_compiler(micro):
    """Breaks if the estimate is not above, and near, what XLA allots for the very step of a run."""
    family, c = get_family(micro), micro.ddo
    c.batch = 512
    params, frozen = jax.eval_shape(family.init, jax.random.key(0))
    training = step.Training(family, sharding.make_mesh(), c, "ddo", warmup=0.0, total=1e6)
    shapes = jax.eval_shape(lambda p: state.new_state(p, training.config), params)
    records = memory.record(family, c.batch)
    totals, key = jax.eval_shape(lambda: (step.zero_totals(family, "ddo"), jax.random.key(0)))
    hyper = step.Hyper(4.0, 0.2, 1e-6, (-0.4, 1.2))
    inputs = step.Inputs(frozen, records, records, key, hyper, params)
    compiled = step.make_step(training).lower(shapes, totals, inputs).compile()
    found = compiled.memory_analysis()
    estimate = memory.step_bytes(family, c, "ddo", 1, 1)["total"]
    assert 0.25 * estimate < found.argument_size_in_bytes + found.temp_size_in_bytes < estimate


# -- the text ---------------------------------------------------------------------------------------------


def section(text: str, name: str) -> str:
    """The lines of `name` and those indented below it."""
    lines = text.splitlines()
    (start,) = [i for i, line in enumerate(lines) if line.startswith(name)]
    rest = [i for i, line in enumerate(lines) if i > start and not line.startswith("  ")]
    return "\n".join(lines[start : min(rest, default=len(lines))])


def test_images_and_hours(micro):
    """By hand: two candidates of 2 steps of 16; 40 fakes and (1 + 2 * 2) * 48 images; 3 systems * 2 * 48."""
    micro.ddo.rounds = 3
    parts = {p.name: p for p in costs.work(micro, 1437)}
    assert parts["pretrain"] == costs.Work("pretrain", 3 * 16, 3, 0, 0)
    assert parts["each round"] == costs.Work("each round", 2 * 2 * 16, 8, 40, 5 * 48)
    assert parts["control"] == costs.Work("control", 3 * 2 * 16, 3, 0, 6 * 48)
    assert parts["report"] == costs.Work("report", 0, 0, 0, 3 * 2 * 48)
    with_remat = micro.copy_and_resolve_references()
    with_remat.remat = True  # what is trained on, real and fake, is computed again; the reference is not
    assert [p.passes for p in costs.work(with_remat, 1437)] == [4, 10, 4, 0]

    lines = dry_run._costs(micro, list(parts.values()), flops=1e12, each=costs.Each(3, 3), rates=(0.5, 0.25))
    hours = {line[:14].strip(): float(line.split()[-1]) for line in lines[1:-1]}
    each = (64 / 0.5 + 280 / 0.25) / 3600
    assert hours["each round"] == pytest.approx(each, rel=1e-3) and hours["all 3 rounds"] == pytest.approx(
        3 * each, 1e-3
    )
    assert hours["everything"] == pytest.approx(
        3 * each + (48 * 3 / 8 / 0.5 + 96 * 3 / 8 / 0.5 + (288 + 288) / 0.25) / 3600, rel=1e-3
    )
    pflop = {
        line[:14].strip(): float(line.split()[-1])
        for line in dry_run._costs(micro, list(parts.values()), 1e12, costs.Each(3, 3), ())[1:-1]
    }
    assert pflop["each round"] == pytest.approx((64 * 8 + 280 * 3) / 1000, rel=1e-3)


def test_what_a_round_is_for(micro):
    """By hand: 64 images of 8 passes, 40 fakes, 240 judged, of 3 passes; a cheaper way must be cheaper."""
    micro.ddo.rounds, each = 3, costs.Each(judged=35, fake=3)
    parts = costs.work(micro, 1437)
    spent = costs.forwards(next(p for p in parts if p.name == costs.EACH_ROUND), each)
    assert spent == {"training": 64 * 8, "fakes": 40 * 3, "selection": 240 * 35}
    first, second = costs.shares(micro, parts, each)
    assert first == "a round's FLOPs: training 6%, fakes 1%, selection 93%"
    assert second == "a cheaper selection would save of them: DPM-Solver-v3 of 12 steps 61%"
    micro.ddo.rounds = 0
    assert costs.shares(micro, costs.work(micro, 1437), each) == []


def test_sampling_rate_from_the_training_rate(micro):
    """One number is enough: sampling at the same FLOP/s. 8 forward passes a training image, 3 a sample."""
    lines = dry_run._costs(micro, costs.work(micro, 1437), flops=1e12, each=costs.Each(3, 3), rates=(30.0,))
    assert "at 30 real images/s" in lines[-1] and "80 images/s sampled" in lines[-1]


@pytest.mark.parametrize("given", [["x"], ["0"], ["-1"], ["inf"], ["1", "2", "3"], ["nan"], [""]])
def test_throughput_refuses(given):
    with pytest.raises(UserError, match="--images_per_s=.*one or two numbers above 0"):
        dry_run.throughput(given)


def test_the_flag_without_a_dry_run():
    """Breaks if a flag that does nothing is ignored silently."""
    command = [sys.executable, "-m", "ddo_jax.main", "--images_per_s=3"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "--dry_run" in done.stderr, done.stderr


@pytest.mark.slow
def test_dry_run_of_latents(tmp_path):
    """A latent family without its files: what is missing is listed, sizes and costs are there all the same."""
    config = edm2_in512.get_config("runlocal")
    config.model.vae = str(tmp_path / "vae.safetensors")
    config.eval.reference = str(tmp_path / "img512.pkl")
    text = dry_run.plan(config, "w", ["3"])
    for name in ("autoencoder", "references"):
        line = section(text, name)
        assert line.startswith(f"{name:<12} NOT AT HAND: ") and str(tmp_path) in line, text
    assert "ddo: " in section(text, "memory") and "remat=True" in text and "remat=False" in text
    assert "each round" in section(text, "cost") and text.count("\n  at 3 real images/s") == 1


def test_disk(tiny):
    """By hand: latest two and best of a candidate, one checkpoint of every older round; pool; snapshots; best/."""
    tiny.ddo.update(rounds=3, pool=1000)
    tiny.ddo.ema_stds = (0.05, 0.1, 0.2)
    tiny.init = "somewhere"
    tiny.ddo.snapshot_every.steps = 5  # of 10: twice a round
    family = get_family(tiny)
    params = jax.eval_shape(family.init, jax.random.key(0))[0]
    n = state.parameter_count(params)
    checkpoint, snapshots, pool = 4 * n * 6, 3 * 2 * (2 * n * 3), 1000 * 64
    assert dry_run._disk(tiny, family, params, 1437) == 8 * n + 3 * checkpoint + 2 * checkpoint + snapshots + pool
    tiny.keep = "all"
    assert dry_run._disk(tiny, family, params, 1437) == 8 * n + 9 * checkpoint + snapshots + 3 * pool


def test_pool_of_latents():
    """Fakes stay latents: float32, without the deviations that records of data have."""
    config = edm2_in512.get_config("")
    assert dry_run._pool(config, get_family(config)) == 50_000 * 64 * 64 * 4 * 4


@pytest.mark.slow
def test_real_configs():
    """280 and 777 million parameters in shapes: none of it is allocated, and it takes seconds."""
    config = edm2_in64.get_config("")
    config.ddo.batch = 64
    parts = step_of(config)
    assert parts["params"] == 4 * 280_209_381
    assert 22.3e9 < parts["total"] < 30e9  # compiled for an H100: 22.3e9 (benchmarks/results/2026-11-aot.jsonl)


def test_the_encoder_is_no_part_of_a_forward_pass():
    """Breaks if 250 evaluations of a sample are counted as if each encoded an image."""
    config = sit_in256.get_config("")
    family = get_family(config)
    params, frozen = memory.abstract(family)
    forward, encoding = dry_run.forward_flops(family, params, frozen)
    x = jax.ShapeDtypeStruct((1, *family.shape), jnp.float32)
    t, label = jax.ShapeDtypeStruct((1,), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.int32)
    alone = jax.jit(family.velocity).lower(params, frozen, x, t, label).cost_analysis()["flops"]
    assert forward == pytest.approx(alone, rel=0.02) and 0.5 * forward < encoding < forward
