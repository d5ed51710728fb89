"""EDM (DDPM++) on CIFAR-10, unconditional: FID 1.97 -> 1.38 in 12 rounds (paper, table 1).

    python -m ddo_jax.main --config=configs/edm_cifar10_uncond.py --workdir=DIR

Needs CIFAR-10 as a TFDS set or EDM's zip (--config.data.name=zip:PATH), the released weights and the Inception
weights (README, "Released weights to numbers"). The authors report about 3 hours a round. NOT RUN here.

Variants: `:search` the grid over alpha and beta, `:from_scratch` EDM's own pretraining first, `:released` scores the
authors' fine-tuned weights (the one-command reproduction of 1.38), `:runlocal` under a minute on a CPU.
"""

from configs import common


def get_config(variant: str = ""):
    config = common.edm_cifar10(
        "EDM + DDO, CIFAR-10 unconditional", "edm-cifar10-32x32-uncond-vp", label_dim=0, rounds=12
    )
    known = {
        "search": common.search,
        "from_scratch": common.from_scratch,
        "released": common.released("edm-cifar10-uncond-vp-ddo"),
        "runlocal": common.runlocal,
    }
    common.variants(config, variant, known)
    return config
