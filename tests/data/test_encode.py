"""`python -m ddo_jax.data encode`: EDM2's latent zip, with the numbers of the public VAE."""

import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from ddo_jax.convert import safetensors
from ddo_jax.convert.read import CONFIG_KEY, KIND_KEY
from ddo_jax.data import __main__ as command
from ddo_jax.data import encode, make, sources
from ddo_jax.errors import UserError

ROOT = Path(__file__).parents[2]
TINY = {"in_channels": 1, "out_channels": 1, "latent_channels": 2, "block_out_channels": [4, 4], "norm_num_groups": 2}
N, CLASSES = 5, 3


@pytest.fixture(scope="session")
def golden():
    with np.load(ROOT / "tests" / "goldens" / "sdvae_small.npz") as f:
        return dict(f)


def write_vae(path, config, state):
    metadata = {KIND_KEY: "sdvae", CONFIG_KEY: json.dumps(config)}
    path.write_bytes(safetensors.dumps(state, metadata))
    return path


@pytest.fixture(scope="session")
def released(golden, tmp_path_factory):
    """The golden VAE (three channels, eight pixels a latent) as a file."""
    state = {name.removeprefix("param/"): v for name, v in golden.items() if name.startswith("param/")}
    return write_vae(tmp_path_factory.mktemp("vae") / "golden.safetensors", json.loads(str(golden["config"])), state)


def tiny_state(seed=0):
    from ddo_jax import convert

    rng = np.random.default_rng(seed)
    shapes = convert.layout("sdvae", TINY).items()
    return {name: (rng.standard_normal(shape) * 0.3).astype(np.float32) for name, shape in shapes}


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A grey VAE of random weights, two pixels a latent."""
    return write_vae(tmp_path_factory.mktemp("vae") / "tiny.safetensors", TINY, tiny_state())


PIXELS = np.random.default_rng(0).integers(0, 256, (N, 8, 6, 1), np.uint8)


@pytest.fixture
def folder(tmp_path):
    """Five grey images in three class folders."""
    for i, pixels in enumerate(PIXELS):
        path = tmp_path / "raw" / f"class{i % CLASSES}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[..., 0]).save(path)
    return tmp_path / "raw"


ORDER = [0, 3, 1, 4, 2]  # sorted by name


def run(*args):
    """The exit code of `python -m ddo_jax.data encode`, in this process."""
    try:
        command.main(["encode", *map(str, args)])
    except SystemExit as e:
        return e.code
    return 0


def test_latents_of_the_public_vae(golden, released, tmp_path, capsys):
    """Breaks if the VAE sees [-1, 1], mean and std change places, or the layout in the file is not [8, h, w]."""
    (tmp_path / "raw").mkdir()
    for i, pixels in enumerate(golden["in/image_u8"]):
        Image.fromarray(pixels.transpose(1, 2, 0)).save(tmp_path / "raw" / f"{i}.png")
    assert run(tmp_path / "raw", tmp_path / "a.zip", f"--vae={released}") == 0
    assert "a.zip: 2 latents (mean, std) of 4x4x8, 0 classes, CRC" in capsys.readouterr().out
    with zipfile.ZipFile(tmp_path / "a.zip") as z:
        members = [np.load(z.open(name)) for name in z.namelist() if name.endswith(".npy")]
        assert json.loads(z.read("dataset.json")) == {"labels": None}
    seen, wanted = np.stack(members), golden["edm2/raw_latents"]
    assert (seen.dtype, seen.shape) == (np.float32, wanted.shape)
    errors = [
        np.abs((seen - wanted)[:, half]).max() / np.abs(wanted[:, half]).max() for half in np.split(np.arange(8), 2)
    ]
    elementwise = np.abs(seen[:, 4:] / wanted[:, 4:] - 1).max()
    print(f"\nmean, std: {errors[0]:.1e}, {errors[1]:.1e} of the largest; std elementwise {elementwise:.1e}")
    assert max(*errors, elementwise) <= 1e-5  # specs/edm2.md section 19


def test_format_of_edm2(folder, tiny, tmp_path):
    """Breaks if a name, the compression, the order or dataset.json is not EDM2's."""
    assert run(folder, tmp_path / "a.zip", f"--vae={tiny}", "--channels=1", "--batch=2") == 0
    names = [f"00000/img-mean-std-{i:08d}.npy" for i in range(N)]
    with zipfile.ZipFile(tmp_path / "a.zip") as z:
        assert {i.compress_type for i in z.infolist()} == {zipfile.ZIP_STORED}
        assert z.namelist() == [*names, "dataset.json"]
        table = json.loads(z.read("dataset.json"))
        stored = np.stack([np.load(z.open(name)) for name in names])
    assert table["labels"] == [[n, i % CLASSES] for n, i in zip(names, ORDER, strict=True)]
    source = sources.open_source(str(tmp_path / "a.zip"), "train")
    assert (source.num_classes, source.image_shape, source.dtype) == (CLASSES, (4, 3, 4), np.float32)
    assert np.array_equal(source.read(np.arange(N))["image"], stored.transpose(0, 2, 3, 1))
    assert source.read(np.arange(N))["label"].tolist() == [i % CLASSES for i in ORDER]


