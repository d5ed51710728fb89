"""VAR against the numbers of the public reference (specs/var.md section 13).

The files here are trimmed: LEFT_OUT says what of; DDO_JAX_GOLDENS=directory of the complete ones (with the
tokenizers') compares every key. `pytest -s` prints the errors.
"""

import json
import os
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddo_jax.convert import from_torch, to_torch
from ddo_jax.core import ar
from ddo_jax.models import vqvae
from ddo_jax.models.var import SampleSettings, decay_mask, sample_tokens

GOLDENS = Path(os.environ.get("DDO_JAX_GOLDENS") or Path(__file__).parents[1] / "goldens")
LEFT_OUT = {
    "var_small": [r"reenc/.*", r".*/img(01)?"],
    "var_small2": [r"reenc/.*", r".*/img(01)?", r"ref/.*", r"act/.*", r"kv/mixed_.*", r"smooth/.*"]
    + [r"tf/grad/blocks.0.attn.mat_qkv.weight", r"ddo/.*_posonly_w1/grad/.*"],
}
TOLERANCE = {  # absolute, relative
    "act": (1e-5, 1e-5),
    "logits": (2e-5, 1e-5),
    "image": (3e-5, 0),
    "smooth_image": (1e-4, 0),
    "probs": (1e-3, 0),
    "logp": (1e-4, 1e-6),
    "ddo": (1e-5, 1e-5),
    "gradnorm": (1e-6, 1e-4),
    "grad": (5e-5, 0),  # of the largest
}
ARGUMENTS = ("num_classes", "depth", "embed_dim", "num_heads", "mlp_ratio", "norm_eps", "shared_aln", "attn_l2_norm")
NAMES = ["var_small", "var_small2"]


def within(name, value, expected, kind, factor=1):
    """factor: on the absolute tolerance."""
    value, expected = np.asarray(value, np.float64), np.asarray(expected, np.float64)
    assert value.shape == expected.shape, name
    absolute, relative = TOLERANCE[kind]
    allowed = factor * absolute + relative * np.abs(expected)
    error = np.abs(value - expected)
    print(f"\n{name}: {error.max():.1e} ({(error / allowed).max():.2f} of the tolerance)", end="")
    assert (error <= allowed).all(), f"{name}: error {error.max():.2e}, {(error / allowed).max():.1f} x tolerance"


