"""What a user's tree means: hidden files, links, other names, labels of zips and folders, splits that keep classes."""

import io
import json
import os
import zipfile

import numpy as np
import pytest
from PIL import Image

from ddo_jax.data import images, labelling, labels, make, sources, tree
from ddo_jax.errors import UserError


def image(value=0, form="PNG"):
    buffer = io.BytesIO()
    Image.fromarray(np.full((4, 4, 3), value, np.uint8)).save(buffer, form)
    return buffer.getvalue()


def folder(path, files):
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


def packed(path, files):
    with zipfile.ZipFile(path.with_suffix(".zip"), "w") as z:
        for name, data in files.items():
            z.writestr(name, data)
    return path.with_suffix(".zip")


def seen(path, split="train"):
    """(values of the images, labels, names) of a set whose images have one value each."""
    source = sources.open_source(str(path), split)
    record = source.read(np.arange(len(source)))
    return record["image"][:, 0, 0, 0].tolist(), record["label"].tolist(), source.class_names


BOTH = pytest.mark.parametrize("write", [folder, packed])
JUNK = {
    name: image(200)
    for name in (
        ".ipynb_checkpoints/0-checkpoint.png",
        "a/.thumbnails/0.png",
        "a/._0.png",
        ".hidden.png",
        "__MACOSX/a/._0.png",
        "__MACOSX/x.png",
        "b/@eaDir/0.png/SYNOPHOTO_THUMB_M.jpg",
    )
}


@BOTH
def test_hidden_files_are_never_data(tmp_path, write):
    """Breaks if a hidden file or one that a system put there is an image, or shifts the labels."""
    path = write(tmp_path / "set", {"a/0.png": image(1), "b/0.png": image(2), **JUNK})
    assert seen(path) == ([1, 2], [0, 1], ("a", "b"))


def test_a_hidden_parent_does_not_hide_a_set(tmp_path):
    """Breaks if the rule looks at the place of the set."""
    assert seen(folder(tmp_path / ".data" / "set", {"a/0.png": image(1)}))[0] == [1]


@BOTH
def test_one_rule_of_classes(tmp_path, write):
    """Breaks if a zip has other classes than the same folder, with or without the folder that it was packed with."""
    files = {"cat/0.png": image(1), "dog/0.png": image(2), "dog/deep/1.png": image(3)}
    assert seen(write(tmp_path / "plain", files)) == ([1, 2, 3], [0, 1, 1], ("cat", "dog"))
    wrapped = {f"my/{name}": data for name, data in files.items()}
    assert seen(write(tmp_path / "wrapped", wrapped)) == ([1, 2, 3], [0, 1, 1], ("cat", "dog"))
    edm = {f"00000/img{i:08d}.png": image(i) for i in range(2)} | {"00001/img00000002.png": image(2)}
    assert seen(write(tmp_path / "edm", edm)) == ([0, 1, 2], [0, 0, 0], ())


def test_zips_of_windows(tmp_path):
    """Breaks if backslashes hide the folders of a zip."""
    path = packed(tmp_path / "set", {"cat0.png": image(1), "dog0.png": image(2)})
    data = path.read_bytes().replace(b"cat0.png", b"c\\00.png").replace(b"dog0.png", b"d\\00.png")
    path.write_bytes(data)
    assert seen(path) == ([1, 2], [0, 1], ("c", "d"))


@BOTH
def test_dataset_json_one_level_down(tmp_path, write):
    """Breaks if labels that were packed with their folder are dropped silently, or those of a part are used."""
    table = json.dumps({"labels": [["0.png", 1], ["1.png", 0]]}).encode()
    files = {"my/0.png": image(1), "my/1.png": image(2), "my/dataset.json": table}
    assert seen(write(tmp_path / "set", files)) == ([1, 2], [1, 0], ())
    for more in ({"other/2.png": image(3)}, {"my/deep/dataset.json": table, "other/2.png": image(3)}):
        with pytest.raises(UserError, match="dataset.json does not speak of all images; name the folder"):
            seen(write(tmp_path / f"more{len(more)}", files | more))


