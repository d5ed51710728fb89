"""How many images a second the host brings to the training step, and what a pool and a start cost.

    python -m benchmarks.data                         # all kinds of sets, some minutes
    python -m benchmarks.data zip folder --num=512
    python -m benchmarks.data pool listing start ahead   # 50,000 fakes; 1,281,167 names; first step; overlap

Sets are made in a temporary folder, read in random order through the pipeline of a run (`data.pipeline.batches`, the
threads of `data.sources`), with nothing kept from one visit to the next. "per_core_s" counts the seconds of all
threads, so it holds beside other jobs: a host's rate is about that times its cores. Files come from the page cache.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import numpy as np  # noqa: E402
from common import ROOT, paired, report, spread  # noqa: E402

TRAIN = 1_281_167  # images of ImageNet


def picture(rng, height: int, width: int) -> np.ndarray:
    """uint8 [H,W,3] that compresses about as a photograph: smooth shapes and a little noise."""
    from PIL import Image

    coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    return np.clip(np.asarray(coarse) + rng.normal(0, 4, (height, width, 3)), 0, 255).astype(np.uint8)


def encoded(num: int, kind: str, height: int, width: int):
    """(file content, label) of `num` pictures."""
    import io

    from PIL import Image

    rng = np.random.default_rng(0)
    for i in range(num):
        buffer = io.BytesIO()
        Image.fromarray(picture(rng, height, width)).save(buffer, kind, **({"quality": 90} if kind == "JPEG" else {}))
        yield buffer.getvalue(), i % 10


def write_zip(path: Path, files, extension: str) -> str:
    labels = []
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as out:
        for i, (data, label) in enumerate(files):
            out.writestr(name := f"{i // 1000:05d}/img{i:08d}.{extension}", data)
            labels.append([name, label])
        out.writestr("dataset.json", json.dumps({"labels": labels}))
    return f"zip:{path}"


def write_folder(path: Path, files, extension: str) -> str:
    for i, (data, label) in enumerate(files):
        (path / str(label)).mkdir(parents=True, exist_ok=True)
        (path / str(label) / f"{i:08d}.{extension}").write_bytes(data)
    return f"folder:{path}"


def latents_files(num: int):
    """EDM2's latents of 512 x 512 images: mean and deviation, float32 [8, 64, 64]."""
    from ddo_jax.data import latents

    rng = np.random.default_rng(0)
    for i in range(num):
        mean, std = rng.normal(size=(2, 64, 64, 4)).astype(np.float32)
        yield latents.encode(mean, np.abs(std) + 0.1, "benchmark"), i % 10


def make(kind: str, folder: Path, num: int):
    """(name of a set, arguments of `open_source`)."""
    from ddo_jax.data import make as sets

    if kind == "latents":
        return write_zip(folder / "latents.zip", latents_files(num), "npy"), {}
    if kind == "jpeg":  # ImageNet's own files, cropped as VAR does
        return write_folder(folder / "jpeg", encoded(num, "JPEG", 375, 500), "jpg"), {"crop": "var", "resolution": 256}
    if kind == "folder":
        return write_folder(folder / "folder", encoded(num, "PNG", 64, 64), "png"), {}
    name = write_zip(folder / "images.zip", encoded(num, "PNG", 64, 64), "png")
    if kind == "array_record":
        name = f"tfds:{sets.make(name, str(folder / 'set'))}"
    return name, {}


def throughput(kind: str, num: int, batch: int) -> None:
    """Images a second through the pipeline."""
    from ddo_jax.data import sources
    from ddo_jax.data.pipeline import batches

    sources.CACHE_BYTES = 0  # as of a set that is too large to be kept
    with tempfile.TemporaryDirectory() as folder:
        name, options = make(kind, Path(folder), num)
        source = sources.open_source(name, "train", **options)
        reader, seen = batches(source, batch, 0), 0
        next(reader)
        wall, own = time.perf_counter(), time.process_time()
        while seen < 2 * num:
            seen += len(next(reader)["label"])
        wall, own = time.perf_counter() - wall, time.process_time() - own
        shape = list(source.image_shape)
    numbers = dict(images_per_s=round(seen / wall), per_core_s=round(seen / own), threads=sources.THREADS)
    report(f"data/{kind}", num=num, batch=batch, shape=shape, dtype=str(source.dtype), **numbers)


