"""EDM2 operations, networks and losses against the numbers of the public reference (specs/edm2.md sections 18, 19).

Two compiled programs serve all the keys of a network: a forward pass with its intermediates, and F with its
pull-back, to which the losses are chained. The reference's training mode is the same programs on `project`ed
parameters. `pytest -s` prints the errors.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddo_jax import config, sharding
from ddo_jax.convert import from_torch, to_torch
from ddo_jax.core import ddo, edm, samplers
from ddo_jax.data.labels import balanced_labels
from ddo_jax.families.codecs import Pixels
from ddo_jax.families.edm2 import EDM2
from ddo_jax.models import edm2
from ddo_jax.run import state, step

GOLDENS = Path(__file__).parents[1] / "goldens"
TOLERANCE = {"out": 1e-5, "grad": 5e-4, "loss": 1e-5, "logp": 1e-5, "norm": 1e-5, "cosdot": 2e-4}  # relative
TOLERANCE |= {"samp": 2e-5, "half": 2e-2}
TOLERANCE |= {"r": 1e-2, "ddo": 5e-4, "ddo_grad": 2e-3, "step": 1e-3}  # r, ddo, step: absolute
ABSOLUTE = {"r", "ddo", "step"}
BUFFERS = ("freqs", "phases")


def nhwc(v):
    return np.ascontiguousarray(np.moveaxis(v, -3, -1)) if np.ndim(v) >= 4 else np.asarray(v)


def check(golden, key, value, kind="out", scale=None):
    value, expected = np.asarray(value), nhwc(golden[key])
    assert value.shape == expected.shape, key
    if scale is None:
        scale = 1 if kind in ABSOLUTE else np.abs(expected).max()
    error = np.max(np.abs(value - expected) / scale)
    print(f"\n{key}: {error:.1e} (tolerance {TOLERANCE[kind]:.0e})", end="")
    assert error <= TOLERANCE[kind], f"{key}: error {error:.2e}, tolerance {TOLERANCE[kind]:.0e}"


def check_flat(golden, key, value, kind="out", scale=None):
    """`check` of an array that is in the reference's layout already."""
    check({key: np.ravel(golden[key])}, key, np.ravel(value), kind, scale)


# ----------------------------------------------------------------------------------------------------
# Operations (section 2)


@pytest.fixture(scope="module")
def ops():
    with np.load(GOLDENS / "edm2_ops.npz") as f, jax.default_matmul_precision("float32"):
        yield {key: jnp.asarray(f[key]) for key in f.files}


def test_normalize(ops):
    check(ops, "normalize/default", edm2.normalize(jnp.asarray(nhwc(ops["normalize/x"])), (1, 2, 3)))
    check(ops, "normalize/dim1", edm2.pixel_norm(jnp.asarray(nhwc(ops["normalize/x"]))))
    y = edm2.normalize(ops["normalize/y"], 2)
    check({"y": np.moveaxis(ops["normalize/y_dim2"], -1, -3)}, "y", y)
    check(ops, "normalize/w2_default", edm2.normalize_weight(ops["normalize/w2"].T).T)


def test_elementwise(ops):
    check(ops, "silu/y", edm2.mp_silu(ops["silu/x"]))
    for op, f in (("sum", edm2.mp_sum), ("cat", edm2.mp_cat)):
        a, b = (jnp.asarray(nhwc(ops[f"{op}/{side}"])) for side in "ab")
        for t in (0.3, 0.5, 0.8):
            if f"{op}/{t}" in ops:
                check(ops, f"{op}/{t}", f(a, b, t))
    for mode in ("down", "up"):
        check(ops, f"resample/{mode}", edm2.resample(jnp.asarray(nhwc(ops["resample/x"])), mode))


def test_fourier(ops):
    buffers = {name: ops[f"fourier/{name}"] for name in BUFFERS}
    check(ops, "fourier/y", edm2.MPFourier(8).apply({"buffers": buffers}, ops["fourier/c_noise"]))


