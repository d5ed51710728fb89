"""VAR: sampling with and without its cache, as one program or ten, teacher forcing, attention, the sampler's noise.

    python benchmarks/var.py [--only=generate,programs,forward,attention,noise] [--depth=16]
    python benchmarks/var.py --model=var-d16 --batch=25 --dtype=bfloat16        # on a GPU

The default is a small network (4 blocks of width 128, 512 codes of width 8) at the ten scales of the real ones. Random
weights and a tokenizer without encoder and decoder: images are token maps here. One JSON line per comparison, with
what was expected before it was measured; variants run in turn in one process, `x_over_y` are ratios of seconds, call
by call (> 1: y is faster). compile_s is trace + lower + compile without the persistent cache; temp_mb and peak_mb are
XLA's memory analysis; gflop its count of the program as lowered. "float32" is precision "highest" (no TF32).

Each part's docstring holds what was found on two shared CPU cores (benchmarks/results/2026-11-var-cpu.jsonl).
"""

import argparse
import functools
import inspect
import time
from typing import Any, NamedTuple

import edm  # first: it puts the repository on the path
import jax
import jax.numpy as jnp
import numpy as np
from common import report, spread

from ddo_jax.core import ar
from ddo_jax.models import var as networks
from ddo_jax.models import vqvae

SMALL = {"num_classes": 10, "depth": 4, "embed_dim": 128, "num_heads": 2, "vocab_size": 512, "z_channels": 8}
TOKENIZER = {"ch": 32, "ch_mult": (1,), "num_res_blocks": 1}  # of the unused networks around the quantizer
PLAN = {"vocab_size": 4096, "batch": 64}  # of the samplers that are compiled only

# ----------------------------------------------------------------------------------------------------
# Networks and programs


class Setup(NamedTuple):
    """What all parts measure; weights: {"var": variables, "vae": variables}."""

    name: str
    config: dict
    dtype: str
    batch: int
    how: networks.SampleSettings
    budget: float  # seconds per contestant and comparison
    first_calls: int
    module: networks.VAR
    vae: vqvae.VQVAE
    weights: Any

    def inputs(self):
        """(labels [B], one key an image [B])."""
        keys = jax.vmap(jax.random.key)(np.arange(self.batch, dtype=np.uint32))
        return np.arange(self.batch, dtype=np.int32) % self.module.num_classes, keys


def modules(config: dict, dtype: str, remat: bool = False):
    """(transformer, tokenizer) of a transformer's constructor arguments."""
    module = networks.from_config(config, dtype=None if dtype == "float32" else jnp.dtype(dtype), remat=remat)
    sizes = {key: getattr(module, key) for key in ("vocab_size", "z_channels", "patch_nums")}
    return module, vqvae.from_config(TOKENIZER | sizes)


def shapes(module, vae):
    """Of both networks' variables; of the tokenizer's only the quantizer's."""
    label, maps = np.zeros(1, np.int32), np.zeros((1, module.length - module.spans[0][1], module.z_channels), "float32")
    image = np.zeros((1, vae.image_size, vae.image_size, 3), np.float32)
    transformer, tokenizer = (
        jax.eval_shape(m.init, jax.random.key(0), *x)["params"] for m, x in ((module, (label, maps)), (vae, (image,)))
    )
    return {"var": {"params": transformer}, "vae": {"params": {"quantize": tokenizer["quantize"]}}}


def random_weights(tree, seed: int = 0):
    """Of the scale of a trained network: classes and levels matter, no residual gain is near zero."""
    rng = np.random.default_rng(seed)

    def draw(path, x):
        name = jax.tree_util.keystr(path)
        noise = rng.standard_normal(x.shape, np.float32)
        if "scale_mul" in name:
            return np.full(x.shape, np.log(4), np.float32)
        if name.endswith("['weight']") and "embedding" not in name and "_emb'" not in name and "lvl_embed" not in name:
            return noise / np.sqrt(np.prod(x.shape[:-1], dtype=np.float32))
        return noise if "emb" in name else np.float32(0.1) * noise

    return jax.device_put(jax.tree_util.tree_map_with_path(draw, tree))


