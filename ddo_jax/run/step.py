"""The training step as pure functions, and its jitted form on a mesh.

DDO, CCA and MLE differ in their objective only. Hyper-parameters that a search varies are traced,
so all candidates of a run share one compiled program.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ddo_jax import config as configs
from ddo_jax import sharding
from ddo_jax.core import ddo, ema, phema, schedules
from ddo_jax.families import Family, Side
from ddo_jax.run.state import averages, lengths, named_averages, new_state, optimizer


class Hyper(NamedTuple):
    """Traced numbers of one candidate. sigma_law = (P_mean, P_std)."""

    alpha: float
    beta: float
    lr: float
    sigma_law: tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Training:
    """What one compiled step is made for.

    Attributes:
      family, mesh: of the run. config: that part of the config: "pretrain", "ddo" or "control".
      objective: "ddo", "cca" or "mle". warmup, total: in images.
    """

    family: Family
    mesh: jax.sharding.Mesh
    config: Any
    objective: str
    warmup: float
    total: float

    @property
    def optimizer(self) -> optax.GradientTransformation:
        return optimizer(self.config)


class Inputs(NamedTuple):
    """What a step reads beside its state.

    Attributes:
      frozen: the network's buffers. real, fake: records (images, labels); fake is None for "mle".
      key: of the phase's steps. hyper: see there.
      ref: the reference's parameters, or None: s_ref, (of real, of fake), is what it said at this step's draws
        (`reference_scores.ReferenceScores`, `make_reference`), in their place.
    """

    frozen: Any
    real: dict
    fake: dict | None
    key: jax.Array
    hyper: Hyper
    ref: Any = None
    s_ref: Any = None


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


def paired(r_real, r_fake) -> tuple:
    """How often the real example of a pair has the larger r; a tie is one half. Who has no partner is left out."""
    n = min(len(r_real), len(r_fake))
    return measured(0.5 + 0.5 * jnp.sign(r_real[:n] - r_fake[:n]))


def pair_objective(family: Family, objective: str, params, inputs: Inputs, pair: ddo.Pair):
    """Loss and statistics of one (micro-)batch of pairs: `ddo.pair_objective` with the family's own functions.

    Args:
      objective: "ddo" or "cca". inputs: frozen, hyper and ref are read. pair: of encoded examples.
    """
    draws, hyper = pair.draws_of_each(), inputs.hyper

    def loss(r_real, r_fake, s):
        real = Side(r_real, s[0], pair.real["label"], draws[0])
        fake = Side(r_fake, s[1], pair.fake["label"], draws[1])
        value, stats = family.pair_loss(objective, real, fake, hyper.alpha, hyper.beta)
        real, fake = jax.lax.stop_gradient((real, fake))
        nll = measured(family.nll(real.s, jax.lax.stop_gradient(pair.real), real.draws))
        own = {"nll_real": nll, "paired_accuracy": paired(real.r, fake.r), **family.pair_stats(real, fake)}
        return value, {**stats, **own}

    def score(params, examples, draws):
        return family.score(params, inputs.frozen, examples, draws)

    return ddo.pair_objective(score, family.ratio, loss, params, inputs.ref, pair)


def mle_objective(family: Family, params, frozen, batch, key):
    """Mean MLE loss of one (micro-)batch."""
    examples, draws = batch
    loss = family.mle_loss(params, frozen, examples, draws, key)
    return jnp.mean(loss), {"loss_mle": measured(loss)}


def micro_batches(x, parts: int):
    """[B,...] -> [parts, B / parts, ...]; part j takes rows j, j + parts, ...: every device keeps its own rows."""
    return jnp.swapaxes(x.reshape(-1, parts, *x.shape[1:]), 0, 1)


def accumulated(objective, params, batch, parts: int):
    """(gradient, statistics) of the mean over `parts` equal micro-batches, one after the other in memory."""
    gradient = jax.grad(objective, has_aux=True)
    if parts == 1:
        return gradient(params, batch, 0)
    micro = jax.tree.map(lambda x: micro_batches(x, parts), batch)

    def body(total, part):
        j, rows = part
        return jax.tree.map(jnp.add, total, gradient(params, rows, j)), None

    shapes = jax.eval_shape(gradient, params, jax.tree.map(lambda x: x[0], micro), 0)
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    (grads, stats), _ = jax.lax.scan(body, zero, (jnp.arange(parts), micro))
    return jax.tree.map(lambda g: g / parts, grads), stats


def averaged(current, params, c, seen) -> dict:
    """The averages of a training state after one more step: its "ema" and "emas", as far as it has them."""

    def beta(std):
        if std is None:
            return ema.half_life_beta(seen, c.batch, c.ema_mimg * 1e6, c.ema_rampup or None)
        return phema.power_beta(seen, c.batch, std)

    before = averages(current, lengths(c))
    return named_averages({std: ema.ema_update(e, params, beta(std)) for std, e in before.items()})


def decayed(c, seen, total: float):
    """The phase's weight decay at `seen` images: constant, or half a cosine to its final value at the last step."""
    if c.final_weight_decay is None:
        return c.weight_decay
    return schedules.cosine(seen, lr=c.weight_decay, final_lr=c.final_weight_decay, warmup=0, total=total - c.batch)