@pytest.mark.parametrize("kind, kernel", [("lin", 0), ("c1", 1), ("c3", 3)])
def test_conv_and_projection(ops, kind, kernel):
    at, axes = f"conv/{kind}/", (2, 3, 1, 0) if kernel else (1, 0)
    params = {"weight": ops[f"{at}w"].transpose(axes)}
    x, conv = jnp.asarray(nhwc(ops[f"{at}x"])), edm2.MPConv(7, kernel)
    check(ops, f"{at}y_gain1", conv.apply({"params": params}, x))
    check(ops, f"{at}y_gain0.37", conv.apply({"params": params}, x, jnp.float32(0.37)))
    params = edm2.project(params)
    check(ops, f"{at}y_train", conv.apply({"params": params}, x))
    for n in (1, 2):
        check_flat(ops, f"{at}w_after{n}", params["weight"].transpose(np.argsort(axes)))
        params = edm2.project(params)


def test_normalize_of_zeros_has_a_finite_gradient():
    x = jnp.zeros((2, 3)).at[0, 0].set(2.0)
    value, gradient = jax.value_and_grad(lambda v: jnp.sum(edm2.pixel_norm(v)))(x)
    np.testing.assert_allclose(value, 2 / (2 / np.sqrt(3) + 1e-4), rtol=1e-6)
    assert np.isfinite(gradient).all()
    np.testing.assert_allclose(gradient[1], 1e4, rtol=1e-5)  # 1 / ε


def test_projection_is_not_differentiated_and_leaves_gains_and_logvar():
    params = {
        "unet": {"out_gain": jnp.float32(3.0), "conv": {"weight": jnp.full((2, 3), 5.0)}},
        "logvar_linear": {"weight": jnp.full((2, 1), 5.0)},
    }
    out = edm2.project(params)
    assert out["unet"]["out_gain"] == 3 and (out["logvar_linear"]["weight"] == 5).all()
    np.testing.assert_allclose(out["unet"]["conv"]["weight"], 5 / 5.0001, rtol=1e-6)
    np.testing.assert_allclose(edm2.project(params, logvar=True)["logvar_linear"]["weight"], 5 / 5.0001, rtol=1e-6)
    half = edm2.project(jax.tree.map(lambda v: v.astype(jnp.float16), params))
    assert {v.dtype for v in jax.tree.leaves(half)} == {jnp.dtype(jnp.float16)}
    gradient = jax.grad(lambda p: jnp.sum(edm2.project(p)["unet"]["conv"]["weight"] ** 3))(params)
    assert not any(v.any() for v in jax.tree.leaves(gradient))


# ----------------------------------------------------------------------------------------------------
# Networks (sections 3-5)