def setup(name: str, config: dict, args) -> Setup:
    """args: dtype, batch, cfg, budget, first_calls of `parse`."""
    module, vae = modules(config, args.dtype)
    how, weights = networks.SampleSettings(cfg=args.cfg), random_weights(shapes(module, vae))
    numbers = args.dtype, args.batch, how, args.budget, args.first_calls
    return Setup(name, config, *numbers, module, vae, weights)


def precision(dtype: str):
    return jax.default_matmul_precision("highest" if dtype == "float32" else "default")


class Contestant(NamedTuple):
    """call() runs it once, waits for the device and returns the result."""

    call: Any
    costs: dict


def build(f, dtype: str, *args) -> Contestant:
    """A function of fixed arguments, compiled here."""
    compiled, costs = ahead(f, dtype, *args)
    return Contestant(lambda: jax.block_until_ready(compiled(*args)), costs)


def ahead(f, dtype: str, *args) -> tuple[Any, dict]:
    """(program, its costs) of a function of arrays or shapes."""

    def precise(*args):
        with precision(dtype):
            return f(*args)

    busy = time.process_time()
    compiled, seconds, flops = edm.ahead(jax.jit(precise), *args)
    busy = time.process_time() - busy
    costs = {"compile_s": round(seconds, 2), "compile_cpu_s": round(busy, 2), "gflop": flops and round(flops / 1e9, 3)}
    return compiled, costs | megabytes(compiled)


def megabytes(compiled) -> dict:
    sizes = {"temp_mb": compiled.memory_analysis().temp_size_in_bytes, "peak_mb": edm.peak_bytes(compiled)}
    return {k: round(v / 2**20, 1) for k, v in sizes.items()}


def ratio_of(seconds: dict, pairs) -> dict:
    """{"x_over_y": spread} of seconds, call by call."""
    return {
        f"{x}_over_{y}": spread([a / b for a, b in zip(seconds[x], seconds[y], strict=True)])
        for x, y in (pair.split("/") for pair in pairs)
    }


def compare(part, s: Setup, contestants: dict, pairs, rate: tuple[str, int] | None = None, **more) -> None:
    """Run the contestants in turn; one JSON line. rate: (name, how many of it a call makes)."""
    _, seconds = edm.in_turn({k: c.call for k, c in contestants.items()}, s.budget, most=30)
    numbers = {}
    for k, c in contestants.items():
        numbers[k] = c.costs | {"ms": spread([1000 * t for t in seconds[k]])}
        if rate:
            numbers[k][f"{rate[0]}_per_s"] = spread([rate[1] / t for t in seconds[k]])
    emit(part, s, **numbers, **ratio_of(seconds, pairs), **more)


def emit(part, s: Setup, name: str | None = None, **numbers) -> None:
    """One JSON line of a part: the network, the numbers, the docstring's expectation."""
    expected = " ".join(inspect.getdoc(part).split("Expected: ")[1].split("Found: ")[0].split())
    sizes = {k: getattr(s.module, k) for k in ("depth", "embed_dim", "vocab_size", "length")}
    network = {"network": s.name, **sizes, "dtype": s.dtype, "batch": s.batch, "cfg": s.how.cfg}
    device = jax.devices()[0].device_kind
    report(f"var/{name or part.__name__}", **network, **numbers, expected=expected, device=device)


# ----------------------------------------------------------------------------------------------------
# Samplers


def codebook(weights):
    return weights["vae"]["params"]["quantize"]["embedding"]["weight"]


def sample(s: Setup, weights, labels, noise, module=None):
    """(tokens [B, L], f_hat) of the product's sampler; module, noise: or stand-ins of this file."""

    def accumulate(scale, h, f_hat):
        return s.vae.apply(weights["vae"], scale, h, f_hat, method="step")

    return networks.sample_tokens(
        module or s.module, weights["var"], labels, noise, s.how, codebook(weights), accumulate
    )


