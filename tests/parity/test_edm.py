"""EDM networks, losses and samplers against the numbers of the public reference (specs/edm.md section 15.1).

Each golden file runs in float32 against its float64 keys, DDPM++ in float64 too. Two compiled programs serve
all the keys of a file: a forward pass with its intermediates, and F with its pull-back, to which the losses
are chained. DDPM++ is always compared in full, the other wirings layer by layer; their rest is marked slow.
`pytest -s` prints the errors.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddo_jax.convert import from_torch, to_torch
from ddo_jax.core import ddo, edm, samplers
from ddo_jax.families.codecs import to_uint8

GOLDENS = Path(__file__).parents[1] / "goldens"
DDPMPP = "edm_ddpmpp_small"
FLOAT32 = {"out": 1e-5, "trace": 1e-5, "grad": 1e-4, "logp": 2e-6, "loss": 1e-5, "pair": 2e-5, "samp": 1e-5}
FOURIER = FLOAT32 | {"out": 5e-5, "trace": 5e-5, "logp": 1e-5, "loss": 5e-5, "pair": 5e-5}
FLOAT64 = dict.fromkeys(FLOAT32, 1e-9) | {"trace": 1e-7}  # traces are stored as float32


def nhwc(v):
    return np.ascontiguousarray(np.moveaxis(v, -3, -1))


class Run:
    """One golden file in one dtype."""

    def __init__(self, name, dtype):
        self.dtype = np.dtype(dtype)
        with np.load(GOLDENS / f"{name}.npz") as f:
            self.golden = dict(f)
        self.config = json.loads(str(self.golden["config"]))
        state = {k.removeprefix("param/"): v for k, v in self.golden.items() if k.startswith("param/")}
        ref = state | {k.removeprefix("ref/"): v for k, v in self.golden.items() if k.startswith("ref/")}
        self.module, self.variables = from_torch("edm", self.config, state)
        self.ref = from_torch("edm", self.config, ref)[1]
        if dtype == np.float64:
            self.variables, self.ref = jax.tree.map(lambda v: v.astype(dtype), (self.variables, self.ref))
            self.tolerance = FLOAT64
        else:
            self.tolerance = FOURIER if self.config.get("embedding_type") == "fourier" else FLOAT32
        self.name, self.forward, self.pull = name, jax.jit(self._forward), jax.jit(self._pull)

    def _forward(self, x, sigma, labels, augment):
        return self.module.apply(self.variables, x, sigma, labels, augment, capture_intermediates=True)

    def _pull(self, variables, x_in, c_noise, labels, cotangent):
        """F, and the pull-back of a cotangent of F to the parameters and to x_in."""

        def f(params, x_in):
            return self.module.apply(variables | {"params": params}, x_in, c_noise, labels, method="raw")

        out, pull = jax.vjp(f, variables["params"], x_in)
        return out, *pull(cotangent)

    def get(self, key):
        """An input in NHWC and in the dtype of the run; None where the file has no such key (no labels)."""
        if key not in self.golden:
            return None
        v = self.golden[key].astype(self.dtype)
        return jnp.asarray(nhwc(v) if v.ndim >= 4 else v)

    def augment(self, given):
        """Zeros are the same as none given, and share the compiled program."""
        v = self.get("in/augment_labels")
        return v if given or v is None else jnp.zeros_like(v)

    def check(self, key, value, kind, scale=None):
        expected = self.golden[key]
        value, expected = np.asarray(value), nhwc(expected) if np.ndim(expected) >= 3 else expected
        assert value.shape == expected.shape, key
        assert value.dtype == self.dtype or kind == "host", key
        error = np.max(np.abs(value - expected) / (np.max(np.abs(expected)) if scale is None else scale))
        tolerance = self.tolerance.get(kind, 1e-12)
        print(f"\n{self.name} {self.dtype} {key}: {error:.1e} (tolerance {tolerance:.0e})", end="")
        assert error <= tolerance, f"{key}: error {error:.2e}, tolerance {tolerance:.0e}"

    def check_gradients(self, prefix, gradients):
        """2-norms and cosine probes per parameter in the checkpoint's layout; unused parameters have none."""
        state = to_torch("edm", self.config, self.variables | {"params": gradients})
        names = [str(name) for name in self.golden[f"{prefix}names"]]
        unused = {name for name in state if not name.endswith(("freqs", "resample_filter"))} - set(names)
        assert unused <= {"model.map_augment.weight"}
        assert all(not state[name].any() for name in unused)
        flat = [state[name].astype(np.float64).ravel() for name in names]
        norms = np.array([np.linalg.norm(g) for g in flat]).astype(self.dtype)
        probes = np.array([g @ np.cos(np.arange(g.size)) for g in flat]).astype(self.dtype)
        self.check(f"{prefix}norms64", norms, "grad", scale=self.golden[f"{prefix}norms64"])
        self.check(f"{prefix}probes64", probes, "grad", scale=self.golden[f"{prefix}norms64"])


