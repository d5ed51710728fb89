"""The training state, a plain dict: params, ema, opt, step. All of it is placed by one sharding rule."""

import zlib

import jax
import jax.numpy as jnp
import optax


def optimizer(c) -> optax.GradientTransformation:
    """Adam direction of a phase's config; the learning rate is applied by the step, where it is traced."""
    return optax.scale_by_adam(b1=c.b1, b2=c.b2, eps=c.eps)


def new_state(params, tx: optax.GradientTransformation) -> dict:
    """A fresh optimizer and a fresh EMA around a copy of `params`: the step donates its state."""
    return {
        "params": jax.tree.map(jnp.copy, params),
        "ema": jax.tree.map(jnp.copy, params),
        "opt": tx.init(params),
        "step": jnp.zeros((), jnp.int32),
    }


def derive(seed: int, *names) -> jax.Array:
    """One independent key per (seed, names): names are strings or integers."""
    key = jax.random.key(seed)
    for name in names:
        key = jax.random.fold_in(key, name if isinstance(name, int) else zlib.crc32(name.encode()))
    return key


def parameter_count(params) -> int:
    return sum(x.size for x in jax.tree.leaves(params))
