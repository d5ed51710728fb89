"""VAR's rule for images of any size: its geometry by the spec, and the same random crops on any number of hosts."""

import io
import itertools
import json
import zipfile

import numpy as np
import pytest
from PIL import Image, ImageOps

from ddo_jax.data import crops, images, sources
from ddo_jax.data.pipeline import BatchSource, batches
from ddo_jax.errors import UserError

SIZE, SHORT = 16, 18  # 1.125 * 16
WIDE, HIGH = 23, 18  # of the images that need no resizing: 2 rows and 7 columns to spare


def picture(seed, width, height, mode="RGB"):
    """Something smooth with some noise on it."""
    rng = np.random.default_rng(seed)
    x, y = np.meshgrid(np.linspace(0, 3, width), np.linspace(0, 3, height))
    levels = np.stack([np.sin(a * x + b * y) for a, b in rng.uniform(-1, 1, (3, 2))], -1) * 110 + 127
    return Image.fromarray(np.uint8(levels + rng.uniform(-15, 15, levels.shape))).convert(mode)


def coordinates():
    """A pixel's first two channels are its place (x, y)."""
    x, y = np.meshgrid(np.arange(WIDE), np.arange(HIGH))
    return Image.fromarray(np.stack([x, y, 0 * x], -1).astype(np.uint8))


def by_spec(image, size, mirrored=False, offset=None):
    """specs/var.md section 10, written down once more: RGB decode, flip, resize, crop at (top, left) or centrally."""
    if image.has_transparency_data:  # ours: the spec knows none
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    image = ImageOps.mirror(image) if mirrored else image
    short = round(1.125 * size)
    w, h = image.size
    w, h = (short, int(short * h / w)) if w <= h else (int(short * w / h), short)
    pixels = np.asarray(image.resize((w, h), Image.Resampling.LANCZOS))
    top, left = offset or (round((h - size) / 2), round((w - size) / 2))
    return pixels[top : top + size, left : left + size]


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def palette(seed, width, height):
    """A PNG with a palette, some entries of which are transparent."""
    return encoded(picture(seed, width, height).quantize(16), transparency=bytes(range(16)))


FILES = {  # as ImageNet has them: the end of a name says little
    "n01/a.JPEG": encoded(picture(0, 40, 24), "JPEG"),
    "n01/b.JPEG": encoded(picture(1, 24, 41, "L"), "JPEG"),
    "n01/c.JPEG": encoded(picture(2, 33, 33, "CMYK"), "JPEG"),
    "n02/d.JPEG": encoded(picture(3, 27, 20)),
    "n02/e.JPEG": palette(4, 20, 50),
    "n02/f.JPEG": encoded(picture(5, 5, 7, "RGBA")),
    "n02/g.JPEG": encoded(picture(6, 16, 16, "1")),
}
N = len(FILES)
LABELS = [int(name[2]) - 1 for name in FILES]
CENTRAL = np.stack([by_spec(Image.open(io.BytesIO(data)), SIZE) for data in FILES.values()])


def write_folder(path, files=FILES):
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return f"folder:{path}"


def write_zip(path, files=FILES):
    with zipfile.ZipFile(path, "w") as z:
        for name, data in files.items():
            z.writestr(name, data)
        z.writestr("dataset.json", json.dumps({"labels": [[name, int(name[2]) - 1] for name in files]}))
    return f"zip:{path}"


def write_tfds(root):
    """With the features of imagenet2012, by a builder as TFDS has it for that set."""
    import tensorflow_datasets as tfds

    class ImagenetLike(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("5.1.0")

        def _info(self):
            features = {
                "image": tfds.features.Image(encoding_format="jpeg"),
                "label": tfds.features.ClassLabel(names=["n01", "n02"]),
                "file_name": tfds.features.Text(),
            }
            return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features), disable_shuffling=True)

        def _split_generators(self, dl_manager):
            rows = [
                (name, {"image": data, "label": name[:3], "file_name": name.rsplit("/", 1)[1]})
                for name, data in FILES.items()
            ]
            return {"train": rows, "validation": rows[:3]}

        def _generate_examples(self):
            raise AssertionError("the rows are given")

    tfds.disable_progress_bar()
    ImagenetLike(data_dir=root, file_format="array_record").download_and_prepare()
    return "tfds:imagenet_like"


