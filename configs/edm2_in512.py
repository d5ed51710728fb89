"""EDM2-L + DDO on ImageNet-512 (SD-VAE latents): FID 1.96 -> 1.26 in 28 rounds, 1.21 with guidance 1.1 (paper).

    python -m ddo_jax.main --config=configs/edm2_in512.py --workdir=DIR

Needs ImageNet as EDM2's zip of latents, made once, the released EDM2-L weights, the SD-VAE (Apache-2.0), the
Inception weights and EDM2's reference statistics (docs/weights.md):

    python -m ddo_jax.data encode ~/imagenet/train imagenet-512x512-sd.zip --vae=sd-vae-ft-mse --resolution=512 \\
        --crop=center-dhariwal

777 million parameters; training never touches pixels, and fakes stay latents. NOT RUN here (no weights, no
accelerator). Guided, with DPM-Solver-v3 (25 NFE a network):

    python -m ddo_jax.evaluate --checkpoint=edm2-img512-l-ddo --guide=edm2-img512-xs-0134217-0.165 --guidance=1.1 \\
        --solver=dpmv3 --ref=edm2-img512-ref

Variants: `:search`, `:auto` (docs/beta.md), `:from_scratch` EDM2's own pretraining first, `:released` scores the
authors' fine-tuned weights (1.26 is to be reproduced), `:runlocal` the same code path in a minute on a CPU: latents of
digits from a tiny VAE (configs/digits_vae.safetensors, made by configs/make/digits_vae.py).
"""

from pathlib import Path

from ddo_jax.config import base, variants


def get_config(variant: str = ""):
    config = base()
    config.name = "EDM2-L + DDO, ImageNet-512"
    config.family = "edm2"
    config.init = "edm2-img512-l"
    config.data.update(split="train", holdout="")
    config.data.name = "zip:imagenet-512x512-sd.zip"
    config.model.update(arch="UNet", img_resolution=64, img_channels=4, label_dim=1000)
    with config.unlocked():
        config.model.update(model_channels=320, dropout=0.1)  # EDM2; all else are the network's defaults
        config.model.update(channel_mult=(1, 2, 3, 4), num_blocks=3, attn_resolutions=(16, 8), channels_per_head=64)
    config.sampler.update(solver="heun", num_steps=32)  # EDM2: 63 NFE
    config.remat = True  # ours: memory only, see docs/measured.md

    # EDM2 throughout, preset img512-l; it zeroed gradients that are not finite, we stop at them
    pretrain = config.pretrain
    pretrain.batch = 2048
    pretrain.length.mimg = 1792 * variants.MI
    pretrain.lr = 0.008
    pretrain.t_ref = 70_000.0 * 2048
    pretrain.p_mean, pretrain.p_std = -0.4, 1.0
    pretrain.schedule = "inverse_sqrt"
    pretrain.warmup.mimg = 10.0
    pretrain.b1, pretrain.b2 = 0.9, 0.99
    pretrain.ema_stds = (0.05, 0.1)
    pretrain.snapshot_every.mimg = 8 * variants.MI
    pretrain.save_every.mimg = 8 * variants.MI  # EDM2 kept a training state every 128 Mi images

    ddo = config.ddo
    ddo.rounds = 28  # paper
    ddo.lr = 5e-5  # not published: that of ImageNet-64
    ddo.p_mean = -0.4  # not published: the base model's
    ddo.p_std = 1.6  # paper: 1.6, then 2.0, then 3.0
    ddo.p_std_from = ((10, 2.0), (20, 3.0))  # the rounds of the changes are not published: ours
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
    control.p_mean, control.p_std = -0.4, 1.0

    config.eval.update(network="inception", reference="edm2-img512-ref", num=50_000)  # paper
    config.eval.select_num = 10_000  # ours
    config.eval.batch = 64  # ours: decoded to 512 x 512
    with config.unlocked():
        config.model.update(vae="sd-vae-ft-mse", image_size=512, image_channels=3)
        config.model.update(latent_mean=(5.81, 3.25, 0.12, -2.15), latent_std=(4.17, 4.62, 3.71, 3.28))  # EDM2

    variants.apply(config, variant, VARIANTS)
    return config


def runlocal(config) -> None:
    variants.runlocal_edm2(config)
    config.model.update(img_resolution=4, img_channels=4, attn_resolutions=(4,))
    config.model.update(
        vae=str(Path(__file__).resolve().with_name("digits_vae.safetensors")), image_size=8, image_channels=1
    )
    config.model.update(latent_mean=(-0.41, 0.67, 0.07, -0.16), latent_std=(0.75, 1.92, 1.72, 1.46))  # its metadata


VARIANTS = {
    "search": variants.search,
    "auto": variants.auto,
    "from_scratch": variants.from_scratch,
    "released": variants.released("edm2-img512-l-ddo"),
    "runlocal": runlocal,
}
