"""The MLP equals equation 6 of Shazeer 2020, arXiv:2002.05202, and its ungated form."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from hybrid_lm.config.schema import InitConfig
from hybrid_lm.layers.base import Context
from hybrid_lm.layers.mlp import MLP
from hybrid_lm.layers.parts import ACTIVATIONS
from hybrid_lm.model.init import initialise

WRITTEN_OUT = {
    "silu": lambda x: x / (1 + (-x).exp()),
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / 2**0.5)),
    "gelu_tanh": lambda x: 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))),
    "relu": lambda x: x.clamp(min=0),
    "relu2": lambda x: x.clamp(min=0) ** 2,
    "sigmoid": lambda x: 1 / (1 + (-x).exp()),
    "identity": lambda x: x,
}


@pytest.mark.parametrize("act", sorted(ACTIVATIONS))
@pytest.mark.parametrize("gated", [True, False])
def test_mlp_is_equation_6(act, gated):
    """Falcon-H1's factors stand on the gate before its nonlinearity, and on the output with its bias."""
    on_gate, on_output = (0.6 if gated else 1.0), 1.7
    options = MLP.Options(act=act, gated=gated, bias=True, gate_multiplier=on_gate, out_multiplier=on_output)
    layer = MLP(12, options).double()
    initialise(layer, InitConfig(), n_layers=1)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    up = F.linear(x, layer.up_proj.weight, layer.up_proj.bias)
    gate = F.linear(x, layer.gate_proj.weight, layer.gate_proj.bias) if gated else up
    hidden = WRITTEN_OUT[act](gate * on_gate) * (up if gated else 1)
    expected = F.linear(hidden, layer.down_proj.weight, layer.down_proj.bias) * on_output
    y, state = layer(x, None, Context(torch.zeros(2, 5, dtype=torch.int64)))
    assert state is None
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-14)  # float64 sums of tens of terms


def test_a_factor_needs_its_gate():
    assert dict(MLP.Options(gated=False, gate_multiplier=0.5).check(12)).keys() == {"gate_multiplier"}
    assert not dict(MLP.Options(gate_multiplier=0.5).check(12))


def test_default_widths_have_equal_cost():
    gated, plain = MLP(96, MLP.Options()), MLP(96, MLP.Options(gated=False))
    count = [sum(p.numel() for p in layer.parameters()) for layer in (gated, plain)]
    assert abs(count[0] - count[1]) / count[1] < 0.03
