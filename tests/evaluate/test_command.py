"""python -m ddo_jax.evaluate, end to end: images or a checkpoint in, a table and records with their protocol out.

Sections are those of specs/metrics.md.
"""

import json
import zipfile
import zlib
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from ddo_jax import sample
from ddo_jax.convert import safetensors
from ddo_jax.core.stats import frechet
from ddo_jax.data import images as codec
from ddo_jax.evaluate import __main__ as command
from ddo_jax.evaluate import collect, evaluator, features, references
from ddo_jax.evaluate.features import FeatureNet

GOLDENS = Path(__file__).parents[1] / "goldens"
IMAGES = np.random.default_rng(0).integers(0, 256, (40, 16, 16, 3), np.uint8)
MAP = np.random.default_rng(1).standard_normal((48, 15)).astype(np.float32)


def apply(images):
    """4x4 means -> 6 features, 4 spatial ones, 5 logits."""
    x = np.repeat(images, 3 // images.shape[-1], axis=-1).astype(np.float32)
    n, h, w, _ = x.shape
    x = x.reshape(n, 4, h // 4, 4, w // 4, 3).mean((2, 4)).reshape(n, -1) @ MAP / 200
    return {"features": x[:, :6], "spatial": x[:, 6:10], "logits": x[:, 10:]}


@pytest.fixture(autouse=True)
def tiny(monkeypatch, tmp_path):
    """Random projections under the networks' names, nothing outside the test's own directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "xla"))
    nets = {"inception": ("tiny net", "fid"), "dinov2": ("tiny dino", "fd_dinov2")}
    for name, (title, metric) in nets.items():
        about = dict(kind=name, resize="TF1 bilinear 299")
        net = FeatureNet(title, f"{zlib.crc32(title.encode()):08x}", metric, 1.0, apply, **about)
        monkeypatch.setitem(features.RELEASED, name, lambda weights, net=net: net)
        monkeypatch.delitem(features.DEFAULT_WEIGHTS, name)


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """The small DDPM++ of the goldens as a safetensors file with the released names."""
    with np.load(GOLDENS / "edm_ddpmpp_small.npz") as golden:
        recorded = json.loads(str(golden["config"]))
        config = {k: v for k, v in recorded.items() if k != "class_name"} | {"model_type": "SongUNet"}
        state = {k.removeprefix("param/"): golden[k] for k in golden.files if k.startswith("param/")}
    path = tmp_path_factory.mktemp("released") / "small.safetensors"
    path.write_bytes(safetensors.dumps(state, {"ddo_jax_kind": "edm", "ddo_jax_config": json.dumps(config)}))
    return path


@pytest.fixture
def real(tmp_path):
    """An OpenAI reference file."""
    images = 255 - IMAGES[:30]
    vectors = apply(images)
    (mu, sigma), (mu_s, sigma_s) = (frechet.moments(vectors[k]) for k in ("features", "spatial"))
    np.savez(tmp_path / "real.npz", arr_0=images, mu=mu, sigma=sigma, mu_s=mu_s, sigma_s=sigma_s)
    return tmp_path / "real.npz"


def folder(path, images=IMAGES):
    path.mkdir()
    for i, image in enumerate(images):
        (path / f"{i:06d}.png").write_bytes(codec.encode_png(image))
    return path


def lines(path="evals.jsonl"):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_folder_zip_and_npz_score_alike(tmp_path, real, capsys):
    """Breaks if the container changes the number, the table lacks it, or the record lacks the protocol."""
    folder(tmp_path / "set")
    with zipfile.ZipFile("set.zip", "w") as archive:
        for path in (tmp_path / "set").iterdir():
            archive.write(path, f"x/{path.name}")
    np.savez("set.npz", arr_0=IMAGES)
    for name in ("set", "set.zip", "set.npz"):
        command.main([f"--images={name}", f"--ref={real}", "--metrics=fid,sfid,is,pr,kid"])
    records = lines()
    plain = [{k: v for k, v in r.items() if k not in ("protocol", "phase")} for r in records]
    assert plain[0] == plain[1] == plain[2]
    expected = frechet.frechet_from_features(apply(255 - IMAGES[:30])["features"], apply(IMAGES)["features"])
    np.testing.assert_allclose(records[0]["fid0.04k"], expected, rtol=1e-6)
    out, err = capsys.readouterr()
    assert "fid0.04k" in out and f"{expected:.6g}" in out and "compare only with the same number" in err
    made = records[0]["protocol"]
    assert made["n_samples"] == 40 and made["references"]["ref"].startswith("real.npz ") and made["class_balance"]
    assert made["features"] == {"inception": f"tiny net {zlib.crc32(b'tiny net'):08x}"}
    assert "TF1 bilinear 299" in made["resize"]["inception"]
    assert made["metrics"]["is"].startswith("blocks of 5000, file order")
    assert {"commit", "jax", "device", "time", "content", "quantised_to"} <= set(made)
    assert made["content"] == records[2]["protocol"]["content"] == f"{zlib.crc32(IMAGES):08x}"


@pytest.mark.slow
def test_checkpoint_in_seed_ranges(tmp_path, real, released, capsys):
    """Breaks if generating and scoring in one pass differs from `sample` and then `evaluate`, or ranges mix."""
    flags = [f"--checkpoint={released}", "--num_steps=2", "--batch=4"]
    ranges = ["--seeds=0-9", "--seeds=10-19"]
    command.main([*flags, *ranges, f"--ref={real}", "--metrics=fid,is", "--keep=kept"])
    first, second = lines()
    assert first["fid0.01k"] != second["fid0.01k"]
    made = first["protocol"]
    assert (made["seeds"], made["nfe"], made["sampler"]["num_steps"]) == ("0-9", 3, 2)
    assert made["class_balance"]["verdict"] == "balanced" and len(made["weights"]) == 8
    out = capsys.readouterr().out
    assert all(word in out for word in ("0-9", "10-19", "min", "mean", "std"))
    sample.main([*flags, "--out=b.npz", "--seeds=10-19"])
    command.main(["--images=b.npz", f"--ref={real}", "--metrics=fid,is"])
    again = lines()[-1]
    assert again["fid0.01k"] == second["fid0.01k"]
    assert again["protocol"]["content"] == second["protocol"]["content"] != made["content"]
    assert sorted(p.name for p in Path("kept").iterdir()) == [f"{i:06d}.png" for i in range(20)]


@pytest.mark.slow
def test_kept_npz(released, real):
    """Breaks if the file for the OpenAI evaluator holds other images than were scored."""
    flags = [f"--checkpoint={released}", "--num_steps=2", "--batch=4", "--seeds=5-10", "--labels=0"]
    command.main([*flags, f"--ref={real}", "--keep=x.npz"])
    with np.load("x.npz") as made:
        assert made["arr_0"].shape == (6, 16, 16, 3) and made["arr_0"].dtype == np.uint8
        assert made["seeds"].tolist() == [5, 6, 7, 8, 9, 10]
        assert f"{zlib.crc32(made['arr_0']):08x}" == lines()[0]["protocol"]["content"]
    assert lines()[0]["protocol"]["class_balance"]["least"] == 0


@pytest.mark.parametrize(
    "labels, classes, verdict",
    [
        (np.arange(100) % 5, 5, "balanced"),
        (np.zeros(100, np.int32), 5, "unbalanced"),
        (np.random.default_rng(0).integers(0, 5, 100), 5, "random"),
        (None, 5, "unknown"),
        (None, 0, "unknown"),
        (np.full(9, -1), 5, "unknown (labels are int64 (9,): integers [N] in 0..4, N >= 1)"),
    ],
)
def test_class_balance_is_said(capsys, labels, classes, verdict):
    """Breaks if unbalanced labels are scored without a word."""
    images = evaluator.Images("set", 100, (4, 4, 3), 256, classes, (), {})
    assert evaluator.balance(images, labels)["verdict"] == verdict
    assert ("not balanced" in capsys.readouterr().err) == (verdict == "unbalanced")


def test_bootstrap(tmp_path, real, capsys):
    """Breaks if the interval misses the difference of two scores."""
    folder(tmp_path / "a"), folder(tmp_path / "b", IMAGES // 2)
    for name in ("b", "a"):
        more = ["--bootstrap", "--against=b"] if name == "a" else []
        command.main([f"--images={name}", f"--ref={real}", *more])
    b, a = lines()
    np.testing.assert_allclose(a["fid0.04k_difference"], a["fid0.04k"] - b["fid0.04k"], rtol=1e-9)
    assert a["fid0.04k_low"] < a["fid0.04k_difference"] < a["fid0.04k_high"]
    assert "paired by name" in a["protocol"]["metrics"]["bootstrap"]


def test_digits_network(tmp_path, capsys):
    """Breaks if the digits' own network and levels are not used, or PNGs of digits are read as other levels."""
    from ddo_jax.data import sources

    digits = sources.open_source("digits", "test").images[:30]
    full = np.round(digits * (255 / 16)).astype(np.uint8)
    np.savez("raw.npz", arr_0=full)
    np.savez("three.npz", arr_0=np.repeat(full, 3, axis=-1))  # as sample --out=x.npz writes them
    np.savez("colours.npz", arr_0=np.concatenate([full, full, 255 - full], axis=-1))
    folder(tmp_path / "set")
    with jax.numpy_dtype_promotion("standard"):  # optax.adamw fails under "strict"
        for name in ("raw.npz", "three.npz"):
            command.main([f"--images={name}", "--ref=digits", "--network=digits"])
        with pytest.raises(SystemExit):
            command.main(["--images=colours.npz", "--ref=digits", "--network=digits"])
        assert "takes grey images, and these have colours" in capsys.readouterr().err
        with pytest.raises(SystemExit):
            command.main(["--images=set", "--ref=digits", "--network=digits"])
        train, test = (sources.open_source("digits", split) for split in ("train", "test"))
        fit = features.Fit(train, test, 17, references.cache_dir() / "features-digits.npz")
        net = features.get_features("digits", fit)
    assert "takes images of 8x8x1, and these have 16x16x3; set --network" in capsys.readouterr().err
    record, three = lines()
    assert record["fd_x100"] == three["fd_x100"]
    train = net.apply(sources.open_source("digits", "train").images)["features"]
    expected = 100 * frechet.frechet_from_features(train, net.apply(digits)["features"])
    np.testing.assert_allclose(record["fd_x100"], expected, rtol=1e-4)
    assert record["protocol"]["references"]["ref"].startswith("digits:train ")


def test_num_is_a_fixed_choice(tmp_path, real):
    """Breaks if --num takes the first images: a class-sorted set would lose classes."""
    folder(tmp_path / "set")
    np.savez("set.npz", arr_0=IMAGES)
    for name in ("set", "set.npz"):
        command.main([f"--images={name}", f"--ref={real}", "--num=12"])
    a, b = lines()
    assert a["fid0.012k"] == b["fid0.012k"] and a["protocol"]["subset"] == "12 at random, seed 0"


def test_what_was_scored_is_said(tmp_path, real, capsys):
    """Breaks if compressed files, other sizes or a deep tree pass without a word, or are refused."""
    tree = tmp_path / "tree"
    for i, image in enumerate(IMAGES):
        path = tree / ["", "a", "a/b"][i % 3] / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).resize((32, 32)).save(path, quality=90)
    command.main(["--images=tree", f"--ref={real}", "--metrics=fid,kid"])
    made = lines()[-1]["protocol"]
    assert (made["n_samples"], made["files"], made["size"]) == (40, "lossy: JPEG", "32x32x3, the reference's 16x16x3")
    err = capsys.readouterr().err
    assert "lossy: JPEG: compression changes distances" in err and "sizes differ" in err
    folder(tmp_path / "plain")
    command.main(["--images=plain", f"--ref={real}", "--metrics=fid,kid"])
    made = lines()[-1]["protocol"]
    assert made["size"] == "16x16x3" and "files" not in made
    assert "lossy" not in (err := capsys.readouterr().err) and "sizes differ" not in err


@pytest.mark.parametrize("ranges", [["0-9", "5-14"], ["0-9", "9"], ["3,4", "0-5"]])
def test_ranges_that_overlap(real, released, capsys, ranges):
    """Breaks if a spread over ranges counts images twice."""
    with pytest.raises(SystemExit) as e:
        command.main([f"--checkpoint={released}", f"--ref={real}", *(f"--seeds={r}" for r in ranges)])
    assert e.value.code == 2 and "is in two ranges" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--metrics=fid,fix"], "--metrics: 'fix'; allowed: fid, sfid, is, pr, kid, mind, fd_dinov2, fd_"),
        (["--metrics=,"], "--metrics: ','"),
        (["--metrics=fid_inf"], "fid_inf of 40 images"),
        (["--ref=edm.npz", "--metrics=sfid"], "no statistics for sfid"),
        (["--ref=edm.npz", "--metrics=pr"], "pr, kid and mind need"),
        (["--ref=other.npz"], "5 features, but tiny net gives 6: a reference made with another network"),
        (["--ref=nan.npz"], "non-finite values"),
        (["--ref=nowhere.npz"], "--ref: nowhere.npz: no such file"),
        (["--ref=nowhere"], "--ref: 'nowhere'; allowed: digits"),
        (["--images=empty"], "empty: no images"),
        (["--images=mixed"], "height, width, channels (8, 16, 3)"),
        (["--images=nowhere"], "--images: nowhere: no such folder or file"),
        (["--num=50"], "--num: 50; allowed: 2 to the 40 images"),
        (["--num=1"], "--num: 1; allowed: at least 2"),
        (["--seeds=0-3"], "--seeds: of --checkpoint"),
        (["--bootstrap"], "--bootstrap and --against belong together"),
        (["--bootstrap", "--against=few"], "12 images against 40"),
        (["--keep=folder"], "--keep: a folder keeps generated images"),
        (["--keep=edm.npz"], "--keep: edm.npz exists"),
        (["--batch=0"], "--batch: 0"),
        (["--sweep=guidance=0,1"], "--sweep: of one --checkpoint and one range of --seeds"),
        (["--plot=x.foo"], "--plot: x.foo; allowed: a file that ends in .png"),
        (["--plot=x.png"], "--plot: the picture of a --sweep, which is missing"),
        (["--checkpoint=x"], "not allowed with argument --images"),
        (["--network=vgg"], "invalid choice: 'vgg'"),
        (["--out=set/000000.png/x"], "--out: set/000000.png/x"),
    ],
)
def test_mistakes_are_one_line(tmp_path, real, capsys, flags, words):
    """Breaks if a mistake ends in a traceback, another exit code, or a record."""
    folder(tmp_path / "set"), folder(tmp_path / "few", IMAGES[:12]), (tmp_path / "empty").mkdir()
    (folder(tmp_path / "mixed") / "x.png").write_bytes(codec.encode_png(IMAGES[0, :8]))
    np.savez("edm.npz", mu=np.zeros(6), sigma=np.eye(6))
    np.savez("other.npz", mu=np.zeros(5), sigma=np.eye(5))
    np.savez("nan.npz", mu=np.full(6, np.nan), sigma=np.eye(6))
    given = {"--images": "set", "--ref": str(real)} | {k: v for k, _, v in (f.partition("=") for f in flags)}
    with pytest.raises(SystemExit) as e:
        command.main([f"{k}={v}" if v else k for k, v in given.items()])
    error = [line for line in capsys.readouterr().err.splitlines() if not line.startswith(("note: ", "warning: "))]
    assert e.value.code == 2 and len(error) == 1 and error[0].startswith("error: ") and words in error[0]
    assert not Path("evals.jsonl").exists()


