"""VAR on real data in minutes: a small multi-scale transformer on the tokens of 8x8 digits, on a laptop's CPU.

    python -m ddo_jax.main --config=configs/digits_var.py --workdir=runs/digits_var

Hardware: 2 CPU cores, no accelerator, three minutes. Expected: FD x 100 to the training images falls from about 14 to
10.5 by DDO (13.8, 14.1, 14.5 -> 10.5, 10.3, 11.2 on training seeds 0, 1, 2; continued MLE 12.9, 13.5, 12.9);
checkpoints chosen on one range of sampling seeds, reported on three others, where a checkpoint varies by about 0.5 to
1. Mostly the first round; the recipe was chosen on seed 0.

The tokenizer is configs/digits_vqvae.safetensors (1x1, 2x2 and 4x4 tokens of a codebook of 128), made by
configs/make/vqvae.py. Everything else is as on ImageNet: fakes online by the reference, unguided and unfiltered,
decoded to pixels and encoded again; the reference's likelihoods kept; dropped labels, so that guidance stays usable.

Variants: `:runlocal` the same code path in little; `:pool` fakes sampled once a round instead; `:published` the rounds
as the authors' program has them; `:auto` every round finds its beta (docs/beta.md); `:neon` Neon in place of DDO
(docs/methods.md). Baselines from the same start: --config.method=cca, --config.method=mle.

The recipe was searched on this data: "ours" below. "VAR" marks Tian et al. 2024.
"""

from pathlib import Path

from ddo_jax.config import base, variants
from ddo_jax.core.ema import decay_to_half_life

BATCH = 128


def get_config(variant: str = ""):
    config = base()
    config.name = "DDO of a small VAR on 8x8 digits"
    config.family = "var"
    config.remark = (
        "Guidance (cfg 1.0) makes these digits easier to recognise and their distance larger, before DDO and after it. "
        "2048 samples leave a noise of about 0.5 to 1 in the distance; the recipe was chosen on training seed 0."
    )
    config.data.name = "digits"
    config.eval.network = "digits"
    config.model.update(arch="VAR", img_resolution=8, img_channels=1, label_dim=10, levels=17)
    with config.unlocked():
        config.model.update(vae=str(Path(__file__).resolve().with_name("digits_vqvae.safetensors")))
        config.model.update(patch_nums=(1, 2, 4), vocab_size=128, z_channels=8)  # the tokenizer's
        config.model.update(depth=2, embed_dim=32, num_heads=2, init_adaln_gamma=1e-3)  # ours
        config.model.update(cond_drop_rate=0.1)  # VAR

    pretrain = config.pretrain
    pretrain.length.steps = 800  # ours, as the rest of this block
    pretrain.batch = BATCH
    pretrain.lr = 4e-3
    pretrain.schedule = "cosine"
    pretrain.final_lr = 8e-5
    pretrain.warmup.steps = 50
    pretrain.save_every.steps = 400

    ddo = config.ddo
    ddo.rounds = 3
    ddo.length.steps = 80  # about as many as in the paper
    ddo.batch = BATCH  # real, and as many fake
    ddo.pool = 0  # online, as in the paper
    ddo.alpha = (1.0,)  # ours: 21 tokens are less than the 680 that want 10 to 100
    ddo.beta = (0.1,)  # ours: of 21 tokens; 0.02 of 680
    ddo.dropped_row_loss = "posonly"  # ours
    ddo.lr = 5e-4
    ddo.ema_mimg = decay_to_half_life(0.9, BATCH) / 1e6  # ours; the paper has none
    ddo.eval_every.steps = 20

    control = config.control  # continued MLE, as strong as we can make it
    control.enabled = True
    control.factor = 3
    control.lrs = (1e-4, 3e-4, 1e-3)
    control.batch = BATCH
    control.eval_every.steps = 80

    for phase in (pretrain, ddo, control):
        phase.b1, phase.b2, phase.weight_decay, phase.clip = 0.9, 0.95, 0.05, 2.0  # VAR
    pretrain.ema_mimg = 0.0  # VAR: none
    control.ema_mimg = decay_to_half_life(0.98, BATCH) / 1e6  # its rates are constant: averaging helps it

    config.eval.num = 2048
    config.eval.batch = 1024
    config.eval.also = ({"cfg": 1.0},)  # is guidance still of use?
    config.log.every = 20

    variants.apply(config, variant, VARIANTS)
    return config


def pool(config) -> None:
    """Fakes sampled once a round; they return, and so does what the reference said of them."""
    config.name += ", offline pool"
    config.ddo.pool = 4096


def published(config) -> None:
    """What of the authors' recipe (configs/var_in256.py) is no matter of size: dropped rows, labels, guided fakes."""
    config.name += ", the published form"
    config.ddo.update(dropped_row_loss="posonly_w1", cond_drop_rate=0.5, fakes_cfg=1.0)


def neon(config) -> None:
    """Neon on a pool of the same size; length, rate and w are ours."""
    pool(config)
    config.name = "Neon of a small VAR on 8x8 digits"
    config.method = "neon"
    config.neon.w = (0.1, 0.25, 0.5, 1.0)


def runlocal(config) -> None:
    """Everything the real run does, in little: two rounds, two candidates, the control."""
    config.name += " (runlocal: shows that it runs, not what it reaches)"
    config.pretrain.length.steps = 40
    config.pretrain.warmup.steps = 5
    config.pretrain.save_every.steps = 20
    config.ddo.rounds = 2
    config.ddo.length.steps = 6
    config.ddo.beta = (0.1, 0.2)
    config.ddo.eval_every.steps = 3
    config.control.lrs = (1e-4, 3e-4)
    config.control.factor = 1
    config.control.eval_every.steps = 6
    config.eval.num = 256
    config.eval.batch = 256
    config.log.every = 3


VARIANTS = {"auto": variants.auto, "neon": neon, "pool": pool, "published": published, "runlocal": runlocal}
