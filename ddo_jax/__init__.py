"""Direct Discriminative Optimization (DDO, arXiv 2503.01103) in JAX.

The loss for anyone's train step; examples/optax_loop.py shows it in a plain optax loop:

    log_ratio(logp_fn, params, ref_params, *args) -> r [B]             # any likelihood
    edm_inputs(x, sigma, eps, sigma_data) -> x_in, c_noise, f_hat      # what a diffusion network is fed
    diffusion_log_ratio(f, f_ref, f_hat) -> r [B]
    ar_logp(logits, tokens) -> logp [B]
    ddo_loss(r_real, r_fake, *, alpha, beta) -> loss, stats            # summarize(stats) -> what to log
    flow_inputs(x, t, eps) -> x_t, u                                   # what a velocity network is fed
    prediction_log_ratio(p, p_ref, target, weight) -> r [B]            # it predicts noise, images or velocities
    balanced_beta(std, alpha) -> beta                                  # from the spread of r in a probe
    self_play(params, rounds=, fakes=, train=, score=) -> best, history

Importing the package loads jax, numpy, jaxtyping and chex, nothing else.
"""

from ddo_jax.core.ar import ar_logp
from ddo_jax.core.ddo import ddo_loss, ddo_stats, ddo_terms, diffusion_log_ratio, log_ratio, summarize
from ddo_jax.core.edm import denoised, edm_inputs, loss_weight, noise_level, preconditioning
from ddo_jax.core.ema import ema_update, half_life_beta
from ddo_jax.core.flow import flow_denoised, flow_inputs, flow_weight
from ddo_jax.core.predictions import prediction_log_ratio, prediction_weight
from ddo_jax.core.samplers import HeunSettings, heun_sample
from ddo_jax.core.search import balanced_beta
from ddo_jax.core.self_play import self_play

__version__ = "0.1.0"

__all__ = [
    "HeunSettings",
    "ar_logp",
    "balanced_beta",
    "ddo_loss",
    "ddo_stats",
    "ddo_terms",
    "denoised",
    "diffusion_log_ratio",
    "edm_inputs",
    "ema_update",
    "flow_denoised",
    "flow_inputs",
    "flow_weight",
    "half_life_beta",
    "heun_sample",
    "load",
    "log_ratio",
    "loss_weight",
    "noise_level",
    "preconditioning",
    "prediction_log_ratio",
    "prediction_weight",
    "self_play",
    "summarize",
]


def load(what):
    """A trained model by name, path or URL; see `ddo_jax.store.load.load`. Only the call imports Flax."""
    from ddo_jax.store.load import load as _load

    return _load(what)