def test_is_alone_needs_no_reference(tmp_path, capsys):
    """Breaks if --ref is asked for where nothing is compared, or not where something is."""
    folder(tmp_path / "set")
    command.main(["--images=set", "--metrics=is"])
    assert "references" not in lines()[0]["protocol"] and lines()[0]["is0.04k"] > 1
    with pytest.raises(SystemExit):
        command.main(["--images=set", "--metrics=is,fid"])
    assert "--ref: missing; fid need a reference" in capsys.readouterr().err


def test_absent_weights_are_named_first(tmp_path, real, monkeypatch, capsys):
    """Breaks if absent weights are found after images were made, or the file to fetch is not named."""
    folder(tmp_path / "set")
    monkeypatch.setitem(features.DEFAULT_WEIGHTS, "inception", "inception-2015-12-05")
    with pytest.raises(SystemExit):
        command.main(["--images=set", f"--ref={real}"])
    assert "pt_inception-2015-12-05-6726825d.pth; or put" not in (err := capsys.readouterr().err)
    assert "put the file at" in err and "pt_inception-2015-12-05-6726825d.pth" in err


def test_torn_record_is_not_continued(tmp_path):
    """Breaks if a line torn by a kill swallows the next one."""
    Path("e.jsonl").write_text('{"a": 1}\n{"b"')
    command.append("e.jsonl", {"c": 3})
    assert Path("e.jsonl").read_text() == '{"a": 1}\n{"b"\n{"c": 3}\n'


