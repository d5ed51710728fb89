"""Log-ratios of networks that predict something other than EDM's F: the image, the noise, a velocity.

All of them stand for -E[ w ||D - x||^2 ], with D the denoised image; what differs is the factor between the error
of the prediction and that of D (x_noisy = x + sigma eps; lambda = 1 / c_out^2 is `edm.loss_weight`; t as in `flow`):

    prediction   target          D - x                    weight under which r is that of F
    F            f_hat           c_out (F - f_hat)        1
    image        x               D - x                    lambda(sigma)
    noise        eps             -sigma (eps_hat - eps)   lambda(sigma) sigma^2
    velocity     u = x - eps     (1 - t) (v - u)          lambda(sigma) (1 - t)^2,   sigma = (1 - t) / t

Reference: arXiv 2503.01103, section 3; arXiv 2206.00364, appendix B.6; for velocities specs/sit.md section 4.
"""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, ScalarLike

from ddo_jax.core import ddo, door, edm

# Of (sigma, sigma_data), with lambda written out where it would be infinity times 0 at sigma = 0.
KINDS: dict[str, Callable[..., Float[Array, "*s"]]] = {
    "image": edm.loss_weight,
    "noise": lambda sigma, sd: (sigma**2 + sd**2) / sd**2,
    "velocity": lambda sigma, sd: (sigma**2 + sd**2) / (sd * (1 + sigma)) ** 2,  # 1 - t = sigma / (1 + sigma)
}


def prediction_log_ratio(
    prediction: Float[Array, "b *dims"],
    prediction_ref: Float[Array, "b *dims"],
    target: Float[Array, "b *dims"],
    weight: Float[Array, "b"],
) -> Float[Array, "b"]:
    """One-evaluation estimate of the log-ratio of two diffusion or flow networks, whatever they predict.

        r = w ( ||p_ref - y||^2 - ||p - y||^2 )

    Args:
      prediction: p of the target network, [B, ...]. prediction_ref: of the reference at the same input; under
        stop_gradient. target: y, what both were trained to answer, [B, ...].
      weight: w [B], >= 0: `prediction_weight`, `flow.flow_weight`, or your own. It belongs to the likelihood, so no
        default would be right: w = 1 on noises counts small sigma a thousand times more than w = 1 on images.

    Returns:
      r [B] in nats, summed over all axes but the first; factored as in `ddo.diffusion_log_ratio`.

    Raises:
      ValueError: shapes that differ, integers, no rows.

    Example:
      >>> import jax.numpy as jnp
      >>> eps, eps_ref = jnp.zeros((1, 2)), jnp.array([[3.0, 4.0]])
      >>> print(prediction_log_ratio(eps, eps_ref, eps, jnp.array([2.0])))
      [50.]
    """
    r = ddo.diffusion_log_ratio(prediction, prediction_ref, target)
    weight = door.floats("weight", weight, rank=1)
    door.alike(r=r, weight=weight)
    return weight.astype(r.dtype) * r


def prediction_weight(kind: str, sigma: Float[Array, "*s"], sigma_data: ScalarLike) -> Float[Array, "*s"]:
    """The weight under which r is the one that a network in EDM's form would give.

        image: lambda(sigma)      noise: lambda(sigma) sigma^2      velocity: lambda(sigma) (sigma / (1 + sigma))^2

    Args:
      kind: what the network predicts. sigma: noise level, any shape, > 0 (of noise and velocity >= 0); of a
        variance-preserving process sqrt(1 - abar) / sqrt(abar), of a flow (1 - t) / t.
      sigma_data: standard deviation of the data, > 0.

    Returns:
      w >= 0, shape and dtype of sigma, at least float32.

    Raises:
      ValueError: another kind.

    Example:
      >>> import jax.numpy as jnp
      >>> print(prediction_weight("noise", jnp.array([0.5]), sigma_data=0.5))  # (sigma^2 + sd^2) / sd^2
      [2.]
    """
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; allowed: {', '.join(KINDS)}")
    sigma = door.floats("sigma", sigma, rows=False)
    sigma = sigma.astype(np.promote_types(sigma.dtype, np.float32))
    return KINDS[kind](sigma, jnp.asarray(sigma_data, sigma.dtype))
