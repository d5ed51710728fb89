"""DDO inside `shard_map`, with the caller's own reductions, and with `optax.MultiSteps`.

    XLA_FLAGS=--xla_force_host_platform_device_count=4 python examples/shard_map.py

Every device has its rows of data and fakes. `ddo_loss` is a mean over the rows that it is given, so whoever wrote the
loop averages gradients over the axis (`pmean`), and adds the statistics, which are sums and counts (`psum`). MultiSteps
averages the gradients of ACCUMULATE small batches: of means over equally many rows, that is the large batch.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import ddo_jax

ALPHA, BETA, BATCH, ACCUMULATE = 2.0, 0.2, 64, 4


def logp(params, x):
    """log N(x; mu, exp(log_sigma)^2) of rows [B, D], summed over D."""
    mu, log_sigma = params
    z = (x - mu[None]) * jnp.exp(-log_sigma)[None]
    return jnp.sum(-0.5 * z**2 - log_sigma[None] - 0.5 * jnp.log(2 * jnp.pi), axis=1)


def loss_fn(params, ref, real, fake):
    r_real, r_fake = (ddo_jax.log_ratio(logp, params, ref, x) for x in (real, fake))
    return ddo_jax.ddo_loss(r_real, r_fake, alpha=ALPHA, beta=BETA)


def make_step(mesh, tx):
    """(params, opt, ref, real, fake) -> (params, opt, loss, statistics), rows over the axis "data"."""

    def local(params, ref, real, fake):
        (loss, stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, ref, real, fake)
        mean = jax.lax.pmean((loss, grads), "data")
        return *mean, jax.lax.psum(stats, "data")

    rows = P("data")
    whole = P()
    # check_vma=False: gradients stay this device's own until pmean, as in a pmap of old
    over = jax.shard_map(
        local, mesh=mesh, in_specs=(whole, whole, rows, rows), out_specs=(whole, whole, whole), check_vma=False
    )

    @jax.jit
    def step(params, opt, ref, real, fake):
        loss, grads, stats = over(params, ref, real, fake)
        updates, opt = tx.update(grads, opt, params)
        return optax.apply_updates(params, updates), opt, loss, stats

    return step


def train(devices, accumulate, batch, steps=40):
    """(parameters, accuracy of the discriminator) after `steps` updates on `batch` rows a call."""
    mesh = Mesh(np.asarray(devices), ("data",))
    tx = optax.MultiSteps(optax.adam(1e-2), accumulate)
    ref = params = (jnp.zeros(8), jnp.zeros(8))
    opt, step, rng, total = tx.init(params), make_step(mesh, tx), np.random.default_rng(0), None
    for _ in range(steps):
        real = rng.normal(0.5, 0.7, (BATCH * ACCUMULATE, 8)).astype(np.float32)  # data; the reference is N(0, 1)
        fake = rng.normal(0.0, 1.0, real.shape).astype(np.float32)
        for i in range(0, len(real), batch):
            params, opt, _, stats = step(params, opt, ref, real[i : i + batch], fake[i : i + batch])
            total = stats if total is None else jax.tree.map(jnp.add, total, stats)
    return params, float(ddo_jax.summarize(total)["accuracy"])


def main():
    """The same training on all devices in small batches, and on one in large ones: largest difference of parameters."""
    devices = jax.devices()
    many, accuracy = train(devices, ACCUMULATE, BATCH)
    one, _ = train(devices[:1], 1, BATCH * ACCUMULATE)
    difference = max(float(np.max(np.abs(np.asarray(a) - np.asarray(b)))) for a, b in zip(many, one, strict=True))
    mu, sigma = float(jnp.mean(many[0])), float(jnp.mean(jnp.exp(many[1])))
    print(f"{len(devices)} devices: mean 0.00 -> {mu:.2f} (data 0.50), std 1.00 -> {sigma:.2f} (data 0.70)")
    print(f"accuracy of the discriminator {accuracy:.2f}; against one device, large batches: {difference:.1e} at most")
    return mu, sigma, difference


if __name__ == "__main__":
    main()
