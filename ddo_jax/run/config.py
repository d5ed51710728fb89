"""The configuration of a run: every key with its default, and `validate` in one place.

Config files start from `base()`, which is locked: a misspelt key answers "Did you mean ...". They live in
configs/; this module is in the package so that a config can be loaded by path from anywhere.
"""

import difflib
import math
from collections.abc import Iterator

from ml_collections import ConfigDict, config_dict

from ddo_jax.core.ar import DROPPED_ROW_LOSSES
from ddo_jax.core.phema import MAX_STD
from ddo_jax.core.samplers import MOST_SIGMA
from ddo_jax.data.crops import CROPS
from ddo_jax.errors import UserError
from ddo_jax.families.base import DIFFUSION_SAMPLER, VAR_SAMPLER

OBJECTIVES = ("ddo", "mle", "cca")


def _duration(**given) -> dict:
    """Three ways to write one duration, at most one of them set (see `steps`)."""
    keys = {"steps": None, "mimg": None, "epochs": None} | given
    types = {"steps": int, "mimg": float, "epochs": float}
    return {k: config_dict.placeholder(types[k]) if v is None else v for k, v in keys.items()}


def _training(**given) -> dict:
    """What a phase of training needs: data per step, optimizer, learning rate, EMA, noise levels."""
    defaults = dict(
        batch=512,  # real images per step; DDO adds as many fakes
        accumulation=1,  # micro-batches per step: changes memory, never results
        lr=1e-3,
        schedule="constant",  # constant | cosine | linear | inverse_sqrt
        warmup=_duration(),  # unset: no warm-up
        final_lr=0.0,  # cosine and linear only
        start_lr=0.0,  # linear only: at the first step of the warm-up
        hold=0.0,  # linear only: fraction after the warm-up with the full rate
        t_ref=0.0,  # inverse_sqrt only: images after which the decay starts
        b1=0.9,
        b2=0.999,
        eps=1e-8,
        clip=0.0,  # largest global norm of a gradient; 0: none
        weight_decay=0.0,  # AdamW's: lr * weight_decay * params, of those that the family decays
        final_weight_decay=config_dict.placeholder(float),  # half a cosine from weight_decay to it; unset: constant
        ema_mimg=0.5,  # half-life of the EMA in millions of images
        ema_rampup=0.0,  # half-life at most this fraction of the images seen; 0: off
        ema_stds=(),  # instead of a half-life: lengths of power-function EMAs, as in (0.05, 0.1); the first one counts
        p_mean=-1.2,
        p_std=1.2,
        eval_every=_duration(),  # unset: no evaluation inside the phase
        save_every=_duration(),  # unset: checkpoints at evaluations and at the end only
        snapshot_every=_duration(),  # of every EMA in ema_stds, for ddo_jax.posthoc; unset: none
    )
    return defaults | given


def _evaluation() -> dict:
    """How images are judged."""
    return dict(
        network="digits",  # digits | inception | dinov2
        weights=config_dict.placeholder(str),  # of the feature network; unset: its known name
        reference=config_dict.placeholder(str),  # statistics: a file or known name; unset: of the training set
        num=50_000,  # images per reported evaluation
        select_num=config_dict.placeholder(int),  # images per evaluation inside the rounds; unset: num
        batch=512,  # sampled at a time, over all devices; images do not depend on it
        dtype="float32",  # float32 | bfloat16 | float16: of the image path when sampling; never of the ratio
        report_seeds=3,  # the report scores this many fresh seed ranges
        also=(),  # other sampler settings that the report scores: ({"cfg": 1.0}, {"top_k": 900, "top_p": 0.96})
        grid=100,  # images of the before/after picture
    )


