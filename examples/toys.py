"""Small data, networks and scores that several examples share; nothing here is about DDO."""

import jax
import jax.numpy as jnp
import numpy as np
import optax


def moons(rng, n):
    """Two half-moons, float32 [n, 2]."""
    angle, side = np.pi * rng.random(n), rng.integers(0, 2, n)
    x = np.stack([np.cos(angle) - 0.5, np.sin(angle) - 0.25], axis=1) * np.where(side, -1, 1)[:, None]
    return jnp.asarray(0.6 * x + 0.02 * rng.standard_normal((n, 2)), jnp.float32)


@jax.jit
def energy_distance(x, y):
    """2 E|x - y| - E|x - x'| - E|y - y'| of points [n, d] and [m, d]: 0 for equal laws."""
    xy, xx, yy = (jnp.mean(jnp.linalg.norm(a[:, None] - b[None], axis=-1)) for a, b in ((x, y), (x, x), (y, y)))
    return 2 * xy - xx - yy


LENGTH, OPEN, KINDS, NULL = 16, (0, 2), 3, 3  # of a sentence; opening brackets; its labels, and "no label"


def brackets(rng, n):
    """Balanced brackets, int32 [n, LENGTH] of ( ) [ ], and labels: 0 only round ones, 1 only square ones, 2 any."""
    label, rows = rng.integers(0, KINDS, n), []
    for kind in label:
        row, stack = [], []
        for left in range(LENGTH, 0, -1):
            if stack and (len(stack) == left or rng.random() < 0.5):
                row.append(stack.pop() + 1)
            else:
                stack.append(OPEN[rng.integers(0, 2) if kind == 2 else kind])
                row.append(stack[-1])
        rows.append(row)
    return jnp.asarray(rows, jnp.int32), jnp.asarray(label, jnp.int32)


def wrong(tokens, label):
    """Per cent of sentences that are not balanced, or not of their label's kind."""
    bad = 0
    for row, kind in zip(np.asarray(tokens).tolist(), np.asarray(label).tolist(), strict=True):
        stack = []
        fine = all(
            (stack.append(c) or kind == 2 or OPEN[kind] == c) if c in OPEN else bool(stack) and stack.pop() + 1 == c
            for c in row
        )
        bad += not (fine and not stack)
    return 100 * bad / len(label)


def transformer(key, vocabulary, width=48, layers=2):
    """Parameters of `logits`: `vocabulary` tokens go in, four come out."""
    shapes = {"token": (vocabulary, width), "place": (LENGTH, width), "label": (KINDS + 1, width), "out": (width, 4)}
    for i in range(layers):
        shapes |= {f"qkv{i}": (width, 3 * width), f"proj{i}": (width, width)}
        shapes |= {f"up{i}": (width, 4 * width), f"down{i}": (4 * width, width)}
    keys = jax.random.split(key, len(shapes))
    return {name: jax.random.normal(k, s) / np.sqrt(s[0]) for k, (name, s) in zip(keys, shapes.items(), strict=True)}


def logits(params, tokens, label, causal, heads=4):
    """[B, L, 4] of tokens [B, L] and labels [B]; causal: token i is told of the tokens before it only."""
    if causal:
        x = jnp.pad(params["token"][tokens], ((0, 0), (1, 0), (0, 0)))[:, :-1]
    else:
        x = params["token"][tokens]
    x = x + params["place"][None] + params["label"][label][:, None]
    mask = jnp.tril(jnp.ones((LENGTH, LENGTH), bool)) if causal else None
    for i in range(sum(name.startswith("qkv") for name in params)):
        h = jax.nn.standardize(x) @ params[f"qkv{i}"]
        q, k, v = jnp.split(h.reshape(*h.shape[:2], heads, -1), 3, axis=-1)
        a = jax.nn.dot_product_attention(q, k, v, mask=None if mask is None else mask[None, None])
        x = x + a.reshape(x.shape) @ params[f"proj{i}"]
        x = x + jax.nn.gelu(jax.nn.standardize(x) @ params[f"up{i}"]) @ params[f"down{i}"]
    return jax.nn.standardize(x) @ params["out"]


def adam(loss, params, batches, rate, average=0.05):
    """(parameters, their average) after a step of Adam on every one of `batches`: loss(params, batch)."""
    tx = optax.adam(rate)

    @jax.jit
    def step(params, mean, opt, batch):
        updates, opt = tx.update(jax.grad(loss)(params, batch), opt)
        params = optax.apply_updates(params, updates)
        return params, jax.tree.map(lambda m, p: m + average * (p - m), mean, params), opt

    state = params, params, tx.init(params)
    for batch in batches:
        state = step(*state, batch)
        yield state[:2]