def peak_mb() -> int:
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def pool(folder: Path, what: str, num: int) -> None:
    """Write a pool chunk by chunk, or open it and read it in random order: seconds, peak memory of the process."""
    from etils import epath

    from ddo_jax import files
    from ddo_jax.data import pool as pools
    from ddo_jax.data.pipeline import batches

    directory, size, before = epath.Path(folder), 1000, peak_mb()
    began = time.perf_counter()
    if what == "write":
        images, digests = np.random.default_rng(0).integers(0, 256, (size, 64, 64, 3), np.uint8), []
        for i in range(num // size):
            images[:, 0, 0, 0] = i
            digests.append(pools.write_chunk(directory, i, images, np.arange(size, dtype=np.int32) % 10))
        files.write_sealed(directory / pools.MARKER, {"chunks": len(digests), "digests": digests, "num_classes": 10})
        rate = num / (time.perf_counter() - began)
    else:
        source = pools.open_pool(directory)
        opened, own = time.perf_counter() - began, time.process_time()
        reader = batches(source, 512, 0)
        for _ in range(num // 512):
            next(reader)
        rate = num / (time.process_time() - own)
        before = f"{before} before; opened in {opened:.1f} s"
    size_mb = round(num * 64 * 64 * 3 / 2**20)
    report(f"data/pool-{what}", num=num, images_per_s=round(rate), size_mb=size_mb, peak_mb=peak_mb(), before=before)


def listing(num: int) -> None:
    """What opening and naming a folder of as many files as ImageNet costs, in 1,000 folders."""
    from ddo_jax.data import archives

    with tempfile.TemporaryDirectory() as folder:
        for label in range(1000):
            (Path(folder) / f"n{label:08d}").mkdir()
        for i in range(num):
            file = os.open(f"{folder}/n{i % 1000:08d}/{i:08d}.JPEG", os.O_CREAT | os.O_WRONLY)
            os.truncate(file, 110_000)  # ImageNet's mean; sparse
            os.close(file)
        began = time.perf_counter()
        records = archives.FolderRecords(Path(folder), "train")
        opened = time.perf_counter() - began
        began = time.perf_counter()
        records.fingerprint  # noqa: B018
        named, paths = time.perf_counter() - began, [Path(records.where(i)) for i in range(num)]
        together, single = paired(lambda: archives._sizes(paths), lambda: [os.stat(p).st_size for p in paths], 1)
        seconds = dict(open_s=opened, fingerprint_s=named, sizes_s=together[0], sizes_one_by_one_s=single[0])
        report("data/listing", num=num, **{name: round(value, 2) for name, value in seconds.items()})


def start(repeats: int = 3) -> None:
    """Seconds of a process from its start to its first step, without and with compiled programs of an earlier one."""
    with tempfile.TemporaryDirectory() as folder:
        for i in range(repeats):
            flags = ["--config=digits", "--config.pretrain.length.steps=1", "--config.ddo.rounds=0"]
            flags += ["--config.eval.num=64", f"--workdir={folder}/{i}", "--config.control.enabled=False"]
            environment = {**os.environ, "XDG_CACHE_HOME": f"{folder}/cache", "JAX_PLATFORMS": "cpu"}
            began, first = time.time(), None
            command = [sys.executable, "-m", "ddo_jax.main", *flags]
            child = subprocess.Popen(
                command, env=environment, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            while child.poll() is None:
                log = Path(folder) / str(i) / "pretrain/metrics.jsonl"
                if first is None and log.exists() and log.stat().st_size:
                    first = log.stat().st_mtime - began
                time.sleep(0.02)
            report("data/start", run=i, first_step_s=None if first is None else round(first, 2), cached=i > 0)


def ahead(steps: int = 8) -> None:
    """Whether the host is done with a step long before the device is: seconds of both, of a U-Net's MLE step."""
    import jax

    from configs import digits
    from ddo_jax import sharding
    from ddo_jax.run import candidates, loop, prepare, record, state, step

    config = digits.get_config("unet")
    with tempfile.TemporaryDirectory() as folder:
        setup = prepare.prepare(config, folder, record.Console())
        phase = candidates.phase(
            setup, "pretrain", "pretrain", lambda: jax.jit(setup.family.init)(jax.random.key(0))[0]
        )
        data, key = loop.feed(phase, setup, 0), loop.step_key(phase, setup)
        advance = setup.programs.step_for(phase.objective, phase.section, phase.warmup, phase.steps)
        zero = step.zero_totals(setup.family, phase.objective)
        current = (
            sharding.place(setup.mesh, state.new_state(phase.start(), phase.config)),
            sharding.place(setup.mesh, zero),
        )
        seconds = {"host": [], "whole": []}
        for i in range(steps + 2):
            began = time.perf_counter()
            real, *_ = next(data)
            current = advance(*current, step.Inputs(setup.frozen, real, None, key, phase.hyper))
            host = time.perf_counter() - began
            jax.block_until_ready(current)
            if i > 1:
                seconds["host"].append(host)
                seconds["whole"].append(time.perf_counter() - began)
    report("data/ahead", **{f"{name}_s": spread(values) for name, values in seconds.items()})


KINDS = ("zip", "folder", "array_record", "latents", "jpeg")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("what", nargs="*", default=[*KINDS, "pool", "listing", "start", "ahead"])
    p.add_argument("--num", type=int, default=2048, help="images of a set; jpeg: a quarter")
    p.add_argument("--batch", type=int, default=512)
    p.add_argument("--pool", type=int, default=50_000)
    p.add_argument("--into", help="of the parts of a pool, which are processes of their own")
    a = p.parse_args()
    for what in a.what:
        if what in KINDS:
            throughput(what, a.num // (4 if what == "jpeg" else 1), min(a.batch, a.num // 8))
        elif what == "pool":
            with tempfile.TemporaryDirectory() as folder:
                for part in ("pool-write", "pool-read"):
                    flags = [f"--into={folder}", f"--pool={a.pool}"]
                    subprocess.run([sys.executable, __file__, part, *flags], check=True)
        elif what.startswith("pool-"):
            pool(Path(a.into), what.removeprefix("pool-"), a.pool)
        elif what == "listing":
            listing(TRAIN)
        elif what == "ahead":
            ahead()
        else:
            start()


if __name__ == "__main__":
    main()