class Run:
    """One golden network."""

    def __init__(self, name):
        with np.load(GOLDENS / f"{name}.npz") as f:
            self.golden = dict(f)
        self.config = json.loads(str(self.golden["config"]))
        self.state = {k.removeprefix("param/"): v for k, v in self.golden.items() if k.startswith("param/")}
        ref = self.state | {k.removeprefix("ref/"): v for k, v in self.golden.items() if k.startswith("ref/")}
        self.module, variables = from_torch("edm2", self.config, self.state)
        self.params, self.buffers = variables["params"], variables["buffers"]
        self.ref = from_torch("edm2", self.config, ref)[1]["params"]
        self.sigma_data = self.module.sigma_data
        self.forward, self.pull, self.project = jax.jit(self._forward), jax.jit(self._pull), jax.jit(edm2.project)
        self.logvar = jax.jit(self._logvar)
        self.names = [str(name) for name in self.golden["grad_names"]]

    def _forward(self, x, sigma, labels):
        variables = {"params": self.params, "buffers": self.buffers}
        return self.module.apply(variables, x, sigma, labels, capture_intermediates=True)

    def _logvar(self, params, sigma, cotangent):
        """log variance and its pull-back to the parameters."""
        variables = {"buffers": self.buffers}
        out, pull = jax.vjp(lambda p: self.module.apply(variables | {"params": p}, sigma, method="logvar"), params)
        return out, pull(cotangent)[0]

    def _pull(self, params, x_in, c_noise, labels, cotangent):
        """F, and the pull-back of a cotangent of F to the parameters and to x_in."""

        def f(params, x_in):
            variables = {"params": params, "buffers": self.buffers}
            return self.module.apply(variables, x_in, c_noise, labels, method="raw")

        out, pull = jax.vjp(f, params, x_in)
        return out, *pull(cotangent)

    def f(self, params, *args):
        return self.pull(params, *args, jnp.zeros_like(args[0]))[0]

    def get(self, key):
        return jnp.asarray(nhwc(self.golden[key]))

    def of_mode(self, mode):
        """The parameters that the reference's forward pass uses; in training mode logvar too, where asked for."""
        return self.params if mode == "eval" else edm2.project(self.params, logvar=True)

    def torch(self, params):
        """{released name: float64 array in the reference's layout} of a parameter tree."""
        state = to_torch("edm2", self.config, {"params": params, "buffers": self.buffers})
        return {name: v.astype(np.float64) for name, v in state.items() if not name.endswith(BUFFERS)}

    def statistics(self, params):
        state = self.torch(params)
        assert list(state) == self.names
        norm = np.array([np.linalg.norm(v) for v in state.values()])
        cosdot = np.array([v.ravel() @ np.cos(np.arange(v.size)) for v in state.values()])
        return norm, cosdot

    def check(self, key, value, kind="out", scale=None):
        check(self.golden, key, value, kind, scale)

    def check_gradients(self, prefix, gradients, kind="grad"):
        expected = self.golden[f"{prefix}grad_norm"]
        scale = np.maximum(expected, 1e-3 * expected.max())
        norm, cosdot = self.statistics(gradients)
        self.check(f"{prefix}grad_norm", norm, kind, scale)
        self.check(f"{prefix}grad_cosdot", cosdot, kind, scale)


NETWORKS = ["edm2_small", "edm2_alt"]
MODES = pytest.mark.parametrize("mode", ["eval", "train"])


@pytest.fixture(scope="module", params=NETWORKS)
def run(request):
    with jax.default_matmul_precision("float32"):
        yield Run(request.param)


def test_denoised_and_every_layer(run):
    d, layers = run.forward(run.get("in/x"), run.get("in/sigma"), run.get("in/labels"))
    run.check("out/D", d)
    layers = layers["intermediates"]["unet"]
    keys = [key for key in run.golden if key.startswith("act/")]
    assert len(keys) > 15
    for key in keys:
        node = layers
        for part in key.removeprefix("act/").split("."):
            node = node[part]
        run.check(key, node["__call__"][0][: len(run.golden[key])])  # the file keeps one image of large layers


@pytest.mark.slow
def test_absent_labels_and_scalar_sigma(run):
    x, sigma, labels = run.get("in/x"), run.get("in/sigma"), run.get("in/labels")
    variables = {"params": run.params, "buffers": run.buffers}
    run.check("out/D_nolabel", jax.jit(run.module.apply)(variables, x, sigma))
    run.check("out/D_scalar_sigma", jax.jit(run.module.apply)(variables, x, run.get("in/scalar_sigma"), labels))


def test_half_precision_weights(run):
    """Released files are float16: gains and buffers too are cast to float32 before any use."""
    half = {k: v.astype(np.float16) for k, v in run.state.items()}
    variables = from_torch("edm2", run.config, half)[1]
    inputs = run.get("in/x"), run.get("in/sigma"), run.get("in/labels")
    run.check("fp16w_cast32/D", jax.jit(run.module.apply)(variables, *inputs))


@pytest.mark.slow
def test_half_precision_images(run):
    """A float16 image path stays near the float32 one."""
    sigma = run.get("in/sigma")
    c = edm.preconditioning(sigma, run.sigma_data)
    args = edm.expand(c.c_in, 4) * run.get("in/x"), c.c_noise, run.get("in/labels")
    run.check("fp32/F", run.f(run.params, *args))
    lowered = edm2.from_config(run.config, dtype=jnp.float16)
    f = jax.jit(lambda *args: lowered.apply({"params": run.params, "buffers": run.buffers}, *args, method="raw"))
    check({"fp16/F": run.golden["fp16/F"]}, "fp16/F", f(*args), "half")


