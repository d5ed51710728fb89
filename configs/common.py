"""What several experiments share. Each value's origin stands beside it: "EDM" is Karras et al. 2022
(arXiv 2206.00364), "paper" is the DDO paper (arXiv 2503.01103), "ours" was not published and is our choice.
"""

from ddo_jax.run.config import base


def variants(config, variant: str, known: dict) -> None:
    """Apply `known[variant]` to the config; "" is the experiment itself."""
    if variant:
        if variant not in known:
            raise ValueError(f"variant {variant!r}; allowed: {', '.join(known)}")
        known[variant](config)


def edm_cifar10(name: str, released: str, label_dim: int, rounds: int):
    """EDM's DDPM++ on CIFAR-10, pretraining and DDO."""
    config = base()
    config.name = name
    config.init = released
    config.data.update(name="tfds:cifar10", split="train", holdout="", augment=0.12)  # EDM
    config.model.update(arch="SongUNet", img_resolution=32, img_channels=3, label_dim=label_dim)
    with config.unlocked():
        config.model.update(  # EDM: 55.7 million parameters
            augment_dim=9,
            model_channels=128,
            channel_mult=(2, 2, 2),
            num_blocks=4,
            attn_resolutions=(16,),
            dropout=0.13,
            embedding_type="positional",
            channel_mult_noise=1,
            encoder_type="standard",
            decoder_type="standard",
            resample_filter=(1, 1),
        )
    config.sampler.num_steps = 18  # EDM: 35 NFE

    pretrain = config.pretrain  # EDM throughout; it zeroed NaN gradients, we stop at them
    pretrain.length.mimg = 200.0
    pretrain.batch = 512
    pretrain.lr = 1e-3
    pretrain.warmup.mimg = 10.0
    pretrain.ema_mimg = 0.5
    pretrain.ema_rampup = 0.05
    pretrain.p_mean, pretrain.p_std = -1.2, 1.2
    pretrain.save_every.mimg = 1.0  # ours

    ddo = config.ddo
    ddo.rounds = rounds  # paper
    ddo.length.mimg = 1.5  # paper
    ddo.batch = 512  # paper: real images, and as many fakes
    ddo.pool = 50_000  # paper
    ddo.alpha = (4.0,)  # paper: searched in [0.5, 6] every round; `:search` does
    ddo.beta = (0.05,)  # paper: searched in [0.01, 0.1] every round
    ddo.lr = 1.5e-4  # paper
    ddo.warmup.mimg = 1.5  # paper: linear over the whole round, no decay
    ddo.ema_mimg = 0.25  # paper
    ddo.p_mean, ddo.p_std = -1.2, 1.2  # paper: EDM's own
    ddo.eval_every.mimg = 0.25  # ours
    ddo.save_every.mimg = 0.1  # ours

    config.eval.network = "inception"
    config.eval.num = 50_000  # EDM
    config.eval.select_num = 10_000  # ours: enough to rank candidates, whose bias is common
    config.eval.report_seeds = 3  # EDM: seeds 0-49999, 50000-99999, 100000-149999
    return config


def search(config) -> None:
    """The paper's search in every round; start one job per node on the same workdir."""
    config.ddo.alpha = (1.0, 2.0, 4.0, 6.0)  # ours: a grid in the paper's ranges
    config.ddo.beta = (0.02, 0.05, 0.1)


def from_scratch(config) -> None:
    """The base model's own recipe before the rounds."""
    config.init = "scratch"


def released(name: str):
    """Import the authors' fine-tuned weights and score them: no training."""

    def apply(config) -> None:
        config.init = name
        config.ddo.rounds = 0

    return apply


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
        for duration in ("length", "warmup", "eval_every", "save_every"):
            if duration in c:
                c[duration].mimg = None
    config.pretrain.length.steps = 20
    config.ddo.rounds = 1
    config.ddo.length.steps = 10
    config.ddo.eval_every.steps = 5
    config.ddo.pool = 64
    config.eval.update(network="digits", num=64, select_num=64, batch=64, report_seeds=1, grid=64)
    config.log.every = 5
