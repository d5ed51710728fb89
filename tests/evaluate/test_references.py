"""Reference statistics: three formats, told by content; what cannot be is named; datasets are cached by content."""

import dataclasses
import pickle

import numpy as np
import pytest

from ddo_jax.data import images as codec
from ddo_jax.errors import UserError
from ddo_jax.evaluate import collect, references
from ddo_jax.evaluate.features import FeatureNet

RNG = np.random.default_rng(0)
D, D_S = 6, 4
CALLS = []


def apply(images):
    CALLS.append(len(images))
    x = images.reshape(len(images), -1).astype(np.float32)
    return {"features": x[:, :D] / 50, "spatial": x[:, -D_S:] / 50, "logits": x[:, :3] / 50}


NET = FeatureNet("tiny net", "abc", "fid", 1.0, apply)
NETS = {collect.MAIN: NET, collect.DINOV2: dataclasses.replace(NET, name="tiny dino", digest="def")}


def statistics(d):
    x = RNG.standard_normal((5 * d, d))
    return x.mean(0), np.cov(x.T)


MU, SIGMA = statistics(D)
MU_S, SIGMA_S = statistics(D_S)


def opened(path, **lengths):
    return references.open_reference(str(path), lengths or {"fid": D}, NETS)


def test_three_formats_round_trip(tmp_path):
    """Breaks if a public format is not read, or one metric's statistics are taken for another's."""
    np.savez(tmp_path / "edm.npz", mu=MU, sigma=SIGMA)
    images = RNG.integers(0, 256, (5, 4, 4, 3), np.uint8)
    np.savez(tmp_path / "openai.npz", arr_0=images, mu=MU, sigma=SIGMA, mu_s=MU_S, sigma_s=SIGMA_S)
    content = {"num_images": 77, "fid": {"mu": MU, "sigma": SIGMA}, "fd_dinov2": {"mu": MU + 1, "sigma": SIGMA * 2}}
    for protocol in (2, 4):
        (tmp_path / f"edm2-{protocol}.pkl").write_bytes(pickle.dumps(content, protocol))
    names = ["edm.npz", "openai.npz", *(f"edm2-{p}.pkl" for p in (2, 4))]
    for name in names:
        found = opened(tmp_path / name)
        g = found.gaussians["fid"]
        assert found.name == name and len(found.digest) == 12
        assert g.mu.tobytes() == MU.tobytes() and g.sigma.tobytes() == SIGMA.tobytes()
        np.testing.assert_allclose(g.root @ g.root, SIGMA, atol=1e-12)
    found = opened(tmp_path / "edm2-4.pkl", fid=D, fd_dinov2=D)
    assert found.num_images == 77 and found.gaussians["fd_dinov2"].mu.tobytes() == (MU + 1).tobytes()
    found = opened(tmp_path / "openai.npz", fid=D, sfid=D_S, pr=D)
    assert found.gaussians["sfid"].mu.tobytes() == MU_S.tobytes()
    assert np.array_equal(next(found.real.records(9))["image"], images)


@pytest.mark.parametrize("kind", ["npz", "pkl"])
@pytest.mark.parametrize(
    "change, words",
    [
        (
            lambda mu, sigma: (mu[:5], sigma[:5, :5]),
            "fid: 5 features, but tiny net gives 6: a reference made with another",
        ),
        (lambda mu, sigma: (mu, sigma[:5]), r"mean \(6,\), covariance \(5, 6\)"),
        (lambda mu, sigma: (mu * np.nan, sigma), "the mean has 6 non-finite values"),
        (lambda mu, sigma: (mu, sigma + np.inf), "the covariance has 36 non-finite values"),
        (lambda mu, sigma: (mu, np.triu(sigma)), "not symmetric"),
        (lambda mu, sigma: (mu, sigma - np.eye(6) * np.linalg.eigvalsh(sigma)[-1] * 0.5), "has the eigenvalue -"),
        (lambda mu, sigma: (mu > 0, sigma), "must be real numbers"),
    ],
)
def test_statistics_that_cannot_be(tmp_path, kind, change, words):
    """Breaks if a distance is computed from broken statistics, or the file is not named."""
    mu, sigma = change(MU, SIGMA)
    path = tmp_path / f"broken.{kind}"
    if kind == "npz":
        np.savez(path, mu=mu, sigma=sigma)
    else:
        path.write_bytes(pickle.dumps({"fid": {"mu": mu, "sigma": sigma}}, 4))
    with pytest.raises(UserError, match=words) as e:
        opened(path)
    assert str(path) in str(e.value) and "\n" not in str(e.value)