@pytest.mark.slow
@MODES
def test_outputs_and_gradients(run, mode):
    params, x, sigma, labels = run.of_mode(mode), run.get("in/x"), run.get("in/sigma"), run.get("in/labels")
    c_skip, c_out, c_in, c_noise = (edm.expand(v, 4) for v in edm.preconditioning(sigma, run.sigma_data))
    cotangent = run.get("cot/D")
    f, dparams, dx_in = run.pull(params, c_in * x, c_noise.reshape(-1), labels, c_out * cotangent)
    logvar, dlogvar = run.logvar(params, sigma, run.get("cot/logvar"))
    run.check(f"{mode}/D", c_skip * x + c_out * f)
    run.check(f"{mode}/logvar", logvar)
    run.check(f"{mode}/grad_x", c_skip * cotangent + c_in * dx_in)
    gradients = jax.tree.map(jnp.add, dparams, dlogvar)
    run.check_gradients(f"{mode}/", gradients)
    state, largest = run.torch(gradients), run.golden[f"{mode}/grad_norm"].max()
    for key in (key for key in run.golden if key.startswith(f"{mode}/grad/")):
        scale = max(np.linalg.norm(run.golden[key]), 1e-3 * largest)
        check_flat(run.golden, key, state[key.removeprefix(f"{mode}/grad/")], "grad", scale)


def test_projected_weights(run):
    state = run.torch(run.of_mode("train"))
    keys = [key for key in run.golden if key.startswith("train/weight_after/")]
    assert len(keys) > 20  # the file keeps those below 4,000 values
    for key in keys:
        check_flat(run.golden, key, state[key.removeprefix("train/weight_after/")])


@pytest.mark.slow
@MODES
def test_edm2_loss(run, mode):
    """ℓ = λ/e^u·(D−y)² + u with u the log variance: λ(D−y)² = (F−F̂)², summed over the image (section 8)."""
    params, images, labels = run.of_mode(mode), run.get("edm2loss/images"), run.get("edm2loss/labels")
    sigma = edm.noise_level(run.get("edm2loss/rnd_normal").reshape(-1), -0.4, 1.0)
    x_in, c_noise, f_hat = edm.edm_inputs(images, sigma, run.get("edm2loss/noise_unit"), run.sigma_data)
    f = run.f(params, x_in, c_noise, labels)
    logvar = run.logvar(params, sigma, jnp.zeros((len(sigma), 1, 1, 1)))[0]

    def loss(f, logvar):
        per_sample = jnp.sum(jnp.square(f - f_hat) / jnp.exp(logvar) + logvar, (1, 2, 3))
        return jnp.mean(per_sample), per_sample

    (scalar, per_sample), (df, dlogvar) = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(f, logvar)
    run.check(f"edm2loss/{mode}/per_sample_sum", per_sample, "loss")
    run.check(f"edm2loss/{mode}/scalar", scalar, "loss")
    gradients = run.pull(params, x_in, c_noise, labels, df)[1], run.logvar(params, sigma, dlogvar)[1]
    run.check_gradients(f"edm2loss/{mode}/", jax.tree.map(jnp.add, *gradients))


# ----------------------------------------------------------------------------------------------------
# DDO (sections 8, 18): edm2_small only


@pytest.fixture(scope="module")
def small():
    with jax.default_matmul_precision("float32"):
        yield Run("edm2_small")


def ddo_batch(run, prefix, params, ref):
    """Both sides of a batch: arguments of F, F of target and reference, F̂."""
    sigma, eps = run.get(f"{prefix}sigma"), run.get(f"{prefix}noise")

    def side(name):
        x_in, c_noise, f_hat = edm.edm_inputs(run.get(f"{prefix}{name}"), sigma, eps, run.sigma_data)
        args = x_in, c_noise, run.get(f"{prefix}lab_{name}")
        return SimpleNamespace(args=args, f=run.f(params, *args), f_ref=run.f(ref, *args), f_hat=f_hat)

    return side("real"), side("fake")


