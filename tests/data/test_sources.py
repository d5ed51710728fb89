"""Zips, folders and TFDS sets as sources: order and labels as the format says; what is wrong is named."""

import io
import itertools
import json
import struct
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddo_jax.data import catalogue, images, sources, tree
from ddo_jax.data.pipeline import batches
from ddo_jax.errors import UserError

N, CLASSES = 12, 5
PIXELS = np.random.default_rng(0).integers(0, 256, (N, 8, 8, 3), np.uint8)
LABELS = np.array([(3 * i + 1) % CLASSES for i in range(N)], np.int32)
NAMES = [f"00000/img{i:08d}.png" for i in range(N)]
ALL = np.arange(N)


def encoded(pixels, kind="PNG", **options):
    buffer = io.BytesIO()
    (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(buffer, kind, **options)
    return buffer.getvalue()


PNGS = {name: encoded(x) for name, x in zip(NAMES, PIXELS, strict=True)}
TABLE = [[name, int(y)] for name, y in zip(NAMES, LABELS, strict=True)]


def write_zip(path, files, labels="absent"):
    with zipfile.ZipFile(path, "w") as z:
        for name, data in files.items():
            z.writestr(name, data)
        if labels != "absent":
            z.writestr("dataset.json", json.dumps({"labels": labels}))
    return f"zip:{path}"


def write_folder(path, files, labels="absent"):
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    if labels != "absent":
        (path / "dataset.json").write_text(json.dumps({"labels": labels}))
    return f"folder:{path}"


def write_tfds(root, name="toy", files=PNGS, num_classes=CLASSES):
    directory = root / name / "1.0.0"
    catalogue.write(directory, zip(files.values(), LABELS, strict=True), len(files), (8, 8, 3), num_classes)
    return directory


@pytest.fixture
def opened(tmp_path):
    """The same set in the three formats."""
    write_tfds(tmp_path)
    named = {
        "zip": write_zip(tmp_path / "set.zip", PNGS, TABLE),
        "folder": write_folder(tmp_path / "set", PNGS, TABLE),
        "tfds": "tfds:toy",
    }
    return {kind: sources.open_source(name, "train", str(tmp_path)) for kind, name in named.items()}


@pytest.mark.parametrize("kind", ["zip", "folder", "tfds"])
@pytest.mark.parametrize("cached", [True, False])
def test_read_gives_what_was_written(opened, kind, cached, monkeypatch):
    """Breaks if pixels, order or labels change, in the cache or without it."""
    monkeypatch.setattr(sources, "CACHE_BYTES", 2**30 if cached else 0)
    s = opened[kind]
    assert (len(s), s.num_classes, s.image_shape, s.name.split(":")[0]) == (N, CLASSES, (8, 8, 3), kind)
    assert s.dtype == np.uint8
    indices = np.array([7, 0, 7, 11])
    for _ in range(2):
        record = s.read(indices)
        assert record["image"].dtype == np.uint8 and record["label"].dtype == np.int32
        assert np.array_equal(record["image"], PIXELS[indices]) and np.array_equal(record["label"], LABELS[indices])
        record["image"][:] = 0  # the caller's copy
    assert s.max_level == (PIXELS.max() if cached else 255)
    assert len(s.fingerprint) == 8


def test_cache_decodes_once(opened, monkeypatch):
    """Breaks if a small set is decoded again at every read."""
    calls = []
    open_image = images.open_image
    monkeypatch.setattr(images, "open_image", lambda *args: calls.append(args) or open_image(*args))
    for _ in range(3):
        opened["zip"].read(ALL)
    assert len(calls) == N


def test_feeds_the_pipeline(opened):
    """Breaks if the host pipeline cannot read a source."""
    epoch = list(itertools.islice(batches(opened["zip"], 4, seed=0), N // 4))
    found = np.concatenate([b["image"] for b in epoch])
    assert sorted(x.tobytes() for x in found) == sorted(x.tobytes() for x in PIXELS)


def test_sorted_by_name_whatever_the_order_of_writing(tmp_path):
    """Breaks if the order of the zip's directory counts, or labels are taken by position."""
    shuffled = dict(sorted(PNGS.items(), key=lambda item: zlib.crc32(item[0].encode())))
    assert list(shuffled) != NAMES
    s = sources.open_source(write_zip(tmp_path / "a.zip", shuffled, TABLE[::-1]), "train")
    record = s.read(ALL)
    assert np.array_equal(record["image"], PIXELS) and np.array_equal(record["label"], LABELS)


@pytest.mark.parametrize("writer", [write_zip, write_folder])
@pytest.mark.parametrize("labels", [None, "absent"])
def test_no_labels(tmp_path, writer, labels):
    """Breaks if null or no dataset.json is not unconditional; 00000/ is no class even in a folder."""
    s = sources.open_source(writer(tmp_path / "a", PNGS, labels), "train")
    assert s.num_classes == 0 and not s.read(ALL)["label"].any()


def test_class_folders(tmp_path):
    """Breaks if classes are not the subfolders in sorted order."""
    folders = ["zebra", "ant", "bee", "cow", "dog"]
    files = {f"{folders[y]}/{i:02d}.PNG": png for i, (y, png) in enumerate(zip(LABELS, PNGS.values(), strict=True))}
    s = sources.open_source(write_folder(tmp_path / "a", files), "train")
    record = s.read(ALL)
    order = sorted(range(N), key=lambda i: (folders[LABELS[i]], i))
    assert s.num_classes == CLASSES and np.array_equal(record["image"], PIXELS[order])
    assert record["label"].tolist() == [sorted(folders).index(folders[LABELS[i]]) for i in order]


def test_flat_folder_is_unconditional(tmp_path):
    """Breaks if a folder without subfolders gets classes."""
    files = {f"{i:02d}.png": png for i, png in enumerate(PNGS.values())}
    s = sources.open_source(write_folder(tmp_path / "a", files | {"notes.txt": b""}), "train")
    assert (len(s), s.num_classes) == (N, 0)


def test_mixed_folder_is_refused(tmp_path):
    """Breaks if images beside class folders are lost or become a class."""
    name = write_folder(tmp_path / "a", {"x.png": PNGS[NAMES[0]], "dog/y.png": PNGS[NAMES[1]]})
    with pytest.raises(UserError, match="x.png lies beside subfolders, dog/y.png"):
        sources.open_source(name, "train")


@pytest.mark.parametrize(
    "labels, message",
    [
        (TABLE[:-1], "no label for 00000/img00000011.png"),
        ([*TABLE, ["00000/img00000099.png", 1]], "a label, but no image, 00000/img00000099.png"),
        ([[n, [0.5, 1.0]] for n in NAMES], "vectors are not supported: label .0.5, 1.0. of 00000/img00000000.png"),
        ([[n, 1.0] for n in NAMES], "label 1.0 of 00000/img00000000.png"),
        ([[n, -1] for n in NAMES], "label -1 of"),
        ([[n, True] for n in NAMES], "label True of"),
        ([["name"]], "dataset.json: .*it must hold"),
        (7, "dataset.json: .*it must hold"),
    ],
    ids=["missing", "extra", "vectors", "float", "negative", "bool", "no pair", "no list"],
)
def test_bad_labels_are_named(tmp_path, labels, message):
    """Breaks if an image without label is taken for class 0, or a bad table ends in a traceback."""
    with pytest.raises(UserError, match=message):
        sources.open_source(write_zip(tmp_path / "a.zip", PNGS, labels), "train")


def test_dataset_json_that_is_no_json(tmp_path):
    """Breaks if it ends in a traceback."""
    with pytest.raises(UserError, match="dataset.json.*it must hold"):
        sources.open_source(write_zip(tmp_path / "a.zip", PNGS | {"dataset.json": b"{"}), "train")


def png16(channels):
    """A 16-bit PNG, which Pillow cannot write in RGB."""
    row = b"\0" + b"\x12\x34" * 8 * channels
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 16, 2 if channels == 3 else 0, 0, 0, 0))]
    chunks += [(b"IDAT", zlib.compress(row * 8)), (b"IEND", b"")]
    body = b"".join(struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + body


def damaged(png):
    data = bytearray(png)
    data[len(data) // 2] ^= 4
    return bytes(data)


BAD = {
    "flipped bit": (damaged(PNGS[NAMES[3]]), "damaged image"),
    "torn": (PNGS[NAMES[3]][:100], "damaged image"),
    "empty": (b"", r"damaged image \(not an image; 0 bytes"),
    "text": (b"<html>404</html>", "not an image"),
    "size": (encoded(PIXELS[3][:4]), r"\(4, 8, 3\); allowed: \(8, 8, 3\) as the first image, .*img00000000.png"),
    "grey": (encoded(PIXELS[3][..., 0]), r"\(8, 8, 1\); allowed: \(8, 8, 3\)"),
    "CMYK": (encoded(Image.new("CMYK", (8, 8)), "JPEG"), "8x8 CMYK JPEG; allowed: 8-bit RGB or grey.*; save it as RGB"),
    "16-bit RGB": (png16(3), "8x8 16-bit RGB PNG; allowed.*; save it with 8 bits a channel"),
    "16-bit grey": (png16(1), "8x8 16-bit I;16 PNG; allowed"),
}
SHOWN = {  # what is no RGB or greyscale of 8 bits, but looks like one
    "alpha": (Image.fromarray(np.full((8, 8, 4), (200, 100, 0, 51), np.uint8)), "8x8 RGBA PNG", (244, 224, 204)),
    "grey alpha": (Image.fromarray(np.full((8, 8, 2), (0, 51), np.uint8), "LA"), "8x8 LA PNG", (204,)),
    "palette": (Image.new("RGB", (8, 8), (9, 8, 7)).quantize(4), "bit P PNG", (9, 8, 7)),
    "1 bit": (Image.new("1", (8, 8), 1), "8x8 1-bit 1 PNG", (255,)),
}


@pytest.mark.parametrize("kind", SHOWN)
def test_images_are_shown_on_white(tmp_path, kind, capsys):
    """Breaks if what a transparent pixel hides becomes data, one note becomes many, or `refuse` does not refuse."""
    image, seen, colour = SHOWN[kind]
    folder = write_folder(tmp_path / "a", {f"{i}.png": encoded(image) for i in range(3)})
    s = sources.open_source(folder, "train")
    assert s.image_shape == (8, 8, len(colour)) and (s.read(np.arange(3))["image"] == colour).all()
    tree.warn.cache_clear()
    sources.open_source(folder, "train").read(np.arange(3))
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"0.png: {'' if kind == 'palette' else seen}" in said and "shown on white" in said
    with pytest.raises(UserError, match=f"0.png: .*{seen}; allowed: 8-bit RGB or greyscale, without alpha or palette"):
        sources.open_source(folder, "train", alpha="refuse")


def test_center_crop_of_any_size_and_mode(tmp_path):
    """Breaks if sizes or colours that differ are refused with data.crop=center, or two hosts see two crops."""
    files = {"a/0.png": Image.new("RGB", (9, 12), (1, 2, 3)), "a/1.png": Image.new("L", (20, 8), 7)}
    files |= {"b/2.png": Image.new("RGBA", (8, 8), (0, 0, 0, 0)), "b/3.jpg": Image.new("CMYK", (8, 10))}
    kinds = {name: encoded(image, "JPEG" if name.endswith("jpg") else "PNG") for name, image in files.items()}
    folder = write_folder(tmp_path / "a", kinds)
    s = sources.open_source(folder, "train", crop="center", resolution=8)
    assert (s.image_shape, s.num_classes, s.random_crop) == ((8, 8, 3), 2, False)
    assert s.name.endswith(":train, center 8") and s.fingerprint != sources.open_records(folder, "train").fingerprint
    pixels = s.read(np.arange(4))["image"]
    assert [x[0, 0].tolist() for x in pixels] == [[1, 2, 3], [7, 7, 7], [255, 255, 255], [255, 255, 255]]
    grey = sources.open_source(folder, "train", crop="center", resolution=4, channels=1)
    assert grey.image_shape == (4, 4, 1) and grey.name.endswith(", center 4 grey")  # and another fingerprint
    with pytest.raises(UserError, match="img_channels: 4; allowed with data.crop = 'center': 1, 3"):
        sources.open_source(folder, "train", crop="center", resolution=8, channels=4)
    with pytest.raises(UserError, match="1.png: height, .*--config.data.crop=center --config.model.img_resolution=N"):
        sources.open_source(folder, "train").read(np.arange(4))


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("cached", [True, False])
def test_bad_images_are_named(tmp_path, kind, cached, monkeypatch):
    """Breaks if an image that is not like the others is skipped, converted or read as noise."""
    monkeypatch.setattr(sources, "CACHE_BYTES", 2**30 if cached else 0)
    data, message = BAD[kind]
    s = sources.open_source(write_folder(tmp_path / "a", PNGS | {NAMES[3]: data}), "train")
    with pytest.raises(UserError, match=f"img00000003.png: .*{message}"):
        s.read(np.arange(2, 6))


def test_bad_image_stops_the_pipeline_with_its_name(tmp_path):
    """Breaks if Grain's threads swallow the error or wrap it into another."""
    s = sources.open_source(write_folder(tmp_path / "a", PNGS | {NAMES[3]: b""}), "train")
    with pytest.raises(UserError, match="img00000003.png"):
        next(batches(s, 4, seed=0))


def test_bad_first_image_is_named_on_opening(tmp_path):
    """Breaks if the first image, which sets the shape, is not checked like the others."""
    with pytest.raises(UserError, match="img00000000.png: 8x8 16-bit RGB"):
        sources.open_source(write_zip(tmp_path / "a.zip", PNGS | {NAMES[0]: BAD["16-bit RGB"][0]}), "train")


def test_flipped_bit_in_a_zip_is_named(tmp_path):
    """Breaks if the zip's CRC is not checked: a bit of a PNG's pixels may still decode."""
    path = tmp_path / "a.zip"
    write_zip(path, PNGS, TABLE)
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as z:
        data[z.getinfo(NAMES[5]).header_offset + 120] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="img00000005.png: damaged"):
        sources.open_source(str(path), "train").read(ALL)


@pytest.mark.parametrize("content", [None, b"", b"PK\3\4 torn"])
def test_bad_zip_is_named(tmp_path, content):
    """Breaks if a missing or torn zip ends in a traceback."""
    path = tmp_path / "a.zip"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match="a.zip.*whole zip"):
        sources.open_source(str(path), "train")