def test_batch_changes_rounding_only(folder, tiny, tmp_path):
    """Breaks if padding reaches an image, or images of a batch change places."""
    found = []
    for batch in (2, 8):
        path = tmp_path / f"{batch}.zip"
        encode.encode(str(folder), str(path), vae=str(tiny), batch=batch, channels=1)
        found.append(sources.open_source(str(path), "train").read(np.arange(N))["image"])
    module, variables = encode.load_vae(str(tiny))
    images = PIXELS[ORDER].astype(np.float32) / np.float32(255)
    with jax.default_matmul_precision("highest"):
        wanted = np.concatenate(jax.jit(lambda x: module.apply(variables, x, method="encode"))(images), -1)
    assert len({x.tobytes() for x in wanted}) == N
    for latents in found:
        np.testing.assert_allclose(latents, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())


def test_the_shipped_vae_decodes_the_means(tmp_path):
    """Breaks if pixels, posterior and decoder do not speak of the same range: digits come back as they were."""
    levels = sources.open_source("digits", "test").read(np.arange(24))["image"]
    pixels = np.round(levels * (255 / 16)).astype(np.uint8)
    (tmp_path / "raw").mkdir()
    for i, image in enumerate(pixels):
        Image.fromarray(image[..., 0]).save(tmp_path / "raw" / f"{i:02d}.png")
    vae = ROOT / "configs" / "digits_vae.safetensors"
    assert run(tmp_path / "raw", tmp_path / "a.zip", f"--vae={vae}", "--channels=1") == 0
    mean = np.split(sources.open_source(str(tmp_path / "a.zip"), "train").read(np.arange(24))["image"], 2, -1)[0]
    module, variables = encode.load_vae(str(vae))
    decoded = jax.jit(lambda z: module.apply(variables, z, method="decode"))(mean)
    error = np.abs(np.asarray(decoded) * 16 - levels).mean()
    print(f"\nmean absolute error: {error:.2f} of 17 grey levels")
    assert error < 0.6  # measured 0.27; the mean training image: 4.2


def test_half_precision_weights(folder, tmp_path):
    """Breaks if float16 weights make the network compute in float16."""
    halves = {name: v.astype(np.float16) for name, v in tiny_state().items()}
    found = []
    for name, state in (("half", halves), ("single", {name: v.astype(np.float32) for name, v in halves.items()})):
        vae = write_vae(tmp_path / f"{name}.safetensors", TINY, state)
        path = encode.encode(str(folder), str(tmp_path / f"{name}.zip"), vae=str(vae), channels=1)
        found.append(sources.open_source(str(path), "train").read(np.arange(N))["image"])
    assert np.array_equal(*found)


