"""Fashion-MNIST, 60,000 real pictures of 28 x 28. In work: no recipe was found yet that shows what DDO does.

    apt-get install dataset-fashion-mnist         # Debian; or the four files of any mirror in a folder (Expat licence)
    python -m ddo_jax.main --config=fashion --workdir=runs/fashion
    python -m ddo_jax.main --config=fashion --config.data.name=idx:DIR --workdir=runs/fashion

The network is one of matrix products. Measured on an H100, seed 0, 15,000 pretraining steps, beta searched in 0.02 to
0.2: FD x 100 29.42 -> 26.87 by DDO, 27.59 by continued MLE; rounds 2 and 3 diverged. Its pictures stay grainy: its MLE
loss is 440 where the DDPM++ of `:gpu` has 167 after 3,800 steps (that run was not finished).

Variants: `:gpu` a DDPM++ of the CIFAR kind; `:runlocal` the same code path in little.

"EDM" marks Karras et al. 2022; the rest of the recipe is ours.
"""

from ddo_jax.config import base, variants
from ddo_jax.core.ema import decay_to_half_life

BATCH = 128


def get_config(variant: str = ""):
    config = base()
    config.name = "DDO on Fashion-MNIST"
    config.data.name = "idx:/usr/share/datasets/fashion-mnist"
    config.eval.network = "classifier"
    config.model.update(arch="mlp", img_resolution=28, img_channels=1, label_dim=10, levels=256)
    with config.unlocked():
        config.model.update(width=512, blocks=4)  # 5.4M parameters
    config.sampler.num_steps = 18  # EDM, CIFAR-10

    pretrain = config.pretrain
    pretrain.length.steps = 20_000
    pretrain.batch = BATCH
    pretrain.lr = 1e-3
    pretrain.schedule = "cosine"
    pretrain.final_lr = 1e-5
    pretrain.warmup.steps = 500
    pretrain.ema_mimg = decay_to_half_life(0.999, BATCH) / 1e6
    pretrain.p_mean, pretrain.p_std = -1.2, 1.2  # EDM
    pretrain.save_every.steps = 2000

    ddo = config.ddo
    ddo.rounds = 3
    ddo.length.steps = 500
    ddo.batch = BATCH  # real, and as many fake
    ddo.pool = 20_000
    ddo.alpha = (4.0,)
    ddo.beta = (0.05,)
    ddo.lr = 1e-4
    ddo.warmup.steps = 50
    ddo.ema_mimg = decay_to_half_life(0.98, BATCH) / 1e6
    ddo.p_mean, ddo.p_std = -1.2, 1.2
    ddo.eval_every.steps = 100

    control = config.control  # continued MLE, as strong as we can make it
    control.enabled = True
    control.factor = 3
    control.lrs = (1e-5, 1e-4, 3e-4)
    control.batch = BATCH
    control.warmup.steps = 50
    control.ema_mimg = pretrain.ema_mimg
    control.p_mean, control.p_std = pretrain.p_mean, pretrain.p_std
    control.eval_every.steps = 500

    config.eval.num = 10_000
    config.eval.select_num = 5000
    config.eval.batch = 1000
    config.eval.metrics = ("pr",)
    config.log.every = 100

    variants.apply(config, variant, VARIANTS)
    return config


def gpu(config) -> None:
    """A DDPM++ of the CIFAR kind."""
    model = config.model
    with config.unlocked():
        del model.width, model.blocks
        model.update(model_channels=64, channel_mult=(1, 2, 2), num_blocks=2, attn_resolutions=(7,), dropout=0.0)
    model.arch = "SongUNet"
    config.name += ", small DDPM++"
    config.pretrain.length.steps = 4000
    config.pretrain.warmup.steps = 200
    config.pretrain.save_every.steps = 4000
    config.ddo.length.steps = 200
    config.ddo.rounds = 2
    config.control.lrs = (1e-4,)
    config.control.eval_every.steps = 300
    config.eval.batch = 500


def runlocal(config) -> None:
    """Everything the real run does, in little."""
    config.name += " (runlocal: shows that it runs, not what it reaches)"
    config.model.update(width=64, blocks=2)
    config.pretrain.length.steps = 100
    config.pretrain.warmup.steps = 10
    config.pretrain.save_every.steps = 50
    config.ddo.update(rounds=1, pool=500)
    config.ddo.length.steps = 20
    config.ddo.eval_every.steps = 10
    config.control.update(lrs=(1e-4,), factor=1)
    config.control.eval_every.steps = 20
    config.eval.update(num=250, select_num=250, batch=250, report_seeds=1)
    config.log.every = 10


VARIANTS = {"gpu": gpu, "runlocal": runlocal}
