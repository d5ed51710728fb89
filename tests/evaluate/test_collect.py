"""Sets of images as streams, one pass, and metrics equal to those of all features at once."""

import json
import types
import zipfile

import numpy as np
import pytest

from ddo_jax.core.stats import frechet, metrics
from ddo_jax.data import images as codec
from ddo_jax.data import pool
from ddo_jax.errors import UserError
from ddo_jax.evaluate import collect, image_sets
from ddo_jax.evaluate.features import FeatureNet
from ddo_jax.generate import writers

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (40, 4, 4, 3), np.uint8)
MAP = RNG.standard_normal((48, 12)).astype(np.float32)


def apply(images):
    x = np.tanh(images.reshape(len(images), -1).astype(np.float32) @ MAP / 900)
    return {"features": x[:, :5], "spatial": x[:, 5:9], "logits": x * 3}


NET = FeatureNet("tiny net", "abc", "fid", 1.0, apply)
NETS = {collect.MAIN: NET, collect.DINOV2: FeatureNet("tiny dino", "def", "fd_dinov2", 1.0, apply)}


def records(images, *ends, labels=None):
    for a, b in zip((0, *ends), (*ends, len(images)), strict=True):
        record = {"image": images[a:b], "id": [str(i) for i in range(a, b)]}
        yield record | ({} if labels is None else {"label": labels[a:b]})


def reference(images):
    vectors = apply(images)
    gaussians = {}
    for metric, (_, vector) in collect.FRECHET.items():
        mu, sigma = frechet.moments(vectors[vector])
        gaussians[metric] = types.SimpleNamespace(mu=mu, sigma=sigma, root=frechet.sqrt_psd(sigma))
    return types.SimpleNamespace(gaussians=gaussians)


# ----------------------------------------------------------------------------------------------------
# Sets of images