def test_batches_have_one_size():
    """Breaks if the last batch is of another shape (a second compilation), or padding is given out."""
    shapes, rows = [], [(np.full((2, 2, 1), i, np.uint8), 10 + i) for i in range(7)]

    def encoder(images):
        shapes.append(images.shape)
        mean = images.astype(np.float32)
        return mean, mean + 1

    made = list(encode.encoded(iter(rows), encoder, 3))
    assert shapes == [(3, 2, 2, 1)] * 3 and [label for _, label in made] == list(range(10, 17))
    values = [np.frombuffer(data, np.float32, offset=len(data) - 32).tolist() for data, _ in made]
    assert values == [[float(i)] * 4 + [i + 1.0] * 4 for i in range(7)]


def test_an_image_without_a_posterior_is_named():
    """Breaks if NaN is written, or counted from the batch instead of the set."""
    rows = [(np.full((2, 2, 1), i, np.uint8), 0) for i in range(7)]

    def encoder(images):
        mean = np.where(images == 5, np.nan, images).astype(np.float32)
        return mean, np.ones_like(mean)

    with pytest.raises(UserError, match="image 5 encoded: holds NaN"):
        list(encode.encoded(rows, encoder, 3))


@pytest.mark.parametrize("precision, wanted", [("highest", "HIGHEST"), ("high", "HIGH"), ("default", None)])
def test_precision_is_in_the_program(tiny, precision, wanted):
    """Breaks if --precision does not reach every product."""
    module, variables = encode.load_vae(str(tiny))
    text = encode.make_program(module, precision).lower(variables, PIXELS).as_text()
    products = [line for line in text.splitlines() if "stablehlo.convolution" in line or "dot_general" in line]
    assert products
    for line in products:
        assert set(re.findall(r"HIGHEST|HIGH", line)) == ({wanted} if wanted else set()), line


def test_images_are_made_equal_first(folder, tiny, tmp_path):
    """Breaks if --resolution, --crop or --max_images do not reach the images, or equal input gives other bytes."""
    options = {"resolution": 4, "crop": "center", "channels": 1, "max_images": 3}
    path = encode.encode(str(folder), str(tmp_path / "a.zip"), vae=str(tiny), **options)
    make.make(str(folder), str(tmp_path / "images.zip"), **options)
    same = encode.encode(str(tmp_path / "images.zip"), str(tmp_path / "b.zip"), vae=str(tiny), channels=1)
    assert path.read_bytes() == same.read_bytes()
    source = sources.open_source(str(path), "train")
    assert (len(source), source.image_shape) == (3, (2, 2, 4))


@pytest.fixture
def other_network(tmp_path):
    """A file of weights that is no VAE."""
    path = tmp_path / "other.safetensors"
    path.write_bytes(safetensors.dumps({"a.weight": np.zeros((2, 2), np.float32)}))
    return path


@pytest.fixture
def nan_network(tmp_path):
    state = tiny_state()
    return write_vae(
        tmp_path / "nan.safetensors", TINY, state | {"quant_conv.bias": state["quant_conv.bias"] * np.float32(np.nan)}
    )


ERRORS = {
    "no vae": ([], "arguments are required: --vae; see python -m ddo_jax.data encode --help"),
    "vae": (["--vae=nowhere"], "nowhere: no such file and no known name"),
    "another network": (["--vae={other_network}"], "other.safetensors: holds an unknown network; allowed: an SD-VAE"),
    "damaged vae": (["--vae={folder}/class0/0.png"], "--vae: .*0.png: .*not a pickle, a torch file or safetensors"),
    "useless vae": (["--vae={nan_network}", "--channels=1"], "image 0 encoded: holds NaN or infinity"),
    "channels": (["--vae={tiny}"], "--vae=.*: takes 1 channels, not 3; set --channels"),
    "size": (
        ["--vae={tiny}", "--channels=1", "--resolution=5", "--crop=center"],
        "takes heights and widths divisible by 2, not 5x5; set --resolution and --crop",
    ),
    "batch": (["--vae={tiny}", "--batch=0"], "--batch=0; allowed: 1 or more"),
    "precision": (["--vae={tiny}", "--precision=tf32"], "--precision=tf32; allowed: highest, high, default"),
    "crop": (["--vae={tiny}", "--crop=center"], "--crop=center needs a size"),
    "split": (["--vae={tiny}", "--split=test"], "split 'test' of folder:raw"),
    "unknown": (["--vae={tiny}", "--batchsize=2"], "unrecognized arguments: --batchsize=2"),
}