def test_no_images(tmp_path):
    """Breaks if an empty set is opened."""
    with pytest.raises(UserError, match="no images among 1 files"):
        sources.open_source(write_folder(tmp_path / "a", {"notes.txt": b""}), "train")
    with pytest.raises(UserError, match="nowhere: does not exist"):
        sources.open_source(f"folder:{tmp_path}/nowhere", "train")


def test_bare_paths_and_directory(tmp_path, monkeypatch):
    """Breaks if a path needs its kind, a TFDS directory is taken for a folder, or data.dir is not looked in."""
    write_zip(tmp_path / "set.zip", PNGS, TABLE)
    write_folder(tmp_path / "set", PNGS, TABLE)
    made = write_tfds(tmp_path)
    kinds = {tmp_path / "set.zip": "zip", tmp_path / "set": "folder", made: "tfds", made.parent: "tfds"}
    for path, kind in kinds.items():
        assert sources.open_source(str(path), "train").name.split(":")[0] == kind
    assert len(sources.open_source("zip:set.zip", "train", str(tmp_path))) == N
    monkeypatch.chdir(tmp_path)
    assert len(sources.open_source("toy", "train")) == N


def test_parts_of_files(tmp_path):
    """Breaks if "test" of a zip gives the training images, or a part without classes is not the one of TFDS."""
    name = write_zip(tmp_path / "a.zip", PNGS)
    for split, rows in {"train[:75%]": ALL[:9], "train[75%:]": ALL[9:], "train[-2:]": ALL[-2:]}.items():
        s = sources.open_source(name, split)
        assert s.num_classes == 0 and np.array_equal(s.read(np.arange(len(s)))["image"], PIXELS[rows])
    for split in ("test", "", "train[", "train[5:5]"):
        with pytest.raises(UserError, match="split .* of zip:a.zip"):
            sources.open_source(name, split)