def write_set(path, images=IMAGES, labels=None):
    """The same images as a folder, a zip, an npz and a pool."""
    if path.suffix == ".npz":
        np.savez(path, arr_0=images, **({} if labels is None else {"labels": labels}))
    elif path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for i, image in enumerate(images):
                archive.writestr(f"a/b/{i:06d}.png", codec.encode_png(image))
            if labels is not None:
                table = [[f"a/b/{i:06d}.png", int(y)] for i, y in enumerate(labels)]
                archive.writestr("dataset.json", json.dumps({"labels": table}))
    elif path.name == "pool":
        path.mkdir()
        for i in range(0, len(images), 16):
            y = np.arange(i, min(i + 16, len(images)), dtype=np.int32) % 3
            pool.write_chunk(path, i // 16, images[i : i + 16], y)
    else:
        for i, image in enumerate(images):
            place = path / f"{i // 10:02d}" / f"{i:06d}.png"
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(codec.encode_png(image))
    return path


@pytest.mark.parametrize("name", ["set", "set.zip", "set.npz", "pool"])
@pytest.mark.parametrize("images", [IMAGES, IMAGES[..., :1]], ids=["rgb", "grey"])
def test_every_kind_of_set_is_the_same_stream(tmp_path, name, images):
    """Breaks if an image is lost, changed or out of order in one of the four kinds, at any piece length."""
    found = image_sets.open_images(str(write_set(tmp_path / name, images)))
    assert (found.num, found.shape) == (40, images.shape[1:])
    for size in (7, 16, 100):
        read = list(found.records(size))
        assert np.array_equal(np.concatenate([r["image"] for r in read]), images)
        assert sum((r["id"] for r in read), []) == [f"{i:06d}" for i in range(40)]
        assert max(len(r["image"]) for r in read) <= size
    some = image_sets.open_images(str(tmp_path / name), 13)
    rows = image_sets.chosen(40, 13)
    assert some.num == 13 and len(set(rows)) == 13
    assert np.array_equal(np.concatenate([r["image"] for r in some.records(5)]), images[rows])


@pytest.mark.parametrize("name, classes", [("set.zip", 4), ("set.npz", 4), ("pool", 3), ("set", 0)])
def test_labels_of_sets(tmp_path, name, classes):
    """Breaks if folders of seeds are counted as classes, or known labels are lost."""
    labels = np.arange(40) % 4
    assert image_sets.open_images(str(write_set(tmp_path / name, labels=labels))).num_classes == classes


def read_all(path):
    list(image_sets.open_images(str(path)).records(8))


def png(array, mode=None):
    import io

    from PIL import Image

    buffer = io.BytesIO()
    (Image.fromarray(array) if mode is None else Image.fromarray(array).convert(mode)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    "content, words",
    [
        (png(np.zeros((5, 4, 3), np.uint8)), r"x.png: height, width, channels \(5, 4, 3\); allowed: \(4, 4, 3\)"),
        (png(np.zeros((4, 4), np.uint8)), r"x.png: height, width, channels \(4, 4, 1\); allowed: \(4, 4, 3\)"),
        (png(np.zeros((4, 4), np.uint16)), "x.png: 4x4 16-bit"),
        (png(np.zeros((4, 4, 3), np.uint8))[:45], "x.png: damaged image"),
    ],
)
@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_bad_images_are_named(tmp_path, kind, content, words):
    """Breaks if an image that cannot be compared is scored in silence."""
    files = {"a.png": codec.encode_png(IMAGES[0]), "x.png": content}
    if kind == "zip":
        with zipfile.ZipFile(tmp_path / "s.zip", "w") as archive:
            for name, data in files.items():
                archive.writestr(name, data)
    else:
        for name, data in files.items():
            (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=words):
        read_all(tmp_path / "s.zip" if kind == "zip" else tmp_path)


@pytest.mark.parametrize(
    "arrays, words",
    [
        ({"arr_0": IMAGES.astype(np.float32)}, r"arr_0 is float32 \(40, 4, 4, 3\); allowed: uint8"),
        ({"arr_0": IMAGES[0]}, r"arr_0 is uint8 \(4, 4, 3\)"),
        ({"arr_0": np.concatenate([IMAGES, IMAGES[..., :1]], -1)}, r"\(40, 4, 4, 4\)"),
        ({"arr_0": np.asfortranarray(IMAGES)}, "Fortran"),
        ({"arr_0": IMAGES[:0]}, r"\(0, 4, 4, 3\)"),
        ({"x": IMAGES}, "no arr_0 among x;"),
        ({"arr_0": np.array([None])}, "arr_0 holds Python objects"),
    ],
)
def test_bad_npz(tmp_path, arrays, words):
    """Breaks if arrays that are no images are scored."""
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(UserError, match=words):
        read_all(tmp_path / "x.npz")


def test_torn_files(tmp_path):
    """Breaks if a corrupted byte is scored, or ends in a traceback."""
    path = write_set(tmp_path / "x.npz")
    data = bytearray(path.read_bytes())
    data[500] ^= 255
    path.write_bytes(data)
    with pytest.raises(UserError, match="damaged.*Bad CRC"):
        read_all(path)
    path.write_bytes(data[:600])
    with pytest.raises(UserError, match="not a zip"):
        read_all(path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty: no images"):
        read_all(tmp_path / "empty")
    with pytest.raises(UserError, match="no such folder or file"):
        read_all(tmp_path / "nowhere")
    directory = tmp_path / "latents"
    directory.mkdir()
    pool.write_chunk(directory, 0, np.zeros((2, 4, 4, 4), np.float32), np.zeros(2, np.int32))
    with pytest.raises(UserError, match="pool of latents"):
        read_all(directory)


def test_written_npz_is_what_openai_reads(tmp_path):
    """Breaks if a streamed arr_0 differs from np.savez's, or a torn one is left."""
    labels = np.arange(40, dtype=np.int32)
    with writers.NpzWriter(tmp_path / "x.npz", 40, (4, 4, 3)) as writer:
        for record in records(IMAGES, 16, 32, labels=labels):
            writer.add(record, record["image"])
        assert not (tmp_path / "x.npz").exists()
    with np.load(tmp_path / "x.npz") as made:
        assert np.array_equal(made["arr_0"], IMAGES) and made["labels"].tolist() == made["seeds"].tolist() == [
            *range(40)
        ]
    with pytest.raises(ZeroDivisionError):
        list(writers.written((1 / 0 for _ in range(1)), writers.NpzWriter(tmp_path / "y.npz", 40, (4, 4, 3)), 256))
    assert [p.name for p in tmp_path.iterdir()] == ["x.npz"]


# ----------------------------------------------------------------------------------------------------
# One pass


@pytest.mark.parametrize("ends", [(), (1,), (7, 8, 39)])
def test_rechunk(ends):
    """Breaks if images are lost or doubled between pieces."""
    for size in (1, 3, 16, 64):
        pieces = list(collect.rechunk(records(IMAGES, *ends), size))
        assert np.array_equal(np.concatenate([p["image"] for p in pieces]), IMAGES)
        assert sum((p["id"] for p in pieces), []) == [str(i) for i in range(40)]
        assert {len(p["image"]) for p in pieces[:-1]} <= {size} and len(pieces[-1]["image"]) <= size


def test_accumulator_merges():
    """Breaks if rows are lost at the borders of what is merged."""
    x, sums = RNG.standard_normal((45, 3)) + 20, collect.Accumulator()
    for i in range(0, 45, 7):
        sums.add(x[i : i + 7])
    mu, sigma = sums.finalize()
    np.testing.assert_allclose(mu, x.mean(0), rtol=1e-12)
    np.testing.assert_allclose(sigma, np.cov(x.T), rtol=1e-10, atol=1e-12)


def test_metrics_equal_those_of_all_features():
    """Breaks if a metric gets another metric's vectors, or a pass loses images."""
    fake, real = IMAGES, 255 - IMAGES[:30]
    wanted = ["fid", "sfid", "is", "pr", "kid", "fd_dinov2"]
    found = collect.collect(NETS, wanted, records(fake, 7, 20), 40)
    a, b = apply(real), apply(fake)
    values = collect.compute(wanted, found, {"real": reference(real)}, NETS, a["features"])
    fid = frechet.frechet_from_features(a["features"], b["features"])
    np.testing.assert_allclose(values["fid0.04k"], fid, rtol=1e-6)
    np.testing.assert_allclose(values["fd_dinov2_0.04k"], fid, rtol=1e-6)
    np.testing.assert_allclose(
        values["sfid0.04k"], frechet.frechet_from_features(a["spatial"], b["spatial"]), rtol=1e-6
    )
    np.testing.assert_allclose(values["is0.04k"], metrics.inception_score(b["logits"], splits=1).mean, rtol=1e-6)
    pr = metrics.precision_recall(a["features"], b["features"])
    assert (values["precision0.04k"], values["recall0.04k"]) == (pr.precision, pr.recall)
    expected = metrics.kid(a["features"], b["features"], size=30).mean
    np.testing.assert_allclose(values["kid"], expected, rtol=1e-5)  # a network's rows depend on the batch by rounding


def test_only_what_is_needed_is_kept():
    """Breaks if fid alone holds the features of 50,000 images."""
    assert collect.collect({collect.MAIN: NET}, ["fid", "sfid"], records(IMAGES), 40).kept == {}
    kept = collect.collect({collect.MAIN: NET}, ["fid", "is"], records(IMAGES), 40).kept
    assert {k: (v.shape, v.dtype) for k, v in kept.items()} == {(collect.MAIN, "logits"): ((40, 12), np.float32)}
    assert collect.networks_of(["fid", "is"]) == {collect.MAIN} and collect.networks_of(["fd_dinov2"]) == {"dinov2"}


def test_class_sorted_images_are_permuted_for_is():
    """Breaks if the Inception Score of class-sorted images collapses, or if others are reordered."""
    assert collect.is_order(np.arange(40) % 4, 40) is None and collect.is_order(None, 40) is None
    assert collect.is_order(np.zeros(40, int), 40) is None
    order = collect.is_order(np.repeat(np.arange(4), 10), 40)
    assert sorted(order) == list(range(40)) and not np.array_equal(order, np.arange(40))


def test_names():
    """Breaks if fewer than 50,000 images are called "fid", "sfid", ..."""
    assert [collect.named(m, 50_000) for m in collect.METRICS] == list(collect.METRICS)
    assert [collect.named(m, 49_999) for m in ("sfid", "is")] == ["sfid49.999k", "is49.999k"]


def test_fid_inf():
    """Breaks if the intercept is not that of a line through random subsets, or few images are extrapolated."""
    x = np.random.default_rng(1).standard_normal((1200, 4)).astype(np.float32)
    mu, sigma = np.zeros(4), np.eye(4)
    found = collect.fid_infinity(x, lambda m: frechet.frechet_distance(mu, sigma, *m), points=6, least=100)
    assert abs(found["fid_inf"]) < 0.02 < found["fid_inf_slope"]
    with pytest.raises(UserError, match="fid_inf of 9999 images.*at least 10000"):
        collect.check(["fid_inf"], 9999)
    collect.check(["fid_inf"], 10_000)


def test_compare():
    """Breaks if equal sets differ, pairing is ignored, or sets of different size are compared."""
    ref = reference(255 - IMAGES)
    a, b = (collect.collect({collect.MAIN: NET}, ["bootstrap"], records(x), 40) for x in (IMAGES, IMAGES[::-1]))
    interval, paired = collect.compare(a, a, ref, NET)
    assert paired and interval.low == interval.high == 0
    interval, paired = collect.compare(a, b, ref, NET)  # the same images in another order
    assert paired and abs(interval.difference) < 1e-6 and interval.low < 0 < interval.high
    few = collect.collect({collect.MAIN: NET}, ["bootstrap"], records(IMAGES[:30]), 30)
    with pytest.raises(UserError, match="30 images against 40"):
        collect.compare(a, few, ref, NET)


def test_probe():
    """Breaks if a metric that a network cannot give is found out after the images are made."""
    assert collect.probe({collect.MAIN: NET}, ["fid", "sfid", "is"], (4, 4, 3)) == {"fid": 5, "sfid": 4, "is": 12}
    poor = FeatureNet("poor", "0", "fid", 1.0, lambda x: {"features": apply(x)["features"]})
    with pytest.raises(UserError, match="is needs logits, which poor has not"):
        collect.probe({collect.MAIN: poor}, ["is"], (4, 4, 3))
    with pytest.raises(UserError, match=r"tiny net does not take images of \(5, 5, 3\)"):
        collect.probe({collect.MAIN: NET}, ["fid"], (5, 5, 3))
    with pytest.raises(UserError, match="1 images: a score needs at least 2"):
        collect.collect({collect.MAIN: NET}, ["fid"], records(IMAGES[:1]), 1)
