"""What several experiments share. Each value's origin stands beside it: "EDM" is Karras et al. 2022
(arXiv 2206.00364), "paper" is the DDO paper (arXiv 2503.01103), "ours" was not published and is our choice.
"""

from ddo_jax.config import base

MI = 2**20 / 1e6  # EDM2 counts images in units of 2^20


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


def edm2(name: str, released: str, channels: int, width: int, dropout: float):
    """EDM2 on ImageNet with 64 x 64 inputs: the parts of the recipes that its data sets share."""
    config = base()
    config.name = name
    config.family = "edm2"
    config.init = released
    config.data.update(split="train", holdout="")
    config.model.update(arch="UNet", img_resolution=64, img_channels=channels, label_dim=1000)
    with config.unlocked():
        config.model.update(model_channels=width, dropout=dropout)  # EDM2; all else are the network's defaults
        config.model.update(channel_mult=(1, 2, 3, 4), num_blocks=3, attn_resolutions=(16, 8), channels_per_head=64)
    config.sampler.update(solver="heun", num_steps=32)  # EDM2: 63 NFE
    config.remat = True  # ours: memory only, see README "Measured"

    pretrain = config.pretrain  # EDM2 throughout; it zeroed gradients that are not finite, we stop at them
    pretrain.batch = 2048
    pretrain.schedule = "inverse_sqrt"
    pretrain.warmup.mimg = 10.0
    pretrain.b1, pretrain.b2 = 0.9, 0.99
    pretrain.ema_stds = (0.05, 0.1)
    pretrain.snapshot_every.mimg = 8 * MI
    pretrain.save_every.mimg = 8 * MI  # EDM2 kept a training state every 128 Mi images

    ddo = config.ddo
    ddo.length.mimg = 6.4  # paper: 5 epochs
    ddo.batch = 512  # paper: real images, and as many fakes
    ddo.pool = 50_000  # paper
    ddo.alpha = (4.0,)  # paper: searched in [0.5, 6] every round; `:search` does
    ddo.beta = (0.05,)  # paper: searched in [0.01, 0.1] every round
    ddo.schedule = "inverse_sqrt"  # paper: warm-up, then inverse square root, about 0.4 of the rate at the end
    ddo.t_ref = 1_024_000.0  # ours: sqrt(1.024 / 6.4) = 0.4
    ddo.warmup.mimg = 0.5  # ours
    ddo.b1, ddo.b2 = 0.9, 0.99  # ours: those of the base model
    ddo.ema_stds = (0.05,)  # paper; that its time counts from the start of the round is our reading
    ddo.eval_every.mimg = 0.64  # ours
    ddo.save_every.mimg = 0.16  # ours

    control = config.control  # ours: pre-training's objective goes on; set control.enabled and control.eval_every
    control.b1, control.b2, control.ema_stds = 0.9, 0.99, (0.05,)

    config.eval.network = "inception"
    config.eval.num = 50_000  # paper
    config.eval.select_num = 10_000  # ours
    config.eval.batch = 256  # ours
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
