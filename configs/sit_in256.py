"""SiT-XL/2 + DDO on ImageNet-256 (SD-VAE latents), flow matching: nobody has published DDO on one for images.

    python -m ddo_jax.main --config=configs/sit_in256.py --workdir=DIR

The base model's FID: 8.3 without guidance, 2.06 with (SiT's own README, SDE of 250 steps; specs/sit.md section 3).
Needs ImageNet as a zip of images, made once, the released weights, the SD-VAE (`sd-vae-ft-ema`), the Inception weights
and OpenAI's reference batch (docs/weights.md):

    python -m ddo_jax.data ~/imagenet/train imagenet-256x256.zip --resolution=256 --crop=center-dhariwal

Images are encoded as they are read, from [-1, 1] as SiT's latents were; the zips of `python -m ddo_jax.data encode`
hold EDM2's encoding, from [0, 1], and are refused.
675 million parameters. NOT RUN here (no weights, no accelerator): compiled only (docs/scaling.md).

Variants: `:xl2` (this), `:repa` a file of REPA's (set --config.init), whose time runs the other way; `:auto` every
round finds its beta (docs/beta.md); `:neon` Neon in place of DDO; `:runlocal` the same code path in a minute on a CPU,
on the digits.

"SiT" marks Ma et al. 2024; what is said of DDO on flows is in specs/sit.md section 4; the rest is ours, not searched.
"""

from ddo_jax.config import base, variants


def get_config(variant: str = ""):
    config = base()
    config.name = "SiT-XL/2 + DDO, ImageNet-256"
    config.family = "sit"
    config.init = "sit-xl2-256"
    config.data.update(name="zip:imagenet-256x256.zip", split="train", holdout="")
    config.model.update(arch="SiT", img_resolution=32, img_channels=4, label_dim=1000, levels=256)
    with config.unlocked():
        config.model.update(patch_size=2, hidden_size=1152, depth=28, num_heads=16, learn_sigma=True)  # SiT-XL/2
        config.model.update(vae="sd-vae-ft-ema", latent_scale=0.18215, image_size=256)  # SiT
        config.model.update(sigma_data=1.0)  # ours: scaled latents have about unit deviation
        config.model.update(weight="edm", mle_time="uniform", pair_time="logit-normal", guidance_channels=0)
    config.sampler.update(solver="sde", num_steps=250)  # SiT: its best scores
    config.remat = True  # ours: memory only

    pretrain = config.pretrain  # SiT: 7M steps of 256, AdamW at a constant rate, no decay, EMA 0.9999
    pretrain.batch = 256
    pretrain.length.mimg = 1792.0
    pretrain.lr = 1e-4
    pretrain.ema_mimg = 1.774  # 0.9999 a step of 256 as a half-life
    pretrain.save_every.mimg = 2.56

    ddo = config.ddo  # ours, by what the paper does with EDM2-L; not searched
    ddo.rounds = 4  # in public experience with a flow a second round gave nothing measurable
    ddo.lr = 2e-5
    ddo.p_mean, ddo.p_std = -0.4, 1.6
    ddo.length.mimg = 3.2
    ddo.batch = 512
    ddo.pool = 50_000
    ddo.alpha = (4.0,)
    ddo.beta = (0.02,)  # by the rule beta std(r) / alpha = 0.2 it must be looked at: `:auto` does
    ddo.warmup.mimg = 0.2
    ddo.ema_mimg = 0.2
    ddo.eval_every.mimg = 0.16  # early and often: best after 300 of 9,000 steps there
    ddo.save_every.mimg = 0.16

    control = config.control  # set control.enabled and control.eval_every
    control.lrs, control.batch, control.ema_mimg = (1e-5, 1e-4), 256, 1.774

    config.eval.update(network="inception", reference="imagenet256-ref", num=50_000, select_num=10_000, batch=64)
    config.eval.also = (dict(cfg=1.5),)

    variants.apply(config, variant, VARIANTS)
    return config


def xl2(config) -> None:
    """The released network: the experiment itself."""


def repa(config) -> None:
    """A file of REPA's: the same network without variances, t = 0 is data."""
    config.name = config.name.replace("SiT-XL/2", "SiT-XL/2 of REPA")
    config.init = "sit-xl2-repa.pt"  # no address is known: a path
    config.model.update(learn_sigma=False)
    with config.unlocked():
        config.model.update(convention="repa")


def neon(config) -> None:
    """Neon: nothing is known of it on flows; w, length and rate are those of EDM."""
    variants.neon(config)


def runlocal(config) -> None:
    """On the pixels of the digits."""
    unet = ("channel_mult", "model_channels", "num_blocks", "attn_resolutions")  # what `variants.runlocal` sets
    with config.unlocked():
        variants.runlocal(config)
        for key in (*unet, "latent_scale"):
            del config.model[key]
    config.model.update(patch_size=2, hidden_size=32, depth=2, num_heads=2, vae="", sigma_data=0.5, image_size=0)
    config.sampler.update(solver="flow_heun", num_steps=6)


VARIANTS = {"xl2": xl2, "repa": repa, "auto": variants.auto, "neon": neon, "runlocal": runlocal}
