"""EDM's augmentation: random flips and affine maps of real images, which the network is told about.

    params = draw(key, n, p)                          # gated parameters, [n] each
    images, labels = augment(images, params)          # labels [n, 9] go into the network beside the images

For pretraining; DDO fine-tuning leaves it off (then the network gets no augmentation labels, which equals zeros).
Section numbers are those of specs/edm.md.

Reference: Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models",
arXiv 2206.00364, appendix F.2; Karras et al. 2020, arXiv 2006.06676 (the resampling), appendix B.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, Num, ScalarLike

NUM_LABELS = 9
SCALE_STD = 0.2  # of log2 of both scales
SHIFT_STD = 0.125  # of the translation, in image sides

# sym6 low-pass, orthonormal to its even shifts: up by 2 and down by 2 is the identity (section 13.2)
SYM6 = np.array(
    [
        *(0.015404109327027373, 0.0034907120842174702, -0.11799011114819057, -0.048311742585633),
        *(0.4910559419267466, 0.787641141030194, 0.3379294217276218, -0.07263752278646252),
        *(-0.021060292512300564, 0.04472490177066578, 0.0017677118642428036, -0.007800708325034148),
    ],
    np.float32,
)
CROP = 3  # a quarter of the filter: the rim of the sampled image that the second filter needs


def draw(key: Key[Array, ""], n: int, p: ScalarLike) -> dict[str, Num[Array, "n"]]:
    """Parameters of n images (section 13.1).

        xflip, yflip ~ {0, 1};  scale_w, aniso_w, trans_wx, trans_wy ~ N(0, 1);  rot_theta, aniso_r ~ U(-pi, pi)

    Each is kept with probability p and else 0: one gate an image and row, one for both translations. `xflip` has
    no gate: it is always on, also at p = 0. `aniso_r` has its own of 1/2, independent of p.

    Args:
      key: one key for the batch.
      n: number of images.
      p: probability in [0, 1] (EDM: 0.12 for CIFAR-10, 0.15 for FFHQ and AFHQv2). Number or traced scalar.

    Returns:
      {name: float32 [n]} as `augment` takes them.

    Example:
      >>> import jax
      >>> params = draw(jax.random.key(0), 4, p=0.0)
      >>> print(sorted(params), params["scale_w"])
      ['aniso_r', 'aniso_w', 'rot_theta', 'scale_w', 'trans_wx', 'trans_wy', 'xflip', 'yflip'] [0. 0. 0. 0.]

    Reference: arXiv 2206.00364, table 6.
    """
    keys = iter(jax.random.split(key, 14))

    def gated(value: Array, probability: ScalarLike) -> Array:
        return jnp.where(jax.random.uniform(next(keys), (n,)) < probability, value, 0)

    def flip() -> Array:
        return jax.random.bernoulli(next(keys), 0.5, (n,)).astype(jnp.float32)

    def normal(*axes: int) -> Array:
        return jax.random.normal(next(keys), (*axes, n))

    def angle() -> Array:
        return jax.random.uniform(next(keys), (n,), minval=-math.pi, maxval=math.pi)

    trans_wx, trans_wy = gated(normal(2), p)
    return {
        "xflip": flip(),
        "yflip": gated(flip(), p),
        "scale_w": gated(normal(), p),
        "rot_theta": gated(angle(), p),
        "aniso_w": gated(normal(), p),
        "aniso_r": gated(angle(), 0.5),
        "trans_wx": trans_wx,
        "trans_wy": trans_wy,
    }


def augment_labels(params: dict[str, Num[Array, "n"]]) -> Float[Array, "n 9"]:
    """What the network is told (section 13.1, column "label entries").

        (xflip, yflip, scale_w, cos theta - 1, sin theta, aniso_w cos r, aniso_w sin r, trans_wx, trans_wy)

    Args:
      params: of `draw`, [n] each.

    Returns:
      [n, 9] in the dtype of `scale_w`; all zero for an untouched image.

    Example:
      >>> import jax
      >>> params = draw(jax.random.key(0), 1, p=0.0)
      >>> print(augment_labels(params | {"yflip": params["yflip"] + 1, "trans_wx": params["trans_wx"] - 2})[:, 1:])
      [[ 1.  0.  0.  0.  0.  0. -2.  0.]]
    """
    p, dtype = params, params["scale_w"].dtype
    theta, w, r = p["rot_theta"], p["aniso_w"], p["aniso_r"]
    entries = [p["xflip"].astype(dtype), p["yflip"].astype(dtype), p["scale_w"], jnp.cos(theta) - 1, jnp.sin(theta)]
    return jnp.stack([*entries, w * jnp.cos(r), w * jnp.sin(r), p["trans_wx"], p["trans_wy"]], axis=1)


def inverse_map(
    params: dict[str, Num[Array, "n"]], height: int, width: int
) -> tuple[Float[Array, "n 2 2"], Float[Array, "n 2"]]:
    """Where a pixel of the output is read from: q = A p + t, in pixels (x, y) from the image's centre.

        A = S(1/s, 1/s) Rot(theta) Rot(-r) S(1/a, a) Rot(r),   t = -A (0.125 W w_x, 0.125 H w_y)
        s = 2^(0.2 scale_w),   a = 2^(0.2 aniso_w),   Rot(v) = [[cos v, -sin v], [sin v, cos v]]

    It is the matrix G of section 13.2.

    Args:
      params: of `draw`, [n] each. height, width: of the images.

    Returns:
      (A [n, 2, 2], t [n, 2]) in the dtype of `scale_w`.

    Example:
      >>> import jax
      >>> a, t = inverse_map(draw(jax.random.key(0), 1, p=0.0), 8, 8)
      >>> print(jax.numpy.round(a[0], 6))
      [[1. 0.]
       [0. 1.]]
    """

    def matrix(a: Array, b: Array, c: Array, d: Array) -> Array:
        return jnp.stack([jnp.stack([a, b], -1), jnp.stack([c, d], -1)], -2)

    def rotation(v: Array) -> Array:
        return matrix(jnp.cos(v), -jnp.sin(v), jnp.sin(v), jnp.cos(v))

    r, zero = params["aniso_r"], jnp.zeros_like(params["aniso_r"])
    s, a = (2 ** (SCALE_STD * params[name]) for name in ("scale_w", "aniso_w"))
    # In full float32 on every accelerator: TF32 or bfloat16 would move a rotated pixel by a tenth of a pixel.
    product = functools.partial(jnp.matmul, precision="highest")
    stretch = product(product(rotation(-r), matrix(1 / a, zero, zero, a)), rotation(r))
    linear = product(rotation(params["rot_theta"]), stretch) / s[:, None, None]
    shift = jnp.stack([SHIFT_STD * width * params["trans_wx"], SHIFT_STD * height * params["trans_wy"]], -1)
    return linear, -product(linear, shift[..., None])[..., 0]


def upsampling_matrix(size: int, before: int, after: int) -> Float[np.ndarray, "rows size"]:
    """Steps 2 and 3 of section 13.2 along one axis: reflect-pad (edge not repeated), then up by 2 with sym6.

        z[j] = sum_k h[11 - k] stuffed[j + k - 6],     stuffed = padded samples with zeros between them

    Args:
      size: of the axis. before, after: the margins, in [0, size - 1].

    Returns:
      float32 [2 (size + before + after), size]: upsampled = matrix @ samples.

    Example:
      >>> upsampling_matrix(4, 3, 3).shape
      (20, 4)
    """
    taps = len(SYM6)
    padded = np.pad(np.arange(size), (before, after), mode="reflect")
    matrix = np.zeros((2 * len(padded), size), np.float32)
    for j in range(len(matrix)):
        for k in range(taps):
            at = j + k - taps // 2
            if at % 2 == 0 and 0 <= at < 2 * len(padded) - 1:
                matrix[j, padded[at // 2]] += SYM6[taps - 1 - k]
    return matrix


def downsampling_matrix(size: int) -> Float[np.ndarray, "size cols"]:
    """Step 5 of section 13.2 along one axis: down by 2 with sym6, then 3 samples cut off on each side.

        y[j] = sum_k h[k] v[2 j + k - 5]

    Args:
      size: of the result.

    Returns:
      float32 [size, 2 (size + 6)]: samples = matrix @ sampled.

    Example:
      >>> downsampling_matrix(4).shape
      (4, 20)
    """
    columns = 2 * (size + 2 * CROP)
    matrix = np.zeros((size, columns), np.float32)
    for j in range(size):
        for k in range(len(SYM6)):
            at = 2 * (j + CROP) + k - (len(SYM6) // 2 - 1)
            if 0 <= at < columns:
                matrix[j, at] = SYM6[k]
    return matrix


def separable(
    rows: Float[np.ndarray, "h2 h"], columns: Float[np.ndarray, "w2 w"], images: Float[Array, "n h w c"]
) -> Float[Array, "n h2 w2 c"]:
    """One linear map along the height, another along the width, of every channel.

    Args:
      rows: [H', H]. columns: [W', W]. images: [N, H, W, C].

    Returns:
      [N, H', W', C] in the dtype of images.

    Numerics:
      Dense products: at these sizes faster than strided depthwise convolutions, with the same rounding (each row
      has at most a dozen entries). Precision "highest" on every accelerator.

    Example:
      >>> import jax.numpy as jnp, numpy as np
      >>> flip = np.eye(2, dtype=np.float32)[::-1]
      >>> print(separable(np.eye(2, dtype=np.float32), flip, jnp.arange(4.0).reshape(1, 2, 2, 1))[0, ..., 0])
      [[1. 0.]
       [3. 2.]]
    """
    y, x = (jnp.asarray(m, images.dtype) for m in (rows, columns))
    images = jnp.einsum("yh,nhwc->nywc", y, images, precision="highest")
    return jnp.einsum("xw,nywc->nyxc", x, images, precision="highest")


def bilinear(
    images: Float[Array, "n h w c"], x: Float[Array, "n h2 w2"], y: Float[Array, "n h2 w2"]
) -> Float[Array, "n h2 w2 c"]:
    """Read every image at fractional indices; what lies outside counts as 0.

    Args:
      images: [N, H, W, C]. x, y: index of column and row, [N, H', W'].

    Returns:
      [N, H', W', C] in the dtype of images.

    Example:
      >>> import jax.numpy as jnp
      >>> image, at = jnp.array([2.0, 4.0]).reshape(1, 1, 2, 1), jnp.array([0.5, 1.5]).reshape(1, 1, 2)
      >>> print(bilinear(image, at, jnp.zeros_like(at)).ravel())
      [3. 2.]
    """
    n, height, width, channels = images.shape
    flat = images.reshape(n, height * width, channels)
    x0, y0 = jnp.floor(x), jnp.floor(y)
    total = jnp.zeros((*x.shape, channels), images.dtype)
    for right in (0, 1):
        for below in (0, 1):
            column, row = x0 + right, y0 + below
            weight = (1 - jnp.abs(x - column)) * (1 - jnp.abs(y - row))
            inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
            index = jnp.where(inside, row * width + column, 0).astype(jnp.int32)
            tap = jnp.take_along_axis(flat, index.reshape(n, -1, 1), axis=1).reshape(*x.shape, channels)
            total += jnp.where(inside, weight, 0)[..., None] * tap
    return total


def augment(
    images: Float[Array, "n h w c"],
    params: dict[str, Num[Array, "n"]],
    margins: tuple[int, int, int, int] | None = None,
) -> tuple[Float[Array, "n h w c"], Float[Array, "n 9"]]:
    """Apply the parameters to a batch (section 13.2).

        flips -> reflect-pad -> up x2 (sym6) -> bilinear at q = A p + t -> down x2 (sym6)

    Args:
      images: [N, H, W, C] float, in [-1, 1].
      params: of `draw`, [N] each.
      margins: (x0, x1, y0, y1) of the reflect-padding, each below the side. Unset: the largest, side - 1.

    Returns:
      (augmented images in shape and dtype of images, labels [N, 9] of `augment_labels`).

    Numerics:
      The resampling is always done; without a geometric parameter it gives the image back to rounding (1e-6).
      The reference takes the smallest margins that the batch needs, which would make shapes depend on values. The
      largest differ where those are slightly too small: at most 2e-5 at p = 0.12, 1.5e-4 with everything on.

    Example:
      >>> import jax
      >>> image = jax.random.uniform(jax.random.key(1), (2, 8, 8, 1))
      >>> params = draw(jax.random.key(0), 2, p=0.0) | {"xflip": jax.numpy.array([1.0, 0.0])}
      >>> out, labels = augment(image, params)
      >>> print(abs(out[0] - image[0, :, ::-1]).max() < 1e-5, abs(out[1] - image[1]).max() < 1e-5, labels[:, 0])
      True True [1. 0.]

    Reference: arXiv 2206.00364, appendix F.2.
    """
    _, height, width, _ = images.shape
    x0, x1, y0, y1 = margins or (width - 1, width - 1, height - 1, height - 1)  # step 1
    params = {k: v.astype(images.dtype) for k, v in params.items()}
    xflip, yflip = (params[name][:, None, None, None] > 0.5 for name in ("xflip", "yflip"))
    flipped = jnp.where(xflip, images[:, :, ::-1], images)
    flipped = jnp.where(yflip, flipped[:, ::-1], flipped)
    up = separable(upsampling_matrix(height, y0, y1), upsampling_matrix(width, x0, x1), flipped)  # steps 2 and 3
    # Step 4. The two half-pixel shifts of the even filter and the factors 2 of both grids are put together:
    # index 2 q + W' - 1 of the upsampled image for output p = (j + 1) / 2 - W2 / 4, with q = A p + t.
    linear, shift = inverse_map(params, height, width)
    px, py = ((jnp.arange(1, 2 * (s + 2 * CROP) + 1, dtype=images.dtype) - (s + 2 * CROP)) / 2 for s in (width, height))
    px, py = px[None, None, :], py[None, :, None]
    a, t = linear[..., None, None], shift[..., None, None]
    # q is counted from the padded image's centre, (x0 - x1) / 2 beside the image's; W' = W + x0 + x1.
    x = 2 * (a[:, 0, 0] * px + a[:, 0, 1] * py + t[:, 0]) + (width + 2 * x0 - 1)
    y = 2 * (a[:, 1, 0] * px + a[:, 1, 1] * py + t[:, 1]) + (height + 2 * y0 - 1)
    out = separable(downsampling_matrix(height), downsampling_matrix(width), bilinear(up, x, y))  # step 5
    return out, augment_labels(params)
