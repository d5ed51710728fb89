"""What the tests of the harness share: a micro config, a quiet console."""

import jax
import numpy as np
from PIL import Image, ImageDraw

from ddo_jax import config as configs


def random_variables(init, *args, scale: float = 0.3, seed: int = 0):
    """Variables of the shapes of `init(key, *args)`, drawn by NumPy: no program of initialisers is compiled."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(init, jax.random.key(0), *args)
    return jax.tree.map(lambda x: (scale * rng.standard_normal(x.shape)).astype(x.dtype), shapes)


def micro_config():
    """The whole job with a network of 8 units: a few steps, a few images."""
    c = configs.base()
    c.name = "micro"
    c.model.update(arch="mlp", img_resolution=8, img_channels=1, label_dim=10, levels=17)
    with c.unlocked():
        c.model.update(width=8, blocks=1)
    c.sampler.num_steps = 2
    for phase in ("pretrain", "ddo", "control"):
        c[phase].update(batch=16, ema_mimg=16e-6)
    c.pretrain.length.steps = 3
    c.ddo.update(rounds=1, beta=(0.1, 0.2), pool=40, lr=1e-3)
    c.ddo.length.steps = 2
    c.ddo.eval_every.steps = 1
    c.control.update(enabled=True, factor=1, lrs=(1e-3,))
    c.control.eval_every.steps = 1
    c.eval.update(num=48, batch=32, report_seeds=2, grid=10)
    c.log.update(every=1, tensorboard=False, signal=0)
    return c


SHAPES = ("circle", "square", "triangle")


def shapes(folder, number=600, side=16):
    """Small coloured shapes of three classes, in front of nothing."""
    rng = np.random.default_rng(0)
    for i in range(number):
        kind, colour = SHAPES[i % 3], tuple(int(c) for c in rng.integers(40, 256, 3))
        x, y = (int(v) for v in rng.integers(1, side // 2, 2))
        s = int(rng.integers(side // 3, side // 2))
        image = Image.new("RGBA", (side, side), (0, 0, 0, 0))
        draw = ImageDraw.Draw(image)
        if kind == "circle":
            draw.ellipse([x, y, x + s, y + s], fill=colour)
        elif kind == "square":
            draw.rectangle([x, y, x + s, y + s], fill=colour)
        else:
            draw.polygon([(x, y + s), (x + s, y + s), (x + s // 2, y)], fill=colour)
        path = folder / kind / f"{i:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    return f"folder:{folder}"


def idx(array) -> bytes:
    """A file of MNIST's format."""
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    return header + array.astype(np.uint8).tobytes()


class Quiet:
    """A console that collects."""

    def __init__(self):
        self.lines = []

    def status(self, text, *, done=False):
        self.lines.append(text)

    line = status


def exit_code(main, argv) -> int:
    """Of a command."""
    try:
        main(argv)
    except SystemExit as e:
        return e.code or 0
    return 0