def test_fingerprints(tmp_path, monkeypatch):
    """Breaks if a fingerprint ignores pixels, labels, names or the part, or depends on the place."""
    other = PNGS | {NAMES[4]: encoded(255 - PIXELS[4])}
    relabelled = [[n, (y + 1) % CLASSES] for n, y in TABLE]
    for writer, ending in ((write_zip, ".zip"), (write_folder, "")):
        prints = [
            sources.open_source(writer(tmp_path / f"{i}{ending}", files, labels), split).fingerprint
            for i, (files, labels, split) in enumerate(
                [
                    (PNGS, TABLE, "train"),
                    (PNGS, TABLE, "train"),
                    (other, TABLE, "train"),
                    (PNGS, relabelled, "train"),
                    (PNGS, TABLE, "train[:50%]"),
                    ({n.replace("img", "jmg"): x for n, x in PNGS.items()}, None, "train"),
                ]
            )
        ]
        assert prints[0] == prints[1] and len(set(prints)) == len(prints) - 1
    toys = [write_tfds(tmp_path / str(i), files=files) for i, files in enumerate((PNGS, PNGS, other))]
    prints = [sources.open_source(str(d), "train").fingerprint for d in toys]
    assert prints[0] == prints[1] != prints[2]


def test_tfds_grammar(tmp_path):
    """Breaks if configs, versions or parts of prepared sets are not found; the highest version wins."""
    write_tfds(tmp_path, "resized/tiny")
    write_tfds(tmp_path, "cifar10", num_classes=0)
    newest = write_tfds(tmp_path, "cifar10_", files=PNGS).rename(tmp_path / "cifar10" / "10.0.0")
    info = newest / "dataset_info.json"
    info.write_text(info.read_text().replace("1.0.0", "10.0.0").replace("cifar10_", "cifar10"))
    for path in newest.glob("cifar10_-*"):
        path.rename(newest / path.name.replace("cifar10_", "cifar10"))

    def opened(name, split="train"):
        return sources.open_source(name, split, str(tmp_path))

    assert opened("tfds:resized/tiny").num_classes == CLASSES
    assert opened("tfds:cifar10").name == "tfds:cifar10/10.0.0:train"
    assert opened("tfds:cifar10:1.0.0").num_classes == 0
    part = opened("tfds:cifar10", "train[25%:50%]")
    assert np.array_equal(part.read(np.arange(3))["image"], PIXELS[3:6])
    with pytest.raises(UserError, match="split 'test' of .*allowed: train"):
        opened("tfds:cifar10", "test")


