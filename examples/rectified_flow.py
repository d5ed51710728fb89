"""DDO on a flow-matching model: a rectified flow of two moons, its velocity network anybody's.

    python examples/rectified_flow.py

Three weights of the log-ratio are compared (`ddo_jax.flow_weight`), one beta each; the score is the energy distance to
fresh data. Self-play is `ddo_jax.self_play`: the reference is the best so far, the fakes are its samples.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import toys

import ddo_jax

SIGMA_DATA, ALPHA = 0.6, 1.0  # of two dimensions; images take more
BETA = {"velocity": 1.0, "x": 4.0, "edm": 1.0}
BATCH, POOL, STEPS, EVERY, NFE = 512, 8192, 90, 30, 20


def init(key, width=96):
    sizes = [2 + 8, width, width, 2]
    keys = jax.random.split(key, len(sizes) - 1)
    shapes = zip(keys, sizes[:-1], sizes[1:], strict=True)
    return [{"w": jax.random.normal(k, (m, n)) / np.sqrt(m), "b": jnp.zeros(n)} for k, m, n in shapes]


def velocity(params, x_t, t):
    """v(x_t, t): x_t [B, 2], t [B] -> [B, 2]."""
    angles = t[:, None] * np.pi * 2.0 ** np.arange(4)[None]
    h = jnp.concatenate([x_t, jnp.sin(angles), jnp.cos(angles)], axis=1)
    for i, layer in enumerate(params):
        h = h @ layer["w"] + layer["b"][None]
        h = jax.nn.silu(h) if i < len(params) - 1 else h
    return h


def draw(key, n):
    """All the randomness of a step: t = 1 / (1 + sigma) with ln sigma ~ N(-0.8, 1), and noise."""
    key_t, key_eps = jax.random.split(key)
    t = jax.nn.sigmoid(0.8 + jax.random.normal(key_t, (n,)))
    return t, jax.random.normal(key_eps, (n, 2))


def ratio(params, ref, x, t, eps, kind):
    x_t, u = ddo_jax.flow_inputs(x, t, eps)
    v, v_ref = velocity(params, x_t, t), velocity(jax.lax.stop_gradient(ref), x_t, t)
    return ddo_jax.prediction_log_ratio(v, v_ref, u, ddo_jax.flow_weight(kind, t, SIGMA_DATA))


def ddo(params, ref, real, fake, draws, kind):
    r_real, r_fake = (ratio(params, ref, x, *draws, kind) for x in (real, fake))  # the same draws for row i of both
    return ddo_jax.ddo_loss(r_real, r_fake, alpha=ALPHA, beta=BETA[kind])[0]


def mle(params, ref, real, fake, draws, kind):
    x_t, u = ddo_jax.flow_inputs(real, *draws)
    return jnp.mean((velocity(params, x_t, draws[0]) - u) ** 2)


@functools.partial(jax.jit, static_argnames=("loss", "kind", "steps", "rate"))
def trained(params, ref, real, fake, key, loss, kind, steps, rate):
    """(parameters, their average) after `steps` of Adam."""
    tx = optax.adam(rate)

    def step(carry, key):
        params, mean, opt = carry
        rows, own = jax.random.split(key)
        i, j = jax.random.randint(rows, (2, BATCH), 0, len(real))
        updates, opt = tx.update(jax.grad(loss)(params, ref, real[i], fake[j], draw(own, BATCH), kind), opt)
        params = optax.apply_updates(params, updates)
        return (params, jax.tree.map(lambda m, p: m + 0.05 * (p - m), mean, params), opt), None

    carry, _ = jax.lax.scan(step, (params, params, tx.init(params)), jax.random.split(key, steps))
    return carry[:2]


@functools.partial(jax.jit, static_argnames="n")
def sample(params, key, n):
    """n points by NFE Euler steps from t = 0."""

    def euler(x, t):
        return x + velocity(params, x, jnp.full((n,), t)) / NFE, None

    return jax.lax.scan(euler, jax.random.normal(key, (n, 2)), jnp.arange(NFE) / NFE)[0]


def main(rounds=2, pretraining=400, kinds=tuple(BETA)):
    """{weight: (score of the start, of the end)}, energy distances times 1000."""
    rng, found = np.random.default_rng(0), {}
    data, fresh = toys.moons(rng, POOL), toys.moons(rng, 2048)
    _, start = trained(init(jax.random.key(0)), None, data, data, jax.random.key(1), mle, "", pretraining, 3e-3)

    def score(params):
        return 1000 * float(toys.energy_distance(sample(params, jax.random.key(2), len(fresh)), fresh))

    for kind in kinds:

        def train(ref, pool, n, kind=kind):
            for steps in range(EVERY, STEPS + 1, EVERY):  # each from ref anew: a longer run repeats a shorter one
                yield trained(ref, ref, data, pool, jax.random.key(10 + n), ddo, kind, steps, 1e-3)[1]

        def fakes(ref, n):
            return sample(ref, jax.random.key(100 + n), POOL)

        best, history = ddo_jax.self_play(start, rounds=rounds, fakes=fakes, train=train, score=score)
        found[kind] = history[0]["start"], score(best)
        print(f"weight {kind:8}  energy distance x 1000: {found[kind][0]:.2f} -> {found[kind][1]:.2f}")
    return found


if __name__ == "__main__":
    with jax.default_matmul_precision("highest"):
        main()