class Recompute:
    """A VAR whose "step" keeps no keys and values: it runs `__call__` on all tokens so far, `past` are their maps."""

    def __init__(self, module):
        self.module = module

    def __getattr__(self, name):  # sizes
        return getattr(self.module, name)

    def apply(self, variables, scale, labels, maps, past, method):
        assert method == "step"
        first, end = self.module.spans[scale]
        nothing = jnp.zeros((len(labels), 0, self.module.z_channels))
        past = nothing if maps is None else jnp.concatenate([past, maps], axis=1)
        params = dict(variables["params"])
        params["pos_1LC"] = params["pos_1LC"][:, :end]
        params["lvl_embed"] = {"weight": params["lvl_embed"]["weight"][: scale + 1]}
        shorter = self.module.clone(patch_nums=self.module.patch_nums[: scale + 1])
        return shorter.apply({"params": params}, labels, past)[:, first:], past


class PerScale:
    """Noise [B, L, V] that is drawn at each scale, when `sample_tokens` takes its slice."""

    ndim = 3

    def __init__(self, module, keys):
        self.module, self.keys = module, keys

    def __getitem__(self, at):
        first, end = at[1].start, at[1].stop
        scale = self.module.spans.index((first, end))

        def draw(key):
            return jax.random.gumbel(jax.random.fold_in(key, scale), (end - first, self.module.vocab_size))

        return jax.vmap(draw)(self.keys)


def all_noise(s: Setup, keys):
    """As `sample_tokens` draws it, [B, L, V]."""
    return jax.vmap(lambda key: jax.random.gumbel(key, (s.module.length, s.module.vocab_size)))(keys)


def one_scale(s: Setup, scale: int, weights, labels, noise, carried):
    """The body of the loop of `sample_tokens`: (tokens of a scale, what the next needs)."""
    past, maps, f_hat = carried
    rows = jnp.concatenate([labels, jnp.full_like(labels, s.module.num_classes)]) if s.how.cfg else labels
    if s.how.cfg and maps is not None:
        maps = jnp.concatenate([maps, maps])
    logits, past = s.module.apply(weights["var"], scale, rows, maps, past, method="step")
    if s.how.cfg:
        t = s.how.cfg * ar.progress(scale, len(s.module.patch_nums))
        logits = ar.guidance(logits[: len(labels)], logits[len(labels) :], t)
    ids = ar.draw(logits, noise)
    h = jnp.take(codebook(weights), ids, axis=0)
    f_hat, maps = s.vae.apply(weights["vae"], scale, h, f_hat, method="step")
    return ids, (past, maps, f_hat)


def one_program(s: Setup, labels, keys):
    """A function that samples, nothing compiled yet."""

    def run(weights, labels, keys):
        with precision(s.dtype):
            return sample(s, weights, labels, keys)

    f = jax.jit(run)
    return lambda: jax.block_until_ready(f(s.weights, labels, keys))


def per_scale_programs(s: Setup, labels, keys):
    """The same as a program for each scale and one for the noise of all, called one after the other."""
    spans, side = s.module.spans, s.module.patch_nums[-1]

    def draw(keys):
        noise = all_noise(s, keys)
        return [noise[:, first:end] for first, end in spans]

    def run(scale, *args):
        with precision(s.dtype):
            return one_scale(s, scale, *args)

    draw, programs = jax.jit(draw), [jax.jit(functools.partial(run, scale)) for scale in range(len(spans))]
    start = np.zeros((s.batch, side, side, s.module.z_channels), np.float32)

    def call():
        noise, tokens, carried = draw(keys), [], (None, None, start)
        for part, program in zip(noise, programs, strict=True):
            ids, carried = program(s.weights, labels, part, carried)
            tokens.append(ids)
        return np.concatenate(jax.block_until_ready(tokens), axis=1), jax.block_until_ready(carried[2])

    return call


def same_tokens(s: Setup, a, b) -> float:
    """Share of equal tokens of two results; in float32 they must all be."""
    share = float(np.mean(np.asarray(a[0]) == np.asarray(b[0])))
    assert share == 1 or s.dtype != "float32", f"{share:.4f} of the tokens are equal"
    return round(share, 4)


# ----------------------------------------------------------------------------------------------------
# Parts


