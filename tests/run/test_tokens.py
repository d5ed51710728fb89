"""A family with exact likelihoods in the harness: online fakes, the reference asked once, baselines, restarts."""

import dataclasses
import itertools
import json

import jax
import numpy as np
import pytest

from ddo_jax import config as configs
from ddo_jax import convert, files, sample, sharding
from ddo_jax.convert import safetensors
from ddo_jax.data.pipeline import batches
from ddo_jax.errors import UserError
from ddo_jax.generate import request
from ddo_jax.generate.request import Request, open_generator
from ddo_jax.models.vqvae import from_config
from ddo_jax.run import candidates, fakes, loop, main_job, prepare, reference_scores, rounds, state, step
from tests.harness import Quiet

TOKENIZER = dict(vocab_size=12, z_channels=4, ch=8, ch_mult=[1, 1], num_res_blocks=1, patch_nums=[1, 4])
TOKENIZER |= dict(in_channels=1, norm_groups=4)
L = 17


def tokens_config(vae):
    c = configs.base()
    c.name, c.family = "tokens", "var"
    c.model.update(arch="VAR", img_resolution=8, img_channels=1, label_dim=10, levels=17)
    with c.unlocked():
        c.model.update(depth=1, embed_dim=16, num_heads=2, patch_nums=(1, 4), vocab_size=12, z_channels=4, vae=vae)
        c.model.cond_drop_rate = 0.3
    for phase in ("pretrain", "ddo", "control"):
        c[phase].update(batch=16, ema_mimg=0.0, clip=2.0, weight_decay=0.05)
    c.pretrain.length.steps = 2
    c.ddo.update(rounds=1, alpha=(10.0,), beta=(0.1, 0.2), pool=0, lr=1e-3)
    c.ddo.length.steps = 3
    c.ddo.eval_every.steps = 3
    c.eval.update(num=32, batch=16, report_seeds=1, grid=4)
    c.log.update(every=1, tensorboard=False)
    return c


@pytest.fixture(scope="session")
def vae(tmp_path_factory):
    module = from_config(TOKENIZER)
    variables = jax.jit(module.init)(jax.random.key(1), np.zeros((1, 8, 8, 1), np.float32))
    path = tmp_path_factory.mktemp("vae") / "vae.safetensors"
    metadata = {"ddo_jax_kind": "vqvae", "ddo_jax_config": json.dumps(TOKENIZER)}
    path.write_bytes(safetensors.dumps(convert.to_torch("vqvae", TOKENIZER, variables), metadata))
    return str(path)


@pytest.fixture
def config(vae):
    return tokens_config(vae)


@pytest.fixture(scope="session")
def run(vae, fitted, tmp_path_factory):
    """A prepared run; its programs are shared by all tests."""
    workdir = tmp_path_factory.mktemp("tokens")
    (workdir / "features-digits.npz").write_bytes(fitted[1].read_bytes())
    return prepare.prepare(tokens_config(vae), workdir, Quiet())


@pytest.fixture(scope="session")
def start(run):
    return jax.jit(run.family.init)(jax.random.key(0))[0]


def candidate(run, directory, ref, *, beta=0.1, pooled=False, config=None):
    """A candidate of round 1 in `directory`, from `ref`."""
    own = dataclasses.replace(run, workdir=run.workdir.__class__(directory), config=config or run.config)
    pool = pooled and (lambda: fakes.pools.open_pool(own.workdir / "pool"))
    shared = rounds.partners(own, ref, 0, pool, keep=True)
    hyper = candidates.hyper(own.config.ddo, grid=(10.0, beta))
    return candidates.phase(own, "ddo", "c", lambda: ref, objective="ddo", hyper=hyper, seed=7, partners=shared)


def with_asks(run, fill):
    """The run with another `fill`."""
    programs = dataclasses.replace(run.programs, asks=run.programs.asks._replace(fill=fill))
    return dataclasses.replace(run, programs=programs)


def steps_of(phase, run, n):
    """What the loop gives its first n steps."""
    return list(itertools.islice(loop.feed(phase, run, 0), n))


def test_small_sets_are_tokenised_once(run):
    """Breaks if training does not read the tokens of its images, or tokenises them at every step."""
    assert run.programs.tokens is None and run.training_data.image_shape == (L,)
    assert len(run.training_data) == len(run.data)
    rows = np.array([0, 5, len(run.data) - 1])
    record = run.data.read(rows)
    tokens = run.family.encode(run.frozen, record, jax.random.key(0))["tokens"]
    np.testing.assert_array_equal(run.training_data.read(rows)["image"], tokens)
    np.testing.assert_array_equal(run.training_data.read(rows)["label"], record["label"])


