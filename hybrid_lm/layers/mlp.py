"""The channel mixer of a Transformer block."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from hybrid_lm.config.base import Positive
from hybrid_lm.layers.base import Context, Layer, LayerOptions
from hybrid_lm.layers.parts import Linear

ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "sigmoid": torch.sigmoid,
    "identity": lambda x: x,
}


class MLP(Layer):
    """down(act(up(x))), or gated: down(act(gate(x)) * up(x)). Shazeer 2020, arXiv:2002.05202, equation 6."""

    class Options(LayerOptions):
        """Settings of an MLP."""

        d_ff: Positive | None = None
        """Inner width; by default 4 d_model, or 8/3 d_model in steps of 8 if gated."""
        act: Literal["silu", "gelu", "gelu_tanh", "relu", "relu2", "sigmoid", "identity"] = "silu"
        """The nonlinearity; relu2 is relu(x)^2 (Primer)."""
        gated: bool = True
        """Multiply by a second projection (SwiGLU with silu, GeGLU with gelu)."""
        bias: bool = False
        """Biases in all projections."""

    EXAMPLES = (
        {"d_ff": 48},
        {"act": "gelu_tanh", "gated": False, "bias": True},
        {"act": "relu2", "d_ff": 40},
    )

    def __init__(self, d_in: int, options: Options, *, d_out: int | None = None, parts=None):
        super().__init__(d_in, options, d_out=d_out)
        default = -(-8 * d_in // 24) * 8 if options.gated else 4 * d_in
        d_ff = options.d_ff or default
        self.act = ACTIVATIONS[options.act]
        self.gate_proj = Linear(d_in, d_ff, bias=options.bias) if options.gated else None
        self.up_proj = Linear(d_in, d_ff, bias=options.bias)
        self.down_proj = Linear(d_ff, self.d_out, bias=options.bias, kind="output")

    def forward(self, x: Tensor, state: None, ctx: Context) -> tuple[Tensor, None]:
        up = self.up_proj(x, ctx)
        hidden = self.act(up) if self.gate_proj is None else self.act(self.gate_proj(x, ctx)) * up
        return self.down_proj(hidden, ctx), state
