"""DDO on a decoder-only transformer: exact likelihoods by `ar_logp`, labels dropped for classifier-free guidance.

    python examples/transformer.py

The language is balanced brackets, the score the share of wrong sentences. Two things differ from diffusion: nothing is
drawn but which labels are dropped (the same for real and fake row i), and log p is exact, so what moves theta at first
is that the reference is not yet the best fit (docs/specs/ddo.md, section 10).
"""

import jax
import jax.numpy as jnp
import numpy as np
import toys

import ddo_jax

ALPHA, BETA, RATE = 0.5, 0.3, 1e-4
BATCH, POOL, STEPS, EVERY, DROP = 256, 4096, 60, 10, 0.1


def logp(params, tokens, label):
    """Nats [B] of sentences [B, L], summed over their tokens."""
    return ddo_jax.ar_logp(toys.logits(params, tokens, label, causal=True), tokens)


def dropped(key, label):
    """Labels with some replaced by "no label"; row i of real and fake share the draw."""
    return jnp.where(jax.random.uniform(key, label.shape) < DROP, toys.NULL, label)


def mle(params, batch):
    tokens, label, key = batch
    return -jnp.mean(logp(params, tokens, dropped(key, label)))


def ddo(params, batch):
    ref, real, fake, key = batch
    r_real, r_fake = (ddo_jax.log_ratio(logp, params, ref, x, dropped(key, label)) for x, label in (real, fake))
    return ddo_jax.ddo_loss(r_real, r_fake, alpha=ALPHA, beta=BETA)[0]


@jax.jit
def sample(params, key, label):
    """Sentences for labels [n], one token after the other."""

    def one(tokens, at):
        i, key = at
        row = jax.lax.dynamic_index_in_dim(toys.logits(params, tokens, label, causal=True), i, 1, keepdims=False)
        return tokens.at[:, i].set(jax.random.categorical(key, row)), None

    start = jnp.zeros((len(label), toys.LENGTH), jnp.int32)
    return jax.lax.scan(one, start, (jnp.arange(toys.LENGTH), jax.random.split(key, toys.LENGTH)))[0]


def score(params):
    """Per cent of wrong sentences among 2048."""
    label = jnp.arange(2048) % toys.KINDS
    return toys.wrong(sample(params, jax.random.key(2), label), label)


def main(rounds=2, pretraining=250):
    """(score of the start, of the end, of as many further steps of MLE)."""
    rng, keys = np.random.default_rng(0), iter(jax.random.split(jax.random.key(1), 10_000))
    tokens, label = toys.brackets(rng, POOL)

    def rows():
        i = rng.integers(0, POOL, BATCH)
        return tokens[i], label[i]

    def fakes(ref, n):
        balanced = jnp.arange(POOL) % toys.KINDS
        return sample(ref, jax.random.key(100 + n), balanced), balanced

    def train(ref, pool, n):
        def batches():
            for _ in range(STEPS):
                j = rng.integers(0, POOL, BATCH)
                yield ref, rows(), (pool[0][j], pool[1][j]), next(keys)

        for k, (_, mean) in enumerate(toys.adam(ddo, ref, batches(), RATE, average=0.2), 1):
            if k % EVERY == 0:
                yield mean

    def fitted(params, steps, rate):
        batches = ((*rows(), next(keys)) for _ in range(steps))
        *_, (_, mean) = toys.adam(mle, params, batches, rate, average=0.2)
        return mean

    start = fitted(toys.transformer(jax.random.key(0), 4), pretraining, 2e-3)
    best, history = ddo_jax.self_play(start, rounds=rounds, fakes=fakes, train=train, score=score)
    found = history[0]["start"], score(best), score(fitted(start, rounds * STEPS, RATE))
    print("wrong sentences, per cent: start {:.1f}, after DDO {:.1f}, after as many steps of MLE {:.1f}".format(*found))
    return found


if __name__ == "__main__":
    main()