def test_mirrored_images_are_tokenised_as_they_come(run, config):
    """Breaks if tokens of one view stand for both, or a likelihood of one is kept for the other."""
    config.data.flip = True
    train, tokens = prepare.tokenised(config, run.family, run.frozen, run.mesh, run.data)
    assert train is run.data and tokens is not None
    record = run.data.read(np.arange(16))
    made = tokens(run.frozen, sharding.put_batch(run.mesh, record))
    np.testing.assert_array_equal(made["image"], run.training_data.read(np.arange(16))["image"])


@pytest.mark.slow
def test_the_reference_is_asked_once(run, start, tmp_path, monkeypatch):
    """Breaks if a kept likelihood belongs to another row, label or drop, or is asked for again."""
    phase = candidate(run, tmp_path, start)
    questions = []

    def fill(said, positions, *args):
        questions.append(np.unique(positions))
        return run.programs.asks.fill(said, positions, *args)

    counting = with_asks(run, fill)
    assert run.programs.asks.block == 2
    first = steps_of(phase, counting, 3)
    assert len(questions) == 6 * 8 and sum(map(len, questions)) == 6 * 16
    again = steps_of(phase, counting, 3)  # the next candidate of the round
    assert len(questions) == 6 * 8
    key = sharding.replicate(run.mesh, state.derive(phase.seed, "step"))
    score = jax.jit(run.family.score)
    for k, (one, two) in enumerate(zip(first, again, strict=True)):
        np.testing.assert_allclose(one[2], two[2], rtol=1e-6)
        draws = run.family.pair_draw(step.step_keys(key, k)[2], 16, (0.0, 1.0))
        assert 0 < np.sum(draws["dropped"]) < 16
        for column, record in enumerate(one[:2]):
            examples = run.family.encode(run.frozen, record, key)
            s = score(start, run.frozen, examples, draws)
            np.testing.assert_allclose(one[2][column], s, rtol=1e-5, atol=1e-4)
    filled = np.isfinite(phase.partners.kept["fake"].values)
    assert filled.sum() == 3 * 16 and (filled.sum(1) <= 1).all()


@pytest.mark.slow
def test_online_fakes(run, start, tmp_path):
    """Breaks if fakes are not the reference's for the labels of the data, or differ after a restart."""
    phase = candidate(run, tmp_path, start)
    whole = steps_of(phase, run, 3)
    for real, fake, _ in whole:
        np.testing.assert_array_equal(real["label"], fake["label"])
        assert fake["image"].shape == (16, L)
    assert not np.array_equal(whole[0][1]["image"], whole[1][1]["image"])
    seeds = 2 * 10**9 + np.arange(16, 32)
    (alone,) = run.programs.fakes(start, run.frozen, seeds, np.asarray(whole[1][0]["label"]))
    np.testing.assert_array_equal(alone["image"], whole[1][1]["image"])
    fresh = candidate(run, tmp_path, start)
    pair = fresh.partners.fakes(1)  # resumed after one step
    np.testing.assert_array_equal(pair(1, whole[1][0])[0]["image"], whole[1][1]["image"])


@pytest.mark.slow
def test_first_step_is_at_the_reference(run, start, tmp_path):
    """Breaks if target and reference, which are two programs here, disagree on what they score."""
    phase = candidate(run, tmp_path, start)
    ((real, fake, s_ref),) = steps_of(phase, run, 1)
    fresh = sharding.place(run.mesh, state.new_state(start, phase.config))
    totals = sharding.replicate(run.mesh, step.zero_totals(run.family, "ddo"))
    key = sharding.replicate(run.mesh, state.derive(phase.seed, "step"))
    advance = run.programs.step_for(phase.objective, phase.section, phase.warmup, phase.steps)
    _, totals = advance(fresh, totals, step.Inputs(run.frozen, real, fake, key, phase.hyper, s_ref=s_ref))
    found = loop.summary(totals, 1.0, 1.0)
    assert abs(found["ddo/r_real_mean"]) < 1e-4 and found["ddo/r_real_std"] < 1e-3  # of |logp| about 40
    draws = run.family.pair_draw(step.step_keys(key, 0)[2], 16, (0.0, 1.0))
    dropped = np.mean(draws["dropped"])
    np.testing.assert_allclose(found["loss/real"], np.log(2) / 10, rtol=1e-4)  # posonly_w1: all rows over max(alpha, 1)
    np.testing.assert_allclose(found["loss/fake"], np.log(2) * (1 - dropped), rtol=1e-4)


def test_wrong_labels(run):
    """Breaks if CCA's fakes are other images, or keep their labels."""
    record = sharding.put_batch(run.mesh, {"image": np.arange(8), "label": np.arange(8, dtype=np.int32)})
    made, rows = fakes.wrong_labels(0)(0, record)
    np.testing.assert_array_equal(made["label"], [1, 2, 3, 4, 5, 6, 7, 0])
    np.testing.assert_array_equal(made["image"], np.arange(8))
    assert rows is None