class Run:
    """One golden network with its tokenizer."""

    def __init__(self, name):
        with np.load(GOLDENS / f"{name}.npz") as f:
            self.golden = dict(f)
        self.name, self.info, self.used = name, json.loads(str(self.golden["config"])), set()
        self.config = {k: self.info[k] for k in (*ARGUMENTS, "patch_nums")}
        self.config |= {"vocab_size": self.info["V"], "z_channels": self.info["Cvae"]}
        self.state = self.under("param/")
        self.module, variables = from_torch("var", self.config, self.state)
        self.params = variables["params"]
        self.pull = jax.jit(self._pull)
        self._tokenizer()

    def _tokenizer(self):
        """The whole one, where its file lies beside; else the quantizer alone, which came along."""
        beside = GOLDENS / self.info["vae_file"]
        if "vae/config" in self.golden:
            config = json.loads(str(self.golden["vae/config"]))
            phis = sum(k.startswith("vae/quantize.quant_resi.") and k.endswith(".weight") for k in self.golden)
            at = "vae/quantize.quant_resi.qresi_ls."
            quantizer = {"embedding": {"weight": self.golden["vae/quantize.embedding.weight"]}}
            for k in range(phis):
                weight = self.golden[f"{at}{k}.weight"].transpose(2, 3, 1, 0)
                quantizer[f"phi_{k}"] = {"weight": weight, "bias": self.golden[f"{at}{k}.bias"]}
            variables = {"params": {"quantize": quantizer}}
        else:
            with np.load(beside) as f:
                config = json.loads(str(f["config"]))
                state = {k.removeprefix("param/"): f[k] for k in f.files if k.startswith("param/")}
        arguments = {k: v for k, v in config.items() if k in vqvae.KEYS}
        if "vae/config" not in self.golden:
            variables = from_torch("vqvae", arguments, state)[1]
        self.vae, self.vae_variables = vqvae.from_config(arguments), variables
        self.codebook = variables["params"]["quantize"]["embedding"]["weight"]

    def tokenizer(self, *args, method):
        return self.vae.apply(self.vae_variables, *args, method=method)

    def image(self, f_hat):
        """[0, 1], NCHW."""
        return (np.moveaxis(np.asarray(jax.jit(lambda v: self.tokenizer(v, method="decode"))(f_hat)), -1, 1) + 1) / 2

    def under(self, prefix):
        self.used |= {k for k in self.golden if k.startswith(prefix)}
        return {k.removeprefix(prefix): v for k, v in self.golden.items() if k.startswith(prefix)}

    def has(self, key):
        """Whether the file at hand has a key; one that is not known to be left out must be there."""
        self.used.add(key)
        known = any(re.fullmatch(pattern, key) for pattern in LEFT_OUT[self.name])
        assert key in self.golden or known, f"{key}: not in {self.name}"
        return key in self.golden

    def get(self, key):
        if not self.has(key):
            pytest.skip(f"{key}: only in the complete {self.name}")
        return self.golden[key]

    def check(self, key, value, kind, factor=1):
        if self.has(key):
            within(f"{self.name} {key}", value, self.golden[key], kind, factor)

    def check_image(self, key, f_hat, kind="image"):
        """The decoder's parameters came along only if the image did."""
        if self.has(key):
            within(f"{self.name} {key}", self.image(f_hat), self.golden[key], kind)

    def _pull(self, params, labels, var_input, cotangent_of):
        """Logits, intermediates, and the gradient of sum(logits * cotangent) or, given [B], of sum(logp * it)."""

        def f(params):
            out, state = self.module.apply({"params": params}, labels, var_input, capture_intermediates=True)
            if isinstance(cotangent_of, dict):
                logp = ar.ar_logp(out, cotangent_of["tokens"])
                return jnp.sum(logp * cotangent_of["logp"]), (logp, state["intermediates"])
            return jnp.sum(out * cotangent_of), (out, state["intermediates"])

        (_, aux), gradient = jax.value_and_grad(f, has_aux=True)(params)
        return *aux, gradient

    def torch(self, params):
        """{released name: float64 array} of a parameter tree, without buffers."""
        state = to_torch("var", self.config, {"params": params})
        keep = [k for k in state if k not in ("lvl_1L", "attn_bias_for_masking") and "zero_k_bias" not in k]
        return {name: state[name].astype(np.float64) for name in keep}

    def check_gradients(self, prefix, gradients):
        seen = 0
        for name, value in self.torch(gradients).items():
            if (norm := f"{prefix}gradnorm/{name}") in self.golden:
                self.check(norm, np.linalg.norm(value), "gradnorm")
                seen += 1
            if (key := f"{prefix}grad/{name}") in self.golden:
                self.used.add(key)
                largest = np.abs(self.golden[key]).max()
                within(f"{self.name} {key}", value / largest, self.golden[key] / largest, "grad")
                seen += 1
        return seen


@pytest.fixture(scope="module", params=NAMES)
def run(request):
    with jax.default_matmul_precision("highest"):
        run = Run(request.param)
        yield run
    if os.environ.get("DDO_JAX_GOLDENS"):  # for the one who runs the complete files: what nothing asked for
        print(f"\n{run.name}: never read: {sorted(set(run.golden) - run.used - {'config'})}")


def test_weight_decay(run):
    """Section 9."""
    mask = jax.tree.map(lambda decays, v: np.full(v.shape, decays, np.float32), decay_mask(run.params), run.params)
    assert [name for name, v in run.torch(mask).items() if not v.any()] == run.info["no_weight_decay_params"]


def statistics(v):
    v = np.asarray(v, np.float64).ravel()
    return [v.mean(), v.std(), v[0], v[-1]]


