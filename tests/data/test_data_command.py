"""`python -m ddo_jax.data`: what it writes is what the sources read, in EDM's format and as a TFDS set."""

import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddo_jax.data import __main__ as command
from ddo_jax.data import make, sources
from ddo_jax.errors import UserError

FOLDERS = ("cat", "ant")
SIZES = ((40, 24), (24, 40), (33, 33), (16, 16), (70, 65))  # width, height


def picture(seed, size, mode="RGB"):
    """Something smooth, so that resampling is comparable."""
    rng = np.random.default_rng(seed)
    x, y = np.meshgrid(np.linspace(0, 3, size[0]), np.linspace(0, 3, size[1]))
    channels = [np.sin(a * x + b * y) for a, b in rng.uniform(-1, 1, (3, 2))]
    return Image.fromarray(np.uint8(127.5 + 127 * np.stack(channels, -1))).convert(mode)


@pytest.fixture
def folder(tmp_path):
    """Ten images of different sizes and modes in two class folders."""
    for i in range(10):
        path = tmp_path / "raw" / FOLDERS[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(i, SIZES[i % 5], "RGBA" if i == 3 else "L" if i == 4 else "RGB").save(path)
    return tmp_path / "raw"


def run(*args):
    """The exit code of the command, in this process."""
    try:
        command.main([str(a) for a in args])
    except SystemExit as e:
        return e.code
    return 0


def test_folder_to_zip_in_the_format_of_edm(folder, tmp_path, capsys):
    """Breaks if a name, the compression, the order or dataset.json is not what EDM's reader expects."""
    assert run(folder, tmp_path / "set.zip", "--resolution=16", "--crop=center") == 0
    assert "set.zip: 10 images of 16x16x3, 2 classes, CRC" in capsys.readouterr().out
    with zipfile.ZipFile(tmp_path / "set.zip") as z:
        assert {i.compress_type for i in z.infolist()} == {zipfile.ZIP_STORED}
        assert z.namelist() == [f"00000/img{i:08d}.png" for i in range(10)] + ["dataset.json"]
        table = json.loads(z.read("dataset.json"))
        with Image.open(z.open("00000/img00000000.png")) as first:
            assert (first.size, first.mode) == ((16, 16), "RGB")
    labels = [[f"00000/img{i:08d}.png", i // 5] for i in range(10)]
    assert table == {"labels": labels, "classes": ["ant", "cat"]}  # the names stay with the numbers
    source = sources.open_source(str(tmp_path / "set.zip"), "train")
    order = [1, 3, 5, 7, 9, 0, 2, 4, 6, 8]  # sorted by name
    wanted = [make.crop_center(Image.open(folder / FOLDERS[i % 2] / f"{i}.png").convert("RGB"), 16) for i in order]
    assert np.array_equal(source.read(np.arange(10))["image"], np.stack([np.asarray(w) for w in wanted]))


def test_equal_input_gives_equal_bytes(folder, tmp_path):
    """Breaks if the time or the order of threads gets into the file."""
    for name in ("a.zip", "b.zip"):
        assert run(folder, tmp_path / name, "--resolution=8", "--crop=center-dhariwal") == 0
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()


def test_zip_to_tfds_and_back(folder, tmp_path):
    """Breaks if one of the formats loses pixels, order, labels or the number of classes."""
    root = tmp_path / "root"
    assert run(folder, tmp_path / "a.zip", "--resolution=8", "--crop=center") == 0
    assert run(f"zip:{tmp_path}/a.zip", root / "animals" / "2.0.0") == 0
    assert run("tfds:animals", tmp_path / "b.zip", f"--data_dir={root}") == 0
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()
    assert sorted(p.name for p in root.iterdir()) == ["animals"]  # nothing temporary
    assert sources.open_source("tfds:animals", "train", str(root)).name == "tfds:animals/2.0.0:train"


def test_version_is_added_and_no_labels_stay_none(tmp_path, capsys):
    """Breaks if an unlabelled set gets classes, or ROOT/NAME needs a version."""
    (tmp_path / "raw").mkdir()
    for i in range(3):
        picture(i, (8, 8), "L").save(tmp_path / "raw" / f"{i}.png")
    assert run(tmp_path / "raw", tmp_path / "root" / "flat", "--channels=1", "--max_images=2") == 0
    assert "flat/1.0.0: 2 images of 8x8x1, 0 classes" in capsys.readouterr().out
    assert run(tmp_path / "root" / "flat", tmp_path / "flat.zip", "--channels=1") == 0
    with zipfile.ZipFile(tmp_path / "flat.zip") as z:
        assert json.loads(z.read("dataset.json")) == {"labels": None}


def test_adm_crop():
    """Breaks if ADM's rule changes: halving by box means while shorter >= 2 size, bicubic, central square."""
    image = picture(0, (70, 60))
    halved = image.resize((35, 30), Image.Resampling.BOX).resize((17, 15), Image.Resampling.BOX)
    wanted = halved.resize((9, 8), Image.Resampling.BICUBIC).crop((0, 0, 8, 8))
    np.testing.assert_array_equal(make.crop_center_dhariwal(image, 8), wanted)
    exact = picture(0, (32, 16))  # 16 >= 2 * 8: halved once more, nothing left for bicubic
    wanted = exact.resize((16, 8), Image.Resampling.BOX).crop((4, 0, 12, 8))
    np.testing.assert_array_equal(make.crop_center_dhariwal(exact, 8), wanted)
    wide = picture(1, (45, 15))  # 15 < 2 * 8: bicubic only, to (24, 8), then 8 pixels cut off at the left
    wanted = wide.resize((24, 8), Image.Resampling.BICUBIC).crop((8, 0, 16, 8))
    np.testing.assert_array_equal(make.crop_center_dhariwal(wide, 8), wanted)
    assert make.crop_center_dhariwal(picture(2, (5, 7)), 8).size == (8, 8)  # enlarges


def test_center_crop():
    """Breaks if EDM's rule changes: central square first, offsets rounded down, then Lanczos."""
    image = picture(0, (21, 16))
    wanted = image.crop((2, 0, 18, 16)).resize((8, 8), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(make.crop_center(image, 8), wanted)


def test_var_crop_is_what_evaluation_sees(folder, tmp_path):
    """Breaks if the set made once differs from the images cropped as they are read, also where one has the size."""
    for i, size in enumerate((16, 9)):
        assert run(folder, tmp_path / f"{i}.zip", f"--resolution={size}", "--crop=var") == 0
        made = sources.open_source(str(tmp_path / f"{i}.zip"), "train").read(np.arange(10))
        cropped = sources.open_source(str(folder), "train", crop="var", resolution=size).read(np.arange(10))
        assert all(np.array_equal(made[key], cropped[key]) for key in ("image", "label"))


ERRORS = {
    "not square": (["--resolution=8"], "raw/ant/1.png: 24x40 is not square; set --crop=center"),
    "unequal": ([], "raw/ant/3.png: .*set --resolution and --crop"),
    "crop": (["--crop=middle"], "--crop=middle; allowed: center, center-dhariwal, none, var$"),
    "crop without size": (["--crop=center"], "--crop=center needs a size"),
    "size": (["--resolution=0"], "--resolution=0; allowed: 1 or more"),
    "number": (["--resolution=x"], "invalid int value: 'x'"),
    "none": (["--max_images=0"], "--max_images=0; allowed: 1 or more"),
    "channels": (["--channels=4"], "--channels=4; allowed: 3"),
    "unknown": (["--resolutoin=8"], "unrecognized arguments: --resolutoin=8"),
    "split": (["--split=test"], "split 'test' of folder:raw"),
}


@pytest.mark.parametrize("kind", ERRORS)
def test_errors_are_one_line_and_leave_nothing(folder, tmp_path, kind, capsys):
    """Breaks if a mistake ends in a traceback, another exit code, or half a set."""
    options, message = ERRORS[kind]
    before = sorted(tmp_path.rglob("*"))
    for dst in ("set.zip", "root/set/1.0.0"):
        assert run(folder, tmp_path / dst, *options) == 2
        (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
        assert re.search(message, line), line
    assert [p for p in sorted(tmp_path.rglob("*")) if p.name != "root"] == before


def test_damaged_image_is_named_and_leaves_nothing(folder, tmp_path):
    """Breaks if a torn image is skipped, or the set appears without it."""
    path = folder / "cat" / "8.png"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UserError, match="cat/8.png: damaged image"):
        make.make(str(folder), str(tmp_path / "a.zip"), resolution=8, crop="center")
    assert [p.name for p in tmp_path.iterdir() if p != folder] == []


def test_sixteen_bits_are_refused(folder, tmp_path):
    """Breaks if 16-bit grey is clipped to white."""
    Image.fromarray(np.full((8, 8), 40000, np.uint16)).save(folder / "ant" / "0.png")
    with pytest.raises(UserError, match="ant/0.png: 8x8 16-bit"):
        make.make(str(folder), str(tmp_path / "a.zip"), resolution=8, crop="center")


def test_nothing_is_overwritten(folder, tmp_path):
    """Breaks if an existing set is touched."""
    (tmp_path / "a.zip").write_text("mine")
    (tmp_path / "root" / "a" / "1.0.0").mkdir(parents=True)
    for dst in ("a.zip", "root/a"):
        with pytest.raises(UserError, match="exists; nothing is overwritten"):
            make.make(str(folder), str(tmp_path / dst), resolution=8, crop="center")
    assert (tmp_path / "a.zip").read_text() == "mine"
    with pytest.raises(UserError, match="name of letters.*seen: 'a-b'"):
        make.make(str(folder), str(tmp_path / "a-b" / "1.0.0"))


def test_the_command_itself(folder, tmp_path):
    """Breaks if `python -m ddo_jax.data` does not start, or prints more than a line on an error."""
    base = [sys.executable, "-m", "ddo_jax.data", str(folder), str(tmp_path / "a.zip")]
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    root = Path(__file__).parents[2]
    bad = subprocess.run([*base, "--crop=center"], cwd=root, env=env, capture_output=True, text=True)
    assert bad.returncode == 2 and bad.stderr.startswith("error: --crop=center") and bad.stderr.count("\n") == 1
    good = subprocess.run([*base, "--resolution=8", "--crop=center"], cwd=root, env=env, capture_output=True, text=True)
    assert good.returncode == 0 and good.stdout.count("\n") == 1
    assert good.stderr.startswith("warning: ") and "3.png: " in good.stderr and good.stderr.count("\n") == 1  # RGBA
    refused = subprocess.run([*base[:-1], "b.zip", "--alpha=refuse"], cwd=root, env=env, capture_output=True, text=True)
    assert refused.returncode == 2 and "3.png: " in refused.stderr and "is transparent" in refused.stderr
