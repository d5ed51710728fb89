"""python -m ddo_jax.sample: images depend on the seed alone; released files, torch's streams, restarts, errors."""

import json
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import ddo_jax
from ddo_jax import config as configs
from ddo_jax import convert, sample
from ddo_jax.convert import safetensors
from ddo_jax.core.torch_rng import edm_streams
from ddo_jax.errors import UserError
from ddo_jax.families import get_family
from ddo_jax.generate import request as requests
from ddo_jax.generate.labels import class_labels
from ddo_jax.generate.request import Request, generate, noise_shape
from ddo_jax.generate.seeds import check_apart, parse_seeds, seeds_text
from ddo_jax.store import load

GOLDEN = Path(__file__).parents[1] / "goldens" / "edm_ddpmpp_small.npz"


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """The small DDPM++ of the goldens as a safetensors file with the released names."""
    with np.load(GOLDEN) as golden:
        recorded = json.loads(str(golden["config"]))
        config = {k: v for k, v in recorded.items() if k != "class_name"} | {"model_type": "SongUNet"}
        state = {k.removeprefix("param/"): golden[k] for k in golden.files if k.startswith("param/")}
    path = tmp_path_factory.mktemp("released") / "small.safetensors"
    path.write_bytes(safetensors.dumps(state, {"ddo_jax_kind": "edm", "ddo_jax_config": json.dumps(config)}))
    return path


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A matrix-product network in the same format: it compiles in a second."""
    c = configs.base()
    c.model.update(img_resolution=8, img_channels=3, label_dim=3)
    with c.unlocked():
        c.model.update(width=16, blocks=1)
    family = get_family(c)
    params = jax.jit(family.init)(jax.random.key(0))[0]
    wave = jax.tree.map(lambda v: v + 0.1 * np.sin(np.arange(v.size)).reshape(v.shape), params)
    arrays, metadata = family.export(jax.tree.map(lambda v: np.asarray(v, np.float32), wave), {})
    path = tmp_path_factory.mktemp("small") / "small.safetensors"
    path.write_bytes(safetensors.dumps(arrays, metadata))
    return path


def request(path, **changes):
    return Request(str(path), np.arange(16), sampler={"num_steps": 3}, **changes)


def images(path, **changes):
    records, num, family = generate(request(path, **changes))
    assert family.spec.levels == 256 and num == 16
    records = list(records)
    return tuple(np.concatenate([r[key] for r in records]) for key in ("seed", "label", "image"))


def test_batch_size_does_not_change_images(small):
    """Breaks if an image depends on the batch it was made in, or a padded row is kept."""
    made = [images(small, batch=batch)[2] for batch in (1, 7, 16)]
    assert made[0].shape == (16, 8, 8, 3)
    assert len(np.unique(made[0].reshape(16, -1), axis=0)) == 16
    for other in made[1:]:
        differ = made[0] != other
        assert differ.mean() <= 1e-3 and np.abs(made[0].astype(int) - other)[differ].max(initial=0) <= 1


def test_labels(released):
    """Breaks if balanced labels follow the seed, a fixed class is ignored, or random ones follow the position."""
    seeds = np.array([7, 3, 8])
    assert class_labels("balanced", seeds, 2, "jax").tolist() == [0, 1, 0]
    assert class_labels("1", seeds, 2, "jax").tolist() == [1, 1, 1]
    drawn = class_labels("random", seeds, 1000, "jax")
    assert drawn.tolist() == class_labels("random", seeds[::-1], 1000, "jax")[::-1].tolist()
    with pytest.raises(UserError, match="'5'; allowed: balanced, random, or a class 0-1"):
        class_labels("5", seeds, 2, "jax")


@pytest.mark.parametrize("text", ["0-3,10", "0,5", "7", "0-49999", "5,4,3", "9-12,0-3"])
def test_records_name_the_seeds_exactly(text):
    """Breaks if a record's seeds are not those that were used."""
    seeds = parse_seeds(text)
    assert seeds_text(seeds) == text and np.array_equal(parse_seeds(seeds_text(seeds)), seeds)


def test_long_lists_of_odd_seeds():
    """Breaks if two different lists have one name."""
    lists = [np.arange(0, 1000, 2), np.sort(np.append(np.arange(0, 998, 2)[1:], [0, 999]))]
    texts = [seeds_text(seeds) for seeds in lists]
    assert texts[0].startswith("500 from 0 to 998, CRC ") and texts[0] != texts[1]


def test_ranges_share_nothing():
    """Breaks if the spread of two scores is that of the same images."""
    check_apart([np.arange(5), np.arange(5, 9)])
    with pytest.raises(UserError, match=r"seed 4 is in two ranges \(1 such seeds\)"):
        check_apart([np.arange(5), np.arange(4, 9)])


