"""EDM (DDPM++) on CIFAR-10, unconditional: FID 1.97 -> 1.38 in 12 rounds (paper, table 1).

    python -m ddo_jax.main --config=configs/edm_cifar10_uncond.py --workdir=DIR

Needs CIFAR-10 as a TFDS set or EDM's zip (--config.data.name=zip:PATH), the released weights and the Inception
weights (docs/weights.md). The authors report about 3 hours a round. NOT RUN here.

Variants: `:search` the grid over alpha and beta, `:auto` beta found by every round (docs/beta.md), `:neon` the method
of arXiv 2510.03597 instead, `:from_scratch` EDM's own pretraining first, `:released` scores the authors' fine-tuned
weights (the one-command reproduction of 1.38), `:runlocal` under a minute on a CPU.
"""

from ddo_jax.config import base, variants


def get_config(variant: str = ""):
    config = base()
    config.name = "EDM + DDO, CIFAR-10 unconditional"
    config.init = "edm-cifar10-32x32-uncond-vp"
    config.data.update(name="tfds:cifar10", split="train", holdout="", augment=0.12)  # EDM
    config.model.update(arch="SongUNet", img_resolution=32, img_channels=3, label_dim=0)
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
    ddo.rounds = 12  # paper
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

    known = {
        "search": variants.search,
        "auto": variants.auto,
        "from_scratch": variants.from_scratch,
        "neon": variants.neon,
        "released": variants.released("edm-cifar10-uncond-vp-ddo"),
        "runlocal": variants.runlocal,
    }
    variants.apply(config, variant, known)
    return config
