"""What every family must keep, ours and a toy of forty lines alike; a new family is one more line of `CASES`."""

import functools
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddo_jax import config as configs
from ddo_jax import convert, sharding
from ddo_jax.convert import safetensors
from ddo_jax.core.ddo import Pair
from ddo_jax.errors import UserError
from ddo_jax.families import Family, Side, from_released, get_family
from ddo_jax.generate.sampler import make_sampler
from ddo_jax.run import step
from ddo_jax.run.checks import check_network
from ddo_jax.run.prepare import initial_frozen
from ddo_jax.store import load
from tests.harness import random_variables

ROOT = Path(__file__).parents[2]
B, NOISE = 4, (-0.4, 1.2)
DIGITS = dict(img_resolution=8, img_channels=1, label_dim=10, levels=17)
UNET = dict(model_channels=8, channel_mult=(1,), num_blocks=1, attn_resolutions=())
EDM2 = dict(arch="UNet", **UNET, channels_per_head=8)
VAES = {"vae": ROOT / "configs/digits_vae.safetensors", "vqvae": ROOT / "configs/digits_vqvae.safetensors"}
LATENTS = dict(img_resolution=4, img_channels=4, image_size=8, image_channels=1, vae=str(VAES["vae"]))
LATENTS |= dict(latent_mean=(0.0,) * 4, latent_std=(1.0,) * 4)
VAR = dict(arch="VAR", vae=str(VAES["vqvae"]), patch_nums=(1, 2, 4), vocab_size=128, z_channels=8)
VAR |= dict(depth=1, embed_dim=16, num_heads=1, cond_drop_rate=0.3)
SIT = dict(arch="SiT", patch_size=2, hidden_size=16, depth=1, num_heads=2)
SIT_LATENTS = SIT | {k: v for k, v in LATENTS.items() if not k.startswith("latent_")}
CASES = {  # name: (family, config.model beside DIGITS, a key of another family)
    "edm-mlp": ("edm", dict(arch="mlp", width=8, blocks=1), ("dtype", "bfloat16")),
    "edm-mixer": ("edm", dict(arch="mixer", patch=2, width=8, blocks=1, tokens=8), ("dtype", "bfloat16")),
    "edm-unet": ("edm", dict(arch="SongUNet", **UNET, dropout=0.1), ("ddo.reencode", False)),
    "edm2": ("edm2", EDM2 | LATENTS, ("data.augment", 0.1)),
    "var": ("var", VAR, ("ddo.p_std", 0.3)),
    "sit": ("sit", SIT | dict(learn_sigma=False, mle_time="logit-normal"), ("data.augment", 0.1)),
    "sit-latents": ("sit", SIT_LATENTS | dict(weight="x", guidance_channels=3), ("ddo.reencode", False)),
    "toy": ("tests.families.toy:make", {}, ("sampler.rho", 3.0)),
}


def config_of(name):
    family, model, _ = CASES[name]
    c = configs.base()
    c.family = family
    with c.unlocked():
        c.model.update(DIGITS | model)
    if family != "var":
        c.sampler.num_steps = 3 if family in ("edm", "edm2") else c.sampler.num_steps
    return c


class Case:
    """One family with parameters that are not at their start, a batch of examples, its draws."""

    def __init__(self, name):
        self.name, self.config = name, config_of(name)
        self.family = get_family(self.config)
        mesh = sharding.make_mesh(1)
        self.params, _ = random_variables(self.family.init)
        self.frozen = load.complete(self.family, mesh, initial_frozen(self.family, mesh, 0))
        spec, rng = self.family.spec, np.random.default_rng(0)
        labels = np.array([1, 3, spec.num_classes, 7], np.int32)  # the third has none
        self.record = {"image": rng.integers(0, spec.levels, (B, *spec.image_shape), np.uint8), "label": labels}
        self.examples = jax.jit(self.family.encode)(self.frozen, self.record, jax.random.key(1))
        self.draws = self.family.draw(jax.random.key(2), B, NOISE)
        self.score = jax.jit(self.family.score)


@functools.lru_cache(maxsize=1)  # one at a time: their programs are large
def case_of(name):
    return Case(name)


@pytest.fixture(params=CASES, scope="module")
def case(request):
    return case_of(request.param)


def test_facts(case):
    """Breaks if a family is not hashable, or says of itself what is not so."""
    spec = case.family.spec
    assert hash(case.family) == hash(get_family(case.config)) and case.family == get_family(case.config)
    assert spec.data[0].kind == "pixels" and spec.data[0].shape == spec.image_shape
    assert {"ddo", "mle"} <= set(case.family.objectives) and spec.kind((1, 2, 3, 4)) is None
    settings = case.family.settings(case.config.sampler)
    assert hash(settings) == hash(case.family.settings(case.config.sampler)) and settings.nfe >= 1
    assert json.dumps(settings.record()) and settings.record()["solver"] == settings.solver
    assert case.family.passes(settings) >= 1 and case.family.strength(settings) == spec.guidance.neutral


