"""Names, URLs and the cache; without a network one line says what was looked for and where to put the file.

Sections are those of specs/edm2.md.
"""

import http.server
import pathlib
import sys
import threading
import time
import types
import urllib.request

import pytest

from ddo_jax.convert import names
from ddo_jax.errors import UserError
from ddo_jax.models.edm import RELEASED
from ddo_jax.models.var import VAR_PRESETS


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path / "cache" / "ddo_jax" / "weights"


def error(what):
    start = time.perf_counter()
    with pytest.raises(UserError) as e:
        names.resolve(what)
    assert "\n" not in str(e.value) and time.perf_counter() - start < 15
    return str(e.value)


def test_the_table_is_complete():
    assert set(RELEASED) <= set(names.SOURCES)
    assert names.ALIASES["edm-cifar10-uncond-vp"] == "edm-cifar10-32x32-uncond-vp"
    assert not set(names.ALIASES) & set(names.SOURCES) and set(names.ALIASES.values()) <= set(names.SOURCES)
    ddo = {url.rsplit("/", 1)[1] for name, url in names.SOURCES.items() if name.endswith("-ddo")}
    edm = {"edm-cifar10-uncond-vp-ddo.pkl", "edm-cifar10-cond-vp-ddo.pkl"}
    assert ddo == edm | {"edm2-img64-s-ddo.pkl", "edm2-img512-l-ddo.pkl", "var_d16-ddo.pth", "var_d30-ddo.pth"}


def test_var_networks():
    """Every size that the code has, and the tokenizer of all of them (specs/var.md section 6.1)."""
    seen = {name: url for name, url in names.SOURCES.items() if url.startswith("hf://FoundationVision/var/")}
    files = {name: f"{name.replace('-', '_')}.pth" for name in VAR_PRESETS} | {"var-vae": "vae_ch160v4096z32.pth"}
    assert seen == {name: f"hf://FoundationVision/var/{file}" for name, file in files.items()}
    assert len(seen) == 6


NVIDIA = "https://nvlabs-fi-cdn.nvidia.com/edm2/"
BEST = {  # specs/edm2.md section 6: published FID without guidance
    "edm2-img64-s": "1073741-0.075",
    "edm2-img64-m": "2147483-0.060",
    "edm2-img64-l": "1073741-0.040",
    "edm2-img64-xl": "0671088-0.040",
    "edm2-img512-xs": "2147483-0.135",
    "edm2-img512-s": "2147483-0.130",
    "edm2-img512-m": "2147483-0.100",
    "edm2-img512-l": "1879048-0.085",
    "edm2-img512-xl": "1342177-0.085",
    "edm2-img512-xxl": "0939524-0.070",
}
PUBLISHED = {  # every other score of that table: networks and their guides
    "img512-{}-2147483": "xs-.200 s-.190 m-.155 xs-.045 s-.025 m-.030 xs-.150 s-.085 m-.015 s-.070 s-.120",
    "img512-s-uncond-2147483": "-.070 -.090",
    "img512-xs-uncond-2147483": "-.045 -.025 -.030 -.015 -.020 -.150 -.085 -.035",
    "img512-l-1879048": "-.155 -.015 -.035",
    "img512-xl-1342177": "-.155 -.020 -.030",
    "img512-xxl-0939524": "-.150 -.015 -.075 -.130",
    "img512-m-0268435": "-.155 -.205",
    "img512-{}-0134217": "xs-.125 xs-uncond-.110 xs-.165 xs-uncond-.125",
    "img64-s-1073741": "-.045 -.105",
    "img64-xs-0134217": "-.110 -.175",
}