def opened(name, directory=None, size=SIZE, split="train"):
    return sources.open_source(name, split, directory, crop="var", resolution=size)


@pytest.fixture
def source(tmp_path):
    return opened(write_folder(tmp_path / "set"))


@pytest.fixture
def places(tmp_path):
    """Seven times the image whose pixels are their places."""
    return opened(write_folder(tmp_path / "places", {f"n01/{i}.png": encoded(coordinates()) for i in range(7)}))


# -- geometry ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "width, height", [(40, 24), (24, 40), (33, 33), (17, 12), (12, 17), (5, 7), (1, 1), (16, 16), (18, 31), (70, 65)]
)
@pytest.mark.parametrize("size", [SIZE, 13])
def test_geometry_is_that_of_the_spec(width, height, size):
    """Breaks if an orientation, the rounding of a side, the filter, or the enlarging of small images differs."""
    image = picture(width, width, height)
    np.testing.assert_array_equal(crops.crop_var(image, size), by_spec(image, size))
    for flip, y, x in ((1.0, 0.0, 0.0), (0.1, 0.5, 0.25), (0.9, 1 - 2**-53, 1 - 2**-53)):
        short = round(1.125 * size)
        spare = [int(short * side / min(width, height)) - size for side in (height, width)]
        offset = tuple(int(u * (s + 1)) for u, s in zip((y, x), spare, strict=True))
        assert flip != 0.9 or offset == tuple(spare)  # the last place is reached, and not passed
        wanted = by_spec(image, size, flip < 0.5, offset)
        np.testing.assert_array_equal(crops.crop_var(image, size, np.array([flip, y, x])), wanted)


def test_central_offsets():
    """Breaks if halves are not rounded to even: 7 columns to spare are 4 at the left, 5 are 2."""
    for width, left in ((23, 4), (21, 2), (20, 2), (18, 1)):
        image = coordinates().crop((0, 0, width, HIGH))
        assert np.asarray(crops.crop_var(image, SIZE))[0, 0].tolist() == [left, 1, 0]


def test_imagenet_at_256():
    """Breaks if 500 x 375 pixels do not become 384 x 288, of which the central ones start at (64, 16)."""
    image = picture(0, 500, 375)
    wanted = image.resize((384, 288), Image.Resampling.LANCZOS).crop((64, 16, 320, 272))
    np.testing.assert_array_equal(crops.crop_var(image, 256), wanted)


def test_mirrored_before_it_is_cropped():
    """Breaks if the flip comes last: the crop's place is that in the mirrored image."""
    pixels = np.asarray(crops.crop_var(coordinates(), SIZE, np.array([0.0, 0.0, 0.0])))
    assert pixels[0, 0].tolist() == [WIDE - 1, 0, 0] and pixels[0, 1].tolist() == [WIDE - 2, 0, 0]


# -- sources ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["folder", "zip", "tfds"])
def test_any_size_and_mode(tmp_path, kind):
    """Breaks if grey, CMYK, palette, alpha or 1-bit images are refused or read otherwise, in any of the formats."""
    write = {"folder": write_folder, "zip": write_zip, "tfds": write_tfds}[kind]
    s = opened(write(tmp_path / "set"), str(tmp_path / "set"))
    assert (len(s), s.num_classes, s.image_shape, s.dtype, s.max_level) == (N, 2, (SIZE, SIZE, 3), np.uint8, 255)
    assert s.random_crop and s.name.split(":")[0] == kind and s.name.endswith(":train, var 16")
    record = s.read(np.arange(N))
    assert record["image"].dtype == np.uint8 and record["label"].dtype == np.int32
    np.testing.assert_array_equal(record["image"], CENTRAL)
    assert record["label"].tolist() == LABELS
    few = s.read(np.array([6, 0, 6]))
    np.testing.assert_array_equal(few["image"], CENTRAL[[6, 0, 6]])
    if kind == "tfds":
        assert len(opened("tfds:imagenet_like", str(tmp_path / "set"), split="validation")) == 3


