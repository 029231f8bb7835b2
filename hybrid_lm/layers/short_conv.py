"""A gated short convolution: the cheapest way to let a token see its neighbours."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hybrid_lm.config.base import Positive
from hybrid_lm.layers.base import Context, Layer, LayerOptions, State
from hybrid_lm.layers.parts import Linear
from hybrid_lm.layers.ssm import conv_start
from hybrid_lm.ops import causal_conv1d


@dataclass
class ConvState(State):
    """The last width - 1 inputs of the convolution, (b w-1 d)."""

    conv: Tensor


class ShortConv(Layer):
    """out(C * conv(B * u)) with [B C u] = in(x) and no activation. LFM2 (Liquid AI 2025), `Lfm2ShortConv` of
    transformers."""

    class Options(LayerOptions):
        """Settings of a short convolution."""

        width: Positive = 3
        """Taps, the current token included."""
        bias: bool = False
        """Biases in the convolution and the projections."""

    EXAMPLES = ({}, {"width": 4, "bias": True}, {"width": 1})

    def __init__(self, d_in: int, options: Options, *, d_out: int | None = None, parts=None):
        super().__init__(d_in, options, d_out=d_out)
        self.width = options.width
        self.in_proj = Linear(d_in, 3 * d_in, bias=options.bias)
        self.add("conv_weight", (d_in, options.width), "conv", conv_start)
        if options.bias:
            self.add("conv_bias", (d_in,), "bias")
        else:
            self.register_parameter("conv_bias", None)
        self.out_proj = Linear(d_in, self.d_out, bias=options.bias, kind="output")

    def empty_state(self, batch: int, *, max_tokens: int | None = None) -> ConvState:
        return ConvState(self.conv_weight.new_zeros(batch, self.width - 1, self.d_in).detach())

    def forward(self, x: Tensor, state: ConvState | None, ctx: Context) -> tuple[Tensor, ConvState | None]:
        B, C, u = self.in_proj(x, ctx).chunk(3, -1)
        y, conv = causal_conv1d(
            B * u,
            self.conv_weight,
            self.conv_bias,
            initial=None if state is None else state.conv,
            reset=ctx.reset,
            donate=True,
            backend=ctx.backends.get("causal_conv1d"),
        )
        return self.out_proj(C * y, ctx), None if state is None else ConvState(conv)

    def mixing_flops(self, context: int) -> float:
        return 2.0 * self.d_in * (self.width + 2)