def test_edm2_networks():
    """Every network and guide of the published scores, nothing else; a short name is the best one without guidance."""
    expected = {f"{short}-{rest}" for short, rest in BEST.items()}
    for pattern, entries in PUBLISHED.items():
        expected |= {f"edm2-{pattern.format(size)}-0.{std}" for size, std in (e.split("-.") for e in entries.split())}
    seen = {name: url for name, url in names.SOURCES.items() if "posthoc-reconstructions" in url}
    assert set(seen) == expected and len(seen) == 51
    assert all(url == f"{NVIDIA}posthoc-reconstructions/{name}.pkl" for name, url in seen.items())
    short = {k: v for k, v in names.ALIASES.items() if k.startswith("edm2")}
    assert short == {k: f"{k}-{v}" for k, v in BEST.items()}
    assert "edm2-img512-xs-0134217-0.165" in seen  # the guide of specs/edm2.md section 6
    for data in ("img64", "img512"):
        assert names.SOURCES[f"edm2-{data}-ref"] == f"{NVIDIA}dataset-refs/{data}.pkl"
    vae = "hf://stabilityai/sd-vae-ft-mse/diffusion_pytorch_model.safetensors"
    assert names.SOURCES["sd-vae-ft-mse"] == vae


def test_local_paths_and_the_cache_come_first(cache, tmp_path):
    path = tmp_path / "edm-cifar10-uncond-vp"
    path.touch()
    assert names.resolve(path) == str(path) and names.resolve(str(tmp_path)) == str(tmp_path)
    cache.mkdir(parents=True)
    for what, file in {
        "edm-cifar10-uncond-vp": "edm-cifar10-32x32-uncond-vp.pkl",
        "edm-cifar10-uncond-vp-ddo": "edm-cifar10-uncond-vp-ddo.pkl",
        "var-d16-ddo": "var_d16-ddo.pth",
        "var-d36": "var_d36.pth",
        "var-vae": "vae_ch160v4096z32.pth",
        "edm2-img64-s": "edm2-img64-s-1073741-0.075.pkl",
        "edm2-img512-ref": "img512.pkl",
        "https://example.org/a/b.pkl": "example.org%2Fa%2Fb.pkl",
    }.items():
        (cache / file).touch()
        assert names.resolve(what) == str(cache / file)


def test_offline_says_what_and_where(cache):
    seen = error("edm-cifar10-cond-vp")
    assert seen.startswith("edm-cifar10-cond-vp (https://") and "HF_HUB_OFFLINE is set" in seen
    where = f"or put the file at {cache / 'edm-cifar10-32x32-cond-vp.pkl'}, "
    assert seen.endswith(f"{where}or give the path of your own copy instead of edm-cifar10-cond-vp")
    assert str(cache / "edm2-img64-s-ddo.pkl") in error("edm2-img64-s-ddo")
    assert error("var-d30").startswith("var-d30 (hf://FoundationVision/var/var_d30.pth): ")
    assert "HF_HUB_OFFLINE is set" in error("gs://bucket/x.pkl")
    assert "owner/repository/file" in error("hf://owner/repository")