@jax.named_scope("update")
def advance(training: Training, state, grads, lr):
    """Optimizer step, EMAs of its (unprojected) output, step count. lr: of the candidate, before the schedule."""
    c, total = training.config, training.total
    seen = state["step"].astype(jnp.float32) * c.batch
    rate = learning_rate(c, seen, lr=lr, warmup=training.warmup, total=total)
    if c.clip:
        grads, _ = optax.clip_by_global_norm(c.clip).update(grads, optax.EmptyState())
    updates, opt = training.optimizer.update(grads, state["opt"], state["params"])
    if c.weight_decay or c.final_weight_decay:
        decay = decayed(c, seen, total)
        masks = training.family.decays(state["params"])
        updates = jax.tree.map(lambda u, p, on: u + decay * p if on else u, updates, state["params"], masks)
    params = jax.tree.map(lambda p, u: p - rate * u, state["params"], updates)
    return {"params": params, **averaged(state, params, c, seen), "opt": opt, "step": state["step"] + 1}


def zero_totals(family: Family, objective: str) -> dict:
    """What the statistics of a step accumulate onto."""
    one = jnp.zeros((1,))
    stats = {"grad_norm": measured(one)}
    if objective != "mle":
        stats |= {**ddo.ddo_loss(one, one, alpha=1.0, beta=1.0)[1], "nll_real": measured(one)}
        side = Side(one, one, jnp.zeros((1,), jnp.int32), family.pair_draw(jax.random.key(0), 1, (0.0, 1.0)))
        stats |= {"paired_accuracy": measured(one), **family.pair_stats(side, side)}
    else:
        stats |= {"loss_mle": measured(one)}
    return jax.tree.map(jnp.zeros_like, stats)


def step_keys(key, k):
    """Keys of step k, from 0: (encoding real, encoding fake, draws, loss, augmentation)."""
    return jax.random.split(jax.random.fold_in(key, k), 5)


def gradients(training: Training, params, inputs: Inputs, keys):
    """(gradient, statistics) of one step's batch; keys: of `step_keys`."""
    family, c = training.family, training.config
    key_real, key_fake, key_draw, key_loss, key_augment = keys
    real = family.encode(inputs.frozen, inputs.real, key_real)
    if training.objective != "mle":
        draws = family.pair_draw(key_draw, drawn_rows(c), inputs.hyper.sigma_law)

        def pairs(params, pair, j):
            return pair_objective(family, training.objective, params, inputs, pair)

        fake = family.encode(inputs.frozen, inputs.fake, key_fake)
        return accumulated(pairs, params, ddo.Pair(real, fake, draws, inputs.s_ref), c.accumulation)

    def loss(params, rows, j):
        return mle_objective(family, params, inputs.frozen, rows, jax.random.fold_in(key_loss, j))

    draws = family.draw(key_draw, c.batch, inputs.hyper.sigma_law)
    return accumulated(loss, params, (family.augment(real, key_augment), draws), c.accumulation)