# ----------------------------------------------------------------------------------------------------
# The real network, random weights (rule 10.1)


def random_inception(path):
    with np.load(GOLDENS / "inception_random.npz") as golden:
        names, shapes, salt = (golden[k].tolist() for k in ("param_names", "param_shapes", "salt"))
        crcs, images = golden["param_crc32"].tolist(), {k: golden[k] for k in ("img32", "img64")}
    state = {}
    for name, text, crc in zip(names, shapes, crcs, strict=True):
        shape = tuple(map(int, text.split("x")))
        seed = int(salt) * 2**32 + zlib.crc32(name.encode())
        k = (np.random.PCG64(seed).random_raw(int(np.prod(shape))) >> np.uint64(40)).astype(np.int64)
        u = k / 2**24
        if name.endswith("conv.weight") or name == "fc.weight":
            k = k.reshape(shape[0], -1)
            m = k.shape[1]
            u = (m * k - k.sum(1, keepdims=True)) / (m * 2**23) * np.sqrt((12 if name == "fc.weight" else 9) / m)
        elif name == "fc.bias":
            u = -1 + 2 * u
        else:
            low, width = {"weight": (0.8, 0.4), "running_var": (0.6, 0.8)}.get(name.split(".")[-1], (-0.2, 0.4))
            u = low + width * u
        state[name] = u.reshape(shape).astype(np.float32)
        assert zlib.crc32(state[name].tobytes()) == crc
    path.write_bytes(safetensors.dumps(state))
    return state, images