def test_unknown_names():
    assert "edm-cifar10-uncond-vp-ddo" in error("edm-cifar10-uncond-vp-dod")
    assert "edm2-img64-s-1073741-0.075" in error("edm2-img64-s-1073741-0.085")
    assert "var-d16-ddo" in error("var-d16-cca") and "var-vae" in error("var_vae")
    assert "edm2-img64-s; docs/weights.md lists them" in error("xyzzy")
    assert "s3:// is not supported; allowed: hf://, gs://, https://" in error("s3://bucket/x")
    assert "http:// is not supported" in error("http://example.org/x")
    assert "no such file and no known name" in error("")


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path.endswith("absent.pkl"):
            return self.send_error(404)
        self.send_response(200)
        self.send_header("Content-Length", "9" if self.path.endswith("cut.pkl") else "7")
        self.end_headers()
        self.wfile.write(b"weights")

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    """https://<this> answered by a local server over plain http."""
    monkeypatch.delenv("HF_HUB_OFFLINE")
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as at:
        thread = threading.Thread(target=at.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        plain = urllib.request.urlopen
        monkeypatch.setattr(urllib.request, "urlopen", lambda url, **kw: plain(url.replace("https:", "http:"), **kw))
        yield f"https://127.0.0.1:{at.server_port}"
        at.shutdown()
        thread.join()


def test_https(server, cache):
    path = names.resolve(f"{server}/w.pkl")
    assert pathlib.Path(path).read_bytes() == b"weights" and path.startswith(str(cache))
    assert names.resolve(f"{server}/w.pkl") == path
    assert "404" in error(f"{server}/absent.pkl")
    assert "broke off" in error(f"{server}/cut.pkl")
    assert len(list(cache.iterdir())) == 1  # nothing torn, nothing temporary


def test_no_network(monkeypatch, cache):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    for name in ("https_proxy", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    assert "cannot be downloaded" in error("https://127.0.0.1:1/x.pkl")
    monkeypatch.setattr(names, "PROBE_SECONDS", 0.05)
    monkeypatch.setattr(urllib.request, "urlopen", lambda url, timeout: time.sleep(0.5))
    assert "no answer within 0.05 s" in error("edm-imagenet-cond-adm")


def test_the_hub(monkeypatch, cache):
    """Its own cache, then a knock, then the download; never the hub's own half minute of retries."""
    monkeypatch.setattr(names.importlib.util, "find_spec", lambda name: None)
    seen = error("var-d16-ddo")
    assert "pip install 'ddo_jax[hub]'" in seen and str(cache / "var_d16-ddo.pth") in seen

    calls = []

    def download(repo, file, local_files_only=False):
        calls.append((repo, file, local_files_only))
        if local_files_only or "absent" in file:
            raise FileNotFoundError("not in\nthe cache")
        return "/there"

    hub = types.ModuleType("huggingface_hub")
    hub.hf_hub_download = download
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    monkeypatch.setattr(names.importlib.util, "find_spec", lambda name: True)
    assert "HF_HUB_OFFLINE is set" in error("hf://owner/repo/a/b.pkl")
    assert calls == [("owner/repo", "a/b.pkl", True)]
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_ENDPOINT", "https://127.0.0.1:1")
    assert "check the network" in error("hf://owner/repo/b.pkl")
    monkeypatch.setattr(names, "_open", lambda url, any_answer: open("/dev/null"))
    assert names.resolve("hf://owner/repo/b.pkl") == "/there"
    assert "not in the cache" in error("hf://owner/repo/absent.pkl")


def test_object_stores(monkeypatch, cache):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    from etils import epath

    class Path:
        def __init__(self, url):
            self.url = url

        def exists(self):
            if "denied" in self.url:
                raise RuntimeError("401")
            if "bare" in self.url:
                raise ImportError("Please install gcsfs")
            return "absent" not in self.url

        def copy(self, target):
            target.write_bytes(b"weights")

    monkeypatch.setattr(epath, "Path", Path)
    assert pathlib.Path(names.resolve("gs://bucket/w.pkl")).read_bytes() == b"weights"
    assert "no such object" in error("gs://bucket/absent.pkl")
    assert "credentials" in error("gs://bucket/denied.pkl")
    assert "ddo_jax[gcs]" in error("gs://bare/w.pkl")


def test_a_cache_that_cannot_be_written(monkeypatch, tmp_path, capsys):
    """Breaks if weights cannot be used where they cannot be kept, or are fetched for every use."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    fetched = []

    def fetch(url, target):
        return names._publish(target, lambda temporary: fetched.append(temporary.write_bytes(b"weights")))

    monkeypatch.setattr(names, "_FETCH", {"https": fetch})
    for _ in range(2):
        with open(names.resolve("https://example.org/weights.pkl"), "rb") as f:
            assert f.read() == b"weights"
    assert len(fetched) == 1
    assert capsys.readouterr().err.count("note: downloads are not kept for the next time") == 1
