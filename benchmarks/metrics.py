"""Feature networks and statistics: images/s, Fréchet distance at 2048 dimensions, an end-to-end score.

    python benchmarks/metrics.py [--images 5000]

Random weights (the arithmetic is the same). Expected: Inception at 299² is 5.7 GFLOP an image, so about 10 to 20
images/s on two cores that reach 100 GFLOP/s; statistics stream, so memory does not grow with the images.
"""

import argparse
import resource
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from common import process, python, report, spread

from ddo_jax.convert import safetensors, to_torch
from ddo_jax.core.stats import frechet
from ddo_jax.models import dinov2, inception


def parameter_shapes(module, side: int) -> dict:
    """{"params": shapes} of a network of side x side images (what it sows beside them is left out)."""
    x = np.zeros((1, side, side, 3), np.float32)
    return {"params": jax.eval_shape(module.init, jax.random.key(0), x)["params"]}


def random_inception(path: Path) -> None:
    """A file with the released names; gains that keep activations alive through 94 layers."""
    shapes = parameter_shapes(inception.Inception(), 299)
    generator = np.random.default_rng(0)

    def draw(path, x):
        name = jax.tree_util.keystr(path)
        if len(x.shape) > 1:
            return (generator.standard_normal(x.shape) * np.sqrt(2 / np.prod(x.shape[:-1]))).astype(np.float32)
        return np.full(x.shape, 1.0 if "gamma" in name or "var" in name else 0.0, np.float32)

    variables = jax.tree_util.tree_map_with_path(draw, shapes)
    path.write_bytes(safetensors.dumps(to_torch("inception", {}, variables)))


def throughput(name: str, program, shape, batches=(1, 64), budget_s: float = 20.0) -> None:
    """images/s and seconds of the first call at each batch."""
    for batch in batches:
        images = np.random.default_rng(0).integers(0, 256, (batch, *shape)).astype(np.uint8)
        began = time.perf_counter()
        jax.block_until_ready(program(images))
        first = time.perf_counter() - began
        rates, start = [], time.perf_counter()
        while len(rates) < 3 or time.perf_counter() - start < budget_s:
            began = time.perf_counter()
            jax.block_until_ready(program(images))
            rates.append(batch / (time.perf_counter() - began))
        device = jax.devices()[0].device_kind
        report(f"metrics/{name}", batch=batch, images_per_s=spread(rates), first_call_s=round(first, 2), device=device)


def distances(dimension: int = 2048) -> None:
    """Seconds of one Fréchet distance, and with the reference's root at hand."""
    generator = np.random.default_rng(0)
    a, b = (frechet.moments(generator.standard_normal((3 * dimension, dimension))) for _ in range(2))
    began = time.perf_counter()
    root = frechet.sqrt_psd(a[1])
    rooted = time.perf_counter()
    frechet.frechet_distance(*a, *b, root1=root)
    done = time.perf_counter()
    report("metrics/frechet", dimension=dimension, root_s=round(rooted - began, 2), distance_s=round(done - rooted, 2))


def end_to_end(images: int) -> None:
    """`python -m ddo_jax.evaluate` on random 64x64 images, as a whole process."""
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        random_inception(home / "inception.safetensors")
        pixels = np.random.default_rng(0).integers(0, 256, (images, 64, 64, 3)).astype(np.uint8)
        np.savez(home / "images.npz", arr_0=pixels)
        np.savez(home / "reference.npz", mu=np.zeros(2048), sigma=np.eye(2048))
        flags = [f"--images={home}/images.npz", f"--ref={home}/reference.npz", "--metrics=fid,is"]
        flags += [f"--weights={home}/inception.safetensors", f"--out={home}/evals.jsonl"]
        report("metrics/end_to_end", images=images, **process(python("-m", "ddo_jax.evaluate", *flags)))


def main(images: int) -> None:
    distances()
    variables = jax.tree.map(lambda x: np.full(x.shape, 0.01, np.float32), parameter_shapes(inception.Inception(), 299))
    throughput("inception", jax.jit(lambda x: inception.features(variables, x)["pool3"]), (64, 64, 3))
    module = dinov2.DINOv2(**dinov2.RELEASED["dinov2_vitl14"])
    weights = jax.tree.map(lambda x: np.full(x.shape, 0.01, np.float32), parameter_shapes(module, 224))
    program = jax.jit(lambda w, x: dinov2.features(module, w, x))
    throughput("dinov2", lambda x: program(weights, x), (64, 64, 3), batches=(1, 16))
    report("metrics/memory", peak_mb=round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))
    end_to_end(images)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=5000)
    main(parser.parse_args().images)
