"""What variants of the experiments in configs/ share: the search, the released weights, the run in little."""

MI = 2**20 / 1e6  # EDM2 counts images in units of 2^20


def apply(config, variant: str, known: dict) -> None:
    """Apply `known[variant]` to the config; "a:b" applies both, in this order, "" is the experiment itself."""
    for name in variant.split(":") if variant else ():
        if name not in known:
            raise ValueError(f"variant {name!r}; allowed: {', '.join(known)}, or several, as in a:b")
        known[name](config)


def search(config) -> None:
    """The paper's search in every round; start one job per node on the same workdir."""
    config.ddo.alpha = (1.0, 2.0, 4.0, 6.0)  # ours: a grid in the paper's ranges
    config.ddo.beta = (0.02, 0.05, 0.1)


def auto(config) -> None:
    """Every round finds its beta, for the config's alpha: at a tenth of a grid's cost (docs/beta.md)."""
    config.ddo.search = "auto"


def from_scratch(config) -> None:
    """The base model's own recipe before the rounds."""
    config.init = "scratch"


def released(name: str):
    """Import the authors' fine-tuned weights and score them: no training."""

    def score_only(config) -> None:
        config.init = name
        config.ddo.rounds = 0

    return score_only


def neon(config) -> None:
    """Neon on EDM, CIFAR-10 (arXiv 2510.03597): FID 1.38, conditional and not, in one go."""
    config.name = config.name.replace("DDO", "Neon")
    config.method = "neon"
    config.neon.w = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0)  # Neon: in [0, 2]; the points are ours
    ddo = config.ddo
    ddo.rounds = 1
    ddo.pool = 6000  # Neon
    ddo.lr = 1e-4  # Neon
    ddo.warmup.mimg = None  # ours, as the length
    ddo.length.mimg = 1.5


def runlocal(config) -> None:
    """The same code path in under a minute on a CPU: a small U-Net of the same wiring on the 8x8 digits."""
    config.name += " (runlocal: shows that it runs, not what it reaches)"
    config.init = "scratch"
    config.data.update(name="digits", split="train", holdout="test")
    config.model.update(
        img_resolution=8, img_channels=1, label_dim=10 if config.model.label_dim else 0, levels=17, channel_mult=(1,)
    )  # one level: compilation is most of the minute
    config.model.update(model_channels=16, num_blocks=1, attn_resolutions=(8,))
    config.sampler.update(num_steps=6)
    for phase in ("pretrain", "ddo"):
        c = config[phase]
        c.batch = 16
        c.ema_mimg = 64e-6
        for duration in ("length", "warmup", "eval_every", "save_every", "snapshot_every"):
            if duration in c:
                c[duration].mimg = None
    config.pretrain.length.steps = 20
    config.ddo.rounds = 1
    config.ddo.length.steps = 10
    config.ddo.eval_every.steps = 5
    config.ddo.pool = 64
    config.eval.update(network="digits", reference=None, num=64, select_num=64, batch=64, report_seeds=1, grid=64)
    config.log.every = 5


def runlocal_edm2(config) -> None:
    """`runlocal` with an EDM2 network: two EMA lengths in pretraining, P_std changed in the second of two rounds."""
    runlocal(config)
    config.model.update(channels_per_head=8, dropout=0.0)
    config.pretrain.snapshot_every.steps = 64  # at its end only: 20 steps are 320 images
    config.pretrain.t_ref, config.ddo.t_ref = 160.0, 64.0
    config.pretrain.warmup.steps, config.ddo.warmup.steps = 2, 2
    config.ddo.rounds = 2
    config.ddo.p_std_from = ((2, 3.0),)
