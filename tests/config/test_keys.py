"""Configs: what is refused, with which words; durations; what may differ when a workdir is continued."""

import copy
import importlib.util
from pathlib import Path

import pytest

from ddo_jax import config as configs
from ddo_jax.errors import UserError
from ddo_jax.run import fill
from ddo_jax.run.checks import check_network

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "configs").glob("*.py"))
VARIANTS = {
    "digits": ("", "runlocal", "unet"),
    **dict.fromkeys(
        ("edm_cifar10_uncond", "edm_cifar10_cond", "edm_in64_adm"),
        ("", "search", "auto", "from_scratch", "released", "runlocal"),
    ),
    "digits_var": ("", "runlocal", "pool"),
    "var_in256": (
        "",
        "d16",
        "d20",
        "d24",
        "d30",
        "search",
        "auto",
        "d30:from_scratch",
        "d30:released",
        "released",
        "runlocal",
    ),
}


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "path, variant",
    [(p, v) for p in FILES if not p.stem.startswith("_") for v in VARIANTS.get(p.stem, ("", "runlocal"))],
    ids=lambda x: getattr(x, "stem", x),
)
def test_shipped_configs_are_valid(path, variant, tmp_path):
    """Breaks if a config or a variant cannot run on one device, or is not locked."""
    config = load(path).get_config(variant)
    if path.stem == "images":  # what it leaves unset is in the data
        config.data.name = "digits"
        config = fill.filled(config, tmp_path)
    configs.validate(config, 1)
    with pytest.raises(AttributeError):
        config.ddo.alhpa = 1.0


def test_unknown_variant_is_refused():
    """Breaks if a misspelt variant runs the full experiment."""
    with pytest.raises(ValueError, match="runlocl.*runlocal, unet"):
        load(ROOT / "configs" / "digits.py").get_config("runlocl")


def test_micro_is_valid(micro):
    """Breaks if the config that the tests below spoil is not good in the first place."""
    configs.validate(micro, 1)
    configs.validate(micro, 8)


def test_base_is_locked():
    """Breaks if a misspelt key in a config file is added silently, at any depth."""
    for section in (None, "ddo", "ddo.length", "model", "sampler"):
        part = configs.base()
        for name in section.split(".") if section else ():
            part = part[name]
        with pytest.raises(AttributeError):
            part.typo = 1


def test_misspelt_key_shows_the_nearest():
    """Breaks if the lock's answer, or validate's, does not name the right key."""
    config = configs.base()
    with pytest.raises(AttributeError, match="Did you mean.*alpha"):
        config.ddo.alhpa = (1.0,)
    with config.unlocked():
        config.ddo.alhpa = (1.0,)
    with pytest.raises(UserError, match=r'config.ddo.alhpa: unknown key; did you mean "ddo.alpha"'):
        configs.validate(config, 1)


def test_missing_key(micro):
    """Breaks if a config that was not made from base() runs on defaults nobody chose."""
    with micro.unlocked():
        del micro.ddo.beta
    with pytest.raises(UserError, match="config.ddo.beta: missing"):
        configs.validate(micro, 1)


def put(config, key, value):
    *path, last = key.split(".")
    for name in path:
        config = config[name]
    with config.unlocked(), config.ignore_type():
        config[last] = value