def test_teacher_forced(run):
    """Logits, every module's output, likelihood, gradients."""
    tokens, labels = run.get("tf/tokens"), run.get("tf/labels")
    run.check("tf/var_input", run.tokenizer(tokens, method="var_input"), "act")
    logits, seen, gradients = run.pull(run.params, labels, run.get("tf/var_input"), run.get("tf/cot"))
    run.check("tf/logits", logits, "logits")
    logp = ar.ar_logp(logits, jnp.asarray(tokens))
    run.check("tf/logp", logp, "logp")
    run.check("tf/ce_mean", -jnp.mean(logp) / tokens.shape[1], "act")
    run.check("tf/acc_mean", np.mean(np.argmax(logits, -1) == tokens), "act")

    run.check("trace/word_embed", statistics(seen["word_embed"]["__call__"][0]), "act")
    for i in range(run.module.depth):
        block = seen[f"blocks_{i}"]
        run.check(f"trace/blocks.{i}.attn", statistics(block["attn"]["__call__"][0][0]), "act")
        run.check(f"trace/blocks.{i}.ffn", statistics(block["ffn"]["__call__"][0]), "act")
        run.check(f"trace/blocks.{i}", statistics(block["__call__"][0][0]), "act")
    run.check("trace/head_nm", statistics(seen["head_nm"]["__call__"][0]), "act")
    run.check("act/blocks.0_out", seen["blocks_0"]["__call__"][0][0], "act")
    run.check("act/blocks.0.attn_out", seen["blocks_0"]["attn"]["__call__"][0][0], "act")
    assert run.check_gradients("tf/", gradients) >= len(run.torch(run.params))


@pytest.mark.slow
def test_cached_steps(run):
    """Forced tokens, conditional and unconditional rows; guided logits; the image of the tokens."""
    tokens, labels = run.get("kv/tokens"), run.get("kv/labels")
    rows = np.concatenate([labels, np.full_like(labels, run.info["uncond_label"])])
    parts = np.split(tokens, [end for _, end in run.module.spans][:-1], axis=1)

    @jax.jit
    def forced(params):
        past = maps = None
        f_hat = jnp.zeros((len(tokens), *[run.module.patch_nums[-1]] * 2, run.module.z_channels))
        out = []
        for s, part in enumerate(parts):
            logits, past = run.module.apply({"params": params}, s, rows, maps, past, method="step")
            out.append(logits)
            f_hat, maps = run.tokenizer(s, run.codebook[part], f_hat, method="step")
            maps = None if maps is None else jnp.concatenate([maps, maps])
        return out, f_hat

    (out, f_hat), n, scales = forced(run.params), len(tokens), len(parts)
    for s, logits in enumerate(out):
        run.check(f"kv/logits_raw/{s}", logits, "logits")
        for cfg in (1.5, 4):
            mixed = ar.guidance(logits[:n], logits[n:], cfg * ar.progress(s, scales))
            run.check(f"kv/mixed_cfg{cfg}/{s}", mixed, "logits", factor=1 + 2 * cfg)
    run.check_image("kv/img", f_hat)


@pytest.mark.parametrize("cfg", [0, 1.5])
def test_greedy(run, cfg):
    settings = SampleSettings(cfg=cfg, top_k=1)
    keys = jax.random.split(jax.random.key(0), len(run.get("greedy/labels")))

    def accumulate(s, h, f_hat):
        return run.tokenizer(s, h, f_hat, method="step")

    @jax.jit
    def sample(params, labels):
        return sample_tokens(run.module, {"params": params}, labels, keys, settings, run.codebook, accumulate)

    tokens, f_hat = sample(run.params, run.get("greedy/labels"))
    np.testing.assert_array_equal(tokens, run.get(f"greedy/cfg{cfg}/ids"))
    np.testing.assert_array_equal(f_hat.shape[1:], (*[run.module.patch_nums[-1]] * 2, run.module.z_channels))
    run.check_image(f"greedy/cfg{cfg}/img01", f_hat)


def test_more_smooth(run):
    """With the reference's noise. A codebook of unit vectors lets the accumulation see the probabilities."""
    labels, scales = run.get("smooth/labels"), len(run.module.patch_nums)
    noise = np.concatenate([-np.log(run.get(f"smooth/exp_noise/{s}")) for s in range(scales)], axis=1)
    settings = SampleSettings(cfg=run.info["smooth_cfg"], more_smooth=True)

    @jax.jit
    def sample(params, labels, noise):
        seen = []

        def accumulate(s, probs, f_hat):
            seen.append(probs)
            f_hat = f_hat if s else f_hat[..., : run.module.z_channels]
            return run.tokenizer(s, probs @ run.codebook, f_hat, method="step")

        unit_vectors = jnp.eye(run.module.vocab_size)
        _, f_hat = sample_tokens(run.module, {"params": params}, labels, noise, settings, unit_vectors, accumulate)
        return seen, f_hat

    probs, f_hat = sample(run.params, labels, noise)
    for s in range(scales):
        run.check(f"smooth/probs/{s}", probs[s], "probs")
    tau = [max(0.27 * (1 - 0.95 * ar.progress(s, scales)), 0.005) for s in range(scales)]
    run.check("smooth/tau", tau, "act")
    run.check_image("smooth/img01", f_hat, "smooth_image")