def drawn_rows(c) -> int:
    """Of a step's draws: real example i and fake i share row i."""
    return max(c.batch, configs.fakes_of_a_step(c))


def make_step(training: Training):
    """The jitted step of a phase: (state, totals, inputs) -> (state, totals).

    `totals` accumulates the statistics on the device, from `zero_totals`. `state` and `totals` are donated.
    """
    family, c, mesh = training.family, training.config, training.mesh

    def step(state, totals, inputs: Inputs):
        keys = step_keys(inputs.key, state["step"])
        with jax.named_scope("project"):
            params = family.project(state["params"], training.objective)
        with sharding.rows_over(mesh):
            grads, stats = gradients(training, params, inputs, keys)
        stats["grad_norm"] = measured(optax.tree.norm(grads)[None])
        state = advance(training, {**state, "params": params}, grads, inputs.hyper.lr)
        return state, jax.tree.map(jnp.add, totals, stats)

    shapes = jax.eval_shape(lambda k: new_state(family.init(k)[0], c), jax.random.key(0))
    out = (sharding.tree_sharding(mesh, shapes), sharding.replicated(mesh))
    options = family.compiler_options or None
    return jax.jit(step, donate_argnums=(0, 1), out_shardings=out, compiler_options=options)


def step_factory(config, family: Family, mesh):
    """(objective, section, warmup, steps) -> the jitted step; phases of one kind share a compiled program,
    whatever their alpha, beta, lr."""

    @functools.cache
    def build(objective: str, section: str, warmup: float, steps: int):
        c = config[section]
        return make_step(Training(family, mesh, c, objective, warmup, total=steps * c.batch))

    return build


def make_reference(family: Family, c, mesh):
    """Jitted (ref, frozen, real, fake, (key, k, sigma_law)) -> s_ref, (of real, of fake), of step k, which several
    candidates share; in as many parts as a step, one after the other in memory."""

    @functools.partial(jax.jit, compiler_options=family.compiler_options or None)
    def refer(ref, frozen, real, fake, at):
        key, k, sigma_law = at
        key_real, key_fake, key_draw, *_ = step_keys(key, k)
        draws = family.pair_draw(key_draw, drawn_rows(c), sigma_law)
        whole = ddo.Pair(family.encode(frozen, real, key_real), family.encode(frozen, fake, key_fake), draws)

        def score(pair):
            rows = ddo.interleave(pair.real, pair.fake), ddo.interleave(*pair.draws_of_each())
            return ddo.apart(family.score(ref, frozen, *rows), *pair.sizes())

        with sharding.rows_over(mesh):
            if c.accumulation == 1:
                return score(whole)
            said = jax.lax.map(score, jax.tree.map(lambda x: micro_batches(x, c.accumulation), whole))
            return jax.tree.map(lambda v: jnp.swapaxes(v, 0, 1).reshape(-1, *v.shape[2:]), said)

    return refer


def make_ratio(family: Family, c):
    """Jitted (params, ref, frozen, record, key, sigma_law) -> r of one micro-batch of `c`, for histograms."""

    @functools.partial(jax.jit, compiler_options=family.compiler_options or None)
    def ratio(params, ref, frozen, record, key, sigma_law):
        key_encode, key_draw = jax.random.split(key)
        examples = family.encode(frozen, record, key_encode)
        draws = family.pair_draw(key_draw, c.batch // c.accumulation, sigma_law)
        s, s_ref = (family.score(family.project(p, "ddo"), frozen, examples, draws) for p in (params, ref))
        return family.ratio(s, s_ref, examples, draws)

    return ratio