@pytest.mark.parametrize(
    "key, value, words",
    [
        ("ddo.lr", "fast", "'fast'; allowed: a float"),
        ("ddo.rounds", 1.5, "1.5; allowed: a int"),
        ("ddo.rounds", True, "True; allowed: a int"),
        ("data.flip", 1, "1; allowed: a bool"),
        ("data.crop", "middle", "'middle'; allowed: '', 'center', 'var'"),
        ("data.crop", None, "None; allowed: '', 'center', 'var'"),
        ("ddo.alpha", (), "at least one value"),
        ("ddo.alpha", (0.0,), "above 0"),
        ("ddo.alpha", (4.0, -1.0), "above 0"),
        ("ddo.alpha", ("4",), "above 0"),
        ("ddo.beta", (0.0,), "above 0"),
        ("ddo.beta", (float("nan"),), "above 0"),
        ("ddo.beta", (float("inf"),), "above 0"),
        ("control.lrs", ("1e-3",), "above 0"),
        ("control.lrs", (True,), "above 0"),
        ("ddo.alpha", (True,), "above 0"),
        ("ddo.p_mean", float("nan"), "nan; allowed: -44.3 to 44.3, or noise levels overflow"),
        ("ddo.p_mean", 1e6, "-44.3 to 44.3, or noise levels overflow"),
        ("pretrain.p_std", 10.0, "10.0; allowed: P_mean -1.2 plus and minus 6 P_std within 44.3"),
        ("ddo.p_std_from", ((2, 9.0),), "within 44.3"),
        ("ddo.b1", -1.0, "0 to below 1"),
        ("ddo.b2", 1.0, "0 to below 1"),
        ("pretrain.b1", float("nan"), "0 to below 1"),
        ("ddo.eps", 0.0, "a finite number above 0"),
        ("ddo.ema_mimg", float("inf"), "inf; allowed: finite numbers"),
        ("ddo.ema_rampup", float("nan"), "0 or more"),
        ("pretrain.weight_decay", float("inf"), "finite numbers"),
        ("ddo.final_weight_decay", float("nan"), "0 or more"),
        ("pretrain.final_lr", float("inf"), "finite numbers"),
        ("pretrain.length.mimg", float("inf"), "a finite number above 0"),
        ("ddo.warmup.epochs", float("nan"), "a finite number above 0"),
        ("lease_s", float("inf"), "finite numbers"),
        ("lease_s", float("nan"), "at least 10"),
        ("data.augment", float("nan"), "0 to 1"),
        ("eval.also", ({"sigma_max": float("inf")},), "finite numbers"),
        ("sampler.s_noise", float("nan"), "finite numbers"),
        ("model.sigma_data", 0.0, "model.sigma_data: 0.0; allowed"),
        ("model.sigma_data", float("nan"), "model.sigma_data: nan; allowed"),
        ("pretrain.lr", 0.0, "above 0"),
        ("pretrain.schedule", "exp", "'exp'; allowed: constant, cosine, linear, inverse_sqrt"),
        ("pretrain.hold", 1.0, "1.0; allowed: 0 to below 1"),
        ("pretrain.hold", 0.5, "0.5; allowed: 0, unless schedule is linear"),
        ("ddo.final_weight_decay", -1.0, "-1.0; allowed: 0 or more"),
        ("eval.also", ({"cfg": "1.0"},), "'1.0'; allowed: a float"),
        ("eval.also", ({"top_k": True},), "True; allowed: a int"),
        ("eval.also", ({"guidance": 1.0},), "allowed: dictionaries of sampler settings: cfg"),
        ("ddo.clip", -1.0, "0 or more"),
        ("method", "gan", "'gan'; allowed: ddo, neon, mle, cca"),
        ("ddo.dropped_row_loss", "mle", "'mle'; allowed: posonly, nll, posonly_w1"),
        ("ddo.pool", -1, "-1; allowed: at least ddo.batch = "),
        ("pretrain.ema_mimg", -1.0, "0 or more"),
        ("pretrain.length.steps", 0, "above 0"),
        ("pretrain.length.steps", None, "unset.*allowed: a duration"),
        ("ddo.length.steps", None, "unset.*allowed: a duration"),
        ("ddo.eval_every.steps", None, "unset.*allowed: a duration"),
        ("control.eval_every.steps", None, "unset.*allowed: a duration"),
        ("pretrain.ema_stds", (0.05, 0.0), "0.0; allowed: numbers above 0 and below 0.2887"),
        ("ddo.ema_stds", (0.2887,), "0.2887; allowed: numbers above 0 and below 0.2887"),
        ("control.ema_stds", ("0.05",), "'0.05'; allowed: numbers"),
        ("pretrain.ema_stds", (True,), "True; allowed: numbers"),
        ("pretrain.ema_stds", (0.1, 0.05, 0.0501), "differ in three decimals"),
        ("pretrain.ema_stds", 0.05, "0.05; allowed: a list"),
        ("pretrain.snapshot_every.steps", 0, "0; allowed: a finite number above 0"),
        ("pretrain.snapshot_every.steps", 1000, "set, but pretrain.ema_stds is empty"),
        ("ddo.p_std_from", (17, 3.0), "17; allowed: .*as in"),
        ("ddo.p_std_from", ((17,),), r"\(17,\); allowed: .*rising order"),
        ("ddo.p_std_from", ((0, 3.0),), "rounds from 1 on"),
        ("ddo.p_std_from", ((1.0, 3.0),), "rounds from 1 on"),
        ("ddo.p_std_from", ((2, "3"),), "P_std above 0"),
        ("ddo.p_std_from", ((2, 0.0),), "P_std above 0"),
        ("ddo.p_std_from", ((17, 3.0), (17, 4.0)), "rising order"),
        ("remat", 1, "1; allowed: a bool"),
        ("eval.dtype", "float64", "'float64'; allowed: float32, bfloat16, float16"),
        ("precision", "BF16_BF16_F32_X3", "'BF16_BF16_F32_X3'; allowed: default, high, highest"),
        ("precision", "HIGHEST", "allowed: default, high, highest"),
        ("keep", "some", "'some'; allowed: best, all"),
        ("ddo.accumulation", 3, "3; allowed: a divisor of ddo.batch = 16"),
        ("ddo.accumulation", 0, "0; allowed: a divisor"),
        ("mesh.fsdp", 3, "3; allowed: a divisor of the 8 devices"),
        ("ddo.batch", 20, "20; allowed: .*multiple of the 8 devices"),
        ("pretrain.accumulation", 4, "4; allowed: .*multiple of the 8 devices"),
        ("eval.batch", 12, "12; allowed: .*multiple of the 8 devices"),
        ("eval.num", 1, "1; allowed: at least 2"),
        ("seed", -1, "-1; allowed: 0 or more"),
    ],
)
def test_bad_values_are_refused(micro, key, value, words):
    """Breaks if one of these starts a run, or the line lacks the key, the value or what is allowed."""
    put(micro, key, value)
    with pytest.raises(UserError, match=words) as e:
        configs.validate(micro, 8)
    section = key.removesuffix(".steps") if value is None or "is empty" in words else key
    assert f"config.{section.split('.accumulation')[0]}" in str(e.value)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("images, expected", [(10.4, 10), (10.6, 11), (0.2, 1)])