@pytest.mark.slow
def test_torch_streams_are_used(released):
    """Breaks if --rng=torch-cpu does not start from the released sampler's latents and labels."""
    found = load.find(str(released))
    classes = found.config["label_dim"]
    latents, labels, _ = edm_streams(np.arange(16), (16, 16, 3), classes, 3)
    _, used, made = images(released, rng="torch-cpu", labels="random", batch=16)
    assert used.tolist() == labels.tolist()
    family = load.family_of(found)
    params, frozen = family.imported(found)
    settings = family.settings({"num_steps": 3})
    zero = np.zeros((3, *latents.shape), np.float32)
    examples = jax.jit(lambda z: family.sample((params, None), frozen, labels, z, zero, settings))(latents)
    expected = np.asarray(family.decode(frozen, examples))
    assert (expected != made).mean() <= 1e-3


@pytest.mark.slow
def test_bfloat16_is_close_and_not_equal(released):
    """Breaks if --dtype=bfloat16 has no effect, or reaches more than the image path."""
    exact, lowered = (images(released, dtype=dtype, batch=16)[2].astype(int) for dtype in ("float32", "bfloat16"))
    error = np.abs(exact - lowered)
    assert 0 < error.mean() < 8


@pytest.mark.slow
def test_dpm_solver(released):
    """Breaks if --solver=dpmv3 is not used, or does not come with its own number of steps."""
    found = load.find(str(released))
    family = load.family_of(found)
    assert load.settings_of(found, family, {"solver": "dpmv3"}).nfe == 25
    assert load.settings_of(found, family, {"solver": "dpmv3", "num_steps": 7}).nfe == 7
    heun = images(released, batch=16)[2].astype(int)
    flags = dict(sampler={"solver": "dpmv3", "num_steps": 8}, batch=16)
    records = generate(Request(str(released), np.arange(16), **flags))[0]
    made = np.concatenate([r["image"] for r in records]).astype(int)
    assert made.shape == heun.shape and 0 < np.abs(made - heun).mean() < 128


@pytest.mark.slow
def test_guidance(released, tmp_path):
    """Breaks if the guide's weights are not used, or guidance by the network itself changes its images."""
    plain, own = images(released, batch=16)[2].astype(int), str(released)
    same = images(released, batch=16, guide=own, guidance=1.5)[2].astype(int)
    assert np.abs(same - plain).max() <= 1 and (same != plain).mean() < 1e-2
    found = convert.read(released)
    half = {k: v * np.float32(0.5) if k.endswith(".weight") else v for k, v in found.state_dict.items()}
    weak = tmp_path / "weak.safetensors"
    weak.write_bytes(safetensors.dumps(half, {k: found.extras["metadata"][k] for k in found.extras["metadata"]}))
    guided = images(released, batch=16, guide=str(weak), guidance=1.5)[2].astype(int)
    assert np.abs(guided - plain).mean() > 0.5


def test_a_sweep_gives_every_strength_to_the_guide(released, monkeypatch):
    """Breaks if the strengths of a second network's guidance are exchanged, or that without guidance is guided."""
    given = []

    def make_sampler(family, settings, mesh, batch, streams, guide):
        def sampler(params, frozen, seeds, labels, weight=None):
            given.append((weight, guide.weight))
            return iter(())

        return sampler

    monkeypatch.setattr(requests, "make_sampler", make_sampler)
    asked = request(released, guide=str(released))
    found = dict(requests.sweep(asked, "guidance", [1.0, 1.5, 3.0]))
    for model in found.values():
        list(model.images(np.arange(2), np.zeros(2, np.int32)))
    assert [weight for weight, _ in given] == [1.0, 1.5, 3.0]
    records = [m.protocol["guidance"] and m.protocol["guidance"]["weight"] for m in found.values()]
    assert records == [None, 1.5, 3.0] and [m.protocol["nfe"] for m in found.values()] == [5, 10, 10]


def test_folder_is_continued(small, tmp_path, capsys):
    """Breaks if a restart makes every image again, or leaves a hole."""
    flags = [f"--checkpoint={small}", f"--out={tmp_path / 'out'}", "--num_steps=2", "--batch=4"]
    sample.main([*flags, "--seeds=0-5"])
    kept = tmp_path / "out" / "000002.png"
    before = kept.stat().st_mtime_ns
    (tmp_path / "out" / "000003.png").unlink()
    sample.main([*flags, "--seeds=0-6"])
    assert "2 images written" in capsys.readouterr().out
    assert kept.stat().st_mtime_ns == before
    sample.main([*flags, "--seeds=0-6", "--subdirs"])
    assert "0 images written" in capsys.readouterr().out  # not one image twice, for evaluate would count both
    names = sorted(p.name for p in (tmp_path / "out").glob("*.png"))
    assert names == [f"{seed:06d}.png" for seed in range(7)]
    with Image.open(kept) as image:
        assert image.size == (8, 8) and image.mode == "RGB"
    with pytest.raises(SystemExit):  # a folder does not mix settings
        sample.main([f"--checkpoint={small}", f"--out={tmp_path / 'out'}", "--num_steps=3", "--seeds=0-9"])
    assert "made with another request (sampler:" in capsys.readouterr().err
    assert len(list((tmp_path / "out").glob("*.png"))) == 7