@pytest.fixture
def real_network(monkeypatch):
    monkeypatch.setitem(features.RELEASED, "inception", features._inception)


@pytest.mark.slow
def test_real_inception_end_to_end(tmp_path, real_network, capsys):
    """Breaks if the file of weights, the network, the statistics and the command do not fit together."""
    _, images = random_inception(tmp_path / "inception.safetensors")
    noise = np.random.default_rng(0).integers(-20, 20, (16, 32, 32, 3))
    fake = np.clip(images["img32"].astype(int)[None] + noise, 0, 255).astype(np.uint8)
    folder(tmp_path / "fake", fake), folder(tmp_path / "real", fake[:, ::-1])
    command.main(
        ["--images=fake", "--ref=folder:real", "--metrics=fid,sfid,is,pr,kid", "--weights=inception.safetensors"]
    )
    (record,) = lines()
    net = features.get_features("inception", weights="inception.safetensors")
    a, b = (net.apply(x) for x in (fake[:, ::-1], fake))
    for metric, vector in (("fid", "features"), ("sfid", "spatial")):
        expected = frechet.frechet_from_features(a[vector], b[vector])
        np.testing.assert_allclose(record[f"{metric}0.016k"], expected, rtol=1e-4)
    assert a["spatial"].shape == (16, 2023) and record["is0.016k"] > 1 and 0 <= record["precision0.016k"] <= 1


