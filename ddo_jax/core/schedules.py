"""Learning rates as functions of the images seen: a change of batch size leaves the curve where it was.

`seen` counts the images consumed BEFORE the step (EDM's convention): with a warm-up the first rate is exactly
0. Every argument may be a Python number or a traced scalar. Float32 resolves `seen` to 1 part in 2^24:
16 images at 200M.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float32, ScalarLike


def constant(seen: ScalarLike, *, lr: ScalarLike, warmup: ScalarLike = 0) -> Float32[Array, ""]:
    """Linear warm-up, then constant.

        lr * min(seen / warmup, 1)

    Args:
      seen: images before this step, >= 0.
      lr: the rate after the warm-up.
      warmup: images until the full rate; 0 switches the warm-up off. The length of a DDO round on CIFAR-10.

    Returns:
      The rate of this step, float32 scalar.

    Example:
      >>> print(constant(0, lr=1e-3, warmup=10_000_000), constant(5e6, lr=1e-3, warmup=10_000_000))
      0.0 0.0005

    Reference: arXiv 2206.00364, appendix F.2.
    """
    seen, lr, warmup = (jnp.asarray(v, jnp.float32) for v in (seen, lr, warmup))
    return lr * _linear(seen, warmup)


def cosine(
    seen: ScalarLike, *, lr: ScalarLike, final_lr: ScalarLike, warmup: ScalarLike, total: ScalarLike
) -> Float32[Array, ""]:
    """Linear warm-up, then half a cosine down to final_lr.

        lr * seen / warmup                                                        while seen < warmup
        final_lr + (lr - final_lr) (1 + cos(pi p)) / 2,  p = clip((seen - warmup) / (total - warmup), 0, 1)

    Args:
      seen: images before this step, >= 0.
      lr: the rate at seen = warmup.
      final_lr: the rate from seen = total on.
      warmup: images of warm-up; 0 switches it off.
      total: images of the whole schedule, >= warmup.

    Returns:
      The rate of this step, float32 scalar.

    Example:
      >>> print(*(cosine(n, lr=1.0, final_lr=0.5, warmup=10, total=30) for n in (0, 5, 10, 20, 30)))
      0.0 0.5 1.0 0.75 0.5

    Reference: arXiv 1608.03983.
    """
    seen, lr, final_lr, warmup, total = (jnp.asarray(v, jnp.float32) for v in (seen, lr, final_lr, warmup, total))
    p = jnp.clip((seen - warmup) / jnp.maximum(total - warmup, 1.0), 0.0, 1.0)
    decayed = final_lr + (lr - final_lr) * 0.5 * (1 + jnp.cos(jnp.pi * p))
    return decayed * _linear(seen, warmup)


def linear(
    seen: ScalarLike,
    *,
    lr: ScalarLike,
    final_lr: ScalarLike,
    warmup: ScalarLike,
    total: ScalarLike,
    start_lr: ScalarLike = 0,
    hold: ScalarLike = 0,
) -> Float32[Array, ""]:
    """Linear warm-up, a stretch of the full rate, then a straight line down to final_lr.

        start_lr + (lr - start_lr) seen / warmup                                  while seen < warmup
        final_lr + (lr - final_lr) min(q / (1 - hold), 1),  q = clip((total - seen) / (total - warmup), 0, 1)

    Args:
      seen: images before this step, >= 0.
      lr: the rate at seen = warmup.
      final_lr: the rate from seen = total on.
      warmup: images of warm-up; 0 switches it off.
      total: images of the whole schedule, >= warmup.
      start_lr: the rate at seen = 0, if there is a warm-up. VAR: 0.005 lr.
      hold: fraction of the images after the warm-up with the full rate, in [0, 1). VAR's "lin0": 0.05, "lin": 0.15,
        "lin00": 0.

    Returns:
      The rate of this step, float32 scalar. VAR's own end is the last step, not the one after it: total there is the
      images seen BEFORE the last step.

    Example:
      >>> print(*(linear(n, lr=1.0, final_lr=0.5, warmup=10, total=30, hold=0.5) for n in (0, 5, 20, 25, 30)))
      0.0 0.5 1.0 0.75 0.5

    Reference: arXiv 2404.02905; specs/var.md section 9.
    """
    seen, lr, final_lr, warmup, total = (jnp.asarray(v, jnp.float32) for v in (seen, lr, final_lr, warmup, total))
    start_lr, hold = (jnp.asarray(v, jnp.float32) for v in (start_lr, hold))
    q = jnp.clip((total - seen) / jnp.maximum(total - warmup, 1.0), 0.0, 1.0)
    decayed = final_lr + (lr - final_lr) * jnp.minimum(q / (1 - hold), 1.0)
    return jnp.where(seen < warmup, start_lr + (lr - start_lr) * _linear(seen, warmup), decayed)


def inverse_sqrt(seen: ScalarLike, *, lr: ScalarLike, warmup: ScalarLike, t_ref: ScalarLike) -> Float32[Array, ""]:
    """Linear warm-up and inverse square root decay, EDM2's form.

        lr * min(seen / warmup, 1) / sqrt( max(seen / t_ref, 1) )

    Args:
      seen: images before this step, >= 0.
      lr: the reference rate, reached if warmup <= t_ref.
      warmup: images of warm-up; 0 switches it off.
      t_ref: images at which the decay begins (EDM2 gives it in steps: times the batch); 0 switches it off.

    Returns:
      The rate of this step, float32 scalar.

    Example:
      >>> print(*(inverse_sqrt(n, lr=1.0, warmup=10, t_ref=100) for n in (0, 5, 100, 400)))
      0.0 0.5 1.0 0.5

    Reference: Karras et al. 2023, arXiv 2312.02696, appendix B.
    """
    seen, lr, warmup, t_ref = (jnp.asarray(v, jnp.float32) for v in (seen, lr, warmup, t_ref))
    ratio = jnp.where(t_ref > 0, seen / jnp.where(t_ref > 0, t_ref, 1.0), 1.0)
    return lr * _linear(seen, warmup) / jnp.sqrt(jnp.maximum(ratio, 1.0))


def _linear(seen: Float32[Array, ""], warmup: Float32[Array, ""]) -> Float32[Array, ""]:
    # The inner where keeps 0/0 out even of the branch that is not taken.
    on = warmup > 0
    return jnp.where(on, jnp.minimum(seen / jnp.where(on, warmup, 1.0), 1.0), 1.0)