@BOTH
@pytest.mark.parametrize(
    "text, message",
    [
        ('{"labels": [["0.png", 0], ["0.png", 0], ["1.png", 1]]}', "0.png is there twice"),
        ('{"labels": [["0.png", 0], ["1.png", 1], ["0.png", 1]]}', r"0.png is there twice \(labels 0 and 1\)"),
        ('{"labels": [["a/0.png", 0], ["a\\\\0.png", 1]]}', "a/0.png is there twice"),
        ('{"labels": null, "labels": [["0.png", 0], ["1.png", 1]]}', "the key 'labels' is there twice"),
        ('{"labels": [["0.png", 0], ["1.png", 2147483647]]}', "label 2147483647 of 1.png; allowed: .* below 1,000,000"),
        ('{"labels": [["0.png", 0], ["1.png", 1]], "classes": ["a"]}', "allowed: a list of 2 or more different"),
        ('{"labels": [["0.png", 0], ["1.png", 1]], "classes": ["a", "a"]}', "allowed: a list of 2 or more different"),
        ('{"labels": [["0.png", 0], ["1.png", 1]], "classes": {"a": 0, "b": 1}}', "allowed: a list of 2 or more"),
    ],
)
def test_doubles_and_contradictions(tmp_path, write, text, message):
    """Breaks if one of two labels wins silently."""
    files = {"0.png": image(0), "1.png": image(1), "dataset.json": text.encode()}
    with pytest.raises(UserError, match=message):
        seen(write(tmp_path / "set", files))


def test_links_are_followed_once(tmp_path, capsys):
    """Breaks if a loop multiplies images, or a linked folder's own name loses to that of a link."""
    path = folder(tmp_path / "set", {"b/0.png": image(1), "c/0.png": image(2)})
    (path / "b" / "loop").symlink_to(path)
    (path / "a").symlink_to(path / "b")
    elsewhere = folder(tmp_path / "elsewhere", {"0.png": image(3)})
    (path / "d").symlink_to(elsewhere)
    (path / "e.png").symlink_to(elsewhere / "0.png")
    (path / "e.png").rename(path / "c" / "e.png")
    assert seen(path) == ([1, 2, 3, 3], [0, 1, 1, 2], ("b", "c", "d"))
    assert f"{path / 'a'}: the same folder as {path / 'b'}" in capsys.readouterr().err