MAIN, EXACT = (DDPMPP, np.float32), (DDPMPP, np.float64)
OTHERS = [(f"edm_{name}_small", np.float32) for name in ("ncsnpp", "song_skip", "adm")]
RELEASE = ("edm_ncsnpp_release_small", np.float32)  # its wiring is part of the first of the others


def label(param):
    return f"{param[0]}-{param[1].__name__}"


def runs(*fast, every=(MAIN, EXACT, *OTHERS, RELEASE)):
    """Parametrise with `every` run, those not named here marked slow."""
    marked = [p if p in fast else pytest.param(p, marks=pytest.mark.slow) for p in every]
    return pytest.mark.parametrize("run", marked, indirect=True, ids=label)


@pytest.fixture(scope="module")
def run(request):
    name, dtype = request.param
    with jax.default_matmul_precision("float32"), jax.enable_x64(dtype == np.float64):
        yield Run(name, dtype)


def denoised(run, augment=False):
    inputs = run.get("in/x"), run.get("in/sigma"), run.get("in/labels"), run.augment(augment)
    return run.forward(*inputs)


@runs(MAIN, EXACT, *OTHERS)
def test_denoised(run):
    run.check("out/D64", denoised(run)[0], "out")
    if "out/D_augment64" in run.golden:
        run.check("out/D_augment64", denoised(run, augment=True)[0], "out")


@runs(MAIN)
def test_scalar_sigma_and_absent_labels(run):
    @jax.jit
    def both(x, sigma, labels):
        scalar = run.module.apply(run.variables, x, sigma[1], labels)
        return scalar, run.module.apply(run.variables, x, sigma)

    scalar, absent = both(run.get("in/x"), run.get("in/sigma"), run.get("in/labels"))
    run.check("out/D_scalar_sigma64", scalar, "out")
    if run.module.label_dim:
        run.check("out/D_no_labels64", absent, "out")


@runs(MAIN, EXACT, *OTHERS)
def test_every_layer(run):
    layers = denoised(run)[1]["intermediates"]["net"]
    keys = [k.removeprefix("trace/") for k in run.golden if k.startswith("trace/")]
    assert len(keys) > 10
    for key in keys:
        node = layers
        for part in key.split("."):
            node = node[part]
        run.check(f"trace/{key}", node["__call__"][0][0], "trace")


@runs(MAIN, EXACT)
def test_raw_output_and_gradient_of_denoised(run):
    """s = Σ c·D with D = c_skip·x + c_out·F(c_in·x)."""
    x, cotangent = run.get("in/x"), run.get("grad/cotangent")
    c = edm.preconditioning(run.get("in/sigma"), 0.5)
    c_skip, c_out, c_in = (edm.expand(v, 4) for v in (c.c_skip, c.c_out, c.c_in))
    f, dparams, dx_in = run.pull(run.variables, c_in * x, c.c_noise, run.get("in/labels"), c_out * cotangent)
    run.check("out/F64", f, "out")
    run.check("grad/x64", c_skip * cotangent + c_in * dx_in, "grad")
    run.check_gradients("grad/", dparams)


def draws(run):
    """σ of section 10.1 in the dtype of the run, and ε."""
    return edm.noise_level(run.get("loss/rnd_normal"), -1.2, 1.2), run.get("loss/eps")


def residual(f, f_hat):
    return jnp.sum(jnp.square(f - f_hat), axis=(1, 2, 3))


