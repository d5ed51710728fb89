"""The training step as pure functions, and its jitted form on a mesh.

DDO, CCA and MLE differ in their objective only. Hyper-parameters that a search varies are traced,
so all candidates of a run share one compiled program.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from ddo_jax import sharding
from ddo_jax.core import ddo, ema, phema, schedules
from ddo_jax.run.state import averages, named_averages


class Hyper(NamedTuple):
    """Traced numbers of one candidate. noise = (P_mean, P_std)."""

    alpha: float
    beta: float
    lr: float
    noise: tuple[float, float]


def learning_rate(c, seen, *, lr, warmup: float, total: float):
    """The phase's schedule at `seen` images (all durations in images)."""
    if c.schedule == "cosine":
        return schedules.cosine(seen, lr=lr, final_lr=c.final_lr, warmup=warmup, total=total)
    if c.schedule == "linear":  # VAR's: the last rate is that of the last step
        shape = dict(final_lr=c.final_lr, start_lr=c.start_lr, hold=c.hold)
        return schedules.linear(seen, lr=lr, warmup=warmup, total=total - c.batch, **shape)
    if c.schedule == "inverse_sqrt":
        return schedules.inverse_sqrt(seen, lr=lr, warmup=warmup, t_ref=c.t_ref)
    return schedules.constant(seen, lr=lr, warmup=warmup)


def measured(x) -> tuple:
    """(sum, count) of an array, as in `ddo.ddo_stats`: statistics of any split add up leaf by leaf."""
    return jnp.sum(x.astype(jnp.float32)), jnp.asarray(x.size, jnp.float32)


def interleave(real, fake):
    """Rows real_0, fake_0, real_1, ...: one forward pass for both, and no row changes its device."""
    return jax.tree.map(lambda a, b: jnp.stack([a, b], 1).reshape(-1, *a.shape[1:]), real, fake)


def pair_objective(family, objective: str, params, ref_params, frozen, batch, hyper: Hyper):
    """Loss and statistics of one (micro-)batch of B pairs. A pair shares its draws.

    Args:
      objective: "ddo" or "cca". batch: (real, fake, draws, s_ref): s_ref [B,2] is what the reference said of real and
        fake rows, or None: it is asked here.
    """
    real, fake, draws, s_ref = batch
    examples, both = interleave(real, fake), interleave(draws, draws)
    s = family.score(params, frozen, examples, both)
    if s_ref is None:
        s_ref = family.score(ref_params, frozen, examples, both)
    else:
        s_ref = s_ref.reshape(-1)
    r = family.ratio(s, jax.lax.stop_gradient(s_ref), examples, both).reshape(-1, 2)
    nll = family.nll(s, examples, both).reshape(-1, 2)[:, 0]
    labels = examples["label"].reshape(-1, 2)
    loss, stats = family.pair_loss(objective, r, -nll, labels, draws, hyper.alpha, hyper.beta)
    return loss, {**stats, "nll_real": measured(jax.lax.stop_gradient(nll))}


def mle_objective(family, params, frozen, batch, key):
    """Mean MLE loss of one (micro-)batch."""
    examples, draws = batch
    loss = family.mle_loss(params, frozen, examples, draws, key)
    return jnp.mean(loss), {"loss_mle": measured(loss)}


def accumulated(objective, params, batch, parts: int):
    """(gradient, statistics) of the mean over `parts` equal micro-batches, one after the other in memory."""
    gradient = jax.grad(objective, has_aux=True)
    if parts == 1:
        return gradient(params, batch, 0)
    # micro-batch j takes rows j, j + parts, ...: every device keeps its own rows
    micro = jax.tree.map(lambda x: jnp.swapaxes(x.reshape(-1, parts, *x.shape[1:]), 0, 1), batch)

    def body(total, part):
        j, rows = part
        return jax.tree.map(jnp.add, total, gradient(params, rows, j)), None

    shapes = jax.eval_shape(gradient, params, jax.tree.map(lambda x: x[0], micro), 0)
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    (grads, stats), _ = jax.lax.scan(body, zero, (jnp.arange(parts), micro))
    return jax.tree.map(lambda g: g / parts, grads), stats


def averaged(current, params, c, seen) -> dict:
    """The averages of a training state after one more step: its "ema", and its "emas" where it has them."""
    if not c.ema_stds:
        beta = ema.half_life_beta(seen, c.batch, c.ema_mimg * 1e6, c.ema_rampup or None)
        return {"ema": ema.ema_update(current["ema"], params, beta)}
    before = averages(current, c.ema_stds)
    return named_averages(
        {std: ema.ema_update(e, params, phema.power_beta(seen, c.batch, std)) for std, e in before.items()}
    )