def test_every_leaf_has_the_batch_first(case):
    """Breaks if rows cannot be spread over devices or split into micro-batches."""
    for tree in (case.examples, case.draws, case.family.store(case.frozen, case.examples)):
        assert {leaf.shape[0] for leaf in jax.tree.leaves(tree)} == {B}
    s = case.score(case.params, case.frozen, case.examples, case.draws)
    assert {leaf.shape[0] for leaf in jax.tree.leaves(s)} == {B}
    for value in (case.family.ratio(s, s, case.examples, case.draws), case.family.nll(s, case.examples, case.draws)):
        assert value.shape == (B,) and value.dtype == jnp.float32
    assert case.family.version(case.draws).shape == (B,)


def test_r_is_zero_at_the_reference(case):
    """Breaks if target and reference are scored differently in one program, or r has no sign of a change."""
    family = case.family

    @jax.jit
    def ratio(params, ref, frozen, examples, draws):
        s, s_ref = (family.score(p, frozen, examples, draws) for p in (params, ref))
        return family.ratio(s, s_ref, examples, draws)

    same = jax.tree.map(np.copy, case.params)
    other = jax.tree.map(lambda v: v + 0.01 * np.cos(np.arange(v.size, dtype=np.float32)).reshape(v.shape), same)
    assert not np.asarray(ratio(case.params, same, case.frozen, case.examples, case.draws)).any()
    assert np.all(np.asarray(ratio(case.params, other, case.frozen, case.examples, case.draws)) != 0)


def test_the_score_is_deterministic(case):
    """Breaks if dropout, augmentation or any draw is left on in the discriminator: r would be noise."""
    shapes = jax.eval_shape(lambda: (case.params, case.frozen, case.examples, case.draws))
    text = str(jax.make_jaxpr(case.family.score)(*shapes))
    assert "random_bits" not in text and "threefry" not in text


def test_rows_do_not_look_at_each_other(case):
    """Breaks if a score, or a loss, depends on what else is in the batch."""
    order = np.array([2, 0, 3, 1])
    s = case.score(case.params, case.frozen, case.examples, case.draws)
    examples, draws = jax.tree.map(lambda v: v[order], (case.examples, case.draws))
    for a, b in zip(*map(jax.tree.leaves, (s, case.score(case.params, case.frozen, examples, draws))), strict=True):
        np.testing.assert_allclose(np.asarray(a)[order], b, rtol=1e-4, atol=1e-4)


def test_what_is_stored_is_read_back(case):
    """Breaks if a pool's fakes are other examples than those that were made."""
    stored = case.family.store(case.frozen, case.examples)
    spec = case.family.spec
    assert stored["image"].shape == (B, *spec.stored.shape) and stored["image"].dtype == spec.stored.dtype
    again = case.family.encode(case.frozen, stored, jax.random.key(9))
    for key in stored.keys() & {"label"} | set(again):
        np.testing.assert_allclose(again[key], case.examples[key], rtol=1e-5, atol=1e-5)


def test_draws_are_a_function_of_their_key(case):
    """Breaks if a restart draws other noise."""
    again, other = (case.family.draw(jax.random.key(k), 64, NOISE) for k in (2, 3))
    same = case.family.draw(jax.random.key(2), 64, NOISE)
    jax.tree.map(np.testing.assert_array_equal, again, same)
    if any(np.asarray(leaf).any() for leaf in jax.tree.leaves(again)):  # else it draws nothing
        assert any(np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (again, other)), strict=True))


def test_projection_settles(case):
    """Breaks if the reference, projected once more than the start, is another network."""
    for objective in ("ddo", "mle"):
        project = jax.jit(functools.partial(case.family.project, objective=objective))
        twice = project(project(case.params))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), twice, project(twice))


def test_losses_have_gradients(case):
    """Breaks if an objective cannot be trained by, or is not finite."""
    family, examples, draws = case.family, case.examples, case.draws

    def total(params):
        s = family.score(params, case.frozen, examples, draws)
        side = Side(family.ratio(s, jax.lax.stop_gradient(s), examples, draws), s, examples["label"], draws)
        losses = {"mle": family.mle_loss(params, case.frozen, examples, draws, jax.random.key(0)).mean()}
        for objective in set(family.objectives) - {"mle"}:
            losses[objective] = family.pair_loss(objective, side, side, 4.0, 0.1)[0]
        return sum(losses.values()), losses

    gradient, losses = jax.jit(jax.grad(total, has_aux=True))(case.params)
    assert losses.keys() == set(family.objectives) and all(np.isfinite(v) and v != 0 for v in losses.values())
    leaves = jax.tree.leaves(gradient)
    assert all(np.isfinite(leaf).all() for leaf in leaves) and any(np.any(leaf != 0) for leaf in leaves)
    masks = family.decays(case.params)
    assert jax.tree.structure(masks) == jax.tree.structure(case.params)