def test_draws_belong_to_their_rows(source):
    """Breaks if the draws of one image go to another: pieces are read by several threads."""
    indices = np.arange(40) % N
    draws = np.random.default_rng(0).random((40, 3))
    found = source.read(indices, draws)["image"]
    for row, (i, draw) in enumerate(zip(indices, draws, strict=True)):
        image = images.convert(list(FILES.values())[i], "x", "RGB", lambda *_: None)
        np.testing.assert_array_equal(found[row], crops.crop_var(image, SIZE, draw))


def test_fingerprint_is_of_images_and_rule(tmp_path):
    """Breaks if a reference's statistics are found for another resolution, or not for the same set elsewhere."""
    one, two = (write_zip(tmp_path / f"{i}.zip") for i in range(2))
    prints = [opened(one).fingerprint, opened(one, size=8).fingerprint]
    prints.append(sources.open_records(one, "train").fingerprint)
    assert len(set(prints)) == 3 and opened(two).fingerprint == prints[0]
    assert all(len(p) == 8 for p in prints)


def test_transparent_images_are_told_of_and_the_rest_refused_by_name():
    """Breaks if transparent pixels keep a colour that nobody saw, or what Pillow cannot convert ends in a traceback."""
    told = []
    image = images.convert(palette(0, 9, 9), "x", "RGB", lambda *args: told.append(args))
    alpha = np.asarray(Image.open(io.BytesIO(palette(0, 9, 9))).convert("RGBA"))[..., 3:] / 255
    wanted = 255 - alpha * (255 - np.asarray(picture(0, 9, 9).quantize(16).convert("RGB")))
    np.testing.assert_allclose(image, wanted, atol=1)
    assert told == [("x", "9x9 4-bit P PNG")]
    with pytest.raises(UserError, match="x: 9x9 4-bit P PNG is transparent; allowed: opaque images"):
        images.convert(palette(0, 9, 9), "x", "RGB")
    lab = encoded(Image.new("LAB", (4, 4)), "TIFF")
    with pytest.raises(UserError, match="there: 4x4 LAB TIFF: conversion .*; save it as RGB"):
        images.convert(lab, "there", "L")


# -- the pipeline -----------------------------------------------------------------------------------------


