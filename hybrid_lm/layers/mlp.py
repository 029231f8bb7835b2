"""The channel mixer of a Transformer block."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from torch import Tensor

from hybrid_lm.config.base import Positive
from hybrid_lm.layers.base import Context, Layer, LayerOptions
from hybrid_lm.layers.parts import ACTIVATIONS, Linear


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
        gate_multiplier: float = 1.0
        """Factor on the gate before the nonlinearity (Falcon-H1); gated only."""
        out_multiplier: float = 1.0
        """Factor on the output (Falcon-H1)."""

        def check(self, d_in: int) -> Iterable[tuple[str, str]]:
            if self.gate_multiplier != 1.0 and not self.gated:
                yield "gate_multiplier", "there is no gate with gated: false"

        def resolved(self, d_in: int) -> dict[str, Any]:
            return self.model_dump() | {"d_ff": self.inner(d_in)}

        def inner(self, d_in: int) -> int:
            """Inner width at input width `d_in`."""
            return self.d_ff or (-(-8 * d_in // 24) * 8 if self.gated else 4 * d_in)

    EXAMPLES = (
        {"d_ff": 48},
        {"act": "gelu_tanh", "gated": False, "bias": True},
        {"act": "relu2", "d_ff": 40},
        {"d_ff": 40, "gate_multiplier": 0.7, "out_multiplier": 1.3},
    )

    def __init__(self, d_in: int, options: Options, *, d_out: int | None = None, parts=None):
        super().__init__(d_in, options, d_out=d_out)
        d_ff = options.inner(d_in)
        self.act = ACTIVATIONS[options.act]
        self.gate_multiplier, self.out_multiplier = options.gate_multiplier, options.out_multiplier
        self.gate_proj = Linear(d_in, d_ff, bias=options.bias) if options.gated else None
        self.up_proj = Linear(d_in, d_ff, bias=options.bias)
        self.down_proj = Linear(d_ff, self.d_out, bias=options.bias, kind="output")

    def forward(self, x: Tensor, state: None, ctx: Context) -> tuple[Tensor, None]:
        up = self.up_proj(x, ctx)
        if self.gate_proj is None:
            hidden = self.act(up)
        else:
            gate = self.gate_proj(x, ctx)
            hidden = self.act(gate if self.gate_multiplier == 1.0 else gate * self.gate_multiplier) * up
        y = self.down_proj(hidden, ctx)
        return (y if self.out_multiplier == 1.0 else y * self.out_multiplier), state
