"""The training state, a plain dict: params, ema, opt, step; and emas where several EMA lengths are tracked.

All of it is placed by one sharding rule.
"""

import zlib

import jax
import jax.numpy as jnp
import optax


def optimizer(c) -> optax.GradientTransformation:
    """Adam direction of a phase's config; the learning rate is applied by the step, where it is traced."""
    return optax.scale_by_adam(b1=c.b1, b2=c.b2, eps=c.eps)


def new_state(params, tx: optax.GradientTransformation, ema_stds=()) -> dict:
    """A fresh optimizer and fresh EMAs around copies of `params`: the step donates its state.

    Args:
      ema_stds: of the phase's config. The first length, or the half-life EMA without any, is "ema".
    """
    copies = {std: jax.tree.map(jnp.copy, params) for std in ema_stds or (None,)}
    return {
        "params": jax.tree.map(jnp.copy, params),
        **named_averages(copies),
        "opt": tx.init(params),
        "step": jnp.zeros((), jnp.int32),
    }


def named_averages(by_std: dict) -> dict:
    """{std: EMA} -> their part of the state: "ema" is the first, "emas" the others by name, absent if none."""
    (_, first), *others = by_std.items()
    return {"ema": first} | ({"emas": {f"{std:.3f}": average for std, average in others}} if others else {})


def averages(state: dict, ema_stds) -> dict:
    """{std: EMA} of a state; the inverse of `named_averages`."""
    return {std: state["emas"][f"{std:.3f}"] if i else state["ema"] for i, std in enumerate(ema_stds)}


def derive(seed: int, *names) -> jax.Array:
    """One independent key per (seed, names): names are strings or integers."""
    key = jax.random.key(seed)
    for name in names:
        key = jax.random.fold_in(key, name if isinstance(name, int) else zlib.crc32(name.encode()))
    return key


def parameter_count(params) -> int:
    return sum(x.size for x in jax.tree.leaves(params))