def test_what_cannot_be_read_is_named(tmp_path, monkeypatch):
    """Breaks if a folder that cannot be listed is left out silently, or a pipe or a dead link is waited for."""
    path = folder(tmp_path / "set", {"a/0.png": image(1)})
    (path / "a" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(UserError, match="gone.png: a link to nothing"):
        tree.list_folder(path)
    (path / "a" / "gone.png").unlink()
    os.mkfifo(path / "a" / "pipe.png")
    with pytest.raises(UserError, match=r"pipe.png: not a file \(a pipe or device\)"):
        tree.list_folder(path)
    (path / "a" / "pipe.png").unlink()
    scan = os.scandir

    def refused(folder):
        if str(folder).endswith("/a"):
            raise PermissionError(13, "Permission denied")
        return scan(folder)

    monkeypatch.setattr(tree.os, "scandir", refused)
    with pytest.raises(UserError, match="a: Permission denied; make it readable"):
        tree.list_folder(path)


def test_other_names_of_images(tmp_path, capsys):
    """Breaks if a file that Pillow reads is left out silently, or what is left out is not counted."""
    files = {"a/0.png": image(1), "b/1.JFIF": image(2, "JPEG"), "b/2.jpe": image(2, "JPEG")}
    files |= {"a/3.heic": b"x", "b/4.heic": b"x", "a/none": b"x", "a/notes.txt": b"x", "a/meta.json": b"{}"}
    assert seen(folder(tmp_path / "set", files))[1] == [0, 1, 1]
    assert "left out for their names: 2 .heic, 1 no extension; read are .png" in capsys.readouterr().err
    assert seen(folder(tmp_path / "quiet", {"0.png": image(1), "notes.txt": b"x"}))[0] == [1]
    assert "left out" not in capsys.readouterr().err


@BOTH
def test_numbered_classes(tmp_path, write):
    """Breaks if folder 10 of 0 to 11 is class 2 again."""
    path = write(tmp_path / "set", {f"{c}/0.png": image(c) for c in range(12)})
    values, classes, names = seen(path)
    assert dict(zip(values, classes, strict=True)) == {c: c for c in range(12)} and names[10] == "10"


@BOTH
def test_parts_of_a_set_are_no_classes(tmp_path, write):
    """Breaks if train and test become classes 0 and 1; a class that is called train may be one."""
    files = {"train/cat/0.png": image(1), "test/cat/1.png": image(2)}
    with pytest.raises(UserError, match="test, train are parts of a set, not classes; name one of them"):
        seen(write(tmp_path / "set", files))
    assert seen(write(tmp_path / "vehicles", {"train/0.png": image(1), "car/0.png": image(2)}))[2] == ("car", "train")


@BOTH
@pytest.mark.parametrize("cut", ["80%", "50%", "1%", "-20%", "12", "-5"])
def test_splits_keep_every_class(tmp_path, write, cut):
    """Breaks if a part of a set that is sorted by class leaves a class out, or two parts overlap or lose an image."""
    sizes = {"a": 10, "b": 4, "c": 6}
    files = {f"{c}/{i}.png": image(40 * k + i) for k, (c, n) in enumerate(sizes.items()) for i in range(n)}
    path = write(tmp_path / "set", files)
    parts = [seen(path, f"train[:{cut}]"), seen(path, f"train[{cut}:]")]
    assert all(set(classes) == {0, 1, 2} for _, classes, _ in parts)
    assert sorted(parts[0][0] + parts[1][0]) == sorted(seen(path)[0])
    assert parts[0] == seen(path, f"train[:{cut}]")
    if cut == "80%":
        assert np.bincount(parts[0][1]).tolist() == [8, 3, 5]


def test_splits_that_cannot_keep_a_class_are_refused(tmp_path):
    """Breaks if a class of one image is left out of a part silently."""
    path = folder(tmp_path / "set", {f"a/{i}.png": image(i) for i in range(9)} | {"b/0.png": image(90)})
    for split in ("train[:50%]", "train[50%:]"):
        try:
            _, classes, _ = seen(path, split)
            assert set(classes) == {0, 1}
        except UserError as e:
            assert "no image of b (class 1), which has 1 in all; take a larger part" in str(e)
    with pytest.raises(UserError, match="no image of"):
        seen(path, "train[:1]")


def test_folders_without_images(tmp_path, capsys):
    """Breaks if a class folder that is empty vanishes without a word, or one is said of a flat set."""
    path = folder(tmp_path / "set", {"a/0.png": image(1), "b/deep/0.png": image(2), "c/notes.txt": b"x"})
    (path / "empty").mkdir()
    assert seen(path)[2] == ("a", "b")
    assert "no image in 2 of the folders (c, empty); they are no classes" in capsys.readouterr().err
    flat = folder(tmp_path / "flat", {"0.png": image(1), "notes/x.txt": b"x"})
    assert seen(flat)[1] == [0] and "no classes" not in capsys.readouterr().err


def test_even_order():
    """Breaks if a beginning of the order favours the first classes."""
    given = np.array([0] * 6 + [1] * 2 + [2] * 4)
    order = labelling.even_order(given)
    assert sorted(order) == list(range(12))
    assert np.bincount(given[order[:6]]).tolist() == [2, 2, 2] and np.bincount(given[order[:9]]).tolist() == [4, 2, 3]


def test_max_images_are_taken_evenly(tmp_path):
    """Breaks if --max_images takes the first classes only, or names are lost on the way to a zip."""
    path = folder(tmp_path / "set", {f"{c}/{i}.png": image(40 * k + i) for k, c in enumerate("abcd") for i in range(5)})
    made = make.make(str(path), str(tmp_path / "some.zip"), max_images=6)
    values, classes, names = seen(made)
    assert np.bincount(classes).tolist() == [2, 2, 1, 1] and values == [0, 1, 40, 41, 80, 120]
    assert names == ("a", "b", "c", "d")
    tfds = make.make(str(path), str(tmp_path / "root" / "my_set"))
    assert sources.open_source(str(tfds), "train").class_names == names


def test_counts(tmp_path, capsys):
    """Breaks if a class without images is not counted as such, or not said."""
    table = json.dumps({"labels": [[f"{i}.png", (1, 3)[i % 2]] for i in range(5)]}).encode()
    path = packed(tmp_path / "set", {f"{i}.png": image(i) for i in range(5)} | {"dataset.json": table})
    source = sources.open_source(str(path), "train")
    assert source.class_counts.tolist() == [0, 3, 0, 2]
    assert "no image of 2 of its 4 classes (0, 2)" in capsys.readouterr().err
    assert labels.present_classes(source.class_counts).tolist() == [1, 3]


def test_labels_with_the_frequencies_of_the_data():
    """Breaks if a class is more than one image off its share, an empty class gets one, or classes come in blocks."""
    counts = np.array([190, 0, 10, 55])
    made = labels.data_labels(102, counts)
    assert np.abs(np.bincount(made, minlength=4) - 102 * counts / 255).max() < 1 and 1 not in made
    assert np.abs(np.bincount(made[:51], minlength=4) - 51 * counts / 255).max() < 2
    assert labels.balanced_labels(np.arange(5), 4, np.array([0, 3])).tolist() == [0, 3, 0, 3, 0]


@pytest.mark.parametrize(
    "rule, expected",
    [("3,5", [3, 5]), ("cat", [0]), ("a,b", [2]), ("dog,3", [1, 3]), ("name:7", [4]), ("id:4", [4]), ("3 , 5", [3, 5])],
)
def test_named_classes(rule, expected):
    """Breaks if a name, an id or a list is read as another class."""
    assert labels.named_classes(rule, 8, ("cat", "dog", "a,b", "x", "7", "y", "z", "w")) == expected


@pytest.mark.parametrize("rule", ["8", "bird", "", "3,", "-1", "²", "id:x", "1" * 30, "cat,bird"])
def test_classes_that_are_not_there(rule):
    """Breaks if an unknown class is guessed, or a digit of another script ends in a traceback."""
    with pytest.raises(UserError, match=r"--labels: .*; allowed: balanced, random, or a class 0-7 \(cat, "):
        labels.named_classes(rule, 8, ("cat", "dog", "a,b", "x", "7", "y", "z", "w"))


def test_a_number_that_is_a_name_and_an_id():
    """Breaks if one of two meanings is guessed."""
    with pytest.raises(UserError, match="'1' is the name of class 0 and the id of '5'; write id:1 or name:1"):
        labels.named_classes("1", 3, ("1", "5", "10"))


def test_photographs_are_turned_upright(tmp_path):
    """Breaks if `data` ignores EXIF's orientation, or --exif=ignore does not keep the rule of EDM's ImageNet."""
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[:4] = 255  # the upper half is bright as stored, the right one as seen
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise
    (tmp_path / "set").mkdir()
    Image.fromarray(pixels).save(tmp_path / "set" / "0.jpg", quality=95, exif=exif)
    seen = {}
    for how in ("apply", "ignore"):
        made = make.make(str(tmp_path / "set"), str(tmp_path / f"{how}.zip"), exif=how)
        seen[how] = sources.open_source(str(made), "train").read(np.arange(1))["image"][0].mean(-1) > 127
    assert seen["apply"][:, 4:].all() and not seen["apply"][:, :4].any()
    assert seen["ignore"][:4].all() and not seen["ignore"][4:].any()
    with pytest.raises(UserError, match="--exif=never; allowed: apply, ignore"):
        make.make(str(tmp_path / "set"), str(tmp_path / "x.zip"), exif="never")


@pytest.mark.parametrize("kind", ["JPEG", "WebP", "AVIF", "PNG", "lossless WebP"])
def test_files_that_lost_detail(kind):
    """Breaks if a lossy format is not told by its content."""
    buffer = io.BytesIO()
    form, options = (kind.split()[-1], {"lossless": True} if kind.startswith("lossless") else {})
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(buffer, form, **options)
    assert images.lossy_kind(buffer.getvalue()) == ("" if "PNG" in kind or options else kind)