def test_kept_scores():
    """Breaks if an unknown score is taken for known, or one version for the other."""
    kept = reference_scores.Kept(4)
    kept.values[[0, 1], [0, 1]] = [-1.0, -2.0]
    np.testing.assert_array_equal(kept.find(np.array([1, 0]), np.array([1, 0])), [-2.0, -1.0])
    np.testing.assert_array_equal(kept.find(np.array([1, 0]), np.array([0, 0])), [np.nan, -1.0])


def test_rows_that_return_are_not_asked_again(run, start, tmp_path):
    """Breaks if one unknown row makes the whole batch be asked, or a returning row gets another one's score."""
    phase = candidate(run, tmp_path, start)
    key = sharding.replicate(run.mesh, state.derive(phase.seed, "step"))
    questions = []

    def fill(said, positions, *args):
        questions.append(len(np.unique(positions)))
        return run.programs.asks.fill(said, positions, *args)

    kept = {"real": reference_scores.Kept(40), "fake": reference_scores.Kept(40)}
    phase = dataclasses.replace(phase, partners=dataclasses.replace(phase.partners, kept=kept))
    asks = reference_scores.ReferenceScores(with_asks(run, fill).programs.asks, run.mesh, run.frozen, phase, key)
    rng, known, expected = np.random.default_rng(0), set(), 0
    score = jax.jit(run.family.score)
    for k in range(6):
        rows = rng.permutation(40)[:16]
        record = sharding.put_batch(run.mesh, run.training_data.read(rows))
        draws = run.family.pair_draw(step.step_keys(key, k)[2], 16, phase.hyper.sigma_law)
        s_ref = asks(k, {"real": record, "fake": record}, {"real": rows, "fake": rows})
        s = score(start, run.frozen, run.family.encode(run.frozen, record, key), draws)
        for said in s_ref:
            np.testing.assert_allclose(said, s, rtol=1e-5, atol=1e-4)
        now = set(zip(rows.tolist(), np.asarray(run.family.version(draws)).tolist(), strict=True))
        expected += 2 * len(now - known)
        known |= now
    assert sum(questions) == expected < 2 * 6 * 16


class Stop(Exception):
    pass