def base() -> ConfigDict:
    """All keys. `None` placeholders are unset values with a type."""
    config = ConfigDict(
        dict(
            name="",  # of the experiment: title of the report
            remark="",  # what the reader of the report must know beside its numbers
            seed=0,  # of training: initialisation, data order, noise
            family="edm",  # edm | edm2 | var
            objective="ddo",  # of the rounds: ddo | mle | cca; the last two are baselines without fakes
            dtype="float32",  # of matrix products in training: float32; bfloat16 and float16 for family var only
            precision="highest",  # matmul and convolution precision: default | high | highest
            remat=False,  # recompute activations in the backward pass: changes memory, never results
            init="scratch",  # scratch | WHAT: a workdir or checkpoint of ours, a released file, a known name
            data=dict(
                name="digits",
                split="train",
                holdout="test",  # scored beside the training set in the report; "" for none
                dir=config_dict.placeholder(str),  # unset: $TFDS_DATA_DIR or ~/tensorflow_datasets
                crop="",  # "" as stored | var: VAR's resize and random crop to model.img_resolution
                flip=False,  # unlabelled horizontal flips of real images
                augment=0.0,  # probability of EDM's augmentation in MLE phases; the network is told (model.augment_dim)
            ),
            model=dict(
                arch="mlp",  # edm: mlp | SongUNet | DhariwalUNet; edm2: UNet; var: VAR
                img_resolution=32,
                img_channels=3,
                label_dim=0,
                sigma_data=0.5,
                levels=256,  # grey levels of the data; samples are quantised to them
            ),
            pretrain=_training(length=_duration()),
            ddo=_training(
                rounds=1,
                length=_duration(),  # of one round
                alpha=(4.0,),  # the grid of every round is alpha x beta; objective cca: alpha is its lambda
                beta=(0.05,),
                pool_labels="balanced",  # of the pool's fakes: balanced over the classes | data: the data's frequencies
                pool=50_000,  # fakes per round, sampled before it; 0: the reference makes every step's fakes as it goes
                # var: rows whose label is dropped have no fake term; how their real one counts is not certain. The
                # authors' text says that they train by MLE: "nll". Public fragments of their code point to "posonly"
                # (-log sigmoid(beta r), weight max(alpha, 1)); by its types that code would compute "posonly_w1".
                dropped_row_loss="posonly",
                reencode=True,  # var: fakes are decoded to pixels and tokenised again, as the data were
                p_std_from=(),  # ((17, 3.0),): P_std from round 17 on; rounds count from 1
            ),
            control=_training(
                enabled=False,  # continued MLE from the same start, the same evaluations and selection
                lrs=(1e-4,),
                factor=3,  # steps, as a multiple of all DDO rounds together
            ),
            sampler=DIFFUSION_SAMPLER | VAR_SAMPLER,  # each family has its own keys and refuses the others'
            eval=_evaluation(),
            mesh=dict(fsdp=1),  # devices that share one copy of the parameters; the rest is "data"
            log=dict(every=50, tensorboard=True),  # steps
            keep="best",  # of finished rounds: best = the best checkpoint only | all
            lease_s=600.0,  # a task whose job shows no life for so long is taken over
            stall_s=3600.0,  # a job whose task makes no step or batch of samples for so long shows no life
        )
    )
    return config.lock()


# Keys that may differ when a workdir is continued: they change no number of the work already done. (Accumulation
# in MLE phases is not among them: dropout masks are drawn per micro-batch.)
HARMLESS = (
    "log",
    "mesh",
    "keep",
    "lease_s",
    "stall_s",
    "name",
    "remark",
    "data.dir",
    "eval.grid",
)  # the key or all below
HARMLESS += tuple(f"{p}.{key}_every" for p in ("pretrain", "ddo", "control") for key in ("save", "snapshot"))
HARMLESS += ("ddo.accumulation", "remat", "eval.also")