def test_rounding_is_allowed(tmp_path):
    """Breaks if a covariance of fewer images than features is refused."""
    x = RNG.standard_normal((3, D))
    np.savez(tmp_path / "few.npz", mu=x.mean(0), sigma=np.cov(x.T))
    assert opened(tmp_path / "few.npz").gaussians["fid"].root.shape == (D, D)


class Evil:
    def __reduce__(self):
        return print, ("executed",)


@pytest.mark.parametrize(
    "name, content, lengths, words",
    [
        ("x.npz", None, {}, "no such file"),
        ("x.pkl", pickle.dumps(Evil(), 4), {}, "print"),
        ("x.pkl", pickle.dumps([1], 4), {}, "a list; it must hold"),
        ("x.pkl", pickle.dumps({"fid": {"mu": MU}}, 4), {}, "no statistics for fid"),
        ("x.npz", b"hello", {}, "no reference statistics"),
        ("x.npz", {"mu": MU, "sigma": SIGMA}, {"sfid": D_S}, "no statistics for sfid .mu_s and sigma_s.; it has fid"),
        ("x.npz", {"mu": MU, "sigma": SIGMA}, {"fid": D, "pr": D}, "no images .arr_0., which pr, kid and mind need"),
        ("x.npz", {"mu": np.array([None]), "sigma": SIGMA}, {}, "damaged reference statistics"),
        ("nowhere", None, {}, "--ref: 'nowhere'; allowed: digits"),
        ("edm2-img64-ref", None, {}, "img64.pkl.*HF_HUB_OFFLINE is set"),
    ],
)
def test_files_that_are_none(tmp_path, monkeypatch, capsys, name, content, lengths, words):
    """Breaks if a wrong file ends in a traceback, or a pickle is executed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    if isinstance(content, dict):
        np.savez(name, **content)
    elif content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=words):
        opened(name, **lengths)
    assert capsys.readouterr().out == ""


def test_dataset_is_computed_once_per_content(tmp_path, monkeypatch):
    """Breaks if the cache is not used, outlives a change of the images, or is not what the images give."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    images = RNG.integers(0, 256, (30, 4, 4, 3), np.uint8)
    (tmp_path / "set").mkdir()
    for i, image in enumerate(images):
        (tmp_path / "set" / f"{i:03d}.png").write_bytes(codec.encode_png(image))
    lengths = {"fid": D, "sfid": D_S}
    first = opened(tmp_path / "set", **lengths)
    x = apply(images)["features"].astype(np.float64)
    np.testing.assert_allclose(first.gaussians["fid"].mu, x.mean(0), rtol=1e-12)
    np.testing.assert_allclose(first.gaussians["fid"].sigma, np.cov(x.T), rtol=1e-12)
    CALLS.clear()
    again = opened(tmp_path / "set", **lengths)
    assert not CALLS and np.array_equal(again.gaussians["sfid"].sigma, first.gaussians["sfid"].sigma)
    assert again.num_images == 30
    (cached,) = (tmp_path / "cache" / "ddo_jax" / "statistics").iterdir()
    whole = cached.read_bytes()
    cached.write_bytes(whole[: len(whole) // 2])
    assert opened(tmp_path / "set", **lengths).gaussians["fid"].mu.tobytes() == first.gaussians["fid"].mu.tobytes()
    assert CALLS and len(cached.read_bytes()) == len(whole)
    (tmp_path / "set" / "000.png").write_bytes(codec.encode_png(255 - images[0]))
    changed = opened(tmp_path / "set", **lengths)
    assert changed.digest != first.digest and not np.allclose(changed.gaussians["fid"].mu, first.gaussians["fid"].mu)


def test_npz_of_images_is_a_dataset(tmp_path, monkeypatch):
    """Breaks if an OpenAI file without statistics is refused: its evaluator computes them from arr_0."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    images = RNG.integers(0, 256, (30, 4, 4, 3), np.uint8)
    np.savez(tmp_path / "x.npz", arr_0=images)
    found = opened(tmp_path / "x.npz", fid=D, pr=D)
    np.testing.assert_allclose(found.gaussians["fid"].mu, apply(images)["features"].mean(0, np.float64), rtol=1e-12)
    assert found.real.num == 30


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch, capsys):
    """Breaks if the number is lost after its features were computed."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    np.savez(tmp_path / "set.npz", arr_0=RNG.integers(0, 256, (20, 4, 4, 3), dtype=np.uint8))
    before = len(CALLS)
    for _ in range(2):
        assert opened(tmp_path / "set.npz").gaussians["fid"].mu.shape == (D,)
    assert len(CALLS) >= before + 2  # computed each time
    assert capsys.readouterr().err.count("note: statistics not kept") == 2
