"""Your own images, in one command: a folder of them, a zip, a TFDS set, MNIST's files.

    python -m ddo_jax.main --config=images --config.data.name=folder:PATH --workdir=runs/mine

Resolution, channels, classes and grey levels are read from the data, and the network and the lengths follow from them
(`ddo_jax.run.fill`, which prints what it found): a network of matrix products up to 28 x 28 on a CPU, a DDPM++ above or
on an accelerator. Any key can be set: `--config.model.arch=SongUNet`, `--config.pretrain.length.steps=20000`.

Judged in the features of a classifier of the data's own classes; without classes nothing is scored, unless
`--config.eval.network=inception` finds its weights.

Variants: `:runlocal` the same path in under two minutes on two CPU cores (600 pictures of 16 x 16).

"EDM" marks Karras et al. 2022; the rest is ours and was tuned on the digits and on Fashion-MNIST, not on your images.
"""

from ml_collections import config_dict

from ddo_jax.config import base, variants
from ddo_jax.core.ema import decay_to_half_life

BATCH = 128
UNSET = {int: ("img_resolution", "img_channels", "label_dim", "levels"), str: ("arch",)}  # of model: by the data


def get_config(variant: str = ""):
    config = base()
    config.name = "DDO on your own images"
    config.data.name = ""  # say which: --config.data.name=folder:PATH
    with config.unlocked():
        for kind, keys in UNSET.items():
            config.model.update({key: config_dict.placeholder(kind) for key in keys})
        config.data.holdout = config_dict.placeholder(str)  # "test" where there is such a split
        config.eval.network = config_dict.placeholder(str)  # a classifier where there are classes
        config.ddo.pool = config_dict.placeholder(int)
        config.ddo.beta = config_dict.placeholder(tuple)
    config.sampler.num_steps = 18  # EDM, CIFAR-10

    pretrain = config.pretrain
    pretrain.batch = BATCH
    pretrain.lr = 2e-3
    pretrain.schedule = "cosine"
    pretrain.final_lr = 1e-5
    pretrain.warmup.steps = 200
    pretrain.ema_mimg = decay_to_half_life(0.999, BATCH) / 1e6
    pretrain.p_mean, pretrain.p_std = -1.2, 1.2  # EDM
    pretrain.save_every.steps = 1000

    ddo = config.ddo
    ddo.rounds = 2
    ddo.batch = BATCH  # real, and as many fake
    ddo.alpha = (4.0,)
    ddo.lr = 3e-4
    ddo.warmup.steps = 50
    ddo.ema_mimg = decay_to_half_life(0.98, BATCH) / 1e6
    ddo.p_mean, ddo.p_std = -1.2, 1.2

    control = config.control
    control.enabled = True
    control.lrs = (1e-4,)
    control.batch = BATCH
    control.warmup.steps = 50
    control.ema_mimg = pretrain.ema_mimg
    control.p_mean, control.p_std = pretrain.p_mean, pretrain.p_std

    config.eval.update(num=5000, select_num=2000, batch=500)
    config.log.every = 50

    variants.apply(config, variant, VARIANTS)
    return config


def runlocal(config) -> None:
    """Everything the real run does, in little."""
    config.name += " (runlocal: shows that it runs, not what it reaches)"
    config.sampler.num_steps = 8
    config.pretrain.length.steps = 300
    config.pretrain.warmup.steps = 20
    config.pretrain.save_every.steps = 150
    config.pretrain.ema_mimg = decay_to_half_life(0.98, BATCH) / 1e6
    config.ddo.update(rounds=1, pool=512)
    config.ddo.length.steps = 40
    config.ddo.warmup.steps = 5
    config.ddo.eval_every.steps = 20
    config.control.update(factor=1)
    config.control.eval_every.steps = 40
    config.eval.update(num=500, select_num=250, batch=250, report_seeds=1)
    config.log.every = 20


VARIANTS = {"runlocal": runlocal}