def generate(s: Setup) -> None:
    """Sampling with the cache of keys and values, and without: each scale runs all tokens so far again.

    Expected: products outside attention see 680 rows with the cache and 1+5+14+...+680 = 1710 without: 2.51 times the
    FLOPs; attention 2.60 times (744k query-key pairs for 286k). The growing scales keep it that low: the last forward
    is 40 % of the whole. The noise and the tokenizer are the same in both, so on a CPU, whose generator is slow, about
    2; on a GPU at small batches less than 2.5 too, as the first scales are short of work. Compilation is equal within
    20 %: as many operations.

    Found: 2.52 times the FLOPs, 2.09 times as long (1.71 to 2.98), compilation 1.02 times, the same tokens.
    """
    labels, keys = s.inputs()
    recompute = Recompute(s.module)
    cache = build(lambda *args: sample(s, *args), s.dtype, s.weights, labels, keys)
    other = build(lambda *args: sample(s, *args, module=recompute), s.dtype, s.weights, labels, keys)
    equal = same_tokens(s, cache.call(), other.call())
    contestants = {"cache": cache, "recompute": other}
    compare(generate, s, contestants, ["recompute/cache"], ("images", s.batch), equal_tokens=equal)


def programs(s: Setup) -> None:
    """One program of all scales, or one a scale and one for the noise of all: first call and steady state.

    Expected: the same operations are compiled, so a first call equally long within 20 %, one program ahead if XLA's
    cost per program matters, behind if a pass grows faster than linearly; steady state equal within 5 % on a CPU and at
    large batches (eleven dispatches of a millisecond or less in all), one program ahead at batch 1 to 4 of a small
    network.

    Found: a first call of per_scale takes 1.09 times the CPU seconds at depth 4 (1.08 to 1.19), but 0.88 at depth 16
    (0.88 to 0.89; 0.63 to 0.88 of the wall time). Steady 1.01 at batch 4, 1.07 at 16; 1.01 and 1.07 (0.79 to 1.47) at
    depth 16: per_scale never ahead. Compiled for an H100 (aot.py's way, not run) the one program fuses the noise into
    the argmax; between programs its B L V numbers have to be stored.

    Blocks in jax.lax.scan over stacked parameters, tried outside (depth 16, batch 2, n = 1): compilation 0.44 times the
    CPU seconds, sampling 1.21 times as long, twice the temporaries, the same tokens; forward + backward 0.44 and 0.86
    times, temporaries 1.25 times.
    """
    labels, keys = s.inputs()
    makers, calls = {"one": one_program, "per_scale": per_scale_programs}, {}
    wall, cpu = ({name: [] for name in makers} for _ in range(2))
    for i in range(s.first_calls):
        for name, make in list(makers.items())[:: -1 if i % 2 else 1]:
            jax.clear_caches()  # of the other too: it is compiled once more below, unmeasured
            began, busy = time.perf_counter(), time.process_time()
            calls[name] = make(s, labels, keys)
            calls[name]()
            wall[name].append(time.perf_counter() - began)
            cpu[name].append(time.process_time() - busy)
    equal = same_tokens(s, calls["one"](), calls["per_scale"]())
    costs = {name: {"first_call_s": spread(wall[name]), "first_call_cpu_s": spread(cpu[name])} for name in makers}
    contestants = {name: Contestant(call, costs[name]) for name, call in calls.items()}
    more = {f"first_call_{k}": v for k, v in ratio_of(wall, ["per_scale/one"]).items()}
    more |= {f"first_call_cpu_{k}": v for k, v in ratio_of(cpu, ["per_scale/one"]).items()}
    compare(programs, s, contestants, ["per_scale/one"], ("images", s.batch), equal_tokens=equal, **more)


