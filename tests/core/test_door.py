"""What users of the functions get wrong: one clear ValueError each, and what is merely unusual works without a warning.

In a process of its own: jaxtyping and beartype, which check every shape in the other tests, are not there for users.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

SETUP = """
import json, sys, warnings
warnings.simplefilter("error")
import jax, jax.numpy as jnp, numpy as np
import ddo_jax as d
from ddo_jax.core import ar, edm, samplers, dpm_solver, ema
r, x, s = jnp.array([0.5, -1.0, 2.0, 0.1]), jnp.ones((2, 8)), jnp.ones(2)
logits, tokens = jnp.zeros((2, 3, 4)), jnp.zeros((2, 3), jnp.int32)
flags, half = jnp.zeros(4, bool), dict(alpha=4.0, beta=0.05)
var = dict(dropped_row_loss="nll", **half)
"""

REFUSED = {
    "d.ddo_loss(r[:, None], r, real_weight=r, **half)": "r_real has shape (4, 1): it must be [B]",
    "d.ddo_loss(r, r[None], **half)": "r_fake has shape (1, 4): it must be [B]",
    "d.ddo_loss(r, r, real_weight=r[:1], **half)": "real_weight has shape (1,), its term has (4,): they must be equal",
    "d.ddo_loss(r, r, fake_weight=jnp.ones(()), **half)": "fake_weight has shape (), its term has (4,)",
    "d.ddo_loss(r[:0], r, **half)": "r_real has shape (0,): its first axis must be a batch of at least one row",
    "d.ddo_loss(jnp.arange(4), r, **half)": "r_real is int32: it must be floating numbers",
    "d.ddo_terms(jnp.float32(1), r, **half)": "r_real has shape (): it must be [B]",
    "d.ddo_stats(r[:, None], r, beta=1.0)": "r_real has shape (4, 1): it must be [B]",
    "d.ddo_loss({}, r, **half)": "r_real",
    "d.diffusion_log_ratio(x, x, x[0])": "f_hat has shape (8,), f has (2, 8): they must be equal",
    "d.diffusion_log_ratio(x, x[:1], x)": "f_ref has shape (1, 8), f has (2, 8)",
    "d.diffusion_log_ratio(x[:0], x[:0], x[:0])": "f has shape (0, 8)",
    "d.log_ratio(lambda p, x: p * x[:, None], 1.0, 2.0, r)": "logp_fn(params, ...) has shape (4, 1): it must be [B]",
    "d.log_ratio(lambda p, x: jnp.sum(p * x), 1.0, 2.0, r)": "logp_fn(params, ...) has shape (): it must be [B]",
    "d.ar_logp(logits, tokens.astype(float))": "tokens is float32: it must be integers in [0, 4)",
    "d.ar_logp(logits, tokens + 4)": "tokens is 4 somewhere: it must be in [0, 4)",
    "d.ar_logp(logits, tokens - 1)": "tokens is -1 somewhere: it must be in [0, 4)",
    "d.ar_logp(logits[0], tokens[0])": "logits has shape (3, 4): it must be [B, L, V]",
    "d.ar_logp(logits, tokens[:, :2])": "tokens has shape (2, 2), logits without V has (2, 3)",
    "ar.guidance(logits, logits[0], 0.5)": "logits_uncond has shape (3, 4), logits_cond has (2, 3, 4)",
    "ar.draw(logits, logits[:1])": "gumbel has shape (1, 3, 4), logits has (2, 3, 4)",
    "ar.var_ddo_loss(r, r, r, r, **var)": "dropped is float32: it must be booleans",
    "ar.var_ddo_loss(r, r, r, flags[:1], **var)": "dropped has shape (1,), r_real has (4,)",
    "ar.cca_loss(r, r, flags[:2], lam=1.0, beta=1.0)": "positive has shape (2,), r_matched has (4,)",
    "d.edm_inputs(x, s[:1], x, 0.5)": "sigma has shape (1,), x has (2, 8): rows must be as many",
    "d.edm_inputs(x, s[:, None], x, 0.5)": "sigma has shape (2, 1): it must be [B]",
    "d.edm_inputs(x, s, x[0], 0.5)": "eps has shape (8,), x has (2, 8): they must be equal",
    "d.edm_inputs(x.astype(jnp.uint8), s, x, 0.5)": "x is uint8: it must be floating numbers",
    "d.denoised(x, x, s[:1], 0.5)": "sigma has shape (1,), f has (2, 8)",
    "d.preconditioning(jnp.arange(3), 0.5)": "sigma is int32: it must be floating numbers",
    "d.ema_update({'w': x}, {'w': x[0]}, 0.5)": "params has shape (8,), ema has (2, 8)",
    "d.heun_sample(lambda x, t: x, x.astype(jnp.int32), d.HeunSettings())": "latents is int32",
}
ACCEPTED = {
    "d.ddo_loss([0.5, -1.0], [0.1], **half)[0]": "d.ddo_loss(jnp.array([0.5, -1.0]), jnp.array([0.1]), **half)[0]",
    "d.ddo_loss(np.array([0.5, 1.0]), np.array([0.1]), **half)[0]": "d.ddo_loss([0.5, 1.0], [0.1], **half)[0]",
    "d.ddo_loss(r, r, real_weight=np.ones(4), fake_weight=flags, **half)[0]": "d.ddo_terms(r, r, **half)[0].mean()",
    "d.diffusion_log_ratio(np.ones((2, 8)), np.zeros((2, 8)), np.zeros((2, 8)))": "jnp.full(2, -8.0)",
    "d.log_ratio(lambda p, x: p * np.asarray(x, np.float64), 2.0, 1.0, np.asarray(r))": "r",
    "d.ar_logp(np.zeros((2, 3, 4)), [[0, 1, 2], [3, 2, 1]])": "jnp.full(2, -3 * np.log(4.0).astype(np.float32))",
    "jax.jit(d.ar_logp)(logits, tokens)": "d.ar_logp(logits, tokens)",
    "d.edm_inputs(np.ones((2, 8)), np.ones(2), np.zeros((2, 8)), 0.5)[0]": "d.edm_inputs(x, s, 0 * x, 0.5)[0]",
    "ar.var_ddo_loss([0.1], [0.2], [3.0], [True], **var)[0]": "jnp.float32(3.0)",
}

RUN = """
found = {}
for text in json.loads(sys.argv[1]):
    try:
        found[text] = str(eval(text))
    except ValueError as e:
        found[text] = f"ValueError: {e}"
    except BaseException as e:
        found[text] = f"{type(e).__name__}: {e}"
for text, other in json.loads(sys.argv[2]).items():
    try:
        found[text] = bool(np.allclose(eval(text), eval(other), rtol=1e-6))
    except BaseException as e:
        found[text] = f"{type(e).__name__}: {e}"
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found():
    arguments = [json.dumps(list(REFUSED)), json.dumps(ACCEPTED)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    line = [sys.executable, "-c", SETUP + RUN, *arguments]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("call", REFUSED)
def test_mistakes_are_named(found, call):
    """Breaks if a wrong shape or dtype broadcasts in silence, gives nan, or ends in somebody else's exception."""
    assert found[call].startswith("ValueError: ") and REFUSED[call] in found[call] and "\n" not in found[call]


@pytest.mark.parametrize("call", ACCEPTED)
def test_what_is_unusual_works(found, call):
    """Breaks if a list or NumPy's float64 is refused, or causes a warning (which is an error there)."""
    assert found[call] is True
