"""Files of SiT: bare, of a training run, REPA's; what is no SiT; and back, byte by byte."""

import argparse
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddo_jax import config as configs
from ddo_jax import convert
from ddo_jax.convert import __main__ as command
from ddo_jax.convert import names, torch_write
from ddo_jax.convert.inert import UnsafeOrDamaged
from ddo_jax.convert.read import same_bytes
from ddo_jax.errors import UserError
from ddo_jax.families import from_released, get_family
from ddo_jax.families.sit import LATENT_SCALE
from ddo_jax.models import sit

from . import conftest as build


@pytest.fixture(scope="module")
def released():
    """(config, state dict) as a released network leaves them: the channels that are thrown away at zero."""
    config, state = build.golden("sit_small")
    state = dict(state)
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        v = state[name].copy()
        v.reshape(-1, 2 * config["in_channels"], *v.shape[1:])[:, config["in_channels"] :] = 0
        state[name] = v
    return config, state


def test_a_bare_file(released, tmp_path):
    """Breaks if arguments are read off wrongly, or writing changes a byte."""
    config, state = released
    torch_write.write(tmp_path / "SiT-XL-2-256x256.pt", state)
    found = convert.read(tmp_path / "SiT-XL-2-256x256.pt")
    assert found.kind == "sit" and found.extras["assumed"] == {"num_heads": 1, "convention": "sit"}
    assert found.config == config | {"num_heads": 1, "mlp_ratio": 4.0, "convention": "sit"}  # heads: a guess
    assert list(found.state_dict) == list(state) and same_bytes(found.state_dict, state)
    module, variables = convert.from_torch("sit", found.config, found.state_dict)
    assert isinstance(module, sit.SiT)
    back = convert.to_torch("sit", found.config, variables)
    assert list(back) == list(state) and same_bytes(back, state)
    for suffix in ("safetensors", "pth"):
        command.main([str(tmp_path / "SiT-XL-2-256x256.pt"), str(tmp_path / f"again.{suffix}")])
        again = convert.read(tmp_path / f"again.{suffix}")
        assert again.kind == "sit" and same_bytes(again.state_dict, state)


def test_a_training_run(released, tmp_path):
    """Breaks if the weights of the last step are taken for the average, or the trainer's flags stop the reader."""
    _, state = released
    last = {k: v + 1 for k, v in state.items()}
    flags = argparse.Namespace(model="SiT-XL/2", lr=1e-4)
    (tmp_path / "0400000.pt").write_bytes(build.torch_run({"model": last, "ema": state}, opt={"state": {}}, args=flags))
    found = convert.read(tmp_path / "0400000.pt")
    assert found.kind == "sit" and same_bytes(found.state_dict, state)


def test_repa(released, tmp_path):
    """Its projectors are left out, its time and sign are turned at the door."""
    config, state = build.golden("sit_small2")
    repa = state | {"projectors.0.0.weight": np.ones((8, 64), np.float32)}
    torch_write.write(tmp_path / "repa.pt", repa)
    found = convert.read(tmp_path / "repa.pt")
    assert found.config["convention"] == "repa" and not found.config["learn_sigma"]
    assert same_bytes(found.state_dict, state)
    x, t = jax.random.normal(jax.random.key(0), (2, 12, 12, 3)), jnp.array([0.2, 0.9])
    answers = []
    for convention in sit.CONVENTIONS:
        module, variables = convert.from_torch("sit", config | {"convention": convention}, state)
        answers.append(lambda t, m=module, v=variables: m.apply(v, x, t, jnp.array([1, 5])))
    np.testing.assert_allclose(answers[1](t), -answers[0](1 - t), rtol=1e-6)


def test_a_dit_is_refused(released, tmp_path):
    """Same names, same shapes; what its last channels hold tells it apart, and the reason is said."""
    _, state = build.golden("sit_small")  # random everywhere: as if variances were learned
    torch_write.write(tmp_path / "DiT-XL-2-256x256.pt", state)
    with pytest.raises(UnsafeOrDamaged, match="a DiT: .* predicts noise over 1000 steps") as e:
        convert.read(tmp_path / "DiT-XL-2-256x256.pt")
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"input_size": 9}, "patch_size is 2; allowed: divisors of input_size, 9"),
        ({"num_heads": 5}, "hidden_size is 48; allowed: multiples of 4 and of num_heads, 5"),
        ({"num_classes": 8}, r"y_embedder.embedding_table.weight: shape \[8, 48\]; expected \[9, 48\]"),
        ({"depth": 4}, "blocks.3.attn.qkv.weight: missing"),
        ({"in_channels": 3}, "x_embedder.proj.weight: shape"),
        ({"hidden_size": 0}, "hidden_size: 0; allowed: whole numbers from 1"),
        ({"convention": "dit"}, "convention is 'dit'; allowed: sit, repa"),
        ({"heads": 4}, "unknown key 'heads' for SiT"),
        ({"num_classes": -2}, "allowed: finite numbers"),
    ],
)
def test_what_is_no_network(released, change, words):
    config, state = released
    with pytest.raises(ValueError, match=words) as e:
        convert.from_torch("sit", config | change, state)
    assert "\n" not in str(e.value)


def test_latents_have_their_own_scale(released, tmp_path):
    """Breaks if SiT's latents are scaled as EDM2's, or its pixels are in [0, 1]."""
    config, state = released
    torch_write.write(tmp_path / "a.pt", state)
    c = configs.base()
    with c.unlocked():
        from_released(c, convert.read(tmp_path / "a.pt"))
    assert c.model.vae == "sd-vae-ft-ema" and c.sampler.solver == "sde"
    family = get_family(c)
    np.testing.assert_allclose(family.codec.scale, np.full((1, 1, 1, 4), LATENT_SCALE), rtol=1e-7)
    raw = np.ones((1, 8, 8, 4), np.float32)
    np.testing.assert_allclose(family.codec.scaled(raw), LATENT_SCALE * raw, rtol=1e-6)
    np.testing.assert_allclose(family.codec.store(family.codec.scaled(raw)), raw, rtol=1e-6)
    edm2 = configs.base()
    with edm2.unlocked():
        edm2.family = "edm2"
        edm2.model.update(arch="UNet", img_resolution=8, img_channels=4, label_dim=7, levels=256, vae="sd-vae-ft-mse")
        edm2.model.update(model_channels=16, channel_mult=(1,), num_blocks=1, attn_resolutions=(), channels_per_head=8)
    other = get_family(edm2).codec.scaled(raw)
    assert np.abs(np.asarray(other) - LATENT_SCALE).min() > 0.05
    for vae, scale, allowed in (("sd-vae-ft-ema", 0.13025, "0.18215$"), ("other.safetensors", 0.0, "above 0")):
        with c.unlocked():
            c.model.update(vae=vae, latent_scale=scale)
        with pytest.raises(UserError, match=f"config.model.latent_scale: {scale}; allowed with vae '{vae}': {allowed}"):
            get_family(c)


def test_the_known_name():
    assert names.SOURCES["sit-xl2-256"].endswith("/SiT-XL-2-256x256.pt") and names.licence("sit-xl2-256") == "mit"
    assert re.search(r"not verified", (build.GOLDENS.parents[1] / "ddo_jax/convert/names.py").read_text())