def forward(s: Setup) -> None:
    """Teacher-forced forward, and forward + backward of the mean log-likelihood (no optimizer), by dtype; with remat.

    Expected: forward + backward 3 times the forward; remat adds a forward of the blocks, 4/3 of that time, for a
    temp_mb several times smaller on a GPU (on a CPU XLA undoes it, see variants.py). bfloat16 on a CPU without
    16-bit units: slower, 1 to 2 times as long; on an H100 up to 10 times as fast as "highest".

    Found: forward + backward 4.8 times the forward (2.99 times its FLOPs). Remat 1.16 times as long, 1.21 in bfloat16
    (1.32 times the FLOPs), and saves 1.5 % of temp_mb on a CPU. bfloat16: forward 1.21, with backward 1.01 times.
    """
    labels, _ = s.inputs()
    rng, first = np.random.default_rng(2), s.module.spans[0][1]
    maps = rng.standard_normal((s.batch, s.module.length - first, s.module.z_channels), np.float32)
    tokens = rng.integers(0, s.module.vocab_size, (s.batch, s.module.length)).astype(np.int32)
    params = s.weights["var"]["params"]

    def contestants(dtype, remat=False):
        module, _ = modules(s.config, dtype, remat)

        def logp(params):
            return jnp.mean(ar.ar_logp(module.apply({"params": params}, labels, maps), tokens)) / module.length

        return build(logp, dtype, params), build(jax.value_and_grad(lambda p: -logp(p)), dtype, params)

    found = {}
    for dtype in ("float32", "bfloat16"):
        found[f"forward_{dtype}"], found[f"mle_{dtype}"] = contestants(dtype)
        found[f"mle_remat_{dtype}"] = contestants(dtype, remat=True)[1]
    pairs = ["mle_float32/forward_float32", "mle_remat_float32/mle_float32", "mle_remat_bfloat16/mle_bfloat16"]
    pairs += ["forward_bfloat16/forward_float32", "mle_bfloat16/mle_float32"]
    compare(forward, s, found, pairs, ("tokens", s.batch * s.module.length))


def our_attention(q, k, v, mask):
    """The lines of `networks.Attention` between normalisation and `proj`: [B,L,H,C/H] each, mask [L,L]."""
    logits = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(jnp.where(mask[None, None], logits, -jnp.inf), axis=-1).astype(q.dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v)


def difference(a, b) -> float:
    """Largest, of numbers up to 1; above, relative to the largest number."""
    a, b = (np.asarray(x, np.float32) for x in (a, b))
    return float(np.abs(a - b).max() / max(1, np.abs(b).max()))


def library_attention(q, k, v, mask):
    return jax.nn.dot_product_attention(q, k, v, mask=mask[None, None], scale=1.0)