def test_npz_for_other_evaluators(released, tmp_path):
    """Breaks if arr_0 is not what the OpenAI evaluator reads."""
    sample.main(
        [f"--checkpoint={released}", f"--out={tmp_path / 'x.npz'}", "--num_steps=2", "--batch=4", "--seeds=3-5,9"]
    )
    with np.load(tmp_path / "x.npz") as made:
        assert made["arr_0"].shape == (4, 16, 16, 3) and made["arr_0"].dtype == np.uint8
        assert made["seeds"].tolist() == [3, 4, 5, 9]


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--seeds=5-"], "--seeds: '5-'; allowed"),
        (["--seeds=10-5,3"], "--seeds: 10-5 runs backwards; write 5-10"),
        (["--seeds=0-3,0-3"], "has seed 0 twice; allowed: every seed once"),
        (["--seeds=7,0-9"], "has seed 7 twice"),
        (["--seeds=²"], "--seeds: '²'; allowed"),
        (["--seeds=0-100000000000"], "allowed: ranges and numbers below 2^32"),
        (["--seeds=0-4294967295"], "allowed: 100,000,000 seeds at a time"),
        (["--checkpoint=edm-cifar10-uncond-vp-dd"], "edm-cifar10-uncond-vp-ddo"),
        (["--num_steps=1"], "num_steps is 1"),
        (["--batch=0"], "--batch: 0; allowed: at least 1"),
        (["--rng=cuda"], "invalid choice: 'cuda'"),
        (["--solver=euler"], "solver is 'euler'; allowed: heun, dpmv3"),
        (["--vae=x"], "--vae: x; allowed for models of latents or tokens"),
        (["--guidance=1.5"], "--guide=None with --guidance=1.5: set --guide=WHAT, too"),
        (["--guide=x"], "--guide=x with --guidance=None: set --guidance=1.4 or another weight, too"),
        (["--guidance=nan", "--guide=x"], "--guidance: nan; allowed: a finite number"),
        (["--solver=dpmv3", "--num_steps=200"], "config.sampler: "),
        (["--solver=dpmv3", "--s_noise=nan"], "config.sampler: s_noise is nan"),
        (["--sigma_max=inf"], "config.sampler: sigma_max is inf"),
        (["--sigma_min=1e-40"], "config.sampler: sigma_min is 1e-40"),
        (["--rho=1e-4"], "config.sampler: rho is 0.0001"),
        (["--rho=0"], "config.sampler: rho is 0.0"),
    ],
)
def test_mistakes_are_one_line(released, tmp_path, capsys, flags, words):
    """Breaks if a mistake ends in a traceback or another exit code."""
    with pytest.raises(SystemExit) as e:
        sample.main([f"--checkpoint={released}", f"--out={tmp_path / 'o'}", *flags])
    error = capsys.readouterr().err
    assert e.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1 and words in error


def test_load_a_released_file(released):
    """Breaks if ddo_jax.load and to_torch are not inverse."""
    family, params, frozen = ddo_jax.load(str(released))
    arrays, metadata = family.export(jax.tree.map(np.asarray, params), frozen)
    found = convert.read(released)
    assert list(arrays) == list(found.state_dict) and metadata["ddo_jax_kind"] == "edm"
    for name, value in found.state_dict.items():
        np.testing.assert_array_equal(arrays[name], value)


def test_streams_of_latents_have_their_shape():
    """Breaks if --rng=torch-cpu draws noise of the size of the decoded image."""
    latent = SimpleNamespace(latents=lambda keys: jnp.zeros((len(keys), 4, 4, 8)), image_shape=(32, 32, 3))
    assert noise_shape(latent) == (4, 4, 8)


def test_buffers_are_kept_after_a_killed_start(tmp_path):
    """Breaks if a run whose first start was killed before its buffers were written cannot be loaded later."""
    (tmp_path / "frozen").mkdir()
    frozen = {"buffers": {"freqs": jnp.arange(3.0)}}
    for _ in range(2):
        load.save_frozen(tmp_path, frozen)
    kept = load.restore_ema(tmp_path / "frozen", 0, jax.eval_shape(lambda: frozen))
    np.testing.assert_array_equal(kept["buffers"]["freqs"], [0, 1, 2])


def test_wrong_architecture_is_refused(released):
    """Breaks if a config starts from weights of another network."""
    found, config = load.find(str(released)), configs.base()
    load.from_released(config, found)
    with config.unlocked():
        config.model.model_channels = 2 * config.model.model_channels
    with pytest.raises(UserError, match="the weights do not fit config.model: .*shape"):
        get_family(config).imported(found)
