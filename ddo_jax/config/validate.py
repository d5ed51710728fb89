"""`validate`: a config that cannot run is refused before anything is written."""

import difflib
import math
from collections.abc import Iterator

from ml_collections import ConfigDict

from ddo_jax.config.keys import METHODS, base, fakes_of_a_step, is_set, leaves, method_of, samples_fakes, steps
from ddo_jax.core.ar import DROPPED_ROW_LOSSES
from ddo_jax.core.phema import MAX_STD
from ddo_jax.core.samplers import MOST_SIGMA
from ddo_jax.data.crops import CROPS
from ddo_jax.data.images import ALPHA
from ddo_jax.errors import UserError, deprecated
from ddo_jax.families.base import PHASES, SAMPLER

# Keys that only some families read; each family says which of them are its own (`Spec.config_keys`).
FAMILY_KEYS = {"dtype", "data.augment", "ddo.dropped_row_loss", "ddo.reencode", "ddo.fakes_cfg"}
FAMILY_KEYS |= {"ddo.cond_drop_rate", "ddo.p_std_from"}
FAMILY_KEYS |= {f"{phase}.{key}" for phase in PHASES for key in ("p_mean", "p_std")}
FAMILY_KEYS |= {f"sampler.{key}" for key in SAMPLER}


def nearest(name: str, known) -> str:
    """' (did you mean "x"?)' or ''."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f'; did you mean "{close[0]}"?' if close else ""


def require(ok: bool, key: str, value, allowed: str) -> None:
    """
    Raises:
      UserError: not ok.
    """
    if not ok:
        raise UserError(f"config.{key}: {value!r}; allowed: {allowed}")


def _numbers(value) -> Iterator[float]:
    """The numbers in a value of a config, at any depth."""
    if isinstance(value, dict | ConfigDict):
        value = [value[key] for key in value]
    if isinstance(value, list | tuple):
        for part in value:
            yield from _numbers(part)
    elif isinstance(value, float):
        yield value


def _check_keys_and_types(config) -> None:
    """Every key and type against `base()`; config.model may carry arguments of its architecture."""
    known = dict(leaves(base()))
    for key, value in leaves(config):
        if key not in known:
            if key.startswith("model.") or ":" in config.family:
                continue  # checked by the network itself, or by `check_claimed`
            raise UserError(f"config.{key}: unknown key{nearest(key, known)}")
        default = known[key]
        if default is None or (value is None and key == "data.crop"):  # whose own check lists what it may be
            continue
        number = isinstance(default, float) and isinstance(value, int | float) and not isinstance(value, bool)
        require(number or type(value) is type(default), key, value, f"a {type(default).__name__}")
    missing = [k for k in known if k not in dict(leaves(config))]
    if missing:
        raise UserError(f"config.{missing[0]}: missing; start config files from ddo_jax.config.base()")


def _check_phase(config, phase: str) -> None:
    c = config[phase]
    require(c.batch >= 1, f"{phase}.batch", c.batch, "at least 1")
    require(
        c.accumulation >= 1 and c.batch % c.accumulation == 0,
        f"{phase}.accumulation",
        c.accumulation,
        f"a divisor of {phase}.batch = {c.batch}",
    )
    for key in ("lr", "p_std", "eps"):
        require(0 < c[key] < math.inf, f"{phase}.{key}", c[key], "a finite number above 0")
    for key in ("b1", "b2"):
        require(0 <= c[key] < 1, f"{phase}.{key}", c[key], "0 to below 1")
    allowed = f"{-MOST_LOG_SIGMA:.1f} to {MOST_LOG_SIGMA:.1f}, or noise levels overflow"
    require(abs(c.p_mean) <= MOST_LOG_SIGMA, f"{phase}.p_mean", c.p_mean, allowed)
    _check_noise(f"{phase}.p_std", c.p_mean, c.p_std)
    for key in ("ema_mimg", "ema_rampup", "final_lr", "start_lr", "t_ref", "clip", "weight_decay"):
        require(c[key] >= 0, f"{phase}.{key}", c[key], "0 or more")
    require(0 <= c.hold < 1, f"{phase}.hold", c.hold, "0 to below 1")
    for key in ("hold", "start_lr"):
        require(c.schedule == "linear" or not c[key], f"{phase}.{key}", c[key], "0, unless schedule is linear")
    final = c.final_weight_decay
    require(final is None or final >= 0, f"{phase}.final_weight_decay", final, "0 or more, or unset")
    schedules = ("constant", "cosine", "linear", "inverse_sqrt")
    require(c.schedule in schedules, f"{phase}.schedule", c.schedule, ", ".join(schedules))
    for key in ("warmup", "eval_every", "save_every", "snapshot_every", "length"):
        if key in c:
            for unit, value in c[key].items():
                ok = value is None or 0 < value < math.inf
                require(ok, f"{phase}.{key}.{unit}", value, "a finite number above 0, or unset")
            steps(c[key], c.batch, 1, f"{phase}.{key}")
    _check_emas(c, phase)


MOST_LOG_SIGMA = math.log(MOST_SIGMA)


def _check_noise(key: str, p_mean: float, p_std: float) -> None:
    """sigma = exp(P_mean + P_std n), and float32 must hold its square; |n| > 6 comes once in 500 million draws."""
    allowed = f"P_mean {p_mean} plus and minus 6 P_std within {MOST_LOG_SIGMA:.1f}, or noise levels overflow"
    require(abs(p_mean) + 6 * p_std <= MOST_LOG_SIGMA, key, p_std, allowed)


def _number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_emas(c, phase: str) -> None:
    for std in c.ema_stds:
        ok = _number(std) and 0 < std < MAX_STD
        require(ok, f"{phase}.ema_stds", std, f"numbers above 0 and below {MAX_STD:.4f}, as in (0.05, 0.1)")
    names = [f"{std:.3f}" for std in c.ema_stds]
    require(len(set(names)) == len(names), f"{phase}.ema_stds", c.ema_stds, "lengths that differ in three decimals")
    every = steps(c.snapshot_every, c.batch, 10**6, f"{phase}.snapshot_every")  # an epoch is long enough
    if every is None:
        return
    if not names:
        raise UserError(f"config.{phase}.snapshot_every: set, but {phase}.ema_stds is empty; set it to (0.05, 0.1)")
    allowed = "at least 1000 images: the names of snapshots count thousands"
    require(every * c.batch >= 1000, f"{phase}.snapshot_every", every * c.batch, allowed)


def _check_family(config, dtypes) -> None:
    """What one family has and another would ignore; the sampler's keys are checked by the family."""
    method = method_of(config)
    require(method in METHODS, "method", method, ", ".join(METHODS))
    if method in ("mle", "neon"):
        allowed = f"one value: method {method} uses neither alpha nor beta"
        for key in ("alpha", "beta"):
            require(len(config.ddo[key]) == 1, f"ddo.{key}", config.ddo[key], allowed)
    losses = ", ".join(DROPPED_ROW_LOSSES)
    loss = config.ddo.dropped_row_loss
    require(loss in DROPPED_ROW_LOSSES, "ddo.dropped_row_loss", loss, losses)
    require(config.dtype in dtypes, "dtype", config.dtype, ", ".join(dtypes))


