"""DDO on a masked ("diffusion") language model: an ELBO in the place of log p.

    python examples/masked.py

The network fills in masked tokens. With each token masked with probability t ~ U(0, 1), the mean of
(1 / t) sum_masked log p(token | the rest) is a lower bound of log p(sentence); here t starts at 1/16, for below it
hardly anything is masked, and 1 / t is large. ONE draw of (t, mask) serves target and
reference, on real and fake row i: what both networks find hard cancels in r. "Any likelihood" means no more than that:
a number of nats for an example, and randomness that is passed in.
"""

import jax
import jax.numpy as jnp
import numpy as np
import toys

import ddo_jax

MASK = 4  # the fifth token that goes in
ALPHA, BETA, RATE = 0.5, 0.3, 3e-4
BATCH, POOL, STEPS, EVERY = 256, 4096, 60, 10


def draw(key, n):
    """All the randomness of a step: t [n] and mask [n, L]."""
    key_t, key_mask = jax.random.split(key)
    t = jax.random.uniform(key_t, (n,), minval=1 / toys.LENGTH)
    return t, jax.random.uniform(key_mask, (n, toys.LENGTH)) < t[:, None]


def elbo(params, tokens, label, t, mask):
    """One draw of the lower bound of log p, nats [B]."""
    logits = toys.logits(params, jnp.where(mask, MASK, tokens), label, causal=False)
    logp = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], axis=-1)[..., 0]
    return jnp.sum(jnp.where(mask, logp, 0.0), axis=1) / t


def mle(params, batch):
    tokens, label, key = batch
    return -jnp.mean(elbo(params, tokens, label, *draw(key, len(tokens))))


def ddo(params, batch):
    ref, real, fake, key = batch
    draws = draw(key, BATCH)
    r_real, r_fake = (ddo_jax.log_ratio(elbo, params, ref, *side, *draws) for side in (real, fake))
    return ddo_jax.ddo_loss(r_real, r_fake, alpha=ALPHA, beta=BETA)[0]


@jax.jit
def sample(params, key, label):
    """Sentences for labels [n]: from all masked, one token after the other in an order of each row's own."""
    key_order, key = jax.random.split(key)
    order = jnp.argsort(jax.random.uniform(key_order, (len(label), toys.LENGTH)), axis=1)

    def one(tokens, at):
        place, key = at
        logits = toys.logits(params, tokens, label, causal=False)
        drawn = jax.random.categorical(key, jnp.take_along_axis(logits, place[:, None, None], axis=1)[:, 0])
        return tokens.at[jnp.arange(len(label)), place].set(drawn), None

    start = jnp.full((len(label), toys.LENGTH), MASK)
    return jax.lax.scan(one, start, (order.T, jax.random.split(key, toys.LENGTH)))[0]


def main(rounds=1, pretraining=600):
    """Per cent of wrong sentences: (of the start, after DDO, after as many further steps of MLE)."""
    rng, keys = np.random.default_rng(0), iter(jax.random.split(jax.random.key(1), 10_000))
    tokens, label = toys.brackets(rng, POOL)
    balanced = jnp.arange(POOL) % toys.KINDS

    def score(params):
        return toys.wrong(sample(params, jax.random.key(2), balanced[:2048]), balanced[:2048])

    def rows(tokens, label):
        i = rng.integers(0, POOL, BATCH)
        return tokens[i], label[i]

    def train(ref, pool, n):
        batches = ((ref, rows(tokens, label), rows(pool, balanced), next(keys)) for _ in range(STEPS))
        for k, (_, mean) in enumerate(toys.adam(ddo, ref, batches, RATE, average=0.2), 1):
            if k % EVERY == 0:
                yield mean

    def fitted(params, steps, rate):
        batches = ((*rows(tokens, label), next(keys)) for _ in range(steps))
        *_, (_, mean) = toys.adam(mle, params, batches, rate, average=0.2)
        return mean

    def fakes(ref, n):
        return sample(ref, jax.random.key(100 + n), balanced)

    start = fitted(toys.transformer(jax.random.key(0), 5), pretraining, 2e-3)
    best, history = ddo_jax.self_play(start, rounds=rounds, fakes=fakes, train=train, score=score)
    found = history[0]["start"], score(best), score(fitted(start, rounds * STEPS, RATE))
    print("wrong sentences, per cent: start {:.1f}, after DDO {:.1f}, after as many steps of MLE {:.1f}".format(*found))
    print("at every tenth step:", ", ".join(f"{s:.1f}" for r in history for s in r["scores"]))
    return found


if __name__ == "__main__":
    main()
