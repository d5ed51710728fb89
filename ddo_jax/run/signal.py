"""Is there anything to learn at the start of a round? The mean score gradient on real images and on fakes.

    g = mean grad log p_ref(x)        its norm, beside the norm that noise alone would give it

DDO's first gradient is -(beta / 2) g_real + (alpha beta / 2) g_fake. With exact likelihoods and exact samples g_fake is
0 (the score identity), at a converged MLE fit g_real too: then curvature and noise decide (docs/specs/ddo.md section
10), and only a score can choose.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from ddo_jax import sharding
from ddo_jax.data.pipeline import batches
from ddo_jax.run import record, state
from ddo_jax.run.prepare import Setup


@functools.cache  # of all rounds of a run
def make_gradient(family, rows: int):
    """Jitted (sums, params, frozen, record, key, sigma_law) -> sums with the gradient of a batch of `rows` examples.

    sums = (tree of sums of the gradients, sum of their squared norms).
    """

    @functools.partial(jax.jit, compiler_options=family.compiler_options or None)
    def add(sums, params, frozen, record, key, sigma_law):
        key_encode, key_draw = jax.random.split(key)
        examples = family.encode(frozen, record, key_encode)
        draws = family.pair_draw(key_draw, rows, sigma_law)

        def logp(params):
            return -jnp.mean(family.nll(family.score(params, frozen, examples, draws), examples, draws))

        gradient = jax.grad(logp)(family.project(params, "ddo"))
        squares = sum(jnp.sum(jnp.square(g)) for g in jax.tree.leaves(gradient))
        return jax.tree.map(jnp.add, sums[0], gradient), sums[1] + squares

    return add


def norms(total: float, squares: float, n: int) -> dict[str, float]:
    """{"norm": of the mean of n gradients, "noise": what it would be if their true mean were 0}.

    Args:
      total: squared norm of their sum. squares: sum of their squared norms.

    >>> norms(total=16.0, squares=8.0, n=2)  # two equal gradients of norm 2: no noise
    {'norm': 2.0, 'noise': 0.0}
    """
    mean = total / n**2
    return {"norm": math.sqrt(mean), "noise": math.sqrt(max(squares / n - mean, 0.0) / (n - 1))}


def measure(setup: Setup, name: str, ref, fakes, law) -> dict:
    """The norms on real images and on `fakes` (a source), logged as step 0 of the round `name`."""
    config, number = setup.config, setup.config.log.signal
    batch = config.ddo.batch // config.ddo.accumulation
    add = make_gradient(setup.family, batch)
    rule, found = sharding.tree_sharding(setup.mesh, ref), {}
    zeros = jax.jit(lambda tree: jax.tree.map(jnp.zeros_like, tree), out_shardings=rule)
    for side, source in (("real", setup.training_data), ("fake", fakes)):
        sums = zeros(ref), sharding.replicate(setup.mesh, jnp.zeros(()))
        reader = batches(source, batch, config.seed, host=(jax.process_index(), jax.process_count()))
        for key in jax.random.split(state.derive(config.seed, "signal"), number):
            rows = sharding.put_batch(setup.mesh, next(reader))
            sums = add(sums, ref, setup.frozen, rows, key, law)
        total = sum(float(np.sum(np.square(sharding.to_host(g), dtype=np.float64))) for g in jax.tree.leaves(sums[0]))
        found[side] = norms(total, float(sharding.to_host(sums[1])), number)
    flat = {f"signal/{side}_{key}": value for side, values in found.items() for key, value in values.items()}
    log = record.PhaseLog(setup.workdir / name / "signal", 0, False, jax.process_index() == 0)
    log.write({"phase": name, "step": 0, "images": 0, **flat})
    log.close()
    return {"batches": number, "batch": batch, **found}