def check_claimed(config, spec) -> None:
    """Refuse what the family in use would ignore: keys that only some families read, and keys of nobody.

    Args:
      config: otherwise valid. spec: of the family (`families.Spec`).

    Raises:
      UserError: names the first such key.
    """
    known, given = dict(leaves(base())), dict(leaves(config))
    for key, value in given.items():
        if key in spec.config_keys or key.startswith("model."):
            continue
        if key not in known:
            raise UserError(f"config.{key}: unknown key{nearest(key, known | dict.fromkeys(spec.config_keys))}")
        if key in FAMILY_KEYS:
            require(value == known[key], key, value, f"{known[key]!r}: family {spec.name} does not use it")


def _check_also(config) -> None:
    for given in config.eval.also:
        ok = isinstance(given, dict | ConfigDict) and len(given) and all(k in config.sampler for k in given)
        require(ok, "eval.also", given, f"dictionaries of sampler settings: {', '.join(config.sampler)}")
        for key, value in given.items():
            default = SAMPLER.get(key, value)
            same = _number(value) if isinstance(default, float) else type(value) is type(default)
            require(same, f"eval.also: {key}", value, f"a {type(default).__name__}")


def _check_p_std_from(pairs, p_mean: float) -> None:
    allowed = "(round, P_std) with rounds from 1 on in rising order and P_std above 0, as in ((17, 3.0),)"
    last = 0
    for pair in pairs:
        shaped = isinstance(pair, tuple | list) and len(pair) == 2 and type(pair[0]) is int and _number(pair[1])
        require(shaped and pair[0] > last and 0 < pair[1] < math.inf, "ddo.p_std_from", pair, allowed)
        _check_noise("ddo.p_std_from", p_mean, pair[1])
        last = pair[0]


