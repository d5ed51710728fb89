"""SiT, Euler's sampler and the DDO step in PyTorch: the baseline of sit.py.

    python benchmarks/torch_sit.py            # verify() against tests/goldens/sit_small.npz

Written from specs/sit.md (section numbers below) alone. NCHW; `load_state_dict` takes the released names. Attention is
`scaled_dot_product_attention`, the fastest that PyTorch has. Needs the extra [bench].
"""

import copy
import json
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        b, n, w = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, w // self.heads).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, w))


class MLP(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def modulate(x, shift, scale):
    return (1 + scale[:, None]) * F.layer_norm(x, x.shape[-1:], eps=1e-6) + shift[:, None]


def modulation(width, parts):
    return nn.Sequential(nn.SiLU(), nn.Linear(width, parts * width))


class Block(nn.Module):
    def __init__(self, width, heads, hidden):
        super().__init__()
        self.attn, self.mlp = Attention(width, heads), MLP(width, hidden)
        self.adaLN_modulation = modulation(width, 6)

    def forward(self, x, c):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate1[:, None] * self.attn(modulate(x, shift1, scale1))
        return x + gate2[:, None] * self.mlp(modulate(x, shift2, scale2))


class Final(nn.Module):
    def __init__(self, width, features):
        super().__init__()
        self.adaLN_modulation, self.linear = modulation(width, 2), nn.Linear(width, features)

    def forward(self, x, c):
        return self.linear(modulate(x, *self.adaLN_modulation(c).chunk(2, dim=1)))


class TimeEmbedder(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t):
        f = 10000.0 ** (-torch.arange(128, device=t.device, dtype=t.dtype) / 128)
        angles = t[:, None] * f
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=1))


class SiT(nn.Module):
    """Section 2."""

    def __init__(self, c):
        super().__init__()
        width, p = c["hidden_size"], c["patch_size"]
        self.patch, self.channels = p, c["in_channels"]
        out = p * p * self.channels * (2 if c["learn_sigma"] else 1)
        self.pos_embed = nn.Parameter(torch.zeros(1, (c["input_size"] // p) ** 2, width), requires_grad=False)
        self.x_embedder, self.y_embedder = nn.Module(), nn.Module()
        self.x_embedder.proj = nn.Conv2d(self.channels, width, p, p)
        self.t_embedder = TimeEmbedder(width)
        self.y_embedder.embedding_table = nn.Embedding(c["num_classes"] + 1, width)
        self.blocks = nn.ModuleList(Block(width, c["num_heads"], 4 * width) for _ in range(c["depth"]))
        self.final_layer = Final(width, out)

    def forward(self, x, t, labels):
        h = self.x_embedder.proj(x).flatten(2).transpose(1, 2) + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder.embedding_table(labels)
        for block in self.blocks:
            h = block(h, c)
        h, p, side = self.final_layer(h, c), self.patch, math.isqrt(h.shape[1])
        h = h.reshape(len(x), side, side, p, p, -1).permute(0, 5, 1, 3, 2, 4)
        return h.reshape(len(x), -1, side * p, side * p)[:, : self.channels]


@torch.no_grad()
def euler_sample(net, z, labels, steps):
    for i in range(steps):
        z = z + net(z, torch.full((len(z),), i / steps, device=z.device, dtype=z.dtype), labels) / steps
    return z


class Trainer:
    """One DDO step: two networks on real and fake, Adam, EMA (specs/ddo.md section 2; sit.md section 4, weight edm)."""

    def __init__(self, net, compiled, sigma_data=0.5):
        self.net, self.ref, self.mean = net, copy.deepcopy(net).eval().requires_grad_(False), copy.deepcopy(net)
        self.run, self.run_ref = (torch.compile(n) if compiled else n for n in (self.net, self.ref))
        self.sigma_data = sigma_data
        self.adam = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=1e-6)

    def ddo(self, real, fake, labels, alpha=4.0, beta=0.05):
        n, s2 = len(real), self.sigma_data**2
        sigma = torch.exp(-0.4 + 1.2 * torch.randn(n, device=real.device))
        t, eps = (1 / (1 + sigma)).repeat(2), torch.randn_like(real).repeat(2, 1, 1, 1)
        x, both = torch.cat([real, fake]), labels.repeat(2)
        at = t[:, None, None, None]
        x_t, u = at * x + (1 - at) * eps, x - eps
        with torch.no_grad():
            v_ref = self.run_ref(x_t, t, both)
        v = self.run(x_t, t, both)
        weight = ((sigma**2 + s2) / (sigma**2 * s2)).repeat(2) * (1 - t) ** 2
        r_real, r_fake = (weight * ((v_ref - v) * (v_ref + v - 2 * u)).sum((1, 2, 3))).chunk(2)
        loss = -F.logsigmoid(beta * r_real).mean() - alpha * F.logsigmoid(-beta * r_fake).mean()
        self.adam.zero_grad(set_to_none=True)
        loss.backward()
        self.adam.step()
        with torch.no_grad():
            for m, p in zip(self.mean.parameters(), self.net.parameters(), strict=True):
                m.lerp_(p, 0.001)
        return loss


def verify() -> dict:
    """Largest error, relative to the largest value, of the golden velocity and of the Euler sampler."""
    golden = dict(np.load(Path(__file__).parents[1] / "tests" / "goldens" / "sit_small.npz"))
    net = SiT(json.loads(str(golden["config"])))
    net.load_state_dict({k[6:]: torch.from_numpy(v) for k, v in golden.items() if k.startswith("param/")})
    xt, t, y, z, labels = (torch.from_numpy(golden[k]) for k in ("in/xt", "in/t", "in/y", "ode/z", "ode/y"))
    with torch.no_grad():
        seen = {"out/v": net(xt, t, y), "ode/euler/8": euler_sample(net, z, labels, 8)}
    return {k: float((v - torch.from_numpy(golden[k])).abs().max() / np.abs(golden[k]).max()) for k, v in seen.items()}


if __name__ == "__main__":
    print(json.dumps(verify()))
