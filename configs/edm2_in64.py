"""EDM2-S + DDO on ImageNet-64, class-conditional: FID 1.60 -> 0.97 in 24 rounds at 63 NFE (paper, table 2).

    python -m ddo_jax.main --config=configs/edm2_in64.py --workdir=DIR

Needs ImageNet as EDM2's 64 x 64 zip, made once from the 1,281,167 training images (one folder a class), the released
EDM2-S weights, the Inception weights and EDM2's reference statistics (docs/weights.md):

    python -m ddo_jax.data ~/imagenet/train imagenet-64x64.zip --resolution=64 --crop=center-dhariwal

280 million parameters; `--dry_run` adds up memory, FLOPs and images, and lists what is missing. Compiled, not run
(benchmarks/aot.py): one 80 GB GPU --config.ddo.accumulation=4 (40 GB); 8 x H100
--config.mesh.fsdp=8 (22 GB each); v5e:4x4 --config.mesh.fsdp=16 --config.ddo.accumulation=4 (4 GB a chip).
NOT RUN here (no weights, no accelerator).

Variants: `:search` the grid over alpha and beta in every round, `:auto` beta found by every round (docs/beta.md),
`:from_scratch` EDM2's own pretraining first,
`:released` scores the authors' fine-tuned weights (the one-command reproduction of 0.97), `:runlocal` the same code
path on the digits in about a minute on a CPU.
"""

from ddo_jax.config import base, variants


def get_config(variant: str = ""):
    config = base()
    config.name = "EDM2-S + DDO, ImageNet-64"
    config.family = "edm2"
    config.init = "edm2-img64-s"
    config.data.update(split="train", holdout="")
    config.data.name = "zip:imagenet-64x64.zip"
    config.model.update(arch="UNet", img_resolution=64, img_channels=3, label_dim=1000)
    with config.unlocked():
        config.model.update(model_channels=192, dropout=0.0)  # EDM2; all else are the network's defaults
        config.model.update(channel_mult=(1, 2, 3, 4), num_blocks=3, attn_resolutions=(16, 8), channels_per_head=64)
    config.sampler.update(solver="heun", num_steps=32)  # EDM2: 63 NFE
    config.remat = True  # ours: memory only, see docs/measured.md

    # EDM2 throughout, preset img64-s; it zeroed gradients that are not finite, we stop at them
    pretrain = config.pretrain
    pretrain.batch = 2048
    pretrain.length.mimg = 1024 * variants.MI
    pretrain.lr = 0.01
    pretrain.t_ref = 35_000.0 * 2048
    pretrain.p_mean, pretrain.p_std = -0.8, 1.6
    pretrain.schedule = "inverse_sqrt"
    pretrain.warmup.mimg = 10.0
    pretrain.b1, pretrain.b2 = 0.9, 0.99
    pretrain.ema_stds = (0.05, 0.1)
    pretrain.snapshot_every.mimg = 8 * variants.MI
    pretrain.save_every.mimg = 8 * variants.MI  # EDM2 kept a training state every 128 Mi images

    ddo = config.ddo
    ddo.rounds = 24  # paper
    ddo.lr = 5e-5  # paper
    ddo.p_mean = -0.8  # not published: the base model's
    ddo.p_std = 1.6  # paper
    ddo.p_std_from = ((17, 3.0),)  # paper
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
    control.p_mean, control.p_std = -0.8, 1.6

    config.eval.network = "inception"
    config.eval.num = 50_000  # paper
    config.eval.select_num = 10_000  # ours
    config.eval.batch = 256  # ours
    config.eval.reference = "edm2-img64-ref"

    variants.apply(config, variant, VARIANTS)
    return config


VARIANTS = {
    "search": variants.search,
    "auto": variants.auto,
    "from_scratch": variants.from_scratch,
    "released": variants.released("edm2-img64-s-ddo"),
    "runlocal": variants.runlocal_edm2,
}
