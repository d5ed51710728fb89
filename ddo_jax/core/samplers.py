"""The EDM sampler: Heun's second-order method on the probability-flow ODE, with optional churn; guidance.

    t_i = ( sigma_max^(1/rho) + i/(n-1) (sigma_min^(1/rho) - sigma_max^(1/rho)) )^rho,  i < n;     t_n = 0
    x_hat = x + sqrt(t_hat^2 - t_i^2) s_noise xi                  # churn: t_hat = (1 + gamma) t_i
    d = (x_hat - D(x_hat; t_hat)) / t_hat                         # dx/dt
    x' = x_hat + (t_{i+1} - t_hat) d                              # Euler; then, except at the last step,
    d' = (x' - D(x'; t_{i+1})) / t_{i+1},   x' = x_hat + (t_{i+1} - t_hat) (d + d') / 2

Reference: Karras et al. 2022, arXiv 2206.00364, algorithms 1 and 2; of guidance, see `guided`.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64, ScalarLike

from ddo_jax.core import door


class HeunSettings(NamedTuple):
    """Settings of the EDM sampler: hashable, so it can be a static argument of jit (it must not be traced).

    Attributes:
      num_steps: n >= 2 steps; checked where it is used.
      sigma_min: lowest noise level before 0, > 0.
      sigma_max: first noise level, > sigma_min.
      rho: exponent of the grid, > 0; larger puts more steps at low noise.
      s_churn: total amount of fresh noise, 0 for the deterministic sampler.
      s_min: churn only where s_min <= t ...
      s_max: ... <= s_max.
      s_noise: factor on the fresh noise.
      grid: "float64", or "float32" for the grid as EDM2 computes it, up to 1e-6 (relative) away.

    Example:
      >>> HeunSettings(num_steps=18).nfe
      35
    """

    num_steps: int = 18
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    s_churn: float = 0.0
    s_min: float = 0.0
    s_max: float = math.inf
    s_noise: float = 1.0
    grid: str = "float64"

    @property
    def solver(self) -> str:
        """Its name in configs and records."""
        return "heun"

    @property
    def nfe(self) -> int:
        """Network evaluations per image: 2n - 1, for the last step is Euler's."""
        return 2 * self.num_steps - 1

    def record(self) -> dict:
        """What a protocol says of it."""
        return {"solver": self.solver, **self._asdict()}


class HeunSchedule(NamedTuple):
    """What each step needs, float64 [n] on the host: its start, its end, the std of the noise before it."""

    t_hat: Float64[np.ndarray, "n"]
    t_next: Float64[np.ndarray, "n"]
    noise_std: Float64[np.ndarray, "n"]


LEAST_SIGMA, MOST_SIGMA = 1.1e-19, 1.8e19  # networks square noise levels in float32: beyond, these are 0 or infinite


def check_levels(sigma: Float64[np.ndarray, "n"], name: str, value: float | int) -> None:
    """Refuse a grid of noise levels on which float32 cannot step.

    Args:
      sigma: NumPy float64 [n], the levels of the grid above 0, in their order. name, value: of the setting to blame.

    Raises:
      ValueError: a level that is not a number, below LEAST_SIGMA or above MOST_SIGMA, or one that float32 does not tell
        from the level before it.

    Example:
      >>> check_levels(np.array([80.0, 1.0, 0.002]), "rho", 7.0)
    """
    inside = (sigma >= LEAST_SIGMA) & (sigma <= MOST_SIGMA)
    if not inside.all():
        bad = sigma[~inside][0]
        raise ValueError(f"{name} is {value}: gives the noise level {bad:.3g}; allowed: {LEAST_SIGMA} to {MOST_SIGMA}")
    if not (np.diff(sigma.astype(np.float32)) < 0).all():
        raise ValueError(f"{name} is {value}: two of the {len(sigma)} noise levels are equal in float32")