def attention(s: Setup) -> None:
    """Masked attention alone, forward and gradient: two einsums, or jax.nn.dot_product_attention with a boolean mask.

    Expected: equal within 5 %, the same memory: it lowers to the same products (implementation "xla"). cuDNN's kernel,
    which never stores the weights, has to be asked for by name and takes 16 bit only: not tried.

    Found: the library's forward 1.82 times as long (1.49 to 2.25) with 1.7 times the temporaries, with gradient 1.42
    (1.31 to 1.52) and 1.2 times; differences below 1e-6.
    """
    rng, heads = np.random.default_rng(3), s.module.num_heads
    shape = (3, s.batch, s.module.length, heads, s.module.embed_dim // heads)
    q, k, v = jnp.asarray(rng.standard_normal(shape, np.float32))
    q, k, v = (x.astype(s.dtype) for x in (4 * networks.unit(q), networks.unit(k), v))
    mask = s.module.levels[:, None] >= s.module.levels[None]

    def gradient(f):
        return jax.value_and_grad(lambda *x: jnp.sum(jnp.sin(f(*x, mask).astype(jnp.float32))), argnums=(0, 1, 2))

    found, results = {}, []
    for name, f in (("einsum", our_attention), ("library", library_attention)):
        found[name] = build(functools.partial(f, mask=mask), s.dtype, q, k, v)
        found[f"{name}_gradient"] = build(gradient(f), s.dtype, q, k, v)
        results.append((found[name].call(), found[f"{name}_gradient"].call()[1]))
    error = max(map(difference, *map(jax.tree.leaves, results)))
    assert error < 1e-5 or s.dtype != "float32", error
    pairs = ["library/einsum", "library_gradient/einsum_gradient"]
    compare(attention, s, found, pairs, largest_difference=float(f"{error:.1e}"))


def noise(s: Setup) -> None:
    """Gumbel noise of all scales in one call, of each scale from fold_in(key, scale), or given: in the whole sampler.

    Expected: per scale the largest draw is 256 of 680 tokens, so temp_mb falls by 0.62 of the noise (B L V 4 bytes: 713
    MB at 64 images and 4096 codes) or more; the same time within 5 %; ten generators to compile instead of one, at
    about a second each on a CPU (a loop on a GPU: less). The noise itself is a quarter of a small network's time on a
    CPU, little of a real one's on a GPU.

    Found: per scale is 1.18 (depth 4, 0.96 to 1.88) to 1.29 times as long (depth 1) and compiles 4.5 to 4.8 CPU
    seconds longer (half a second a generator; 1.5 times the whole at depth 1). At 64 images and 4096 codes it saves
    25 % of 2.9 GiB (depth 4), 10 % of 2.7 (depth 1): the generator alone has temporaries of three times its result, and
    XLA puts all ten draws before the network. Keys that depend on the scale before (outside this file) save 52 %;
    optimization_barrier does nothing on a CPU. Drawing is 0.13 (depth 4) to 0.29 of the sampler's time.

    Compiled for an H100 (aot.py's way, var-d16's width, depth 2, 256 images, bfloat16; not run) both have 5.5 GiB of
    temporaries and the same compile seconds within 1 %: at_once stores no noise there, the generator is fused into
    argmax(logits + noise). So per scale has nothing to gain.
    """
    samplers = {
        "at_once": lambda s: functools.partial(sample, s),
        "per_scale": lambda s: lambda weights, labels, keys: sample(s, weights, labels, PerScale(s.module, keys)),
    }
    labels, keys = s.inputs()
    found = {name: build(make(s), s.dtype, s.weights, labels, keys) for name, make in samplers.items()}
    found["given"] = build(
        samplers["at_once"](s), s.dtype, s.weights, labels, jax.jit(functools.partial(all_noise, s))(keys)
    )
    found["draw_only"] = build(functools.partial(all_noise, s), s.dtype, keys)
    compare(noise, s, found, ["per_scale/at_once", "given/at_once", "draw_only/at_once"], ("images", s.batch))
    plan(s, samplers)


def plan(s: Setup, samplers: dict) -> None:
    """Memory of both samplers at PLAN's sizes: compiled from shapes, not run."""
    module, vae = modules(s.config | {"vocab_size": PLAN["vocab_size"]}, s.dtype)
    big = s._replace(module=module, vae=vae, batch=PLAN["batch"])
    inputs = jax.eval_shape(big.inputs)
    found = {}
    for name, make in samplers.items():
        found[name] = ahead(make(big), s.dtype, shapes(module, vae), *inputs)[1]
    noise_mb = round(4 * big.batch * module.length * module.vocab_size / 2**20, 1)
    emit(noise, big, "noise_memory", noise_mb=noise_mb, **found)


PARTS = {f.__name__: f for f in (generate, programs, forward, attention, noise)}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help=f"of {', '.join(PARTS)}")
    parser.add_argument("--model", default="small", choices=["small", *networks.VAR_PRESETS])
    parser.add_argument("--depth", type=int, help="other than the model's")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--cfg", type=float, default=0.0, help="guidance of the samplers; 0: none")
    parser.add_argument("--budget", type=float, default=10.0, help="seconds per contestant and comparison")
    parser.add_argument("--first_calls", type=int, default=3, help="of each kind of program")
    args = parser.parse_args()
    args.only = args.only.split(",")
    if unknown := set(args.only) - set(PARTS):
        parser.error(f"--only: {', '.join(sorted(unknown))}; allowed: {', '.join(PARTS)}")
    return args


def main(args) -> None:
    config = dict(SMALL if args.model == "small" else networks.VAR_PRESETS[args.model])
    if args.depth:
        config["depth"] = args.depth
    s = setup(args.model, config, args)
    jax.block_until_ready(jax.jit(jnp.sin)(np.ones(8, np.float32)))  # the compiler's own start is nobody's
    for name in args.only:
        PARTS[name](s)


if __name__ == "__main__":
    main(parse())