@pytest.mark.slow
def test_agrees_with_torch_fidelity(tmp_path, real_network):
    """Breaks if the whole path differs from torch-fidelity's on the same weights and images."""
    torch_fidelity = pytest.importorskip("torch_fidelity")
    import torch

    state, images = random_inception(tmp_path / "inception.safetensors")
    torch.save({k: torch.from_numpy(v) for k, v in state.items()}, tmp_path / "inception.pth")
    noise = np.random.default_rng(0).integers(-20, 20, (2, 64, 64, 64, 3))
    sets = np.clip(images["img64"].astype(int)[None, None] + noise, 0, 255).astype(np.uint8)
    folder(tmp_path / "fake", sets[0]), folder(tmp_path / "real", sets[1, :, ::-1])
    command.main(["--images=fake", "--ref=folder:real", "--metrics=fid,kid", "--weights=inception.safetensors"])
    theirs = torch_fidelity.calculate_metrics(
        input1=str(tmp_path / "fake"),
        input2=str(tmp_path / "real"),
        fid=True,
        kid=True,
        kid_subset_size=64,
        cuda=False,
        feature_extractor_weights_path=str(tmp_path / "inception.pth"),
        verbose=False,
    )
    (record,) = lines()
    np.testing.assert_allclose(record["fid0.064k"], theirs["frechet_inception_distance"], rtol=1e-3)
    np.testing.assert_allclose(record["kid"], theirs["kernel_inception_distance_mean"], rtol=1e-3)


def test_constants():
    """Breaks if a protocol constant is changed without a thought for published numbers (section 5)."""
    assert (collect.IS_BLOCK, collect.KID_SIZE, collect.INF_POINTS, collect.INF_LEAST) == (5000, 1000, 15, 5000)


def test_numbers_before_their_record(tmp_path, real, capsys):
    """Breaks if a number that was computed is lost because the record cannot be written, or that is not an error."""
    folder(tmp_path / "set")
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as e:
        command.main(["--images=set", f"--ref={real}", "--out=file/evals.jsonl"])
    out, err = capsys.readouterr()
    assert e.value.code == 2 and "fid0.04k" in out and "error: --out: file/evals.jsonl" in err
