"""EDM2-S + DDO on ImageNet-64, class-conditional: FID 1.60 -> 0.97 in 24 rounds at 63 NFE (paper, table 2).

    python -m ddo_jax.main --config=configs/edm2_in64.py --workdir=DIR

Needs ImageNet as EDM2's 64 x 64 zip, made once from the 1,281,167 training images (one folder a class), the released
EDM2-S weights, the Inception weights and EDM2's reference statistics (README, "Released weights to numbers"):

    python -m ddo_jax.data ~/imagenet/train imagenet-64x64.zip --resolution=64 --crop=center-dhariwal

280 million parameters; `--dry_run` adds up memory, FLOPs and images, and lists what is missing. Compiled, not run
(benchmarks/aot.py): one 80 GB GPU --config.ddo.accumulation=4 (40 GB; a round keeps 3.4 GB more); 8 x H100
--config.mesh.fsdp=8 (22 GB each); v5e:4x4 --config.mesh.fsdp=16 --config.ddo.accumulation=4 (6 GB a chip).
NOT RUN here (no weights, no accelerator).

Variants: `:search` the grid over alpha and beta in every round, `:from_scratch` EDM2's own pretraining first,
`:released` scores the authors' fine-tuned weights (the one-command reproduction of 0.97), `:runlocal` the same code
path on the digits in about a minute on a CPU.
"""

from configs import common


def get_config(variant: str = ""):
    config = common.edm2("EDM2-S + DDO, ImageNet-64", "edm2-img64-s", channels=3, width=192, dropout=0.0)
    config.data.name = "zip:imagenet-64x64.zip"
    config.eval.reference = "edm2-img64-ref"

    pretrain = config.pretrain  # EDM2, preset img64-s
    pretrain.length.mimg = 1024 * common.MI
    pretrain.lr = 0.01
    pretrain.t_ref = 35_000.0 * 2048
    pretrain.p_mean, pretrain.p_std = -0.8, 1.6
    config.control.p_mean, config.control.p_std = -0.8, 1.6

    ddo = config.ddo
    ddo.rounds = 24  # paper
    ddo.lr = 5e-5  # paper
    ddo.p_mean = -0.8  # not published: the base model's
    ddo.p_std = 1.6  # paper
    ddo.p_std_from = ((17, 3.0),)  # paper

    known = {
        "search": common.search,
        "from_scratch": common.from_scratch,
        "released": common.released("edm2-img64-s-ddo"),
        "runlocal": common.runlocal_edm2,
    }
    common.variants(config, variant, known)
    return config
