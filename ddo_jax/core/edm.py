"""EDM preconditioning: what a diffusion network F is fed, what it must answer, and the image that follows.

    D(x; sigma) = c_skip x + c_out F(c_in x; c_noise)            # x = y + sigma eps, noisy; D estimates y

Reference: Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models",
arXiv 2206.00364.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, ScalarLike, Shaped

from ddo_jax.core import door


class Preconditioning(NamedTuple):
    """The four EDM coefficients, each with the shape and dtype of sigma."""

    c_skip: Float[Array, "..."]
    c_out: Float[Array, "..."]
    c_in: Float[Array, "..."]
    c_noise: Float[Array, "..."]


def expand(v: Shaped[Array, "b"], ndim: int) -> Shaped[Array, "b ..."]:
    """Append axes of length 1 to one number per example, so that it multiplies a batch of rank `ndim`.

    Args:
      v: [B], any dtype.
      ndim: rank of the result, >= 1.

    Returns:
      [B, 1, ..., 1] with ndim axes. Without it [B] * [B, 1] would silently be [B, B].

    Example:
      >>> import jax.numpy as jnp
      >>> expand(jnp.ones(2), 4).shape
      (2, 1, 1, 1)
    """
    return v.reshape(v.shape + (1,) * (ndim - 1))


def preconditioning(sigma: Float[Array, "*s"], sigma_data: ScalarLike) -> Preconditioning:
    """Coefficients that keep the input and the target of the network at unit variance.

        c_skip = sd^2 / (sigma^2 + sd^2)          c_out = sigma sd / sqrt(sigma^2 + sd^2)
        c_in = 1 / sqrt(sigma^2 + sd^2)           c_noise = ln(sigma) / 4            # sd = sigma_data

    Args:
      sigma: noise level, any shape, > 0, in the units of the image ([-1, 1] pixels).
      sigma_data: standard deviation of the data, > 0 (0.5 for images).

    Returns:
      Preconditioning, every field in the shape and dtype of sigma.

    Example:
      >>> import jax.numpy as jnp
      >>> c = preconditioning(jnp.array([0.5]), 0.5)
      >>> print(c.c_skip, c.c_out, c.c_in, c.c_noise)
      [0.5] [0.35355338] [1.4142135] [-0.1732868]

    Reference: arXiv 2206.00364, table 1.
    """
    sigma = door.floats("sigma", sigma, rows=False)
    sigma_data = jnp.asarray(sigma_data, sigma.dtype)
    norm2 = sigma**2 + sigma_data**2
    norm = jnp.sqrt(norm2)
    return Preconditioning(
        c_skip=sigma_data**2 / norm2,
        c_out=sigma * sigma_data / norm,
        c_in=1 / norm,
        c_noise=jnp.log(sigma) / 4,
    )


def loss_weight(sigma: Float[Array, "*s"], sigma_data: ScalarLike) -> Float[Array, "*s"]:
    """Weight that turns the error of D into the error of F.

        lambda = (sigma^2 + sd^2) / (sigma sd)^2 = 1 / c_out^2,      lambda ||D - y||^2 = ||F - F_hat||^2

    Args:
      sigma: noise level, any shape, > 0.
      sigma_data: standard deviation of the data, > 0.

    Returns:
      lambda, shape and dtype of sigma.

    Example:
      >>> import jax.numpy as jnp
      >>> print(loss_weight(jnp.array([0.5]), 0.5))
      [8.]

    Reference: arXiv 2206.00364, table 1.
    """
    sigma = door.floats("sigma", sigma, rows=False)
    sigma_data = jnp.asarray(sigma_data, sigma.dtype)
    return (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2


def noise_level(normal: Float[Array, "*s"], p_mean: ScalarLike, p_std: ScalarLike) -> Float[Array, "*s"]:
    """Log-normal noise level from a unit normal draw.

        sigma = exp(p_mean + p_std n),   n ~ N(0, 1)

    Args:
      normal: the draw n, any shape. The randomness is an argument: the same draw serves every network.
      p_mean: mean of ln(sigma). Python number or traced scalar.
      p_std: standard deviation of ln(sigma), >= 0. Python number or traced scalar.

    Returns:
      sigma > 0, shape and dtype of normal.

    Example:
      >>> import jax.numpy as jnp
      >>> print(noise_level(jnp.array([0.0, 1.0]), p_mean=-1.2, p_std=1.2))
      [0.3011942 1.       ]

    Reference: arXiv 2206.00364, table 1.
    """
    normal = door.floats("normal", normal, rows=False)
    return jnp.exp(jnp.asarray(p_mean, normal.dtype) + jnp.asarray(p_std, normal.dtype) * normal)


def edm_inputs(
    x: Float[Array, "b *dims"], sigma: Float[Array, "b"], eps: Float[Array, "b *dims"], sigma_data: ScalarLike
) -> tuple[Float[Array, "b *dims"], Float[Array, "b"], Float[Array, "b *dims"]]:
    """Network input and regression target of a noised batch.

        x_in = c_in (x + sigma eps)           c_noise = ln(sigma) / 4
        f_hat = ((sigma / sd) x - sd eps) / sqrt(sigma^2 + sd^2)

    Args:
      x: clean images, [B, ...], in [-1, 1] or standardised latents.
      sigma: noise levels, [B], > 0.
      eps: unit normal noise, [B, ...]. In DDO row i of (sigma, eps) serves the real and the fake of pair i.
      sigma_data: standard deviation of the data, > 0.

    Returns:
      (x_in [B, ...], c_noise [B], f_hat [B, ...]) in the dtype of x, but at least float32.

    Numerics:
      f_hat equals (x - c_skip x_noisy) / c_out, rearranged so that nothing cancels at small sigma.

    Example:
      >>> import jax.numpy as jnp
      >>> x_in, c_noise, f_hat = edm_inputs(jnp.ones((1, 2)), jnp.ones(1), jnp.zeros((1, 2)), sigma_data=1.0)
      >>> print(x_in, c_noise, f_hat)
      [[0.70710677 0.70710677]] [0.] [[0.70710677 0.70710677]]

    Reference: arXiv 2206.00364, appendix B.6.
    """
    x, sigma, eps = door.floats("x", x), door.floats("sigma", sigma, rank=1), door.floats("eps", eps)
    door.alike(x=x, eps=eps)
    door.same_batch(x=x, sigma=sigma)
    dtype = np.promote_types(x.dtype, np.float32)
    x, sigma, eps, sigma_data = (jnp.asarray(v, dtype) for v in (x, sigma, eps, sigma_data))
    c = preconditioning(sigma, sigma_data)
    c_in, s = expand(c.c_in, x.ndim), expand(sigma, x.ndim)
    return c_in * (x + s * eps), c.c_noise, c_in * ((s / sigma_data) * x - sigma_data * eps)


def denoised(
    f: Float[Array, "b *dims"],
    x_noisy: Float[Array, "b *dims"],
    sigma: Float[Array, "b"],
    sigma_data: ScalarLike,
) -> Float[Array, "b *dims"]:
    """The image that the raw network output stands for.

        D = c_skip x_noisy + c_out F

    Args:
      f: raw network output F, [B, ...].
      x_noisy: the noisy image before c_in, [B, ...].
      sigma: noise levels, [B], > 0.
      sigma_data: standard deviation of the data, > 0.

    Returns:
      D [B, ...] in the dtype of x_noisy, but at least float32.

    Example:
      >>> import jax.numpy as jnp
      >>> print(denoised(jnp.zeros((1, 2)), jnp.ones((1, 2)), jnp.array([0.5]), sigma_data=0.5))
      [[0.5 0.5]]

    Reference: arXiv 2206.00364, equation 7.
    """
    f, x_noisy, sigma = door.floats("f", f), door.floats("x_noisy", x_noisy), door.floats("sigma", sigma, rank=1)
    door.alike(f=f, x_noisy=x_noisy)
    door.same_batch(f=f, sigma=sigma)
    dtype = np.promote_types(x_noisy.dtype, np.float32)
    c = preconditioning(sigma.astype(dtype), sigma_data)
    return expand(c.c_skip, f.ndim) * x_noisy.astype(dtype) + expand(c.c_out, f.ndim) * f.astype(dtype)
