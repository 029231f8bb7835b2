"""Mamba2 equals the recurrence of Dao & Gu 2024, arXiv:2405.21060, section 7, and transformers'
`Mamba2Mixer`."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from hybrid_lm.config.schema import InitConfig
from hybrid_lm.layers.base import Context
from hybrid_lm.layers.mamba2 import Mamba2
from hybrid_lm.model.init import initialise

# Falcon-H1's factors: on the input, on z, x, B, C and dt, on the output.
FACTORS = (0.7, (0.9, 1.2, 0.8, 1.5, 0.6), 1.3)


@pytest.mark.parametrize("norm", ["gate_norm", "norm_gate", "gate"])
@pytest.mark.parametrize(("a", "m", "b"), [(1.0, (1.0,) * 5, 1.0), FACTORS])
def test_mamba2_is_the_published_recurrence(norm, a, m, b):
    d, n, hp, g, t = 16, 5, 8, 2, 13
    options = Mamba2.Options(
        d_state=n,
        head_dim=hp,
        n_groups=g,
        norm=norm,
        chunk=4,
        bias=True,
        in_multiplier=a,
        multipliers=m,
        out_multiplier=b,
    )
    layer = Mamba2(d, options).double()
    initialise(layer, InitConfig(), n_layers=1)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    layer.requires_grad_(False)
    x = torch.randn(2, t, d, dtype=torch.float64)
    y, _ = layer(x, None, Context(torch.arange(t).expand(2, t)))

    p, inner, heads = dict(layer.named_parameters()), 2 * d, 2 * d // hp
    parts = (a * x @ p["in_proj.weight"].T + p["in_proj.bias"]).split([inner, inner, g * n, g * n, heads], -1)
    z, u, B, C, dt = (factor * part for factor, part in zip(m, parts, strict=True))
    xBC = torch.cat([u, B, C], -1)
    taps = F.pad(xBC, (0, 0, 3, 0)).unfold(1, 4, 1)
    xBC = F.silu((taps * p["conv_weight"]).sum(-1) + p["conv_bias"])
    u, B, C = xBC.split([inner, g * n, g * n], -1)
    u = u.view(2, t, heads, hp)
    B, C = (v.view(2, t, g, n).repeat_interleave(heads // g, 2) for v in (B, C))
    dt = F.softplus(dt + p["dt_bias"])
    A = -p["A_log"].exp()
    h, rows = torch.zeros(2, heads, hp, n, dtype=torch.float64), []
    for i in range(t):
        h = (dt[:, i] * A).exp()[..., None, None] * h
        h = h + dt[:, i, :, None, None] * u[:, i, :, :, None] * B[:, i, :, None]
        rows.append((h * C[:, i, :, None]).sum(-1) + p["D"][:, None] * u[:, i])
    out = torch.stack(rows, 1).flatten(-2)

    def grouped(v):
        v = v.unflatten(-1, (g, -1))
        return (v * torch.rsqrt(v.square().mean(-1, keepdim=True) + 1e-5)).flatten(-2) * p["norm_weight"]

    gate = F.silu(z)
    out = {
        "gate_norm": lambda: grouped(out * gate),
        "norm_gate": lambda: grouped(out) * gate,
        "gate": lambda: out * gate,
    }[norm]()
    expected = b * (out @ p["out_proj.weight"].T + p["out_proj.bias"])
    # Two orders of the same sums in float64: 2^-52 times a few thousand terms.
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-11 * float(expected.abs().max()))


def test_mamba2_is_the_transformers_mixer():
    modeling = pytest.importorskip("transformers.models.mamba2.modeling_mamba2")
    config = modeling.Mamba2Config(
        hidden_size=32,
        num_heads=8,
        head_dim=8,
        state_size=6,
        n_groups=2,
        conv_kernel=4,
        expand=2,
        chunk_size=8,
    )
    theirs = modeling.Mamba2Mixer(config, layer_idx=0).double().eval()
    ours = Mamba2(32, Mamba2.Options(d_state=6, head_dim=8, n_groups=2)).double()
    keys = {"conv1d.weight": "conv_weight", "conv1d.bias": "conv_bias", "norm.weight": "norm_weight"}
    weights = {}
    for name, value in theirs.state_dict().items():
        value = value + 0.1 * torch.randn_like(value)
        weights[name] = value
    theirs.load_state_dict(weights)
    ours.requires_grad_(False)
    ours.load_state_dict(
        {keys.get(k, k): v.squeeze(1) if k == "conv1d.weight" else v for k, v in weights.items()}
    )
    x = torch.randn(2, 19, 32, dtype=torch.float64)
    y, _ = ours(x, None, Context(torch.arange(19).expand(2, 19)))
    with torch.no_grad():
        expected = theirs(x)
    # transformers computes parts in float32 whatever the model's type: its eps times sums of a few hundred
    # terms.
    torch.testing.assert_close(y.float(), expected.float(), rtol=0, atol=2e-5)