def decayed(c, seen, total: float):
    """The phase's weight decay at `seen` images: constant, or half a cosine to its final value at the last step."""
    if c.final_weight_decay is None:
        return c.weight_decay
    return schedules.cosine(seen, lr=c.weight_decay, final_lr=c.final_weight_decay, warmup=0, total=total - c.batch)


def advance(family, state, grads, tx, c, hyper: Hyper, *, warmup: float, total: float):
    """Optimizer step, EMAs of its (unprojected) output, step count."""
    seen = state["step"].astype(jnp.float32) * c.batch
    lr = learning_rate(c, seen, lr=hyper.lr, warmup=warmup, total=total)
    if c.clip:
        grads, _ = optax.clip_by_global_norm(c.clip).update(grads, optax.EmptyState())
    updates, opt = tx.update(grads, state["opt"], state["params"])
    if c.weight_decay or c.final_weight_decay:
        rate = decayed(c, seen, total)
        masks = family.decays(state["params"])
        updates = jax.tree.map(lambda u, p, on: u + rate * p if on else u, updates, state["params"], masks)
    params = jax.tree.map(lambda p, u: p - lr * u, state["params"], updates)
    return {"params": params, **averaged(state, params, c, seen), "opt": opt, "step": state["step"] + 1}


def zero_totals(objective: str) -> dict:
    """What the statistics of a step accumulate onto."""
    one = jnp.zeros((1,))
    stats = {"grad_norm": measured(one)}
    if objective != "mle":
        stats |= {**ddo.ddo_loss(one, one, alpha=1.0, beta=1.0)[1], "nll_real": measured(one)}
    else:
        stats |= {"loss_mle": measured(one)}
    return jax.tree.map(jnp.zeros_like, stats)


def step_keys(key, k):
    """Keys of step k, from 0: (encoding real, encoding fake, draws, loss, augmentation)."""
    return jax.random.split(jax.random.fold_in(key, k), 5)


def make_step(family, c, tx, mesh, shapes, *, objective: str, warmup: float, total: float):
    """The jitted step of a phase.

    Args:
      family: Family. c: the phase's config. tx: its optimizer. mesh: of `sharding.make_mesh`.
      shapes: the state's ShapeDtypeStructs. objective: "ddo", "cca" or "mle". warmup, total: in images.

    Returns:
      step(state, totals, ref, frozen, real, fake, key, hyper, s_ref=None) -> (state, totals). `real` and `fake` are
      records (uint8 images, labels); "mle" ignores `ref` and `fake` (None). s_ref [B,2]: what the reference said of
      the pairs at this step's draws (`asked.Asked`), in place of `ref`. `totals` accumulates the
      statistics on the device, from `zero_totals`. `state` and `totals` are donated.
    """

    def gradients(params, ref, frozen, real, fake, s_ref, keys, hyper):
        key_real, key_fake, key_draw, key_loss, key_augment = keys
        real = family.encode(frozen, real, key_real)
        draws = family.draw(key_draw, c.batch, hyper.noise)
        if objective != "mle":

            def loss(params, rows, j):
                return pair_objective(family, objective, params, ref, frozen, rows, hyper)

            fake = family.encode(frozen, fake, key_fake)
            return accumulated(loss, params, (real, fake, draws, s_ref), c.accumulation)

        def loss(params, rows, j):
            return mle_objective(family, params, frozen, rows, jax.random.fold_in(key_loss, j))

        return accumulated(loss, params, (family.augment(real, key_augment), draws), c.accumulation)

    def step(state, totals, ref, frozen, real, fake, key, hyper, s_ref=None):
        keys = step_keys(key, state["step"])
        params = family.project(state["params"], objective)
        with sharding.rows_over(mesh):
            grads, stats = gradients(params, ref, frozen, real, fake, s_ref, keys, hyper)
        stats["grad_norm"] = measured(optax.tree.norm(grads)[None])
        state = advance(family, {**state, "params": params}, grads, tx, c, hyper, warmup=warmup, total=total)
        return state, jax.tree.map(jnp.add, totals, stats)

    out = (sharding.tree_sharding(mesh, shapes), sharding.replicated(mesh))
    options = family.compiler_options or None
    return jax.jit(step, donate_argnums=(0, 1), out_shardings=out, compiler_options=options)


def make_ratio(family, c):
    """Jitted (params, ref, frozen, record, key, noise) -> r of one micro-batch of `c`, for histograms."""

    @functools.partial(jax.jit, compiler_options=family.compiler_options or None)
    def ratio(params, ref, frozen, record, key, noise):
        key_encode, key_draw = jax.random.split(key)
        examples = family.encode(frozen, record, key_encode)
        draws = family.draw(key_draw, c.batch // c.accumulation, noise)
        s, s_ref = (family.score(family.project(p, "ddo"), frozen, examples, draws) for p in (params, ref))
        return family.ratio(s, s_ref, examples, draws)

    return ratio
