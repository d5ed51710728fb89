"""A full-size SiT of random weights in the released format: written by PyTorch, read, asked, written back.

    python -m benchmarks.sit_file --size=sit-xl-2            # 2.7 GB of files in --scratch; [bench] brings PyTorch

PyTorch (torch_sit.py) saves `SiT-XL-2-256x256.pt` as released, a bare state dict, and as a training run does, {"model",
"ema", "opt", "args"}; `convert.read` takes both. Expected: every tensor equal to the bit on the way back through
`python -m ddo_jax.convert`, and answers equal to 1e-5 of the largest, the tolerance of the goldens.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch

from benchmarks import torch_sit
from benchmarks.common import report
from benchmarks.sit import weights_of
from ddo_jax import convert
from ddo_jax.models.sit import SIT_PRESETS


def released_weights(arguments: dict) -> dict:
    """Random, but for the channels of the answer that a SiT leaves as they begin, at zero: a DiT uses them."""
    weights, channels = weights_of(arguments), arguments["in_channels"]
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        weights[name].reshape(arguments["patch_size"] ** 2, 2 * channels, -1)[:, channels:] = 0
    return weights


def save(net, path: Path, whole: bool) -> None:
    state = net.state_dict()
    if not whole:
        torch.save(state, path)
        return
    other = {k: torch.zeros_like(v) for k, v in state.items()}  # not to be taken
    torch.save({"model": other, "ema": state, "opt": {}, "args": argparse.Namespace(model="SiT-XL/2")}, path)


def answers(net, arguments: dict, path: Path) -> dict:
    """Our network with the file beside PyTorch's: seconds to read it, the largest difference over the largest |v|."""
    began = time.perf_counter()
    released = convert.read(str(path))
    module, variables = convert.from_torch("sit", released.config, released.state_dict)
    took = time.perf_counter() - began
    if {k: released.config[k] for k in arguments} != arguments:
        raise SystemExit(f"{path.name}: read as {released.config}, written as {arguments}")
    rng, side, channels = np.random.default_rng(1), arguments["input_size"], arguments["in_channels"]
    x, t = rng.standard_normal((2, channels, side, side), np.float32), np.array([0.2, 0.9], np.float32)
    labels = np.array([7, arguments["num_classes"]], np.int64)  # a class, and none
    with torch.no_grad():
        theirs = net(torch.from_numpy(x), torch.from_numpy(t), torch.from_numpy(labels)).numpy()
    with jax.default_matmul_precision("highest"):
        v = jax.jit(module.apply)(variables, jnp.asarray(x.transpose(0, 2, 3, 1)), t, labels.astype(np.int32))
    mine = np.asarray(v).transpose(0, 3, 1, 2)
    return {"read_s": round(took, 1), "error": float(np.abs(mine - theirs).max() / np.abs(theirs).max())}


def there_and_back(path: Path, scratch: Path) -> dict:
    """Tensors, and those equal to the bit, after two runs of `python -m ddo_jax.convert`; the memory of the larger."""
    middle, back = scratch / "middle.safetensors", scratch / "back.pth"
    for src, dst in ((path, middle), (middle, back)):
        command = [sys.executable, "-m", "ddo_jax.convert", str(src), str(dst)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    old, new = torch.load(path, mmap=True), torch.load(back, mmap=True)
    same = sum(k in new and v.dtype == new[k].dtype and torch.equal(v, new[k]) for k, v in old.items())
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss >> 10
    return {"tensors": len(old.keys() | new.keys()), "equal": same, "convert_peak_mb": peak}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--size", default="sit-xl-2", choices=sorted(SIT_PRESETS))
    p.add_argument("--scratch", help="where the files lie for a while (default: the system's)")
    a = p.parse_args()
    arguments = {"input_size": 32, "patch_size": 2, "in_channels": 4, "num_classes": 1000, "learn_sigma": True}
    arguments |= SIT_PRESETS[a.size]
    net = torch_sit.SiT(arguments).eval()
    net.load_state_dict({k: torch.from_numpy(v) for k, v in released_weights(arguments).items()})
    with tempfile.TemporaryDirectory(dir=a.scratch) as scratch:
        for name in ("bare", "whole"):
            path = Path(scratch) / f"{name}.pt"
            save(net, path, name == "whole")
            found = {"file": name, "bytes": path.stat().st_size}
            if name == "bare":
                found |= there_and_back(path, Path(scratch))
            found |= answers(net, arguments, path)
            report("sit_file", size=a.size, parameters=sum(v.numel() for v in net.state_dict().values()), **found)
            path.unlink()
    report("sit_file", peak_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10, torch=torch.__version__)


if __name__ == "__main__":
    main()