LAYERS, MOST_LAYERS = ("blocks", "num_blocks", "depth"), 256
MOST_SIDE = 128  # of a map of tokens: those of 256 attend to each other in 2^33 pairs
MOST_ARGUMENT = 10**6  # of channels, classes, tokens: the products of three of them still fit into 64 bits


def _check_model(model) -> None:
    """What every network has; its other arguments are checked by itself, but none is as large as these limits."""
    for key, value in leaves(model):
        if key in LAYERS or isinstance(value, list):  # networks are traced layer by layer
            size = len(value) if isinstance(value, list) else value
            require(not _number(size) or size <= MOST_LAYERS, f"model.{key}", value, f"at most {MOST_LAYERS}")
        for number in value if isinstance(value, list) else [value]:
            ok = type(number) is not int or 0 <= number <= MOST_ARGUMENT
            require(ok, f"model.{key}", value, f"whole numbers from 0 to {MOST_ARGUMENT:,}")
    for key, most in (("channel_mult", MOST_ARGUMENT), ("patch_nums", MOST_SIDE)):
        given = model.get(key, (1,))
        ok = len(given) > 0 and all(_number(n) and 0 < n <= most for n in given)
        require(ok, f"model.{key}", given, f"one number a level, above 0, up to {most:,}")
    for key, least, most in (("img_resolution", 1, 2**14), ("img_channels", 1, 2**12)):
        require(least <= model[key] <= most, f"model.{key}", model[key], f"{least} to {most:,}")
    require(2 <= model.levels <= 256, "model.levels", model.levels, "2 to 256")
    allowed = f"1 / {MOST_SIGMA:g} to {MOST_SIGMA:g}"
    require(1 / MOST_SIGMA <= model.sigma_data <= MOST_SIGMA, "model.sigma_data", model.sigma_data, allowed)
    dropout = model.get("dropout", 0)
    require(_number(dropout) and 0 <= dropout < 1, "model.dropout", dropout, "0 to below 1")


def _check_apart(key: str, grid) -> None:
    """A candidate's directory is named by its numbers in six digits: two of one name would be one candidate."""
    names = [f"{value:g}" for value in grid]
    require(len(set(names)) == len(names), key, grid, "values that differ in their first six digits")