def equal(a, b):
    return set(a) == set(b) and all(np.array_equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("flip", [False, True])
def test_two_hosts_make_the_batch_of_one(source, flip):
    """Breaks if a crop depends on the number of hosts, on what was read before, or not on the seed."""
    whole = BatchSource(source, 6, 3, flip=flip)
    parts = [BatchSource(source, 6, 3, flip=flip, host=(h, 2)) for h in range(2)]
    for k in (4, 0, 9):
        joined = {key: np.concatenate([p[k][key] for p in parts]) for key in ("image", "label")}
        assert equal(joined, whole[k])
    assert not equal(whole[0], BatchSource(source, 6, 4, flip=flip)[0])


def test_resume_continues_the_stream(source):
    """Breaks if crops depend on the position since the start of the job."""
    stream = list(itertools.islice(batches(source, 4, 0, flip=True), 6))
    resumed = list(itertools.islice(batches(source, 4, 0, flip=True, start=4), 2))
    assert all(map(equal, stream[4:], resumed))


@pytest.mark.parametrize("flip", [False, True])
def test_offsets_cover_their_range(places, flip):
    """Breaks if a place is never or too seldom cropped, offsets hang together, or images are mirrored unasked."""
    stream = BatchSource(places, 140, 0, flip=flip)
    pixels = np.concatenate([stream[k]["image"] for k in range(20)]).astype(int)
    mirrored = pixels[:, 0, 0, 0] > pixels[:, 0, 1, 0]
    left = np.where(mirrored, WIDE - 1 - pixels[:, 0, 0, 0], pixels[:, 0, 0, 0])
    counts = np.zeros((2, HIGH - SIZE + 1, WIDE - SIZE + 1), int)
    np.add.at(counts, (mirrored.astype(int), pixels[:, 0, 0, 1], left), 1)
    counts = counts if flip else counts[:1]
    expected = 2800 / counts.size
    assert counts.sum() == 2800 and (abs(counts - expected) < 4.5 * expected**0.5).all()


def test_every_epoch_crops_anew(places):
    """Breaks if crops are drawn by position in the epoch, or kept."""
    stream = BatchSource(places, 7, 0)
    assert not any(np.array_equal(stream[0]["image"], stream[k]["image"]) for k in range(1, 5))


def test_no_index_of_what_does_not_return(source):
    """Breaks if a randomly cropped example could be taken for one whose ratio is known."""
    assert "index" not in BatchSource(source, 4, 0, with_index=True)[0]


# -- errors -----------------------------------------------------------------------------------------------


def test_bad_requests_are_refused(tmp_path):
    """Breaks if one of these is ignored, or says less than what is allowed."""
    folder = write_folder(tmp_path / "set")
    with pytest.raises(UserError, match=r"^config.data.crop: 'centre'; allowed: '', 'center', 'var'$"):
        sources.open_source(folder, "train", crop="centre", resolution=8)
    with pytest.raises(UserError, match=r"^config.data.crop: 'var'; allowed with data set 'digits': ''$"):
        opened("digits")
    with pytest.raises(UserError, match=r"^config.model.img_resolution: 0; allowed with data.crop = 'var': 1 or more"):
        opened(folder, size=0)
    buffer = io.BytesIO()
    np.save(buffer, np.ones((8, 4, 4), np.float32))
    latents = write_zip(tmp_path / "latents.zip", {"n01/img-mean-std-00000000.npy": buffer.getvalue()})
    with pytest.raises(UserError, match=r"^config.data.crop: 'var'; allowed with latents, as zip:latents.zip:train"):
        opened(latents)


def test_fixed_sizes_refuse_draws(tmp_path):
    """Breaks if draws are ignored silently, or a set of a fixed size is taken for one of random crops."""
    files = {f"n01/{i}.png": encoded(coordinates()) for i in range(2)}
    fixed = sources.open_source(write_folder(tmp_path / "set", files), "train")
    array = sources.ArraySource("x", np.zeros((2, 4, 4, 1), np.uint8), np.zeros(2, np.int32), 0)
    for s in (fixed, array):
        assert not s.random_crop and len(s.read(np.arange(2), None)["image"]) == 2
        with pytest.raises(ValueError, match="read without draws"):
            s.read(np.arange(2), np.zeros((2, 3)))


@pytest.mark.parametrize(
    "data, message",
    [
        (FILES["n01/a.JPEG"][:300], "damaged image"),
        (b"<html>404</html>", "not an image"),
        (encoded(Image.fromarray(np.full((8, 8), 40000, np.uint16))), "8x8 16-bit"),
    ],
    ids=["torn", "text", "16 bits"],
)
def test_bad_images_are_named(tmp_path, data, message):
    """Breaks if a bad image is skipped, also by the threads of the pipeline, or the first one is found too late."""
    s = opened(write_folder(tmp_path / "a", FILES | {"n02/d.JPEG": data}))
    with pytest.raises(UserError, match=f"n02/d.JPEG: .*{message}"):
        next(batches(s, N, seed=0))
    with pytest.raises(UserError, match=f"n01/a.JPEG: .*{message}"):
        opened(write_folder(tmp_path / "b", FILES | {"n01/a.JPEG": data}))