def ddo_gradients(run, params, real, fake, alpha, beta):
    """(loss, gradients) with the gradient through the target only."""

    def loss_of(f_real, f_fake):
        r_real = ddo.diffusion_log_ratio(f_real, real.f_ref, real.f_hat)
        r_fake = ddo.diffusion_log_ratio(f_fake, fake.f_ref, fake.f_hat)
        return ddo.ddo_loss(r_real, r_fake, alpha=alpha, beta=beta)[0]

    loss, dfs = jax.value_and_grad(loss_of, argnums=(0, 1))(real.f, fake.f)
    parts = [run.pull(params, *side.args, df)[1] for side, df in zip((real, fake), dfs, strict=True)]
    return loss, jax.tree.map(jnp.add, *parts)


@pytest.mark.slow
@MODES
def test_ddo(small, mode):
    params = small.params if mode == "eval" else edm2.project(small.params)
    real, fake = sides = ddo_batch(small, "ddo/", params, small.ref)
    for key in ("f", "f_ref"):
        logp = [-jnp.sum(jnp.square(vars(side)[key] - side.f_hat), (1, 2, 3)) for side in sides]
        small.check(f"ddo/{mode}/{'logp' if key == 'f' else 'ref_logp'}", jnp.concatenate(logp), "logp")
    for name, side in (("real", real), ("fake", fake)):
        small.check(f"ddo/{mode}/r_{name}", ddo.diffusion_log_ratio(side.f, side.f_ref, side.f_hat), "r")
    for j, (alpha, beta) in enumerate(small.golden["ddo/alpha_beta"]):
        loss, gradients = ddo_gradients(small, params, real, fake, float(alpha), float(beta))
        small.check(f"ddo/{mode}/{j}/loss", loss, "ddo")
        small.check_gradients(f"ddo/{mode}/{j}/", gradients, "ddo_grad")
        assert not gradients["logvar_linear"]["weight"].any()


def record(run, prefix, side):
    return {"image": run.get(f"{prefix}{side}"), "label": jnp.argmax(run.get(f"{prefix}lab_{side}"), 1)}


class Golden(EDM2):
    """The golden network as the product's family; its images are examples already, and its draws come as `noise`."""

    def encode(self, frozen, record, key):
        return {"x": record["image"], "label": record["label"]}

    def draw(self, key, n, noise):
        return dict(zip(("sigma", "eps"), noise, strict=True))


@pytest.fixture(scope="module")
def family(small):
    return Golden(small.module, Pixels((16, 16, 3), 256), small.config, "highest", "float32")


@pytest.mark.slow
def test_trajectory(small, family):
    """Three steps of the trainer: Π, gradient at Π(θ), Adam from Π(θ), two EMAs of the unprojected result (form A)."""
    size = int(small.golden["traj/batch_size"])
    c = config.base().ddo
    c.batch, c.b1, c.b2, c.ema_stds = size, 0.9, 0.99, (0.05, 0.1)
    mesh = sharding.make_mesh()
    training = step.Training(family, mesh, c, "ddo", warmup=0.0, total=3.0 * size)
    frozen, ref = {"buffers": small.buffers}, sharding.place(mesh, small.ref)
    running = sharding.place(mesh, state.new_state(jax.tree.map(jnp.asarray, small.params), c))
    advance = step.make_step(training)
    losses = []
    for i, lr in enumerate(small.golden["traj/lr"]):
        at = f"traj/{i}/"
        noise = (small.get(f"{at}sigma"), small.get(f"{at}noise"))
        totals = sharding.replicate(mesh, step.zero_totals(family, "ddo"))
        sides = [record(small, at, side) for side in ("real", "fake")]
        hyper = step.Hyper(4.0, 0.05, float(lr), noise)
        with jax.numpy_dtype_promotion("standard"):  # optax
            inputs = step.Inputs(frozen, *sides, jax.random.key(0), hyper, ref)
            running, totals = advance(running, totals, inputs)
        loss = sum(totals[k][0] / totals[k][1] for k in ("loss_real", "loss_fake"))
        losses.append(loss)
        trees = {"param": running["params"], "ema0.050": running["ema"], "ema0.100": running["emas"]["0.100"]}
        for name, tree in trees.items():
            (norm, cosdot), scale = small.statistics(tree), small.golden[f"{at}{name}_norm"]
            small.check(f"{at}{name}_norm", norm, "norm", np.maximum(scale, 1e-6))
            small.check(f"{at}{name}_cosdot", cosdot, "cosdot", np.maximum(scale, 1e-6))
    small.check("traj/loss", np.array(losses), "step")


