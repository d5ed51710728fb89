"""A feature network for any labelled images: a small classifier, fitted on the training split when a run starts.

FID's Inception network knows nothing of 8x8 digits or of one's own pictures, and its weights are a download. This one
is fitted in seconds; its last hidden layer takes the place of Inception's 2048 features. Its seed is fixed: all runs,
candidates and the control are judged by the same network. Its accuracy on images that it has not seen stands in the
protocol: features of a network that cannot tell the classes apart say little.

    x in [-1, 1] -> tanh(Dense 128) -> tanh(Dense 32) -> Dense K       up to 64 numbers an image: the digits, 98 %
                    3 x silu(Conv 3x3 / 2) -> mean over pixels -> Dense K       above; over 32 a side: averaged first

The mean over pixels is the feature vector of pictures, 64 numbers, as Inception's is. Of dense layers instead, fitted
on blurred pixels, the distance hardly saw grain and holes: on Fashion-MNIST it rose to 1.1 of the start's where that of
EfficientNet fell to half, and the eye agreed with the latter.
"""

import dataclasses
import functools
import io
import math
import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ddo_jax import npz

SEED = 0
BATCH = 128
SMALL = 64  # numbers in an image
LARGEST, SIDE = 64, 32  # pixels a side: that are taken, that the network sees
CHANNELS = (32, 64, 64)  # of the convolutions
MOST, MOST_JUDGED = 2**16, 10_000  # images that it is fitted on, that tell its accuracy
TENTH = 10  # without a held-out split every tenth image is left out


