"""Every key of a run's config with its default, and the helpers that compare configs and turn durations into steps."""

from collections.abc import Iterator

from ml_collections import ConfigDict, config_dict

from ddo_jax.errors import UserError
from ddo_jax.families.base import PHASES, SAMPLER

METHODS = ("ddo", "neon", "mle", "cca")


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
        network="digits",  # digits | classifier | inception | dinov2 | efficientnet | none: nothing is scored
        weights=config_dict.placeholder(str),  # of the feature network; unset: its known name
        dinov2_weights=config_dict.placeholder(str),  # of fd_dinov2 beside another network; unset: its known name
        efficientnet_weights=config_dict.placeholder(str),  # the same of fd_efficientnet
        select=config_dict.placeholder(str),  # what selects: fid | sfid | fd_dinov2 | kid | mind; unset: the network's
        metrics=(),  # scored beside it: fid | sfid | is | pr | kid | mind | fd_dinov2 | fd_efficientnet | fid_inf
        reference=config_dict.placeholder(str),  # statistics: a file or known name; unset: of the training set
        num=50_000,  # images per reported evaluation
        select_num=config_dict.placeholder(int),  # images per evaluation inside the rounds; unset: num
        batch=512,  # sampled at a time, over all devices; images do not depend on it
        dtype="float32",  # float32 | bfloat16 | float16: of the image path when sampling; never of the ratio
        report_seeds=3,  # the report scores this many fresh seed ranges
        also=(),  # other sampler settings that the report scores: ({"cfg": 1.0}, {"top_k": 900, "top_p": 0.96})
        grid=100,  # images of the before/after picture
    )


def _rounds() -> dict:
    """What the rounds of self-play need beside that."""
    return _training(
        rounds=1,
        length=_duration(),  # of one round
        # grid: every alpha x beta | fixed: the only one of each | auto: beta is found in every round (docs/beta.md),
        # for the first alpha
        search="grid",
        alpha=(4.0,),  # method cca: its lambda
        beta=(0.05,),
        fake_ratio=1.0,  # fakes of a step over its real images; both terms are means, so alpha keeps its meaning
        together=1,  # candidates that one job trains side by side: the reference is asked once for all
        line=(),  # of a round's best checkpoint, ref + w (theta - ref) is scored for these w too; the best is kept
        pool_labels="balanced",  # of the pool's fakes: balanced over the classes | data: the data's frequencies
        pool=50_000,  # fakes per round, sampled before it; 0: the reference makes every step's fakes as it goes
        # var: rows whose label is dropped have no fake term. Their real one: -log sigmoid(beta r) of weight 1, which is
        # what the authors' program computes ("posonly_w1"), of weight max(alpha, 1), which is what it means to
        # ("posonly"), or the cross-entropy of their text ("nll").
        dropped_row_loss="posonly_w1",
        reencode=True,  # var: fakes are decoded to pixels and tokenised again, as the data were
        cond_drop_rate=config_dict.placeholder(float),  # var: share of pairs without label; unset: model.cond_drop_rate
        fakes_cfg=0.0,  # var: guidance of the fakes; 1.0, a ramp up to 1, in the authors' program, none in their text
        p_std_from=(),  # ((17, 3.0),): P_std from round 17 on; rounds count from 1
    )


