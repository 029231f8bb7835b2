"""GatedDeltaNet equals the recurrence of Yang et al. 2024, arXiv:2412.06464, eq. 10 and section 3."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from hybrid_lm.config.schema import InitConfig
from hybrid_lm.layers.base import Context
from hybrid_lm.layers.gated_deltanet import GatedDeltaNet
from hybrid_lm.model.init import initialise


@pytest.mark.parametrize("negative", [False, True])
@pytest.mark.parametrize("shared", [1, 3])
def test_gated_deltanet_is_the_published_recurrence(negative, shared):
    d, heads, n, p, t, eps = 16, 2, 5, 6, 13, 1e-2
    options = GatedDeltaNet.Options(
        n_heads=heads,
        n_v_heads=heads * shared,
        head_dim=n,
        v_head_dim=p,
        negative_eigenvalues=negative,
        norm_eps=eps,
        chunk=4,
    )
    layer = GatedDeltaNet(d, options).double()
    initialise(layer, InitConfig(), n_layers=1)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    layer.requires_grad_(False)
    x = torch.randn(2, t, d, dtype=torch.float64)
    y, _ = layer(x, None, Context(torch.arange(t).expand(2, t)))

    w = dict(layer.named_parameters())
    q, k, v, z, a, b = (x @ w[f"{name}_proj.weight"].T for name in "qkvzab")
    taps = F.pad(torch.cat((q, k, v), -1), (0, 0, 3, 0)).unfold(1, 4, 1)
    q, k, v = F.silu((taps * w["conv_weight"]).sum(-1)).split([heads * n, heads * n, heads * shared * p], -1)
    q, k = (m.view(2, t, heads, n).repeat_interleave(shared, 2) for m in (q, k))
    q, k = (m / (m.square().sum(-1, keepdim=True) + 1e-6).sqrt() for m in (q, k))
    v, z = (m.view(2, t, heads * shared, p) for m in (v, z))
    decay = torch.exp(-w["A_log"].exp() * F.softplus(a + w["dt_bias"]))
    beta = torch.sigmoid(b) * (2 if negative else 1)
    S, rows = torch.zeros(2, heads * shared, p, n, dtype=torch.float64), []
    for i in range(t):
        # S_t = S_{t-1} (alpha_t (1 - beta_t k_t k_t^T)) + beta_t v_t k_t^T, the paper's letters
        outer = k[:, i, :, :, None] * k[:, i, :, None]
        turned = torch.eye(n, dtype=torch.float64) - beta[:, i, :, None, None] * outer
        S = S @ (decay[:, i, :, None, None] * turned)
        S = S + beta[:, i, :, None, None] * v[:, i, :, :, None] * k[:, i, :, None]
        rows.append((S @ q[:, i, :, :, None])[..., 0] / n**0.5)
    out = torch.stack(rows, 1)
    out = out / (out.square().mean(-1, keepdim=True) + eps).sqrt() * w["norm_weight"] * F.silu(z)
    expected = out.flatten(-2) @ w["o_proj.weight"].T
    # Two orders of the same sums in float64: 2^-52 times a few thousand terms.
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-11 * float(expected.abs().max()))


def test_widths_that_are_not_said_are_those_of_the_authors():
    layer = GatedDeltaNet(64, GatedDeltaNet.Options(n_heads=4))
    assert (layer.head_dim, layer.v_head_dim, layer.n_v_heads) == (12, 24, 4)
    # The authors' implementation (flash-linear-attention) gives a layer 6 d^2, and the gates of its heads.
    matrices = sum(x.numel() for name, x in layer.named_parameters() if name.endswith("proj.weight"))
    assert matrices == 6 * 64**2 + 2 * 4 * 64


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"n_heads": 2, "n_v_heads": 3}, "n_v_heads"),
        ({"n_heads": 32}, "n_heads"),
        ({"A_range": [2.0, 1.0]}, "A_range"),
        ({"A_range": [0.0, 0.0]}, "A_range"),
        ({"dt_min": 0.2}, "dt_min"),
    ],
)
def test_impossible_settings_are_named(options, key):
    assert [name for name, _ in GatedDeltaNet.Options(**options).check(32)] == [key]
