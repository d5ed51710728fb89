"""EDM2-L + DDO on ImageNet-512 (SD-VAE latents): FID 1.96 -> 1.26 in 28 rounds, 1.21 with guidance 1.1 (paper).

    python -m ddo_jax.main --config=configs/edm2_in512.py --workdir=DIR

Needs ImageNet as EDM2's zip of latents, made once, the released EDM2-L weights, the SD-VAE (Apache-2.0), the
Inception weights and EDM2's reference statistics (README, "Released weights to numbers"):

    python -m ddo_jax.data encode ~/imagenet/train imagenet-512x512-sd.zip --vae=sd-vae-ft-mse --resolution=512 \\
        --crop=center-dhariwal

777 million parameters; training never touches pixels, and fakes stay latents. NOT RUN here (no weights, no
accelerator). Guided, with DPM-Solver-v3 (25 NFE a network):

    python -m ddo_jax.evaluate --checkpoint=edm2-img512-l-ddo --guide=edm2-img512-xs-0134217-0.165 --guidance=1.1 \\
        --solver=dpmv3 --ref=edm2-img512-ref

Variants: `:search`, `:from_scratch` EDM2's own pretraining first, `:released` scores the authors' fine-tuned weights
(1.26 is to be reproduced), `:runlocal` the same code path in a minute on a CPU: latents of digits from a tiny VAE
(configs/digits_vae.safetensors, made by examples/digits_vae.py).
"""

from pathlib import Path

from configs import common


def get_config(variant: str = ""):
    config = common.edm2("EDM2-L + DDO, ImageNet-512", "edm2-img512-l", channels=4, width=320, dropout=0.1)
    config.data.name = "zip:imagenet-512x512-sd.zip"
    config.eval.reference = "edm2-img512-ref"
    config.eval.batch = 64  # ours: decoded to 512 x 512
    with config.unlocked():
        config.model.update(vae="sd-vae-ft-mse", image_size=512, image_channels=3)
        config.model.update(latent_mean=(5.81, 3.25, 0.12, -2.15), latent_std=(4.17, 4.62, 3.71, 3.28))  # EDM2

    pretrain = config.pretrain  # EDM2, preset img512-l
    pretrain.length.mimg = 1792 * common.MI
    pretrain.lr = 0.008
    pretrain.t_ref = 70_000.0 * 2048
    pretrain.p_mean, pretrain.p_std = -0.4, 1.0
    config.control.p_mean, config.control.p_std = -0.4, 1.0

    ddo = config.ddo
    ddo.rounds = 28  # paper
    ddo.lr = 5e-5  # not published: that of ImageNet-64
    ddo.p_mean = -0.4  # not published: the base model's
    ddo.p_std = 1.6  # paper: 1.6, then 2.0, then 3.0
    ddo.p_std_from = ((10, 2.0), (20, 3.0))  # the rounds of the changes are not published: ours

    known = {
        "search": common.search,
        "from_scratch": common.from_scratch,
        "released": common.released("edm2-img512-l-ddo"),
        "runlocal": runlocal,
    }
    common.variants(config, variant, known)
    return config


def runlocal(config) -> None:
    common.runlocal_edm2(config)
    config.model.update(img_resolution=4, img_channels=4, attn_resolutions=(4,))
    config.model.update(
        vae=str(Path(__file__).resolve().with_name("digits_vae.safetensors")), image_size=8, image_channels=1
    )
    config.model.update(latent_mean=(-0.41, 0.67, 0.07, -0.16), latent_std=(0.75, 1.92, 1.72, 1.46))  # its metadata