def _check_grids(config) -> None:
    for key in ("alpha", "beta"):
        grid = config.ddo[key]
        require(len(grid) > 0, f"ddo.{key}", grid, "at least one value")
        for value in grid:
            ok = _number(value) and 0 < value < math.inf
            require(ok, f"ddo.{key}", value, "finite numbers above 0, as in --config.ddo.alpha='(2.0, 4.0)'")
        _check_apart(f"ddo.{key}", grid)
    _check_search(config)
    _check_lines(config)
    if config.control.enabled:
        require(config.control.factor >= 1, "control.factor", config.control.factor, "at least 1")
        lrs = config.control.lrs
        ok = len(lrs) > 0 and all(_number(lr) and 0 < lr < math.inf for lr in lrs)
        require(ok, "control.lrs", lrs, "finite numbers above 0")
        _check_apart("control.lrs", lrs)


def _check_search(config) -> None:
    c, ways = config.ddo, ("fixed", "grid", "auto")
    require(c.search in ways, "ddo.search", c.search, ", ".join(ways))
    fakes, key, ratio = fakes_of_a_step(c), "ddo.fake_ratio", c.fake_ratio
    require(
        0 < ratio < 1000 and fakes == c.batch * ratio, key, ratio, f"such that {c.batch} times it is a whole number"
    )
    require(fakes % c.accumulation == 0, key, ratio, f"such that {fakes} fakes are a multiple of ddo.accumulation")
    require(ratio == 1 or method_of(config) == "ddo", key, ratio, f"1 with method {method_of(config)!r}")
    require(c.together >= 1, "ddo.together", c.together, "at least 1")
    for key in ("alpha", "beta") if c.search == "fixed" else ():
        require(len(c[key]) == 1, f"ddo.{key}", c[key], "one value: ddo.search is 'fixed'")
    if c.search == "auto":
        require(method_of(config) == "ddo", "ddo.search", c.search, f"fixed, grid with method {method_of(config)!r}")


def _check_lines(config) -> None:
    """The weights that a round's result is extrapolated by."""
    neon = method_of(config) == "neon"
    require(not neon or len(config.neon.w) > 0, "neon.w", config.neon.w, "at least one value")
    for w in config.neon.w:
        require(_number(w) and 0 < w < math.inf, "neon.w", w, "finite numbers above 0: away from the fakes")
    require(not neon or not config.ddo.line, "ddo.line", config.ddo.line, "(): method neon has its own, neon.w")
    for w in config.ddo.line:
        require(_number(w) and 0 < abs(w) < math.inf, "ddo.line", w, "finite numbers but 0, as in (-1.0, 0.5, 2.0)")
    for key, line in (("neon.w", config.neon.w), ("ddo.line", config.ddo.line)):
        _check_apart(key, line)


def check_hosts(config) -> None:
    """What is needed before the processes of a run meet.

    Raises:
      UserError: a time that is none.
    """
    for key in ("start_s", "heartbeat_s"):
        value = config.hosts[key]
        require(1 <= value <= 10**6, f"hosts.{key}", value, "1 to 1,000,000 seconds")