def leaves(config, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Every (dotted key, value) of a ConfigDict or dict, in order."""
    for key in config:
        value = config[key]
        if isinstance(value, ConfigDict | dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, _listed(value)


def _listed(value):
    """Tuples as the lists that JSON makes of them, at any depth."""
    return [_listed(v) for v in value] if isinstance(value, tuple | list) else value


def difference(old: dict, new: dict) -> list[str]:
    """Lines 'key: old -> new' for every key that differs and is not harmless.

    A key of `base()` that an older workdir lacks has its default: what was done before there was such a key.
    """
    a, b = dict(leaves(old)), dict(leaves(new))
    a = {k: v for k, v in leaves(base()) if k in b and not k.startswith("model.")} | a
    changed = (k for k in dict.fromkeys([*a, *b]) if a.get(k) != b.get(k))
    return [
        f"config.{k}: {a.get(k, 'absent')} -> {b.get(k, 'absent')}"
        for k in changed
        if not any(f"{k}.".startswith(f"{h}.") for h in HARMLESS)
    ]


MOST_STEPS = 2**31 - 1


def steps(duration, batch: int, examples: int, name: str) -> int | None:
    """Optimizer steps of a duration {steps | mimg | epochs}; None if none of them is set.

    Raises:
      UserError: two of them are set, or it is too long.
    """
    given = {k: v for k, v in duration.items() if v is not None}
    if len(given) > 1:
        keys = " and ".join(f"config.{name}.{k} = {v}" for k, v in given.items())
        raise UserError(f"{keys}: set only one of them")
    if not given:
        return None
    ((unit, value),) = given.items()
    images = {"steps": value * batch, "mimg": value * 1e6, "epochs": value * examples}[unit]
    if images / batch > MOST_STEPS:
        raise UserError(f"config.{name}.{unit}: {value}; allowed: at most {MOST_STEPS:,} steps, they have 32 bits")
    return max(1, round(images / batch))


def _is_set(duration) -> bool:
    return any(value is not None for _, value in duration.items())


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
            if key.startswith("model."):
                continue  # checked by the network itself
            raise UserError(f"config.{key}: unknown key{nearest(key, known)}")
        default = known[key]
        if default is None or (value is None and key == "data.crop"):  # whose own check lists what it may be
            continue
        number = isinstance(default, float) and isinstance(value, int | float) and not isinstance(value, bool)
        require(number or type(value) is type(default), key, value, f"a {type(default).__name__}")
    missing = [k for k in known if k not in dict(leaves(config))]
    if missing:
        raise UserError(f"config.{missing[0]}: missing; start config files from ddo_jax.run.config.base()")


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
    require(config.objective in OBJECTIVES, "objective", config.objective, ", ".join(OBJECTIVES))
    if config.objective == "mle":
        allowed = "one value: objective mle uses neither alpha nor beta"
        for key in ("alpha", "beta"):
            require(len(config.ddo[key]) == 1, f"ddo.{key}", config.ddo[key], allowed)
    if config.objective != "ddo":
        for key, default in (("dropped_row_loss", "posonly"), ("reencode", True)):
            value = config.ddo[key]
            require(value == default, f"ddo.{key}", value, f"{default!r}: objective {config.objective} has no fakes")
    losses = ", ".join(DROPPED_ROW_LOSSES)
    loss = config.ddo.dropped_row_loss
    require(loss in DROPPED_ROW_LOSSES, "ddo.dropped_row_loss", loss, losses)
    diffusion = [f"{phase}.{key}" for phase in ("pretrain", "ddo", "control") for key in ("p_mean", "p_std")]
    foreign = {"var": [*diffusion, "ddo.p_std_from"]}
    foreign |= dict.fromkeys(("edm", "edm2"), ["dtype", "ddo.dropped_row_loss", "ddo.reencode"])
    known, given = dict(leaves(base())), dict(leaves(config))
    for key in foreign.get(config.family, ()):
        require(given[key] == known[key], key, given[key], f"{known[key]!r}: family {config.family} does not use it")
    require(config.dtype in dtypes, "dtype", config.dtype, ", ".join(dtypes))


def _check_also(config) -> None:
    for given in config.eval.also:
        ok = isinstance(given, dict | ConfigDict) and len(given) and all(k in config.sampler for k in given)
        require(ok, "eval.also", given, f"dictionaries of sampler settings: {', '.join(config.sampler)}")
        for key, value in given.items():
            default = (DIFFUSION_SAMPLER | VAR_SAMPLER)[key]
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
    if config.control.enabled:
        require(config.control.factor >= 1, "control.factor", config.control.factor, "at least 1")
        lrs = config.control.lrs
        ok = len(lrs) > 0 and all(_number(lr) and 0 < lr < math.inf for lr in lrs)
        require(ok, "control.lrs", lrs, "finite numbers above 0")
        _check_apart("control.lrs", lrs)


def validate(config, devices: int) -> None:
    """Refuse a config that cannot run, before anything is written.

    Raises:
      UserError: one line with the key, the value, what is allowed.
    """
    _check_keys_and_types(config)
    precisions = ("default", "high", "highest")  # the DotAlgorithmPreset names are dropped for convolutions
    require(config.precision in precisions, "precision", config.precision, ", ".join(precisions))
    dtypes = ("float32", "bfloat16", "float16")
    require(config.eval.dtype in dtypes, "eval.dtype", config.eval.dtype, ", ".join(dtypes))
    require(config.sampler.solver in ("heun", "dpmv3"), "sampler.solver", config.sampler.solver, "heun, dpmv3")
    _check_family(config, dtypes)
    require(config.data.crop in CROPS, "data.crop", config.data.crop, ", ".join(map(repr, CROPS)))
    require(0 <= config.data.augment <= 1, "data.augment", config.data.augment, "0 to 1")
    require(config.keep in ("best", "all"), "keep", config.keep, "best, all")
    for phase in ("pretrain", "ddo", "control"):
        _check_phase(config, phase)
    _check_grids(config)
    _check_p_std_from(config.ddo.p_std_from, config.ddo.p_mean)
    _check_also(config)
    require(0 <= config.seed < 2**31, "seed", config.seed, "0 or more, below 2^31")
    for key in ("lease_s", "stall_s"):
        require(config[key] >= 10, key, config[key], "at least 10")
    _check_model(config.model)
    require(
        0 <= config.ddo.rounds < 1000, "ddo.rounds", config.ddo.rounds, "0 to 999: their directories have three digits"
    )
    needed = ["ddo.length", "ddo.eval_every"] if config.ddo.rounds else []  # evaluations select the best
    needed += ["control.eval_every"] if config.ddo.rounds and config.control.enabled else []
    for key in needed:
        phase, name = key.split(".")
        require(_is_set(config[phase][name]), key, "unset", "a duration")
    labels, allowed = config.ddo.pool_labels, "balanced, data"
    if not config.ddo.pool or config.objective != "ddo":
        allowed = "balanced: there is no pool, fakes have the labels of the real rows beside them"
    require(labels in allowed.split(":")[0].split(", "), "ddo.pool_labels", labels, allowed)
    least = config.ddo.batch
    allowed = f"at least ddo.batch = {least}, the fakes of a step, or 0 for fakes made as training goes"
    require(config.ddo.pool == 0 or config.ddo.pool >= least, "ddo.pool", config.ddo.pool, allowed)
    scratch = config.init == "scratch"
    require(
        not scratch or _is_set(config.pretrain.length),
        "pretrain.length",
        "unset",
        "a duration, or config.init = a checkpoint",
    )
    fsdp = config.mesh.fsdp
    require(fsdp >= 1 and devices % fsdp == 0, "mesh.fsdp", fsdp, f"a divisor of the {devices} devices")
    batches = {f"{p}.batch": config[p].batch // config[p].accumulation for p in ("pretrain", "ddo", "control")}
    for key, value in {**batches, "eval.batch": config.eval.batch}.items():
        require(value % devices == 0, key, value, f"(per micro-batch) a multiple of the {devices} devices")
    for key in ("eval.batch", "eval.grid", "log.every"):
        section, name = key.split(".")
        require(config[section][name] >= 1, key, config[section][name], "at least 1")
    for key in ("num", "select_num"):
        value = config.eval[key]
        require(value is None or value >= 2, f"eval.{key}", value, "at least 2")
    require(config.eval.report_seeds >= 1, "eval.report_seeds", config.eval.report_seeds, "at least 1")
    for key, value in leaves(config):
        require(all(map(math.isfinite, _numbers(value))), key, value, "finite numbers")