def base() -> ConfigDict:
    """All keys. `None` placeholders are unset values with a type."""
    config = ConfigDict(
        dict(
            name="",  # of the experiment: title of the report
            remark="",  # what the reader of the report must know beside its numbers
            seed=0,  # of training: initialisation, data order, noise
            family="edm",  # edm | edm2 | var | package.module:make, a function (config) -> Family of yours
            # Of the rounds: ddo | neon: the fakes alone, by MLE, then a step away from them | mle | cca: baselines
            # without fakes. Unset: ddo.
            method=config_dict.placeholder(str),
            objective=config_dict.placeholder(str),  # what `method` was called before 2026-12
            dtype="float32",  # of matrix products in training: float32; bfloat16 and float16 for family var only
            precision="highest",  # matmul and convolution precision: default | high | highest
            remat=False,  # recompute activations in the backward pass: changes memory, never results
            init="scratch",  # scratch | WHAT: a workdir or checkpoint of ours, a released file, a known name
            data=dict(
                name="digits",
                split="train",
                holdout="test",  # scored beside the training set in the report; "" for none
                dir=config_dict.placeholder(str),  # unset: $TFDS_DATA_DIR or ~/tensorflow_datasets
                crop="",  # "" as stored | to model.img_resolution: center, the central square | var, VAR's random crop
                alpha="white",  # behind transparent images; refuse: they are refused, palettes too
                flip=False,  # unlabelled horizontal flips of real images
                augment=0.0,  # probability of EDM's augmentation in MLE phases; the network is told (model.augment_dim)
            ),
            model=dict(
                arch="mlp",  # edm: mlp | mixer | SongUNet | DhariwalUNet; edm2: UNet; var: VAR
                img_resolution=32,
                img_channels=3,
                label_dim=0,
                sigma_data=0.5,
                levels=256,  # grey levels of the data; samples are quantised to them
            ),
            pretrain=_training(length=_duration()),
            adapt=_training(length=_duration()),  # of `init` by MLE to this data and its classes; unset: not at all
            ddo=_rounds(),
            neon=dict(w=(0.5, 1.0, 1.5, 2.0)),  # of method neon: theta = (1 + w) ref - w theta_s; the best is kept
            control=_training(
                enabled=False,  # continued MLE from the same start, the same evaluations and selection
                lrs=(1e-4,),
                factor=3,  # steps, as a multiple of all DDO rounds together
            ),
            sampler=dict(SAMPLER),  # each family has its own keys and refuses the others'
            eval=_evaluation(),
            mesh=dict(fsdp=1),  # devices that share one copy of the parameters; the rest is "data"
            # every: steps. signal: batches that a round's first gradients are averaged over (`run.signal`); 0: none
            log=dict(every=50, tensorboard=True, signal=8),
            keep="best",  # of finished rounds: best = the best checkpoint only | all
            save_minutes=10.0,  # a checkpoint at the next log.every after so long without one; 0: at evaluations only
            # Processes of one run: how long they wait for one another at the start; without a sign of life for how long
            # one of them is given up, which ends the others (it should be less: one that was started again waits for
            # them).
            hosts=dict(start_s=60.0, heartbeat_s=40.0),
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
    "save_minutes",
    "hosts",
    "lease_s",
    "stall_s",
    "name",
    "remark",
    "data.dir",
    "eval.grid",
)  # the key or all below
HARMLESS += tuple(f"{p}.{key}_every" for p in PHASES for key in ("save", "snapshot"))
HARMLESS += ("ddo.accumulation", "ddo.together", "remat", "eval.also", "eval.metrics", "eval.dinov2_weights")
HARMLESS += ("eval.efficientnet_weights",)


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
    a, b = (dict(leaves(config)) | {"method": method_of(config), "objective": None} for config in (old, new))
    a = {k: v for k, v in leaves(base()) if k in b and not k.startswith("model.")} | a
    unread = ("ddo.dropped_row_loss",) if b.get("family") in ("edm", "edm2") else ()  # its default changed in 2026-12
    changed = (k for k in dict.fromkeys([*a, *b]) if a.get(k) != b.get(k) and k not in unread)
    return [
        f"config.{k}: {a.get(k, 'absent')} -> {b.get(k, 'absent')}"
        for k in changed
        if not any(f"{k}.".startswith(f"{h}.") for h in HARMLESS)
    ]


def method_of(config) -> str:
    """What the rounds train by, of METHODS; also of a config of before 2026-12, where the key was `objective`.

    >>> method_of({"objective": "cca"}), method_of({"method": "neon", "objective": None}), method_of({})
    ('cca', 'neon', 'ddo')

    Raises:
      UserError: the two keys contradict each other.
    """
    given = {key: config[key] for key in ("method", "objective") if config.get(key) is not None}
    if len(set(given.values())) > 1:
        method, objective = given.values()
        raise UserError(
            f"config.method: {method!r}, but config.objective, its older name, is {objective!r}; set one of them"
        )
    return next(iter(given.values()), "ddo")


def samples_fakes(config) -> bool:
    """Whether the rounds need samples of the reference."""
    return method_of(config) in ("ddo", "neon")


def fakes_of_a_step(c) -> int:
    """Fake images of a step of the section "ddo".

    >>> fakes_of_a_step(ConfigDict({"batch": 128, "fake_ratio": 0.5})), fakes_of_a_step(ConfigDict({"batch": 128}))
    (64, 128)
    """
    return round(c.batch * c.get("fake_ratio", 1.0))


MOST_STEPS = 2**31 - 1


def is_set(duration) -> bool:
    """Whether a duration is given, in any of its units."""
    return any(value is not None for _, value in duration.items())


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