def test_durations_are_rounded(images, expected):
    """Breaks if a duration that no number of batches makes is rounded up, or down, or to no step at all."""
    duration = configs.base().ddo.length
    duration.mimg = images * 512 / 1e6
    assert configs.steps(duration, 512, 1, "ddo.length") == expected


FOREIGN = [("dtype", "bfloat16"), ("ddo.reencode", False), ("ddo.dropped_row_loss", "nll"), ("sampler.cfg", 1.0)]


@pytest.mark.parametrize("key, value", FOREIGN)
def test_keys_of_other_families_are_refused(micro, key, value):
    """Breaks if a key that the family in use ignores passes in silence."""
    put(micro, key, value)
    default = dict(configs.leaves(configs.base()))[key]
    with pytest.raises(UserError, match=f"config.{key}: {value!r}; allowed: {default!r}: family edm does not use it"):
        check_network(micro)


def test_keys_of_nobody_are_refused(micro):
    """Breaks if a misspelt key passes with a family of the user's, whose own keys are known after it is made."""
    with micro.unlocked():
        micro.family, micro.heigth = "tests.families.toy:make", 3
    with pytest.raises(UserError, match="config.heigth: unknown key"):
        check_network(micro)


def test_whole_numbers_are_good_floats(micro):
    """Breaks if `--config.ddo.lr=1` or alpha (4,) is refused."""
    put(micro, "ddo.lr", 1)
    put(micro, "ddo.alpha", (4,))
    configs.validate(micro, 1)


def test_good_lengths_and_noise_changes(micro):
    """Breaks if the values of the EDM2 configs are refused, or snapshots that share a name are accepted."""
    micro.pretrain.update(ema_stds=(0.05, 0.1))
    micro.ddo.update(ema_stds=(0.05,), p_std_from=((3, 2.0), (17, 3)))
    micro.update(remat=True)
    micro.sampler.solver = "dpmv3"
    micro.eval.dtype = "float16"
    for unit, value in (("steps", 63), ("mimg", 8.388608), ("epochs", 1.0)):  # 63 steps of 16 are 1008 images
        micro.pretrain.snapshot_every = {"steps": None, "mimg": None, "epochs": None, unit: value}
        configs.validate(micro, 1)
    micro.pretrain.snapshot_every = {"steps": 62, "mimg": None, "epochs": None}
    with pytest.raises(UserError, match=r"config.pretrain.snapshot_every: 992; allowed: at least 1000 images"):
        configs.validate(micro, 1)