def heun_times(settings: HeunSettings) -> Float64[np.ndarray, "n_plus_1"]:
    """The time grid t_0 = sigma_max > ... > t_{n-1} = sigma_min > t_n = 0, in noise levels.

    Args:
      settings: HeunSettings.

    Returns:
      [n + 1] NumPy float64: JAX without x64 would round it. With grid = "float32" all values are float32.

    Raises:
      ValueError: num_steps < 2, rho <= 0, not 0 < sigma_min < sigma_max, an unknown grid, or levels that float32 does
        not hold or tell apart.

    Numerics:
      grid = "float32": the ends of the ramp and their difference are rounded, the ramp is float32, its power is
      taken in float64 and rounded. So t_0 = 79.99998 where sigma_max is 80.

    Example:
      >>> print(heun_times(HeunSettings(num_steps=3)).round(4))
      [8.0000e+01 2.5152e+00 2.0000e-03 0.0000e+00]

    Reference: arXiv 2206.00364, equation 5; of the float32 grid, specs/edm2.md section 14.
    """
    n, low, high, rho = settings.num_steps, settings.sigma_min, settings.sigma_max, settings.rho
    if n < 2:
        raise ValueError(f"num_steps is {n}: the Heun sampler needs at least 2")
    if not 0 < low < high:
        raise ValueError(f"sigma_min is {low} and sigma_max is {high}: need 0 < sigma_min < sigma_max")
    if not rho > 0:
        raise ValueError(f"rho is {rho}: it must be > 0")
    if settings.grid not in ("float64", "float32"):
        raise ValueError(f"grid is {settings.grid!r}: allowed are float64, float32")
    check_levels(np.array([high, low], np.float64), *blamed(settings))
    dtype = np.dtype(settings.grid).type
    try:
        start, end = high ** (1 / rho), low ** (1 / rho)
    except OverflowError:
        raise ValueError(f"rho is {rho}: sigma_max^(1/rho) is too large a number; take a larger rho") from None
    with np.errstate(all="ignore"):  # what comes of an odd rho is looked at below
        ramp = np.arange(n, dtype=dtype) / dtype(n - 1)
        base = dtype(start) + ramp * dtype(end - start)
        times = (base.astype(np.float64) ** rho).astype(dtype)
    check_levels(times.astype(np.float64), "rho", rho)
    if not np.allclose(times[[0, -1]], [high, low], rtol=0.1, atol=0):
        raise ValueError(f"rho is {rho}: rounding moves the ends of the grid to {times[0]:.3g} and {times[-1]:.3g}")
    return np.append(times.astype(np.float64), 0.0)


def blamed(settings: Any) -> tuple[str, float | int]:
    """(name, value) of the end of a grid that float32 does not hold, for `check_levels`."""
    name = "sigma_max" if not settings.sigma_max <= MOST_SIGMA else "sigma_min"
    return name, getattr(settings, name)


def heun_schedule(settings: HeunSettings) -> HeunSchedule:
    """Start, end and churn of every step.

        gamma = min(s_churn / n, sqrt(2) - 1)  where s_min <= t_i <= s_max,  else 0
        t_hat = t_i + gamma t_i,    t_next = t_{i+1},    noise_std = sqrt(t_hat^2 - t_i^2) s_noise

    Args:
      settings: HeunSettings.

    Returns:
      HeunSchedule of NumPy float64 [n]; noise_std is exactly 0 where there is no churn.

    Raises:
      ValueError: as `heun_times`; s_churn, s_noise negative or not finite; s_min or s_max not a number.

    Example:
      >>> schedule = heun_schedule(HeunSettings(num_steps=2, s_churn=0.5))
      >>> print(schedule.t_hat, schedule.t_next, schedule.noise_std)
      [1.0e+02 2.5e-03] [0.002 0.   ] [6.0e+01 1.5e-03]

    Reference: arXiv 2206.00364, algorithm 2.
    """
    if not 0 <= settings.s_churn < math.inf:
        raise ValueError(f"s_churn is {settings.s_churn}: it must be >= 0 (0 switches churn off) and finite")
    if not 0 <= settings.s_noise < math.inf:
        raise ValueError(f"s_noise is {settings.s_noise}: it must be a finite number >= 0 (1 is the usual one)")
    if not settings.s_min < math.inf or math.isnan(settings.s_max):
        raise ValueError(f"s_min is {settings.s_min} and s_max is {settings.s_max}: they must be noise levels")
    times = heun_times(settings)
    t, t_next = times[:-1], times[1:]
    gamma = min(settings.s_churn / settings.num_steps, math.sqrt(2) - 1)
    t_hat = t + np.where((settings.s_min <= t) & (t <= settings.s_max), gamma, 0.0) * t
    return HeunSchedule(t_hat, t_next, np.sqrt(t_hat**2 - t**2) * settings.s_noise)


def guided(denoise: Callable[..., Any], guide: Callable[..., Any] | None, weight: ScalarLike) -> Callable[..., Any]:
    """A denoiser pushed away from that of a weaker network, for any sampler.

        D_w(x; sigma) = D_guide + w (D - D_guide)

    Args:
      denoise: `denoise(x [B, ...], sigma [B]) -> D [B, ...]`; its labels are bound already.
      guide: the same of the guiding network: without labels (classifier-free guidance), or smaller and less
        trained, with the same labels (autoguidance). None only where weight is 1.
      weight: w; 1 is `denoise` itself, above 1 guides. A Python number or a traced scalar; at the Python number
        1 the guide is never called.

    Returns:
      `denoise(x, sigma) -> D_w`, in the dtype of x.

    Raises:
      ValueError: no guide for a weight other than 1.

    Example:
      >>> import jax.numpy as jnp
      >>> d = guided(lambda x, sigma: 3 * x, lambda x, sigma: 2 * x, 1.5)
      >>> print(d(jnp.ones((1, 2)), jnp.ones(1)))
      [[3.5 3.5]]

    Reference: Ho & Salimans 2022, arXiv 2207.12598; Karras et al. 2024, arXiv 2406.02507; specs/edm2.md section 14.
    """
    if isinstance(weight, int | float) and weight == 1:
        return denoise
    if guide is None:
        raise ValueError(f"the guidance weight is {weight} and guide is None: pass a guide or set the weight to 1")

    def denoise_guided(x: Array, sigma: Array) -> Array:
        d, d_guide = denoise(x, sigma).astype(x.dtype), guide(x, sigma).astype(x.dtype)
        return d_guide + jnp.asarray(weight, x.dtype) * (d - d_guide)

    return denoise_guided


