"""Mamba equals the recurrence of Gu & Dao 2023, arXiv:2312.00752, algorithm 2, written out token by token."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from hybrid_lm.config.schema import InitConfig
from hybrid_lm.layers.base import Context
from hybrid_lm.layers.mamba import Mamba
from hybrid_lm.model.init import initialise


def rms(x):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5)


def moved(**options):
    """A layer of width 16 in float64 with every parameter off its start."""
    layer = Mamba(16, Mamba.Options(**options)).double()
    initialise(layer, InitConfig(), n_layers=1)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return layer.requires_grad_(False)


@pytest.mark.parametrize("inner_norm", ["none", "weightless", "weighted"])
def test_mamba_is_algorithm_2(inner_norm):
    d, n, t = 16, 4, 11
    layer = moved(d_state=n, inner_norm=inner_norm)
    x = torch.randn(2, t, d, dtype=torch.float64)
    y, _ = layer(x, None, Context(torch.arange(t).expand(2, t)))

    p = dict(layer.named_parameters())
    u, z = (x @ p["in_proj.weight"].T).chunk(2, -1)
    taps = F.pad(u, (0, 0, 3, 0)).unfold(1, 4, 1)  # (b t d w)
    u = F.silu((taps * p["conv_weight"]).sum(-1) + p["conv_bias"])
    dt, B, C = (u @ p["x_proj.weight"].T).split([1, n, n], -1)
    if inner_norm != "none":
        dt, B, C = rms(dt), rms(B), rms(C)
    if inner_norm == "weighted":
        dt, B, C = dt * p["dt_norm.weight"], B * p["B_norm.weight"], C * p["C_norm.weight"]
    dt = F.softplus(dt @ p["dt_proj.weight"].T + p["dt_bias"])
    A = -p["A_log"].exp()
    h, rows = torch.zeros(2, 2 * d, n, dtype=torch.float64), []
    for i in range(t):
        h = (dt[:, i, :, None] * A).exp() * h + (dt[:, i] * u[:, i])[..., None] * B[:, i, None]
        rows.append((h * C[:, i, None]).sum(-1) + p["D"] * u[:, i])
    expected = (torch.stack(rows, 1) * F.silu(z)) @ p["out_proj.weight"].T
    # Two orders of the same sums in float64: 2^-52 times a few hundred terms.
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-13 * float(expected.abs().max()) * 100)


@pytest.mark.parametrize("heads", [2, 4])
def test_heads_are_mambas_between_one_input_and_one_output_matrix(heads):
    # Glorioso et al. 2024, arXiv:2405.16712: the channels of each head go through a Mamba of their own.
    d, n, t, rank = 16, 4, 11, 3
    p = 2 * d // heads
    layer = moved(d_state=n, dt_rank=rank, n_heads=heads)
    x = torch.randn(2, t, d, dtype=torch.float64)
    y, _ = layer(x, None, Context(torch.arange(t).expand(2, t)))

    w = dict(layer.named_parameters())
    u, z = (x @ w["in_proj.weight"].T).chunk(2, -1)
    taps = F.pad(u, (0, 0, 3, 0)).unfold(1, 4, 1)  # (b t d w)
    u = F.silu((taps * w["conv_weight"]).sum(-1) + w["conv_bias"])
    outputs = []
    for i in range(heads):
        mine = slice(i * p, (i + 1) * p)
        dt, B, C = (u[..., mine] @ w["x_proj.weight"][i].T).split([rank, n, n], -1)
        dt = F.softplus(dt @ w["dt_proj.weight"][i].T + w["dt_bias"][mine])
        h, A = torch.zeros(2, p, n, dtype=torch.float64), -w["A_log"][mine].exp()
        for k in range(t):
            v = u[:, k, mine]
            h = (dt[:, k, :, None] * A).exp() * h + (dt[:, k] * v)[..., None] * B[:, k, None]
            outputs.append(((h * C[:, k, None]).sum(-1) + w["D"][mine] * v) * F.silu(z[:, k, mine]))
    expected = torch.stack(outputs).unflatten(0, (heads, t)).permute(2, 1, 0, 3).flatten(2)
    expected = expected @ w["out_proj.weight"].T
    # Two orders of the same sums in float64: 2^-52 times a few hundred terms.
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-13 * float(expected.abs().max()) * 100)


def test_dynamics_start_where_the_paper_says():
    layer = Mamba(64, Mamba.Options())
    initialise(layer, InitConfig(), n_layers=1)
    dt = F.softplus(layer.dt_bias)
    assert dt.min() >= 1e-3 * (1 - 1e-4)  # float32 rounding of the inverse softplus
    assert dt.max() <= 0.1 * (1 + 1e-4)
    assert dt.max() / dt.min() > 10
    torch.testing.assert_close(layer.A_log.exp(), torch.arange(1.0, 17.0).expand(128, 16))