def test_two_units_of_one_duration(micro):
    """Breaks if one of two durations wins silently."""
    micro.ddo.length.mimg = 1.0
    with pytest.raises(UserError, match=r"ddo.length.mimg = 1.0 and config.ddo.length.steps = 2: set only one"):
        configs.validate(micro, 1)


def test_durations_in_steps():
    """Breaks if a unit is converted wrongly, rounds to no step, or an unset duration becomes one."""
    given = [("steps", 7), ("mimg", 0.001), ("epochs", 2.0), ("mimg", 1e-9)]
    durations = [{"steps": None, "mimg": None, "epochs": None, unit: value} for unit, value in given]
    assert [configs.steps(d, 10, 55, "x") for d in durations] == [7, 100, 11, 1]
    assert configs.steps({"steps": None, "mimg": None, "epochs": None}, 10, 55, "x") is None


HARMLESS = ["log.every", "log.tensorboard", "keep", "lease_s", "name", "remark", "data.dir", "eval.grid"]
HARMLESS += ["ddo.save_every.steps", "ddo.accumulation", "mesh.fsdp", "pretrain.snapshot_every.mimg", "remat"]
SERIOUS = [
    "seed",
    "precision",
    "data.name",
    "data.split",
    "data.flip",
    "data.crop",
    "model.levels",
    "model.width",
    "ddo.lr",
]
SERIOUS += ["ddo.alpha", "ddo.rounds", "pretrain.length.steps", "eval.num", "sampler.num_steps", "control.enabled"]
SERIOUS += ["pretrain.ema_stds", "ddo.p_std_from", "sampler.solver", "eval.dtype"]


@pytest.mark.parametrize("key", HARMLESS + SERIOUS)
def test_difference(micro, key):
    """Breaks if a key that changes numbers may differ in a continued workdir, or one that does not may not."""
    old = micro.to_dict()
    put(micro, key, "other")
    found = configs.difference(old, micro.to_dict())
    before = dict(configs.leaves(old))[key]
    unread = key == "ddo.dropped_row_loss"  # by family edm
    assert found == ([] if key in HARMLESS or unread else [f"config.{key}: {before} -> other"])


def test_difference_of_absent_keys_and_tuples(micro):
    """Breaks if JSON's lists differ from tuples, or a key only one side has is not shown."""
    old = micro.to_dict()
    listed = copy.deepcopy(old)
    listed["ddo"]["alpha"] = list(old["ddo"]["alpha"])
    old["ddo"]["p_std_from"], listed["ddo"]["p_std_from"] = ((17, 3.0),), [[17, 3.0]]
    assert configs.difference(listed, old) == []
    del listed["model"]["blocks"]
    assert configs.difference(listed, old) == ["config.model.blocks: absent -> 1"]


def test_difference_of_keys_that_came_later(micro):
    """Breaks if a workdir from before a key is refused although nothing changes, or continued although it does."""
    new = micro.to_dict()
    old = copy.deepcopy(new)
    del old["data"]["crop"], old["objective"], old["sampler"]["cfg"], old["ddo"]["clip"]
    assert configs.difference(old, new) == []
    del old["method"]
    old["objective"] = "cca"  # a workdir of before 2026-12
    assert configs.difference(old, new | {"method": "cca"}) == configs.difference(old, new | {"objective": "cca"}) == []
    assert configs.difference(old, new) == ["config.method: cca -> ddo"]
    old["ddo"]["dropped_row_loss"] = "posonly"  # the default of before 2026-12
    old["family"] = new["family"] = "var"
    assert "config.ddo.dropped_row_loss: posonly -> posonly_w1" in configs.difference(old, new)
    old["family"] = new["family"] = "edm"
    del old["objective"]
    new["data"]["crop"] = "var"
    assert configs.difference(old, new) == ["config.data.crop:  -> var"]
