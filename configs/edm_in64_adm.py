"""EDM's ADM network on ImageNet-64, class-conditional: FID 1.36 (EDM, stochastic sampler); DDO on it is ours.

    python -m ddo_jax.main --config=configs/edm_in64_adm.py --workdir=DIR

The DDO paper has no row for this network: rounds, learning rate and noise levels are taken over from its EDM2-S
ImageNet-64 column (constant rate, one P_std) and untested. NOT RUN here (no weights, no accelerator).

Variants: `:search`, `:auto` (docs/beta.md), `:from_scratch` EDM's own pretraining first, `:released` scores the base
weights (1.36 is to be reproduced), `:runlocal` under a minute on a CPU.
"""

from ddo_jax.config import base, variants

NAME = "edm-imagenet-64x64-cond-adm"


def get_config(variant: str = ""):
    config = base()
    config.name = "EDM (ADM) + DDO, ImageNet-64"
    config.init = NAME
    config.data.update(name="tfds:imagenet_resized/64x64", split="train", holdout="")
    config.model.update(arch="DhariwalUNet", img_resolution=64, img_channels=3, label_dim=1000)
    with config.unlocked():
        config.model.update(  # EDM: 295.9 million parameters
            augment_dim=0, model_channels=192, channel_mult=(1, 2, 3, 4), num_blocks=3, dropout=0.10
        )
        config.model.attn_resolutions = (32, 16, 8)
    config.sampler.update(num_steps=256, s_churn=40.0, s_min=0.05, s_max=50.0, s_noise=1.003)  # EDM: 511 NFE

    pretrain = config.pretrain  # EDM, which trained in float16 with loss scaling; here float32
    pretrain.length.mimg = 2500.0
    pretrain.batch = 4096
    pretrain.lr = 1e-4
    pretrain.warmup.mimg = 10.0
    pretrain.ema_mimg = 50.0
    pretrain.ema_rampup = 0.05
    pretrain.save_every.mimg = 10.0  # ours

    ddo = config.ddo  # ours, after the paper's EDM2-S ImageNet-64 column
    ddo.rounds = 24
    ddo.length.mimg = 6.4
    ddo.batch = 512
    ddo.alpha = (4.0,)
    ddo.beta = (0.05,)
    ddo.lr = 5e-5
    ddo.warmup.mimg = 1.0
    ddo.ema_mimg = 0.5
    ddo.p_mean, ddo.p_std = -0.8, 1.6
    ddo.eval_every.mimg = 1.0
    ddo.save_every.mimg = 0.5

    config.eval.network = "inception"
    config.eval.num = 50_000
    config.eval.select_num = 10_000

    known = {
        "search": variants.search,
        "auto": variants.auto,
        "from_scratch": variants.from_scratch,
        "released": variants.released(NAME),
        "runlocal": variants.runlocal,
    }
    variants.apply(config, variant, known)
    return config