@pytest.mark.slow
def test_a_restart_changes_nothing(run, start, tmp_path, monkeypatch):
    """Breaks if tokens, fakes, drops or kept scores of a resumed round differ from those of an uninterrupted one."""
    ends = {}
    for name in ("whole", "halved"):
        (tmp_path / name).mkdir()
        phase = candidate(run, tmp_path / name, start)
        phase = dataclasses.replace(phase, save_every=2, eval_every=None)
        if name == "halved":

            def stop(self, done, totals, write=loop._Loop.write):
                if done == 3:
                    raise Stop
                write(self, done, totals)

            with monkeypatch.context() as patch:
                patch.setattr(loop._Loop, "write", stop)
                with pytest.raises(Stop):
                    loop.train(phase, run)
            phase = dataclasses.replace(candidate(run, tmp_path / name, start), save_every=2, eval_every=None)
        loop.train(phase, run)
        shapes = sharding.abstract(run.mesh, jax.eval_shape(lambda: start))
        ends[name] = rounds.restore_ema(phase.directory / "checkpoints", 3, shapes)
    for a, b in zip(*map(jax.tree.leaves, ends.values()), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
@pytest.mark.filterwarnings("default:config.objective is config.method today:FutureWarning")
@pytest.mark.parametrize("objective, pool", [("ddo", 0), ("ddo", 40), ("neon", 40), ("cca", 0), ("mle", 0)])
def test_every_objective_to_its_report(run, config, start, tmp_path, fitted, objective, pool):
    """Breaks if a baseline or an offline pool does not run to its end, or leaves another kind of record."""
    config.update(**{"objective" if objective == "cca" else "method": objective})  # its older name
    config.log.signal = 2 if objective in ("ddo", "neon") else 0
    config.ddo.update(pool=pool, beta=(0.1,))
    config.eval.also = ({"cfg": 1.0}, {"top_k": 3, "top_p": 0.9})
    (tmp_path / "features-digits.npz").write_bytes(fitted[1].read_bytes())
    main_job.run(config, tmp_path)
    text = (tmp_path / "report" / "report.md").read_text()
    method = {"ddo": "DDO", "neon": "Neon", "cca": "CCA", "mle": "MLE"}[objective]
    assert f"| after {method}, cfg 1.0 |" in text and "| start (pretrained), top_k 3, top_p 0.9 |" in text
    names = {"ddo": "a10_b0.1", "cca": "cca_a10_b0.1", "mle": "mle", "neon": "neon"}
    records = files.read_jsonl(tmp_path / "rounds/001" / names[objective] / "metrics.jsonl")
    assert ("loss/mle" in records[0]) == (objective in ("mle", "neon"))
    if objective in ("ddo", "cca"):
        assert "ddo/paired_accuracy" in records[0] and "ddo/ce_ref_fake" in records[0]
        assert abs(records[0]["ddo/margin"]) < 1e-3 and "loss/nll_real" in records[0]
    protocols = [e["protocol"] for e in files.read_jsonl(tmp_path / "evals.jsonl")]
    assert {(p.get("guidance") or {}).get("cfg") for p in protocols} == {None, 1.0}
    assert {p["nfe"] for p in protocols} == {2, 4} and {p["dtype"] for p in protocols} == {config.eval.dtype}
    if pool:
        made = files.read_json(tmp_path / "rounds/001/pool/result.json")
        assert made["num"] == 40 and made["sampler"]["reencode"] and made["sampler"]["cfg"] == 0


@pytest.mark.slow
def test_a_pool_of_tokens_is_read_like_the_data(run, start, tmp_path):
    """Breaks if tokens are stored as anything but themselves, or a pool's scores are kept under other rows."""
    own = dataclasses.replace(
        run, workdir=run.workdir.__class__(tmp_path), config=run.config.copy_and_resolve_references()
    )
    own.config.ddo.pool = 40
    directory = own.workdir / "pool"
    directory.mkdir()
    result = fakes.make_pool(own, directory, lambda: start, 0)
    files.write_json(directory / "result.json", result)
    pool = fakes.pools.open_pool(directory)
    assert pool.image_shape == (L,) and pool.dtype == np.int32 and len(pool) == 40
    phase = candidate(run, tmp_path, start, pooled=True, config=own.config)
    assert phase.partners.kept["fake"].values.shape == (40, 2)
    ((_, fake, _),) = steps_of(phase, run, 1)
    index = next(batches(pool, 16, 1000 + 1, with_index=True))["index"]
    np.testing.assert_array_equal(fake["image"], pool.images[index])


@pytest.mark.slow
def test_sample_and_sweep_a_finished_run(config, tmp_path, fitted, capsys):
    """Breaks if guidance 1 is taken for none, strengths are compiled one by one, or filters are not those asked for."""
    config.update(init="scratch")
    config.ddo.rounds = 0
    config.sampler.cfg = 2.0
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "features-digits.npz").write_bytes(fitted[1].read_bytes())
    what = str(tmp_path / "run")
    main_job.run(config, what)
    asked = Request(what, np.arange(8), batch=8)
    assert open_generator(asked).protocol["guidance"]["cfg"] == 2.0  # the run's own
    found = dict(request.sweep(asked, "guidance", [0.0, 1.0, 500.0]))
    assert found[1.0].sampler.func is found[500.0].sampler.func is not found[0.0].sampler.func
    assert [m.protocol["guidance"] and m.protocol["guidance"]["cfg"] for m in found.values()] == [None, 1.0, 500.0]
    assert [m.protocol["nfe"] for m in found.values()] == [2, 4, 4]

    def images(model):
        return next(model.sampler(model.params, model.frozen, asked.seeds, np.arange(8)))["image"]

    for weight in (0.0, 500.0):
        alone = open_generator(asked._replace(guidance=weight))
        np.testing.assert_array_equal(images(alone), images(found[weight]))
    assert (images(found[0.0]) != images(found[500.0])).any()
    filtered = open_generator(asked._replace(sampler={"top_k": 1}, guidance=0.0))
    assert filtered.settings[:2] == (0.0, 1)
    capsys.readouterr()  # what the run said
    for flags, words in (
        (["--guide=x", "--guidance=2"], "x: no such file"),
        (["--rng=torch-cpu"], "--rng: 'torch-cpu'; allowed for a var: jax"),
        (["--num_steps=3"], "config.sampler.num_steps: 3; this model's sampler has no such setting"),
        (["--guidance=-1"], "config.sampler.cfg: -1.0; allowed: 0"),
    ):
        with pytest.raises(SystemExit) as e:
            sample.main([f"--checkpoint={what}", f"--out={tmp_path / 'out'}", "--seeds=0-3", *flags])
        error = capsys.readouterr().err
        assert e.value.code == 2 and error.count("\n") == 1 and words in error
    assert not (tmp_path / "out" / "request.json").exists()  # a folder remembers what was made, not what failed
    with pytest.raises(UserError, match="--guide: .*; a var takes no second network"):
        open_generator(asked._replace(guide=what, guidance=2.0))