@pytest.mark.slow
def test_the_familys_pretraining_loss(small, family):
    """Breaks if mle_loss forgets a logvar, counts it once an image, or takes a mean over the pixels."""
    sigma = edm.noise_level(small.get("edm2loss/rnd_normal").reshape(-1), -0.4, 1.0)
    draws = {"sigma": sigma, "eps": small.get("edm2loss/noise_unit")}
    examples = {"x": small.get("edm2loss/images"), "label": jnp.argmax(small.get("edm2loss/labels"), 1)}
    params = family.project(small.params, "mle")
    loss = jax.jit(family.mle_loss)(params, {"buffers": small.buffers}, examples, draws, jax.random.key(0))
    small.check("edm2loss/train/per_sample_sum", loss, "loss")


@pytest.mark.slow
def test_projected_target_and_reference_agree_at_the_start(small):
    """The trap of section 8: with Π on the target alone r is not 0 at step 0; with Π on both it is."""
    params = small.project(small.params)
    args = ddo_batch(small, "ddo/", params, params)[0]
    assert not np.asarray(ddo.diffusion_log_ratio(args.f, args.f_ref, args.f_hat)).any()
    unprojected = small.f(small.params, *args.args)
    assert np.abs(ddo.diffusion_log_ratio(args.f, unprojected, args.f_hat)).min() > 0.1


# ----------------------------------------------------------------------------------------------------
# Samples (sections 14, 15)


@pytest.mark.slow
@pytest.mark.parametrize("guided", [False, True])
def test_heun(small, guided):
    """Every state of 8 steps; guided by a smaller unconditional network, which ignores the labels."""
    key, golden = "heun_guid" if guided else "heun", small.golden
    labels, states, noise = small.get("heun/labels"), [], small.get("heun/noise")
    state = {k.removeprefix("gparam/"): v for k, v in golden.items() if k.startswith("gparam/")}
    guide, guide_variables = from_torch("edm2", json.loads(str(golden["gconfig"])), state)
    variables = {"params": small.params, "buffers": small.buffers}

    @jax.jit
    def network(x, sigma):
        return small.module.apply(variables, x, sigma, labels)

    @jax.jit
    def weak(x, sigma):
        return guide.apply(guide_variables, x, sigma, labels)

    def denoise(x, sigma):
        states.append((x, sigma[0]))
        return (samplers.guided(network, weak, 1.5) if guided else network)(x, sigma)

    x = samplers.heun_sample(denoise, noise, samplers.HeunSettings(num_steps=8, grid="float32"), scan=False)
    assert len(states) == 15
    check(golden, f"{key}/x_final", x, "samp")
    check(golden, f"{key}/x_eval", np.stack([x for x, _ in states]), "samp")
    check(golden, f"{key}/t_eval", np.stack([t for _, t in states]), "samp")


@pytest.mark.parametrize("case", range(5))
def test_strict_class_balance(case):
    with np.load(GOLDENS / "edm2_balance.npz") as f:
        expected, num_classes = f[f"{case}/labels"], f[f"{case}/meta_classes_maxbatch_world"][0]
    np.testing.assert_array_equal(balanced_labels(np.arange(len(expected)), num_classes), expected)