@pytest.mark.parametrize("kind", ERRORS)
def test_errors_are_one_line_and_leave_nothing(folder, tmp_path, kind, tiny, other_network, nan_network, capsys):
    """Breaks if a mistake ends in a traceback, another exit code, or half a set."""
    options, message = ERRORS[kind]
    files = {"folder": folder, "tiny": tiny, "other_network": other_network, "nan_network": nan_network}
    before = sorted(tmp_path.rglob("*"))
    assert run(folder, tmp_path / "set.zip", *(option.format(**files) for option in options)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(f"error: .*{message}", line), line
    assert sorted(tmp_path.rglob("*")) == before


def test_destination_and_source_are_checked(folder, tiny, tmp_path, capsys):
    """Breaks if something is overwritten, a TFDS set of latents is promised, or latents are encoded again."""
    flags = (f"--vae={tiny}", "--channels=1")
    assert run(folder, tmp_path / "root" / "latents" / "1.0.0", *flags) == 2
    assert "latents are written as a zip; end DST in .zip" in capsys.readouterr().err
    (tmp_path / "mine.zip").write_text("mine")
    assert run(folder, tmp_path / "mine.zip", *flags) == 2
    assert "mine.zip exists; nothing is overwritten" in capsys.readouterr().err
    assert run(folder, tmp_path / "a.zip", *flags, "--max_images=1") == 0
    assert run(tmp_path / "a.zip", tmp_path / "b.zip", *flags) == 2
    assert "a.zip: latents (00000/img-mean-std-00000000.npy), which are not images" in capsys.readouterr().err
    assert run("digits", tmp_path / "b.zip", *flags) == 2
    assert "error: SRC: 'digits'" in capsys.readouterr().err


def test_damaged_image_is_named_and_leaves_nothing(folder, tiny, tmp_path, capsys):
    """Breaks if the zip appears without the images after a torn one."""
    path = folder / "class2" / "2.png"  # the last one: the others are written before it is read
    path.write_bytes(path.read_bytes()[:60])
    assert run(folder, tmp_path / "a.zip", f"--vae={tiny}", "--channels=1", "--batch=2") == 2
    assert "class2/2.png: damaged image" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["raw"]


def test_help_and_the_light_command(folder, tmp_path):
    """Breaks if a help text has a bad format, does not lead to the other command, or making images loads Flax."""
    code = (
        "import sys; from ddo_jax.data import __main__ as c; c.main([sys.argv[1], sys.argv[2], '--channels=1']); "
        "print('flax' in sys.modules)"
    )
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    made = [sys.executable, "-c", code, str(folder), str(tmp_path / "a.zip")]
    done = subprocess.run(made, env=env, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"
    for parser, wanted in ((command.parser(), "encode --help"), (command.encode_parser(), "--vae WHAT")):
        assert wanted in parser.format_help()


@pytest.mark.slow
def test_several_devices(folder, tiny, tmp_path):
    """Breaks if a batch is not spread over the devices, or its rows come back in another order."""
    base = [sys.executable, "-m", "ddo_jax.data", "encode", str(folder)]
    found = []
    for devices in (1, 2):
        env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
        path = tmp_path / f"{devices}.zip"
        flags = [f"--vae={tiny}", "--channels=1", "--batch=3"]
        subprocess.run([*base, str(path), *flags], cwd=ROOT, env=env, check=True, capture_output=True)
        found.append(sources.open_source(str(path), "train").read(np.arange(N))["image"])
    np.testing.assert_allclose(found[1], found[0], rtol=1e-5, atol=1e-5 * np.abs(found[0]).max())
