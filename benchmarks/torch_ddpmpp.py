"""DDPM++ with EDM preconditioning, Heun's sampler and both training steps in PyTorch: the baseline of edm.py.

    python benchmarks/torch_ddpmpp.py         # verify() against tests/goldens/edm_ddpmpp_small.npz

Written from specs/edm.md (section numbers below) alone. NCHW; `load_state_dict` takes the released names. Only
the standard/standard wiring with positional embedding and [1, 1] filters, whose resampling is written as 2x2
mean and nearest neighbour (section 2.2): equal numbers, and cheaper than the depthwise convolutions, so the
baseline is not made slow. Needs the extra [bench].
"""

import copy
import json
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

SKIP_SCALE = math.sqrt(0.5)
DROPPED = ("class_name", "model_type", "embedding_type", "encoder_type", "decoder_type", "channel_mult_noise")


class Conv2d(nn.Module):
    """Resample, then a k x k convolution (section 2.2); weights are cast to the dtype of x."""

    def __init__(self, cin, cout, kernel, up=False, down=False):
        super().__init__()
        self.up, self.down, self.pad = up, down, kernel // 2
        self.weight = nn.Parameter(torch.empty(cout, cin, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(cout))
        nn.init.xavier_uniform_(self.weight)
        if up or down:
            self.register_buffer("resample_filter", torch.full((1, 1, 2, 2), 0.25))

    def forward(self, x):
        if self.up:
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        if self.down:
            x = F.avg_pool2d(x, 2)
        return F.conv2d(x, self.weight.to(x.dtype), self.bias.to(x.dtype), padding=self.pad)


class GroupNorm(nn.GroupNorm):
    """min(32, C/4) groups, eps 1e-6 (section 2.3)."""

    def __init__(self, channels):
        super().__init__(min(32, channels // 4), channels, eps=1e-6)

    def forward(self, x):
        return F.group_norm(x, self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class UNetBlock(nn.Module):
    """Section 3, the column of SongUNet."""

    def __init__(self, cin, cout, width, dropout, attend=False, up=False, down=False):
        super().__init__()
        self.dropout, self.attend = dropout, attend
        self.norm0 = GroupNorm(cin)
        self.conv0 = Conv2d(cin, cout, 3, up, down)
        self.affine = nn.Linear(width, cout)
        self.norm1 = GroupNorm(cout)
        self.conv1 = Conv2d(cout, cout, 3)
        self.skip = Conv2d(cin, cout, 1, up, down) if cin != cout or up or down else None
        if attend:
            self.norm2 = GroupNorm(cout)
            self.qkv = Conv2d(cout, 3 * cout, 1)
            self.proj = Conv2d(cout, cout, 1)

    def attention(self, x):
        """One head; q, k, v interleaved with period 3; logits and softmax at least float32 (section 2.5)."""
        n, c, h, w = x.shape
        q, k, v = self.qkv(self.norm2(x)).reshape(n, c, 3, h * w).unbind(2)
        wide = torch.promote_types(x.dtype, torch.float32)
        logits = q.to(wide).transpose(1, 2) @ (k / math.sqrt(c)).to(wide)
        weights = logits.softmax(-1).to(x.dtype)
        return self.proj((v @ weights.transpose(1, 2)).reshape(n, c, h, w))

    def forward(self, x, emb):
        u = self.conv0(F.silu(self.norm0(x)))
        u = u + self.affine(emb).to(u.dtype)[:, :, None, None]
        u = F.dropout(F.silu(self.norm1(u)), self.dropout, self.training)
        u = self.conv1(u)
        x = (u + (x if self.skip is None else self.skip(x))) * SKIP_SCALE
        return (self.attention(x) + x) * SKIP_SCALE if self.attend else x


class SongUNet(nn.Module):
    """DDPM++ (section 4). x [N,C,R,R], c_noise [N or 1], labels [N,L] -> F [N,C,R,R]."""

    def __init__(self, img_resolution, img_channels, label_dim=0, augment_dim=0, model_channels=128, **options):
        super().__init__()
        options = {"channel_mult": (1, 2, 2, 2), "num_blocks": 4, "attn_resolutions": (16,), "dropout": 0.1} | options
        m, self.label_dim = model_channels, label_dim
        emb = m * options.pop("channel_mult_emb", 4)
        steps = torch.arange(m // 2, dtype=torch.float64) / (m // 2 - 1)
        self.register_buffer("freqs", (1 / 10000) ** steps, persistent=False)
        self.map_label = nn.Linear(label_dim, m) if label_dim else None
        self.map_augment = nn.Linear(augment_dim, m, bias=False) if augment_dim else None
        self.map_layer0 = nn.Linear(m, emb)
        self.map_layer1 = nn.Linear(emb, emb)
        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        self._build(img_resolution, img_channels, m, emb, options)

    def _build(self, resolution, channels, m, emb, options):
        """The ordered entries of sections 4.2 and 4.3."""
        keys = ("channel_mult", "num_blocks", "attn_resolutions", "dropout")
        channel_mult, num_blocks, attn_resolutions, dropout = (options[key] for key in keys)
        here, skips = m, [m]
        for level, mult in enumerate(channel_mult):
            at = f"{resolution >> level}x{resolution >> level}"
            if level:
                self.enc[f"{at}_down"] = UNetBlock(here, here, emb, dropout, down=True)
                skips.append(here)
            else:
                self.enc[f"{at}_conv"] = Conv2d(channels, m, 3)
            for i in range(num_blocks):
                attend = resolution >> level in attn_resolutions
                self.enc[f"{at}_block{i}"] = UNetBlock(here, m * mult, emb, dropout, attend)
                here = m * mult
                skips.append(here)
        for level, mult in reversed(list(enumerate(channel_mult))):
            at = f"{resolution >> level}x{resolution >> level}"
            if level == len(channel_mult) - 1:
                self.dec[f"{at}_in0"] = UNetBlock(here, here, emb, dropout, attend=True)
                self.dec[f"{at}_in1"] = UNetBlock(here, here, emb, dropout)
            else:
                self.dec[f"{at}_up"] = UNetBlock(here, here, emb, dropout, up=True)
            for i in range(num_blocks + 1):
                attend = i == num_blocks and resolution >> level in attn_resolutions
                self.dec[f"{at}_block{i}"] = UNetBlock(here + skips.pop(), m * mult, emb, dropout, attend)
                here = m * mult
        self.dec[f"{at}_aux_norm"] = GroupNorm(here)
        self.dec[f"{at}_aux_conv"] = Conv2d(here, channels, 3)

    def forward(self, x, c_noise, labels=None, augment_labels=None):
        phase = c_noise[:, None] * self.freqs.to(c_noise.dtype)
        e = torch.cat([phase.sin(), phase.cos()], 1)  # swapped (section 4.1)
        if self.map_label is not None:
            e = e + self.map_label(labels * math.sqrt(self.label_dim))
        if self.map_augment is not None and augment_labels is not None:
            e = e + self.map_augment(augment_labels)
        emb = F.silu(self.map_layer1(F.silu(self.map_layer0(e))))
        skips = []
        for layer in self.enc.values():
            x = layer(x, emb) if isinstance(layer, UNetBlock) else layer(x)
            skips.append(x)
        for name, layer in self.dec.items():
            if "_block" in name:
                x = torch.cat([x, skips.pop()], 1)
            if isinstance(layer, UNetBlock):
                x = layer(x, emb)
            else:
                x = F.silu(layer(x)) if isinstance(layer, GroupNorm) else layer(x)
        return x


class EDMPrecond(nn.Module):
    """D = c_skip x + c_out F(c_in x; ln(sigma)/4) (section 9.1). dtype: of the image path inside F."""

    def __init__(self, model, sigma_data=0.5, dtype=None):
        super().__init__()
        self.model, self.sigma_data, self.dtype = model, sigma_data, dtype

    def forward(self, x, sigma, labels=None, augment_labels=None):
        sd, s = self.sigma_data, sigma.to(x.dtype).reshape(-1, 1, 1, 1)
        norm2 = s**2 + sd**2
        f = self.raw(x / norm2.sqrt(), s.flatten().log() / 4, labels, augment_labels)
        return sd**2 / norm2 * x + s * sd / norm2.sqrt() * f

    def raw(self, x_in, c_noise, labels=None, augment_labels=None):
        if self.model.label_dim and labels is None:
            labels = x_in.new_zeros(1, self.model.label_dim)
        return self.model(x_in.to(self.dtype or x_in.dtype), c_noise, labels, augment_labels).to(x_in.dtype)


def from_config(config: dict, dtype=None) -> EDMPrecond:
    """The network for a released file's constructor arguments."""
    wanted = {"encoder_type": "standard", "decoder_type": "standard", "embedding_type": "positional"}
    assert config["model_type"] == "SongUNet" and all(config.get(k, v) == v for k, v in wanted.items())
    assert config.get("channel_mult_noise", 1) == 1 and list(config.get("resample_filter", [1, 1])) == [1, 1]
    drop = (*DROPPED, "resample_filter", "use_fp16")
    return EDMPrecond(SongUNet(**{k: v for k, v in config.items() if k not in drop}), dtype=dtype)


# ----------------------------------------------------------------------------------------------------
# Sampling and training


def heun_times(n, sigma_min=0.002, sigma_max=80.0, rho=7.0):
    """t_0 > ... > t_n = 0, float64 on the host (section 11)."""
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return np.append((high + np.arange(n) / (n - 1) * (low - high)) ** rho, 0.0)


@torch.no_grad()
def heun_sample(denoise, latents, n=18, net_dtype=torch.float32, **grid):
    """Deterministic sampler: the state in float64, the network in `net_dtype` (section 11)."""
    times = heun_times(n, **grid)
    x = latents.double() * times[0]

    def slope(x, t):
        sigma = torch.full(x.shape[:1], t, dtype=net_dtype, device=x.device)
        return (x - denoise(x.to(net_dtype), sigma).double()) / t

    for i in range(n):
        t, t_next = times[i : i + 2]
        d = slope(x, t)
        x_next = x + (t_next - t) * d
        if i < n - 1:
            x_next = x + (t_next - t) * 0.5 * (d + slope(x_next, t_next))
        x = x_next
    return x


def edm_inputs(x, sigma, eps, sd=0.5):
    """x_in, c_noise and the target F_hat (section 10.2)."""
    s = sigma.reshape(-1, 1, 1, 1)
    c_in = 1 / (s**2 + sd**2).sqrt()
    return c_in * (x + s * eps), sigma.log() / 4, c_in * (s / sd * x - sd * eps)


class Trainer:
    """The two steps of ddo_jax.run.step: forward, backward, Adam, EMA; constant learning rate.

    Args:
      net: EDMPrecond; the reference is a copy. compiled: torch.compile of both forwards (and the backward).
    """

    def __init__(self, net, compiled=False, alpha=4.0, beta=0.05, lr=1e-6):
        self.net, self.alpha, self.beta = net, alpha, beta
        self.ref = copy.deepcopy(net).requires_grad_(False)
        self.ema = [p.detach().clone() for p in net.parameters()]
        self.adam = torch.optim.Adam(net.parameters(), lr=lr)
        wrap = torch.compile if compiled else (lambda f: f)
        self.raw, self.raw_ref = wrap(self.net.raw), wrap(self.ref.raw)

    def noised(self, images):
        x = images.float() / 127.5 - 1
        sigma = torch.exp(1.2 * torch.randn(len(x), device=x.device) - 1.2)
        return x, sigma, torch.randn_like(x)

    def update(self, loss):
        self.adam.zero_grad(set_to_none=True)
        loss.backward()
        self.adam.step()
        torch._foreach_lerp_(self.ema, [p.detach() for p in self.net.parameters()], 0.01)
        return loss.detach()

    def ddo(self, real, fake):
        """Images uint8 [B,C,R,R] each; one forward of 2B rows per network, pairs share (sigma, eps)."""
        self.net.eval()
        real, sigma, eps = self.noised(real)
        x = torch.cat([real, fake.float() / 127.5 - 1])
        x_in, c_noise, f_hat = edm_inputs(x, torch.cat([sigma, sigma]), torch.cat([eps, eps]))
        with torch.no_grad():
            f_ref = self.raw_ref(x_in, c_noise)
        f = self.raw(x_in, c_noise)
        r = ((f_ref - f) * (f_ref + f - 2 * f_hat)).sum((1, 2, 3))
        r_real, r_fake = (self.beta * r).chunk(2)
        return self.update(-(F.logsigmoid(r_real) + self.alpha * F.logsigmoid(-r_fake)).mean())

    def mle(self, real):
        self.net.train()
        x_in, c_noise, f_hat = edm_inputs(*self.noised(real))
        return self.update((self.raw(x_in, c_noise) - f_hat).square().sum((1, 2, 3)).mean())


# ----------------------------------------------------------------------------------------------------
# Verification


def _error(value, expected):
    value = value.detach().double().numpy()
    assert value.shape == expected.shape, (value.shape, expected.shape)
    return float(np.abs(value - expected).max() / np.abs(expected).max())


def _golden_errors(golden, dtype) -> dict:
    config = json.loads(str(golden["config"]))
    net = from_config(config).eval()
    state = {k.removeprefix("param/"): torch.from_numpy(v) for k, v in golden.items() if k.startswith("param/")}
    net.load_state_dict(state, strict=True)
    assert list(net.state_dict()) == list(state), "order of names"
    net = net.to(dtype)

    def get(key):
        return torch.from_numpy(golden[key]).to(dtype)

    x, sigma, labels = get("in/x"), get("in/sigma"), get("in/labels")
    s = sigma.reshape(-1, 1, 1, 1)
    x_in, c_noise = x / (s**2 + 0.25).sqrt(), sigma.log() / 4
    settings = json.loads(str(golden["samp/settings"]))
    grid = {k: settings[k] for k in ("sigma_min", "sigma_max", "rho")}
    samp_labels = get("samp/labels")

    def denoise(x, sigma):
        return net(x, sigma, samp_labels)

    images = heun_sample(denoise, get("samp/latents"), settings["num_steps"], dtype, **grid)
    with torch.no_grad():
        return {
            "out/F": _error(net.raw(x_in, c_noise, labels), golden["out/F64"]),
            "out/D": _error(net(x, sigma, labels), golden["out/D64"]),
            "out/D_augment": _error(net(x, sigma, labels, get("in/augment_labels")), golden["out/D_augment64"]),
            "out/D_no_labels": _error(net(x, sigma), golden["out/D_no_labels64"]),
            "samp/images": _error(images, golden["samp/images"]),
        }


def verify(path=Path(__file__).parents[1] / "tests" / "goldens" / "edm_ddpmpp_small.npz") -> dict:
    """Errors (max abs / max abs value) by dtype and key; AssertionError if one is over 1e-5 (float64: 1e-9)."""
    with np.load(path) as f:
        golden = dict(f)
    errors = {}
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-9)):
        errors[str(dtype)] = found = _golden_errors(golden, dtype)
        assert max(found.values()) <= tolerance, f"{dtype}: {found}; tolerance {tolerance}"
    return errors


if __name__ == "__main__":
    print(json.dumps(verify(), indent=2))