def heun_step(
    denoise: Callable[..., Any],
    x_hat: Float[Array, "b *dims"],
    t_hat: ScalarLike,
    t_next: ScalarLike,
    *,
    last: bool,
) -> Float[Array, "b *dims"]:
    """One step of the sampler from noise level t_hat to t_next.

        x' = x_hat + (t_next - t_hat) d,  then unless last  x' = x_hat + (t_next - t_hat) (d + d') / 2

    Args:
      denoise: `denoise(x [B, ...], sigma [B]) -> D [B, ...]`; sigma comes in the dtype of x.
      x_hat: state at t_hat, [B, ...], any churn noise already added.
      t_hat: noise level it has, > 0. Python number or traced scalar.
      t_next: noise level to reach, >= 0; > 0 unless last.
      last: no correction, so t_next may be 0. A Python bool.

    Returns:
      x at t_next, shape and dtype of x_hat.

    Numerics:
      The grid is rounded to the dtype of x once and used so throughout: each step is an exact step of a grid
      that differs in the last bit. float32 costs 3e-7 in the final image against all-float64; bfloat16 is too
      coarse.

    Example:
      >>> import jax.numpy as jnp
      >>> print(heun_step(lambda x, sigma: 0 * x, jnp.ones((1, 2)), 4.0, 1.0, last=False))  # data at 0: x ~ t
      [[0.25 0.25]]

    Reference: arXiv 2206.00364, algorithm 1.
    """
    t_hat, t_next = jnp.asarray(t_hat, x_hat.dtype), jnp.asarray(t_next, x_hat.dtype)

    def slope(x: Array, t: Array) -> Array:
        return (x - denoise(x, jnp.full(x.shape[:1], t)).astype(x.dtype)) / t

    d = slope(x_hat, t_hat)
    x_next = x_hat + (t_next - t_hat) * d
    if last:
        return x_next
    return x_hat + (t_next - t_hat) * (0.5 * (d + slope(x_next, t_next)))


def heun_sample(
    denoise: Callable[..., Any],
    latents: Float[Array, "b *dims"],
    settings: HeunSettings,
    noise: Callable[..., Any] | None = None,
    *,
    scan: bool = True,
) -> Float[Array, "b *dims"]:
    """Samples from unit normal latents: n - 1 Heun steps and one Euler step.

    Args:
      denoise: `denoise(x [B, ...], sigma [B]) -> D [B, ...]`; sigma comes in the dtype of latents.
      latents: unit normal, [B, ...], float32 or float64: the dtype the state keeps.
      settings: HeunSettings, static.
      noise: `noise(i) -> [B, ...]`, unit normal for step i (an int, or a traced int32 under scan), the same
        whenever asked for the same i. Needed with churn; never called without.
      scan: one `lax.scan` (the network is compiled 3 times whatever n is) or a Python loop (for debugging).

    Returns:
      x [B, ...], shape and dtype of latents, in the units of the data.

    Raises:
      ValueError: churn without noise, or settings that `heun_schedule` refuses.

    Numerics:
      The time grid comes from the host in float64 and is cast once, see `heun_step`.

    Example:
      >>> import jax.numpy as jnp
      >>> denoise = lambda x, sigma: jnp.full_like(x, 0.5)             # all data sit at 0.5
      >>> print(heun_sample(denoise, jnp.ones((1, 2)), HeunSettings(num_steps=4)))
      [[0.5 0.5]]

    Reference: arXiv 2206.00364, algorithms 1 and 2.
    """
    latents = door.floats("latents", latents)
    schedule = heun_schedule(settings)
    churn = bool(np.any(schedule.noise_std > 0))
    if churn and noise is None:
        raise ValueError(
            f"s_churn is {settings.s_churn} and noise is None: pass noise(i) -> [B, ...] or set s_churn = 0"
        )

    def step(x: Array, i: Any, t_hat: Any, t_next: Any, noise_std: Any, *, last: bool) -> Array:
        if churn and noise is not None:
            x = x + noise_std * noise(i).astype(x.dtype)
        return heun_step(denoise, x, t_hat, t_next, last=last)

    n = settings.num_steps
    rows = [v.astype(latents.dtype) for v in schedule]
    x = latents * jnp.asarray(heun_times(settings)[0], latents.dtype)
    if scan:
        heun = functools.partial(step, last=False)
        steps = (np.arange(n - 1, dtype=np.int32), *(v[:-1] for v in rows))
        x, _ = jax.lax.scan(lambda x, row: (heun(x, *row), None), x, steps)
    else:
        for i in range(n - 1):
            x = step(x, i, *(v[i] for v in rows), last=False)
    return step(x, n - 1, *(v[-1] for v in rows), last=True)