def test_statistics_add_up(case):
    """Breaks if a batch of pairs gives other statistics than those that a phase starts to add up from."""
    family = case.family

    def pairs(params):
        pair = Pair(case.examples, case.examples, case.draws)
        inputs = step.Inputs(case.frozen, None, None, None, step.Hyper(4.0, 0.1, 1.0, (0.0, 1.0)), params)
        return step.pair_objective(family, "ddo", params, inputs, pair)[1]

    got = jax.eval_shape(pairs, case.params)
    zero = {k: v for k, v in step.zero_totals(family, "ddo").items() if k != "grad_norm"}
    assert jax.tree.structure(got) == jax.tree.structure(zero)


def test_a_sample_is_a_function_of_key_and_label(case):
    """Breaks if an image depends on its row, its neighbours or the size of the request."""
    settings = case.family.settings(case.config.sampler)
    sampler = make_sampler(case.family, settings, sharding.make_mesh(1), 8)
    seeds, labels = np.arange(100, 108), np.arange(8, dtype=np.int32)
    (whole,) = sampler(case.params, case.frozen, seeds, labels)
    assert whole["image"].shape == (8, *case.family.spec.image_shape) and whole["image"].dtype == np.uint8
    assert whole["image"].max() < case.family.spec.levels and len(np.unique(whole["image"], axis=0)) > 1
    (part,) = sampler(case.params, case.frozen, seeds[[6, 1]], labels[[6, 1]])
    differ = part["image"] != whole["image"][[6, 1]]
    assert differ.mean() <= 1e-2


def test_files_and_back(case, tmp_path):
    """Breaks if what a run exports is not what every command reads, or not the same network."""
    arrays, metadata = case.family.export(case.params, case.frozen)
    path = tmp_path / "params.safetensors"
    path.write_bytes(safetensors.dumps({k: np.asarray(v) for k, v in arrays.items()}, metadata))
    released = convert.read(path)
    if type(case.family).imported is Family.imported:  # its files are its own
        with pytest.raises(UserError, match="reads no files of others"):
            case.family.imported(released)
        return
    again = configs.base()
    from_released(again, released)
    family = get_family(again)
    assert family.spec == case.family.spec
    params, frozen = family.imported(released)
    assert jax.tree.structure(params) == jax.tree.structure(case.params)
    jax.tree.map(np.testing.assert_array_equal, params, case.params)
    with pytest.raises(UserError, match="weights of kind inception"):
        case.family.imported(convert.Released("inception", {}, {}, {}))


def test_foreign_keys_are_refused(case):
    """Breaks if a key that this family ignores passes in silence."""
    key, value = CASES[case.name][2]
    foreign = prepared(case.config)
    section, _, name = key.rpartition(".")
    (foreign[section] if section else foreign)[name] = value
    with pytest.raises(UserError, match=f"config.{key}"):
        check_network(foreign)
    assert check_network(prepared(case.config))[0] == case.family


def prepared(config):
    """The config with what validation wants beside the network."""
    config = config.copy_and_resolve_references()
    config.pretrain.length.steps, config.ddo.length.steps, config.ddo.eval_every.steps = 1, 1, 1
    return config


@pytest.mark.slow
def test_a_family_of_the_user_runs(tmp_path):
    """Breaks if `--config.family=package.module:make` needs anything of this repository but the seam."""
    (tmp_path / "mine.py").write_text(Path(__file__).with_name("toy.py").read_text())
    (tmp_path / "my_config.py").write_text(CONFIG)
    line = [sys.executable, "-m", "ddo_jax.main", "--config=my_config.py", "--workdir=w"]
    environment = {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    evals = [json.loads(text) for text in (tmp_path / "w" / "evals.jsonl").read_text().splitlines()]
    assert {e["protocol"]["sampler"]["solver"] for e in evals} == {"toy"} and (tmp_path / "w/report/report.md").exists()


CONFIG = """
from ddo_jax.config import base

def get_config():
    c = base()
    c.family = "mine:make"
    c.model.update(img_resolution=8, img_channels=1, label_dim=10, levels=17)
    for phase in ("pretrain", "ddo"):
        c[phase].update(batch=16, ema_mimg=16e-6)
        c[phase].length.steps = 2
    c.ddo.eval_every.steps = 1
    c.ddo.pool = 32
    c.eval.update(num=32, batch=32, report_seeds=1, grid=4)
    c.log.tensorboard = False
    return c
"""


@pytest.mark.parametrize(
    "name, words",
    [
        ("nowhere:make", "ModuleNotFoundError: No module named 'nowhere'"),
        ("json:make", "AttributeError"),
        ("builtins:dict", "gives a"),
        ("edm3", "'edm3'; allowed: edm, .*, or a function of yours"),
    ],
)
def test_families_that_are_none(name, words):
    """Breaks if a wrong name of a family ends in a traceback."""
    c = config_of("edm-mlp")
    c.family = name
    with pytest.raises(UserError, match=words):
        get_family(c)