def test_reencoded(run):
    """Tokens -> pixels -> tokens, as for DDO's fakes."""
    tokens = jnp.asarray(run.get("reenc/tokens_in"))
    pixels = np.moveaxis(run.get("reenc/img_pm1"), 1, -1)
    image = run.image(run.tokenizer(tokens, method="f_hat"))
    run.check("reenc/img_pm1", 2 * image - 1, "image")
    again = jax.jit(lambda v: run.tokenizer(v, method="tokens"))(pixels)
    np.testing.assert_array_equal(again, run.get("reenc/tokens_out"))
    again = jax.jit(lambda v: run.tokenizer(v, method="tokens"))(np.moveaxis(2 * image - 1, 1, -1))
    np.testing.assert_array_equal(again, run.get("reenc/tokens_out"))


@pytest.fixture(scope="module")
def pairs(run):
    """Real and fake rows in one batch, and their likelihoods under both networks for each mask of labels."""
    tokens = np.concatenate([run.get("ddo/real_tokens"), run.get("ddo/fake_tokens")])
    var_input = run.tokenizer(jnp.asarray(tokens), method="var_input")

    def pull(params, drop_applied, cotangent):
        none = run.info["uncond_label"]
        labels = np.where(run.get("ddo/dropped") & drop_applied, none, run.get("ddo/labels")).astype(np.int32)
        what = {"tokens": jnp.asarray(tokens), "logp": jnp.asarray(cotangent)}
        logp, _, gradient = run.pull(params, np.concatenate([labels, labels]), var_input, what)
        return logp, gradient

    return pull


@pytest.mark.slow
def test_ddo(run, pairs):
    """Likelihoods, losses, gradients: every case and variant. The reference's likelihoods need its parameters."""
    n, gradients = len(run.get("ddo/labels")), 0
    zeros = np.zeros(2 * n, np.float32)
    ref = None
    if run.has("ref/pos_start"):
        ref = from_torch("var", run.config, run.state | run.under("ref/"))[1]["params"]
    for case in run.info["ddo_cases"]:
        at, applied, key = case["logp"], case["drop_applied"], f"ddo/{case['name']}/"
        dropped = jnp.asarray(run.get("ddo/dropped") & applied)
        logp = pairs(run.params, applied, zeros)[0]
        run.check(f"{at}logp_real", logp[:n], "logp")
        run.check(f"{at}logp_fake", logp[n:], "logp")
        logp_ref = np.concatenate([run.get(f"{at}ref_logp_real"), run.get(f"{at}ref_logp_fake")])
        if ref is not None:
            logp_ref = pairs(ref, applied, zeros)[0]
            run.check(f"{at}ref_logp_real", logp_ref[:n], "logp")
            run.check(f"{at}ref_logp_fake", logp_ref[n:], "logp")
        how = {"alpha": case["alpha"], "beta": case["beta"]}

        def loss(logp, logp_ref=logp_ref, dropped=dropped, how=how, variant=case["variant"]):
            r = logp - logp_ref
            nll = -logp[:n] / run.module.length
            return ar.var_ddo_loss(r[:n], r[n:], nll, dropped, dropped_row_loss=variant, **how)[0]

        value, cotangent = jax.value_and_grad(loss)(logp)
        run.check(f"{key}loss", value, "ddo")
        # logp_ref from the file is 1e-5 off ours; the gradient does not notice
        gradient = pairs(run.params, applied, cotangent)[1]
        total = np.sqrt(sum(np.sum(v**2) for v in run.torch(gradient).values()))
        run.check(f"{key}grad_global_norm", total, "gradnorm")
        gradients += run.check_gradients(key, gradient)
    assert gradients >= 2 * len(run.torch(run.params)) + 12
