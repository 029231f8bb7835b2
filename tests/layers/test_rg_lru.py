"""RG-LRU equals the recurrence of De et al. 2024, arXiv:2402.19427, equations 1 to 4, token by token."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from hybrid_lm.config.schema import InitConfig
from hybrid_lm.layers.base import Context
from hybrid_lm.layers.rg_lru import RGLRU
from hybrid_lm.model.init import initialise


def shaken(layer):
    """The layer in float64, every parameter off its start."""
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=rng)
    return layer.double().requires_grad_(False)


def written_out(layer, x, starts, c):
    """The paper's block on x (b t d); a token in `starts` begins a document."""
    p = {name: parameter.detach() for name, parameter in layer.named_parameters()}
    heads, w = p["input_gate_weight"].shape[:2]
    linear = {k: (p[f"{k}.weight"], p.get(f"{k}.bias")) for k in ("gate_proj", "x_proj", "out_proj")}
    v, ys = F.linear(x, *linear["x_proj"]), []
    taps, h, begin = p["conv_weight"].shape[1], torch.zeros_like(v[:, 0]), 0
    for t in range(x.shape[1]):
        begin = t if t in starts else begin
        u = p["conv_bias"].clone() if "conv_bias" in p else torch.zeros_like(v[0, 0])
        for k in range(taps):
            at = t - taps + 1 + k
            u = u + p["conv_weight"][:, k] * v[:, at] if at >= begin else u
        u = u.expand_as(h)
        gates = {}
        for name in ("input_gate", "recurrent_gate"):
            blocks = [u[:, k * w : (k + 1) * w] @ p[f"{name}_weight"][k] for k in range(heads)]
            gates[name] = torch.sigmoid(torch.cat(blocks, 1) + p[f"{name}_bias"].flatten())
        a = torch.exp(-c * F.softplus(p["decay"]) * gates["recurrent_gate"])
        gated = gates["input_gate"] * u
        h = gated if t in starts else a * h + (1 - a.square()).sqrt() * gated
        ys.append(h * F.gelu(F.linear(x[:, t], *linear["gate_proj"]), approximate="tanh"))
    return F.linear(torch.stack(ys, 1), *linear["out_proj"])


@pytest.mark.parametrize(
    "options", [{"n_heads": 4}, {"n_heads": 2, "d_inner": 20, "d_conv": 2, "c": 3.0, "bias": False}]
)
@pytest.mark.parametrize("packed", [False, True])
def test_rg_lru_is_the_papers(options, packed):
    d, t = 16, 11
    layer = RGLRU(d, RGLRU.Options(**options))
    initialise(layer, InitConfig(), n_layers=1)
    shaken(layer)
    x = torch.randn(2, t, d, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    positions, reset = torch.arange(t).expand(2, t), None
    if packed:
        reset = torch.isin(positions, torch.tensor([0, 5]))
        positions = torch.where(positions < 5, positions, positions - 5)
    y, _ = layer(x, None, Context(positions, reset=reset))
    expected = written_out(layer, x, {0, 5} if packed else {0}, options.get("c", 8.0))
    # Two orders of sums of tens of terms in float64, through a recurrence of eleven steps.
    assert (y - expected).abs().max() <= 2**10 * torch.finfo(torch.float64).eps * expected.abs().max()


def test_a_call_that_goes_on_does_not_begin():
    layer = RGLRU(8, RGLRU.Options(n_heads=2))
    initialise(layer, InitConfig(), n_layers=1)
    shaken(layer)
    x = torch.randn(1, 1, 8, dtype=torch.float64)
    first, _ = layer(x, layer.empty_state(1), Context(torch.tensor([[0]])))
    later, _ = layer(x, layer.empty_state(1), Context(torch.tensor([[3]])))
    # Later the input is weighed by sqrt(1 - a^2) < 1.
    assert not torch.allclose(first, later)


def test_the_decay_starts_where_the_paper_says():
    layer = RGLRU(512, RGLRU.Options(c=5.0))
    initialise(layer, InitConfig(), n_layers=1)
    slowest = torch.exp(-5.0 * F.softplus(layer.decay.detach()))
    # 2^-24 of rounding, five times over.
    assert slowest.min() >= 0.9 - 1e-6
    assert slowest.max() <= 0.999 + 1e-6
    # A mean of 512 draws has a deviation of 0.0286 / sqrt(512) = 0.0013.
    assert abs(float(slowest.mean()) - 0.9495) <= 5 * 0.0013


def test_gates_that_are_shut_have_finite_gradients():
    layer = RGLRU(8, RGLRU.Options(n_heads=2))
    initialise(layer, InitConfig(), n_layers=1)
    with torch.no_grad():
        layer.recurrent_gate_bias.fill_(-200.0)  # exp(-200) is 0 in float32: the decay is exactly 1
    x = torch.randn(2, 5, 8, requires_grad=True)
    y, _ = layer(x, None, Context(torch.arange(5).expand(2, 5)))
    y.sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())
    assert x.grad.isfinite().all()