@runs(MAIN, EXACT)
def test_edm_loss(run):
    labels, (sigma, eps) = run.get("loss/labels"), draws(run)
    if run.dtype == np.float32:  # stored in float32 only
        run.check("loss/sigma", sigma, "trace")
        run.check("loss/weight", edm.loss_weight(sigma, 0.5), "trace")
    x_in, c_noise, f_hat = edm.edm_inputs(run.get("loss/images"), sigma, eps, 0.5)
    f = run.pull(run.variables, x_in, c_noise, labels, jnp.zeros_like(x_in))[0]
    run.check("loss/edm_per_sample64", residual(f, f_hat), "loss")
    loss, df = jax.value_and_grad(lambda f: jnp.mean(residual(f, f_hat)))(f)
    run.check("loss/edm64", loss, "loss")
    run.check_gradients("loss/grad_", run.pull(run.variables, x_in, c_noise, labels, df)[1])


@runs(MAIN, EXACT, every=(MAIN, EXACT))
def test_ddo_loss(run):
    """As the product does: F of target and reference, factored r, gradient through the target only."""
    sigma, eps = draws(run)
    alpha, beta = run.golden["ddo/alpha"], run.golden["ddo/beta"]
    sides = {}
    for side, source in (("", "loss/"), ("fake_", "ddo/fake_")):
        x_in, c_noise, f_hat = edm.edm_inputs(run.get(f"{source}images"), sigma, eps, 0.5)
        args = x_in, c_noise, run.get(f"{source}labels")
        f, f_ref = (run.pull(v, *args, jnp.zeros_like(x_in))[0] for v in (run.variables, run.ref))
        run.check(f"ddo/{side}logp64", -residual(f, f_hat), "logp")
        run.check(f"ddo/ref_{side}logp64", -residual(f_ref, f_hat), "logp")
        sides[side] = SimpleNamespace(args=args, f=f, f_ref=f_ref, f_hat=f_hat)
    real, fake = sides.values()

    def loss_of(f_real, f_fake):
        r_real = ddo.diffusion_log_ratio(f_real, real.f_ref, real.f_hat)
        r_fake = ddo.diffusion_log_ratio(f_fake, fake.f_ref, fake.f_hat)
        pairs = sum(ddo.ddo_terms(r_real, r_fake, alpha=alpha, beta=beta))
        return ddo.ddo_loss(r_real, r_fake, alpha=alpha, beta=beta)[0], pairs

    (loss, pairs), dfs = jax.value_and_grad(loss_of, argnums=(0, 1), has_aux=True)(real.f, fake.f)
    run.check("ddo/loss_per_pair64", pairs, "pair")
    run.check("ddo/loss64", loss, "loss")
    parts = [run.pull(run.variables, *s.args, df)[1] for s, df in zip((real, fake), dfs, strict=True)]
    run.check_gradients("ddo/grad_", jax.tree.map(jnp.add, *parts))


@runs(MAIN, EXACT, every=(MAIN, EXACT))
@pytest.mark.parametrize("key", ["samp", "churn"])
def test_sampler(run, key):
    latents, labels, noise = run.get(f"{key}/latents"), run.get(f"{key}/labels"), run.get(f"{key}/noise")
    settings = json.loads(str(run.golden[f"{key}/settings"]))
    settings = samplers.HeunSettings(**{k.lower(): v for k, v in settings.items()})

    def pad(v):  # to the batch of the compiled program
        return None if v is None else jnp.concatenate([v, v[:1]])

    def denoise(x, sigma):
        return run.forward(pad(x), pad(sigma), pad(labels), run.augment(False))[0][:2]

    schedule, x = samplers.heun_schedule(settings), latents * run.dtype.type(settings.sigma_max)
    run.check(f"{key}/t_hat", schedule.t_hat, "host")
    run.check(f"{key}/t_steps", samplers.heun_times(settings), "host")
    states = [x]
    for i, (t_hat, t_next, noise_std) in enumerate(zip(*schedule, strict=True)):
        x_hat = x if noise is None else x + run.dtype.type(noise_std) * noise[i]
        x = samplers.heun_step(denoise, x_hat, t_hat, t_next, last=i == settings.num_steps - 1)
        states.append(x)
    run.check(f"{key}/x", np.stack(states), "samp")
    run.check(f"{key}/x_hat_last", x_hat, "samp")
    run.check(f"{key}/images", x, "samp")
    off = np.asarray(to_uint8(x, 256)).astype(int) - run.golden[f"{key}/uint8"]
    assert np.abs(off).max() <= 1 and np.count_nonzero(off) <= 2
    if run.name == DDPMPP:  # the public loop over the same steps
        churn = None if noise is None else lambda i: noise[i]
        whole = samplers.heun_sample(denoise, latents, settings, churn, scan=False)
        run.check(f"{key}/images", whole, "samp")
