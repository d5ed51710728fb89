"""The training state, a plain dict: params, opt, step; ema where there is an average, emas where there are several.

All of it is placed by one sharding rule.
"""

import zlib

import jax
import jax.numpy as jnp
import optax


def optimizer(c) -> optax.GradientTransformation:
    """Adam direction of a phase's config; the learning rate is applied by the step, where it is traced."""
    return optax.scale_by_adam(b1=c.b1, b2=c.b2, eps=c.eps)


HALF_LIFE = (None,)  # the lengths of a phase with one average of a half-life


def lengths(c) -> tuple:
    """The lengths of a phase's averages, of its config: standard deviations, `HALF_LIFE`, or none at all."""
    return tuple(c.ema_stds) or (HALF_LIFE if c.ema_mimg else ())


def new_state(params, c) -> dict:
    """A fresh optimizer and fresh EMAs, of a phase's config, around copies of `params`: the step donates its state."""
    return {
        "params": jax.tree.map(jnp.copy, params),
        **named_averages({std: jax.tree.map(jnp.copy, params) for std in lengths(c)}),
        "opt": optimizer(c).init(params),
        "step": jnp.zeros((), jnp.int32),
    }


def named_averages(by_std: dict) -> dict:
    """{std: EMA} -> their part of the state: "ema" is the first, "emas" the others by name; absent if none."""
    first, *others = by_std.items() or (None,)
    if first is None:
        return {}
    return {"ema": first[1]} | ({"emas": {f"{std:.3f}": average for std, average in others}} if others else {})


def averages(state: dict, stds: tuple) -> dict:
    """{std: EMA} of a state; the inverse of `named_averages`."""
    return {std: state["emas"][f"{std:.3f}"] if i else state["ema"] for i, std in enumerate(stds)}


def result(state: dict):
    """What a phase has made: its average, the first of several, or its parameters where it has none."""
    return state.get("ema", state["params"])


def derive(seed: int, *names) -> jax.Array:
    """One independent key per (seed, names): names are strings or integers."""
    key = jax.random.key(seed)
    for name in names:
        key = jax.random.fold_in(key, name if isinstance(name, int) else zlib.crc32(name.encode()))
    return key


def parameter_count(params) -> int:
    return sum(x.size for x in jax.tree.leaves(params))