@dataclasses.dataclass(frozen=True)
class Design:
    """What a classifier is for: images (H, W, C) of so many grey levels, so many classes."""

    shape: tuple[int, ...]
    levels: int
    num_classes: int

    @property
    def factor(self) -> int:
        """Pixels a side that are averaged into one."""
        return 1 if self.shape[0] <= SIDE else -(-self.shape[0] // SIDE)

    @property
    def dense(self) -> bool:
        """Whether all layers are dense."""
        return math.prod(self.shape) <= SMALL

    @property
    def weights(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of the layers' weights: dense [in, out], convolutions [3, 3, in, out]."""
        sizes = (math.prod(self.shape), 128, 32) if self.dense else (self.shape[2], *CHANNELS)
        kernel = () if self.dense else (3, 3)
        hidden = [(*kernel, m, n) for m, n in zip(sizes[:-1], sizes[1:], strict=True)]
        return (*hidden, (sizes[-1], self.num_classes))

    @property
    def features(self) -> int:
        return self.weights[-1][0]

    @property
    def steps(self) -> int:
        return 1500 if self.dense else 2000

    def problem(self) -> str | None:
        """Why there is no such classifier, or None."""
        h, w, channels = self.shape
        if h != w or not 8 <= h <= LARGEST or channels not in (1, 3) or h % self.factor:
            return f"images of {'x'.join(map(str, self.shape))}; allowed: 8x8 to {LARGEST}x{LARGEST}, 1 or 3 channels"
        if self.num_classes < 2:
            return f"{self.num_classes} classes; a classifier needs labels of at least 2"
        return None


class Classifier(NamedTuple):
    """Weights and biases, layer by layer."""

    layers: tuple[tuple[np.ndarray, np.ndarray], ...]

    @property
    def digest(self) -> str:
        """CRC-32 of the weights, eight hex digits."""
        return f"{zlib.crc32(b''.join(x.tobytes() for layer in self.layers for x in layer)):08x}"


def _inputs(images: jax.Array, design: Design) -> jax.Array:
    """[N, H, W, C] of levels -> float32 of levels: [N, D], or [N, h, w, C], averaged where the design says so."""
    n, (h, w, channels), k = len(images), design.shape, design.factor
    x = images.astype(jnp.float32)
    if k > 1:
        x = x.reshape(n, h // k, k, w // k, k, channels).mean((2, 4))
    return x.reshape(n, -1) if design.dense else x


def _dense(x: jax.Array, weight: jax.Array, bias: jax.Array) -> jax.Array:
    """tanh, so bounded."""
    return jnp.tanh(jnp.dot(x, weight, precision="highest") + bias[None])


def _convolved(x: jax.Array, weight: jax.Array, bias: jax.Array) -> jax.Array:
    """silu of a 3x3 convolution of stride 2, [N, H, W, C] -> [N, H/2, W/2, O].

    As one matrix product: with XLA's own convolution the fit took more than ten times as long on a CPU.
    """
    _, h, w, channels = x.shape
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    taps = [x[:, i : i + h : 2, j : j + w : 2] for i in range(3) for j in range(3)]
    y = jnp.dot(jnp.concatenate(taps, -1), weight.reshape(9 * channels, -1), precision="highest")
    return jax.nn.silu(y + bias[None, None, None])


def _forward(layers: Any, x: jax.Array, design: Design) -> tuple[jax.Array, jax.Array]:
    """Of `_inputs` -> features [N, D], logits [N, K]."""
    x = x / ((design.levels - 1) / 2) - 1
    *hidden, (w_out, b_out) = layers
    for weight, bias in hidden:
        x = _dense(x, weight, bias) if design.dense else _convolved(x, weight, bias)
    x = x if design.dense else x.mean((1, 2))
    return x, jnp.dot(x, w_out, precision="highest") + b_out[None]


def train(images: np.ndarray, labels: np.ndarray, design: Design) -> Classifier:
    """Fit on uint8 [N, H, W, C], int32 [N]; deterministic."""
    shapes = design.weights
    keys = jax.random.split(jax.random.key(SEED), len(shapes) + 1)
    layers = tuple(
        (jax.random.normal(k, shape) / np.sqrt(math.prod(shape[:-1])), jnp.zeros(shape[-1:]))
        for k, shape in zip(keys[:-1], shapes, strict=True)
    )
    schedule = optax.cosine_decay_schedule(3e-3, design.steps)
    tx = optax.adamw(schedule, weight_decay=1e-2)
    pixels, classes = jnp.asarray(images), jnp.asarray(labels)
    blur = (design.levels - 1) / 16 if design.dense else 0.0  # one level of 17: features less sharp than the classes

    def step(carry: tuple, key: jax.Array) -> tuple:
        layers, opt_state = carry
        key_rows, key_noise = jax.random.split(key)
        rows = jax.random.randint(key_rows, (BATCH,), 0, len(classes))
        x = _inputs(pixels[rows], design)
        x = x + blur * jax.random.normal(key_noise, x.shape) if blur else x

        def loss(layers: Any) -> jax.Array:
            logits = _forward(layers, x, design)[1]
            return optax.softmax_cross_entropy_with_integer_labels(logits, classes[rows]).mean()

        updates, opt_state = tx.update(jax.grad(loss)(layers), opt_state, layers)
        return (optax.apply_updates(layers, updates), opt_state), None

    run = jax.jit(lambda carry, keys: jax.lax.scan(step, carry, keys)[0][0])
    with jax.disable_jit(False):  # who debugs a run under JAX_DISABLE_JIT waits for its steps, not for these
        fitted = run((layers, tx.init(layers)), jax.random.split(keys[-1], design.steps))
    return Classifier(jax.tree.map(np.asarray, fitted))


def to_file(layers: Any, design: Design) -> bytes:
    """An .npz: w0, b0, w1 ... and what it is for."""
    arrays: dict[str, Any] = {
        f"{kind}{i}": x for i, layer in enumerate(layers) for kind, x in zip("wb", layer, strict=True)
    }
    buffer = io.BytesIO()
    np.savez(buffer, **arrays, design=np.array([*design.shape, design.levels, design.num_classes]))
    return buffer.getvalue()


def of_file(content: bytes, design: Design | None = None) -> tuple[Any, Design]:
    """(layers, what they are for) of `to_file`'s bytes.

    Args:
      design: that it must have. None: what the file says (those of versions before 2026-12 say nothing).

    Raises:
      ValueError, KeyError: damaged, no such file, or of another design.
    """
    arrays = npz.read(content)
    said = arrays.pop("design", None)
    if design is None:
        if said is None or said.shape != (5,) or said.dtype.kind not in "iu":
            raise ValueError("it does not say for which images it is")
        *shape, levels, num_classes = (int(n) for n in said)
        design = Design(tuple(shape), levels, num_classes)
        if (problem := design.problem()) or not 2 <= levels <= 256:
            raise ValueError(problem or f"{levels} grey levels")
    layers = tuple((arrays[f"w{i}"], arrays[f"b{i}"]) for i in range(len(arrays) // 2))
    check(layers, design)
    return layers, design


def left_out(n: int) -> np.ndarray:
    """Every tenth of n images: where no split is held out, they tell the accuracy."""
    return np.arange(TENTH - 1, n, TENTH)


def rows_to_fit(n: int, whole: bool) -> np.ndarray:
    """Which of n training images: all, or (where no split is held out) all but every tenth; at most MOST, evenly.

    >>> rows_to_fit(12, whole=False)
    array([ 0,  1,  2,  3,  4,  5,  6,  7,  8, 10, 11])
    """
    rows = np.arange(n)
    return evenly(rows if whole else np.setdiff1d(rows, left_out(n)), MOST)


def evenly(rows: np.ndarray, most: int) -> np.ndarray:
    """At most so many of them: sets often lie by class."""
    return rows if len(rows) <= most else rows[np.linspace(0, len(rows) - 1, most).astype(int)]


def check(layers: Any, design: Design) -> None:
    """Refuse layers that are none of this classifier's.

    Raises:
      ValueError: another number of layers, other shapes or dtypes, or values that are not finite.
    """
    wanted = [(shape, shape[-1:]) for shape in design.weights]
    if [tuple(x.shape for x in layer) for layer in layers] != wanted:
        raise ValueError("its arrays have other shapes")
    if not all(x.dtype == np.float32 and np.isfinite(x).all() for layer in layers for x in layer):
        raise ValueError("its arrays are not finite float32")


@functools.partial(jax.jit, static_argnames="design")
def features_and_logits(layers: Any, images: jax.Array, design: Design) -> tuple[jax.Array, jax.Array]:
    """Of uint8 [N, H, W, C]."""
    return _forward(layers, _inputs(images, design), design)


def accuracy(layers: Any, images: np.ndarray, labels: np.ndarray, design: Design) -> float:
    """Share of images [N, H, W, C] that are put into their own class."""
    parts = math.ceil(len(images) / 4096)
    said = [np.asarray(features_and_logits(layers, x, design)[1]) for x in np.array_split(images, parts)]
    return float(np.mean(np.argmax(np.concatenate(said), 1) == labels))
