"""DPM-Solver-v3 without training: a multistep exponential integrator on the denoised image, with a corrector.

In lambda = -ln sigma the probability-flow ODE is d(e^lambda x)/dlambda = e^lambda D. Between times s and t
(indices a < b of a fine uniform grid of lambda), with D expanded around s:

    x_t = r (x_s + sum_{k<p} E_k D^(k)),     r = sigma_t / sigma_s                           # p: the order
    E_k = trapezoid sum over nodes a..b of e^u u^k / k!,     u = lambda - lambda_s           # NOT the exact integral
    D^(k) = k-th derivative at s of the polynomial in lambda through p stored values of D, the one at s included

The predictor goes from the newest time to the next one. The corrector repeats the step that led to the newest
time, now with the D found there; x is replaced, D is not evaluated again. Both are linear in the stored x and D.

Reference: Zheng et al. 2023, arXiv 2310.13268, with the statistics l = 1, s = 0, b = 0; specs/edm2.md section 16.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64, Int64

from ddo_jax.core import door
from ddo_jax.core.samplers import blamed, check_levels

# The times are equally spaced in sigma^(1/rho); in ln sigma for infinite rho.
GRID_RHO = {"karras": 7.0, "log": math.inf, "uniform": 1.0, "quadratic": 2.0}


class DPMSettings(NamedTuple):
    """Settings of DPM-Solver-v3: hashable, so it can be a static argument of jit (it must not be traced).

    Attributes:
      num_steps: N >= 1 steps; checked where it is used, as all the others.
      sigma_min: noise level of the result, > 0.
      sigma_max: first noise level, > sigma_min.
      order: 1, 2 or 3, of the predictor.
      corrector: correct each x once its D is known.
      lower_order_final: the last steps have order ..., 2, 1.
      p_pseudo: Newton's divided differences for the derivatives of the predictor; the same up to order 2.
      c_pseudo: the same for the corrector, whose order is then one higher.
      grid: "karras", "log", "uniform" or "quadratic": even spacing of sigma^(1/7), ln sigma, sigma or
        sqrt(sigma), before rounding to the fine grid.
      intervals: of the fine grid, equal in ln sigma.

    Example:
      >>> DPMSettings(num_steps=25).nfe
      25
    """

    num_steps: int = 25
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    order: int = 2
    corrector: bool = True
    lower_order_final: bool = True
    p_pseudo: bool = False
    c_pseudo: bool = False
    grid: str = "karras"
    intervals: int = 250

    @property
    def solver(self) -> str:
        """Its name in configs and records."""
        return "dpmv3"

    @property
    def nfe(self) -> int:
        """Network evaluations per image: one a step, also with the corrector."""
        return self.num_steps

    def record(self) -> dict:
        """What a protocol says of it."""
        return {"solver": self.solver, **self._asdict()}


class DPMSchedule(NamedTuple):
    """What each step needs, float64 on the host: the noise level of its D, and two rows of weights.

    correct: of the predicted x, the x kept by the step before, and the D so far, newest first.
    predict: of the corrected x, and the D so far, newest first.
    """

    sigma: Float64[np.ndarray, "n"]
    correct: Float64[np.ndarray, "n d_plus_2"]
    predict: Float64[np.ndarray, "n d_plus_1"]


def _check(settings: DPMSettings) -> None:
    n, low, high = settings.num_steps, settings.sigma_min, settings.sigma_max
    if n < 1:
        raise ValueError(f"num_steps is {n}: DPM-Solver-v3 needs at least 1")
    if not 0 < low < high:
        raise ValueError(f"sigma_min is {low} and sigma_max is {high}: need 0 < sigma_min < sigma_max")
    check_levels(np.array([high, low], np.float64), *blamed(settings))
    if settings.order not in (1, 2, 3):
        raise ValueError(f"order is {settings.order}: allowed are 1, 2, 3")
    if settings.grid not in GRID_RHO:
        raise ValueError(f"grid is {settings.grid!r}: allowed are {', '.join(GRID_RHO)}")
    if settings.intervals < 1:
        raise ValueError(f"intervals is {settings.intervals}: it must be at least 1 (default 250)")
    if settings.c_pseudo and not settings.corrector:
        raise ValueError("c_pseudo is True and corrector is False: c_pseudo changes the corrector only")


def dpm_grid(settings: DPMSettings) -> tuple[Float64[np.ndarray, "m_plus_1"], Int64[np.ndarray, "n_plus_1"]]:
    """The fine grid of lambda = -ln sigma, and the indices on it of the N + 1 times.

        lambda_m = -ln sigma_max + m h,   h = ln(sigma_max / sigma_min) / M,   m = 0..M      # M = intervals
        sigma_j = (sigma_max^(1/rho) + j/N (sigma_min^(1/rho) - sigma_max^(1/rho)))^rho, rounded to a node in lambda

    Args:
      settings: DPMSettings.

    Returns:
      (lambda [M + 1] NumPy float64, rising from -ln sigma_max to -ln sigma_min; indices [N + 1] int64, strictly
      rising from 0 to M). The times are exp(-lambda[indices]).

    Raises:
      ValueError: a setting outside its range, or so many steps that two times share a node.

    Example:
      >>> lam, indices = dpm_grid(DPMSettings(num_steps=6))
      >>> print(lam.shape, indices)
      (251,) [  0  23  50  82 121 173 250]

    Reference: specs/edm2.md sections 16.1, 16.2.
    """
    _check(settings)
    n, m, rho = settings.num_steps, settings.intervals, GRID_RHO[settings.grid]
    first, last = -math.log(settings.sigma_max), -math.log(settings.sigma_min)
    ramp = np.arange(n + 1, dtype=np.float64) / n
    if math.isinf(rho):
        wanted = first + ramp * (last - first)
    else:
        high, low = settings.sigma_max ** (1 / rho), settings.sigma_min ** (1 / rho)
        wanted = -rho * np.log(high + ramp * (low - high))
    indices = np.round(m * (wanted - first) / (last - first)).astype(np.int64)
    if not np.all(np.diff(indices) > 0):
        raise ValueError(
            f"num_steps is {n}: two times fall on one node of the grid of {m} intervals; take fewer steps (with the "
            "default settings at most 139) or more intervals"
        )
    lam = first + np.arange(m + 1) * ((last - first) / m)
    check_levels(np.exp(-lam[indices]), "num_steps", n)
    return lam, indices


def exponential_sum(lam: Float64[np.ndarray, "nodes"], k: int) -> float:
    """Weight of the k-th derivative of D in one step.

        E_k = trapezoid sum over the nodes of e^u u^k / k!,     u = lambda - lambda_0

    Args:
      lam: equally spaced nodes from the start to the end of the step, at least 2.
      k: >= 0.

    Returns:
      E_k, a Python float.

    Numerics:
      A sum over the nodes, as in the reference: the exact integral of e^u is smaller by (h/2) coth(h/2), 1.5e-4
      with the default grid, which would show in the images.

    Example:
      >>> round(exponential_sum(np.array([0.0, 0.5, 1.0]), 0), 6)          # e - 1 = 1.718282
      1.753931

    Reference: specs/edm2.md section 16.1.
    """
    u = lam - lam[0]
    f = np.exp(u) * u**k / math.factorial(k)
    return float((u[1] - u[0]) * (f.sum() - (f[0] + f[-1]) / 2))


def derivative_weights(lam: Float64[np.ndarray, "p"], pseudo: bool) -> Float64[np.ndarray, "p p"]:
    """Derivatives of D at lambda_0 as linear forms of D_0 .. D_{p-1}.

        normal:  D^(k) = k! c_k,   sum_k c_k (lambda_i - lambda_0)^k = D_i
        pseudo:  D^(k) = k! D[lambda_0, .., lambda_k],  Newton's divided difference; the same for k < p = 2

    Args:
      lam: lambda of the stored values, all different; D is expanded around the first.
      pseudo: which of the two.

    Returns:
      [p, p]; row k holds the weights of D_0 .. D_{p-1} in D^(k).

    Example:
      >>> print(derivative_weights(np.array([0.0, 0.5]), pseudo=False))
      [[ 1.  0.]
       [-2.  2.]]

    Reference: specs/edm2.md section 16.3.
    """
    p = len(lam)
    factorials = np.array([[float(math.factorial(k))] for k in range(p)])
    if not pseudo:
        return factorials * np.linalg.inv(np.vander(lam - lam[0], increasing=True))
    rows, table = [], np.eye(p)  # table[j]: the divided difference that starts at j, as weights of D
    for k in range(1, p + 1):
        rows.append(table[0])
        table = (table[:-1] - table[1:]) / (lam[: p - k] - lam[k:])[:, None]
    return factorials * np.stack(rows)


def dpm_schedule(settings: DPMSettings) -> DPMSchedule:
    """All the numbers of the sampler.

    Args:
      settings: DPMSettings.

    Returns:
      DPMSchedule of NumPy float64; its D weights are as many as the highest order needs.

    Raises:
      ValueError: as `dpm_grid`.

    Example:
      >>> schedule = dpm_schedule(DPMSettings(num_steps=2, sigma_min=1.0, sigma_max=4.0, intervals=2))
      >>> print(schedule.sigma, schedule.correct.shape, schedule.predict.shape)
      [4. 2.] (2, 4) (2, 3)
      >>> print(schedule.predict[0].round(4))                # sigma 4 -> 2: x/2 + D (1 - 1/2) kappa, kappa ~ 1
      [0.5    0.5199 0.    ]

    Reference: specs/edm2.md sections 16.3, 16.4.
    """
    lam, indices = dpm_grid(settings)
    times, n = lam[indices], settings.num_steps
    width = settings.order + settings.c_pseudo  # the most values of D that a step uses

    def step(start: int, end: int, nodes: Sequence[int], pseudo: bool) -> tuple[float, np.ndarray]:
        """(r, weights of D at the nodes) of the step between two times; nodes[0] is its start."""
        order, fine = len(nodes), lam[indices[start] : indices[end] + 1]
        e = np.array([exponential_sum(fine, k) for k in range(order)])
        r = math.exp(times[start] - times[end])
        return r, r * (e @ derivative_weights(times[list(nodes)], pseudo))

    correct, predict, previous = np.zeros((n, 2 + width)), np.zeros((n, 1 + width)), 0
    correct[:, 0] = 1
    for i in range(n):
        order = previous + settings.c_pseudo
        if settings.corrector and order >= 2:
            nodes = [i - 1, i, *range(i - 2, i - order, -1)]
            correct[i, 0] = 0
            correct[i, 1], weights = step(i - 1, i, nodes, settings.c_pseudo)
            correct[i, [2 + i - j for j in nodes]] = weights
        order = min(i + 1, settings.order, n - i if settings.lower_order_final else n)
        predict[i, 0], predict[i, 1 : 1 + order] = step(i, i + 1, range(i, i - order, -1), settings.p_pseudo)
        previous = order
    return DPMSchedule(np.exp(-times[:-1]), correct, predict)


def dpm_sample(
    denoise: Callable[..., Any],
    latents: Float[Array, "b *dims"],
    settings: DPMSettings,
    *,
    scan: bool = True,
) -> Float[Array, "b *dims"]:
    """Samples from unit normal latents by N multistep steps, one network evaluation each.

    Args:
      denoise: `denoise(x [B, ...], sigma [B]) -> D [B, ...]`; sigma comes in the dtype of latents.
      latents: unit normal, [B, ...], float32 or float64: the dtype the state keeps.
      settings: DPMSettings, static.
      scan: one `lax.scan` (the network is compiled once whatever N is) or a Python loop (for debugging).

    Returns:
      x [B, ...] at noise level sigma_min, shape and dtype of latents, in the units of the data.

    Raises:
      ValueError: settings that `dpm_grid` refuses.

    Numerics:
      The weights come from the host in float64 and are cast once. The state in float32 costs 3e-7 in the final
      image against all-float64; bfloat16 is too coarse.

    Example:
      >>> import jax.numpy as jnp
      >>> denoise = lambda x, sigma: jnp.full_like(x, 0.5)             # all data sit at 0.5
      >>> print(dpm_sample(denoise, jnp.zeros((1, 2)), DPMSettings(num_steps=4)).round(3))
      [[0.5 0.5]]

    Reference: arXiv 2310.13268; specs/edm2.md section 16.4.
    """
    latents = door.floats("latents", latents)
    schedule = dpm_schedule(settings)

    def combine(weights: Any, terms: Any) -> Any:
        return sum(weights[i] * term for i, term in enumerate(terms))

    def step(state: Any, row: Any) -> tuple[Any, None]:
        x, kept, past = state
        sigma, correct, predict = row
        d = denoise(x, jnp.full(x.shape[:1], sigma)).astype(x.dtype)
        history = (d, *past)  # newest first
        kept = combine(correct, (x, kept, *history))
        return (combine(predict, (kept, *history)), kept, history[:-1]), None

    rows = tuple(v.astype(latents.dtype) for v in schedule)
    zeros = jnp.zeros_like(latents)
    state = (
        latents * jnp.asarray(settings.sigma_max, latents.dtype),
        zeros,
        (zeros,) * (schedule.predict.shape[1] - 2),
    )
    if scan:
        state, _ = jax.lax.scan(step, state, rows)
    else:
        for i in range(settings.num_steps):
            state, _ = step(state, tuple(v[i] for v in rows))
    return state[0]