def validate(config, devices: int) -> None:
    """Refuse a config that cannot run, before anything is written.

    Raises:
      UserError: one line with the key, the value, what is allowed.
    """
    _check_keys_and_types(config)
    if config.objective is not None and method_of(config):  # which refuses two that contradict each other
        deprecated("config.objective", "config.method", gone="0.2")
    precisions = ("default", "high", "highest")  # the DotAlgorithmPreset names are dropped for convolutions
    require(config.precision in precisions, "precision", config.precision, ", ".join(precisions))
    dtypes = ("float32", "bfloat16", "float16")
    require(config.eval.dtype in dtypes, "eval.dtype", config.eval.dtype, ", ".join(dtypes))
    _check_family(config, dtypes)
    require(config.data.crop in CROPS, "data.crop", config.data.crop, ", ".join(map(repr, CROPS)))
    require(config.data.alpha in ALPHA, "data.alpha", config.data.alpha, ", ".join(ALPHA))
    require(0 <= config.data.augment <= 1, "data.augment", config.data.augment, "0 to 1")
    require(config.keep in ("best", "all"), "keep", config.keep, "best, all")
    for phase in PHASES:
        _check_phase(config, phase)
    _check_grids(config)
    _check_p_std_from(config.ddo.p_std_from, config.ddo.p_mean)
    _check_also(config)
    require(0 <= config.seed < 2**31, "seed", config.seed, "0 or more, below 2^31")
    for key in ("lease_s", "stall_s"):
        require(config[key] >= 10, key, config[key], "at least 10")
    require(config.save_minutes >= 0, "save_minutes", config.save_minutes, "0 or more")
    check_hosts(config)
    _check_model(config.model)
    require(
        0 <= config.ddo.rounds < 1000, "ddo.rounds", config.ddo.rounds, "0 to 999: their directories have three digits"
    )
    needed = ["ddo.length"] if config.ddo.rounds else []
    needed += ["ddo.eval_every"] if config.ddo.rounds and method_of(config) != "neon" else []  # they select the best
    needed += ["control.eval_every"] if config.ddo.rounds and config.control.enabled else []
    for key in needed:
        phase, name = key.split(".")
        require(is_set(config[phase][name]), key, "unset", "a duration")
    _check_pool(config)
    scratch = config.init == "scratch"
    require(
        not scratch or is_set(config.pretrain.length),
        "pretrain.length",
        "unset",
        "a duration, or config.init = a checkpoint",
    )
    require(
        not scratch or not is_set(config.adapt.length),
        "adapt.length",
        "set",
        "unset with init = 'scratch': a network is adapted from config.init = a checkpoint",
    )
    _check_devices(config, devices)
    _check_evaluation(config)
    for key, value in leaves(config):
        require(all(map(math.isfinite, _numbers(value))), key, value, "finite numbers")


def _check_pool(config) -> None:
    labels, allowed = config.ddo.pool_labels, "balanced, data"
    if not config.ddo.pool or not samples_fakes(config):
        allowed = "balanced: there is no pool, fakes have the labels of the real rows beside them"
    require(labels in allowed.split(":")[0].split(", "), "ddo.pool_labels", labels, allowed)
    least = fakes_of_a_step(config.ddo)
    product = "ddo.batch" if config.ddo.fake_ratio == 1 else "ddo.batch x ddo.fake_ratio"
    allowed = f"at least {product} = {least}, the fakes of a step, or 0 for fakes made as training goes"
    if method_of(config) == "neon":
        allowed = f"at least ddo.batch = {least}: method neon trains on the pool and nothing else"
        require(config.ddo.pool > 0, "ddo.pool", config.ddo.pool, allowed)
    require(config.ddo.pool == 0 or config.ddo.pool >= least, "ddo.pool", config.ddo.pool, allowed)


def _check_devices(config, devices: int) -> None:
    fsdp = config.mesh.fsdp
    require(fsdp >= 1 and devices % fsdp == 0, "mesh.fsdp", fsdp, f"a divisor of the {devices} devices")
    batches = {f"{p}.batch": config[p].batch // config[p].accumulation for p in PHASES}
    batches["ddo.fake_ratio"] = fakes_of_a_step(config.ddo) // config.ddo.accumulation
    for key, value in {**batches, "eval.batch": config.eval.batch}.items():
        require(value % devices == 0, key, value, f"(per micro-batch) a multiple of the {devices} devices")


def _check_evaluation(config) -> None:
    for key in ("eval.batch", "eval.grid", "log.every"):
        section, name = key.split(".")
        require(config[section][name] >= 1, key, config[section][name], "at least 1")
    allowed = "0 (not measured), or at least 2"
    require(config.log.signal == 0 or config.log.signal >= 2, "log.signal", config.log.signal, allowed)
    for key in ("num", "select_num"):
        value = config.eval[key]
        require(value is None or value >= 2, f"eval.{key}", value, "at least 2")
    require(config.eval.report_seeds >= 1, "eval.report_seeds", config.eval.report_seeds, "at least 1")