def test_tfds_set_of_latents_is_refused(tmp_path):
    """Breaks if the message does not say that latents belong into zips and folders."""
    directory = write_tfds(tmp_path)
    features = directory / "features.json"
    table = json.loads(features.read_text())
    tensor = "tensorflow_datasets.core.features.tensor_feature.Tensor"
    image = {"pythonClassName": tensor, "tensor": {"shape": {"dimensions": ["8", "4", "4"]}, "dtype": "float32"}}
    table["featuresDict"]["features"]["image"] = image | {"tensor": image["tensor"] | {"encoding": "none"}}
    features.write_text(json.dumps(table))
    with pytest.raises(UserError, match="an Image named 'image' is needed .latents are read from zips and folders"):
        sources.open_source("tfds:toy", "train", str(tmp_path))


def test_tfds_not_prepared(tmp_path):
    """Breaks if a download is tried (it hangs without a network), or the message does not say what to do."""
    with pytest.raises(UserError, match=r"tfds:cifar10: not prepared in .*\.\[prepare\].*ddo_jax.data SRC") as e:
        sources.open_source("tfds:cifar10", "train", str(tmp_path))
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("damage", ["flipped", "torn", "absent", "info", "tfrecord"])
def test_damaged_tfds_set_is_named(tmp_path, damage):
    """Breaks if a damaged set ends in a traceback or is read as if it were whole."""
    directory = write_tfds(tmp_path)
    (shard,) = directory.glob("toy-train*")
    data = bytearray(shard.read_bytes())
    if damage == "flipped":
        data[len(data) // 2] ^= 1
        shard.write_bytes(data)
    elif damage == "torn":
        shard.write_bytes(data[: len(data) // 2])
    elif damage == "absent":
        shard.unlink()
    else:
        info = directory / "dataset_info.json"
        info.write_text(info.read_text().replace("array_record", "tfrecord") if damage == "tfrecord" else "{")
    with pytest.raises(UserError, match="toy") as e:
        sources.open_source("tfds:toy", "train", str(tmp_path)).read(ALL)
    assert "\n" not in str(e.value)


def test_large_sets_are_written_in_shards(tmp_path, monkeypatch):
    """Breaks if shards lose, double or reorder images."""
    monkeypatch.setattr(catalogue, "SHARD_BYTES", 3 * 8 * 8 * 3)
    directory = write_tfds(tmp_path)
    assert len(list(directory.glob("*-of-00004"))) == 4
    assert np.array_equal(sources.open_source(str(directory), "train").read(ALL)["image"], PIXELS)


def test_tfds_needs_no_tensorflow(tmp_path):
    """Breaks if reading imports TensorFlow (in a fresh process: here others may have)."""
    write_tfds(tmp_path)
    code = (
        "import sys; from ddo_jax.data import sources; s = sources.open_source('tfds:toy', 'train', sys.argv[1]); "
        "print(s.read([3])['label'][0], 'tensorflow' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    run = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True)
    assert run.stdout.split() == [str(LABELS[3]), "False"]


@pytest.mark.parametrize("name", ["set[1]", "a?b", "**", "a:b", "{x}"])
def test_a_set_is_read_from_the_folder_that_is_named(tmp_path, monkeypatch, name):
    """Breaks if a folder's name is taken for a pattern, and the neighbour that matches it is read."""
    write_tfds(tmp_path / name)
    for neighbour in ("set1", "aXb", "x"):
        write_tfds(tmp_path / neighbour, num_classes=CLASSES + 2)
    assert sources.open_source(str(tmp_path / name / "toy"), "train").num_classes == CLASSES
    for directory in (str(tmp_path / name), "~/" + name):
        monkeypatch.setenv("HOME", str(tmp_path))
        for toy in ("tfds:toy", "tfds:toy:1.0.0"):
            assert sources.open_source(toy, "train", directory).num_classes == CLASSES
