"""The paper's Figure 1 with an exact likelihood: MLE covers both modes, DDO concentrates on one.

    python examples/figure1.py [figure1.png]

A Gaussian is fitted by MLE to 0.8 N(0, 0.5^2) + 0.2 N(4, 0.7^2): it must lie over both modes, and puts mass where
there is none. DDO starts there. All expectations are sums over a grid, so nothing is random but the first step: at the
fit the gradient is zero, the curvature is negative for alpha > 1 and beta < 2 (alpha - 1) / (alpha + 1), and the sign
of a perturbation of 1e-3 decides whether theta concentrates or spreads (docs/specs/ddo.md, section 10).
"""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

import ddo_jax

X, DX = jnp.linspace(-80.0, 80.0, 16_001), 0.01  # wide enough for the side that spreads
RATE, STEPS, NUDGE = 2e-3, 600, 1e-3


def logp(theta, x):
    """log N(x; mu, sigma^2) in nats; theta = (mu, log sigma)."""
    mu, log_sigma = theta
    return -0.5 * ((x - mu) * jnp.exp(-log_sigma)) ** 2 - log_sigma - 0.5 * jnp.log(2 * jnp.pi)


def data_density(x):
    parts = ((0.8, 0.0, 0.5), (0.2, 4.0, 0.7))
    return sum(w * jnp.exp(logp((mu, jnp.log(sigma)), x)) for w, mu, sigma in parts)


def fitted():
    """The maximum-likelihood Gaussian: mean and standard deviation of the data."""
    p = data_density(X) * DX
    mean = jnp.sum(p * X)
    return mean, 0.5 * jnp.log(jnp.sum(p * (X - mean) ** 2))


def loss(theta, ref, alpha, beta):
    """The DDO loss with expectations as integrals: every point of the grid is a row, its density the weight."""
    r = ddo_jax.log_ratio(logp, theta, ref, X)
    rows = len(X) * DX  # a term is a mean over the rows
    weights = dict(real_weight=rows * data_density(X), fake_weight=rows * jnp.exp(logp(ref, X)))
    return ddo_jax.ddo_loss(r, r, alpha=alpha, beta=beta, **weights)[0]


def reverse_kl(theta):
    """KL(p_theta || p_data), nats: what mass costs where the data have none."""
    q = jnp.exp(logp(theta, X))
    return jnp.sum(q * (logp(theta, X) - jnp.log(data_density(X) + 1e-30))) * DX


@functools.partial(jax.jit, static_argnames="steps")
def path(ref, nudge, alpha, beta, steps=STEPS):
    """theta [steps + 1, 2] from ref + nudge, by Adam."""
    tx = optax.adam(RATE)

    def step(carry, _):
        theta, opt = carry
        updates, opt = tx.update(jax.grad(loss)(theta, ref, alpha, beta), opt)
        return (optax.apply_updates(theta, updates), opt), theta

    start = jax.tree.map(jnp.add, ref, nudge)
    return jax.lax.scan(step, (start, tx.init(start)), None, steps + 1)[1]


def run(alpha, beta, sign):
    """(reverse KL of every step [STEPS + 1], the best step, theta there)."""
    nudge = (-NUDGE, -NUDGE) if sign < 0 else (0.0, NUDGE)
    thetas = path(fitted(), nudge, alpha, beta)
    kl = np.asarray(jax.jit(jax.vmap(reverse_kl))(thetas))
    best = int(np.argmin(kl))
    return kl, best, tuple(float(v[best]) for v in thetas)


def main():
    """One run a setting: {(alpha, beta, sign): run}."""
    ref = fitted()
    print(f"MLE: mu {ref[0]:.2f}, sigma {jnp.exp(ref[1]):.2f}, reverse KL {reverse_kl(ref):.3f}")
    settings = ((4.0, 0.1, -1), (2.0, 0.1, -1), (1.0, 0.1, -1), (4.0, 0.1, 1))
    found = {s: run(*s) for s in settings}
    for (alpha, beta, sign), (kl, best, theta) in found.items():
        stop = f"best at step {best}: mu {theta[0]:.2f}, sigma {np.exp(theta[1]):.2f}, reverse KL {kl[best]:.3f}"
        print(f"alpha {alpha:g}, beta {beta:g}, nudged {sign:+d}: {stop}; at the end {kl[-1]:.3f}")
    return found


def draw(found, file):
    """Densities and the course of the reverse KL, both signs and the stopping point."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    kl, best, theta = found[4.0, 0.1, -1]
    near = (X > -5) & (X < 8)
    left.fill_between(X[near], data_density(X[near]), color="0.85", label="data")
    left.plot(X[near], jnp.exp(logp(fitted(), X[near])), "C0", label="MLE fit: the reference")
    left.plot(X[near], jnp.exp(logp(theta, X[near])), "C1", label=f"DDO, stopped at step {best}")
    left.set(xlabel="x", ylabel="density")
    for (alpha, _, sign), (values, at, _) in found.items():
        style = dict(ls="--") if sign > 0 else {}
        side = "the side that spreads" if sign > 0 else "the side that concentrates"
        (line,) = right.plot(values, label=f"alpha {alpha:g}, {side}" if alpha != 1 else "alpha 1: stays", **style)
        if 0 < at < STEPS:
            right.plot(at, values[at], "o", mfc="none", ms=9, color=line.get_color())
    right.set(xlabel="step", ylabel="reverse KL to the data, nats", ylim=(0, 4))
    for axes in (left, right):
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    runs = main()
    if len(sys.argv) > 1:
        draw(runs, sys.argv[1])
