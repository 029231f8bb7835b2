"""The recurrent block of Griffin and its real-gated linear recurrent unit."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from hybrid_lm.config.base import Positive
from hybrid_lm.layers.base import Context, Init, Layer, LayerOptions, State
from hybrid_lm.layers.parts import Linear
from hybrid_lm.layers.ssm import conv_start
from hybrid_lm.ops import causal_conv1d, linear_recurrence


@dataclass
class LRUState(State):
    """The last inputs of the convolution (b w-1 d), and the recurrence (b d) in float32."""

    conv: Tensor
    h: Tensor


class RGLRU(Layer):
    """A gated linear recurrence beside a gate. De et al. 2024, arXiv:2402.19427, figure 2 and section 2.4.

    u = conv(x_proj(x)); r = sigmoid(W_r u + b_r); i = sigmoid(W_i u + b_i), W_r and W_i block-diagonal;
    log a = -c r softplus(decay); h_t = a_t h_{t-1} + sqrt(1 - a_t^2) i_t u_t, at a document's first token
    h = i u; out(gelu(gate_proj(x)) * h).
    """

    class Options(LayerOptions):
        """Settings of the RG-LRU block."""

        d_inner: Positive | None = None
        """Width of the recurrence; by default d_model."""
        n_heads: Positive = 8
        """Blocks on the diagonals of W_r and W_i; divides d_inner."""
        d_conv: Positive = 4
        """Taps of the convolution."""
        c: Annotated[float, Field(gt=0.0)] = 8.0
        """Factor on the logarithm of the decay (eq. 6 of the paper)."""
        bias: bool = True
        """Biases of the projections and of the convolution."""

        def resolved(self, d_in: int) -> dict[str, Any]:
            return self.model_dump() | {"d_inner": self.d_inner or d_in}

        def check(self, d_in: int) -> Iterable[tuple[str, str]]:
            d = self.d_inner or d_in
            if d % self.n_heads:
                yield "n_heads", f"{self.n_heads} does not divide the width {d} of the recurrence"

    EXAMPLES = (
        {"n_heads": 4},
        {"n_heads": 2, "d_inner": 40, "d_conv": 3, "c": 2.0, "bias": False},
        {"n_heads": 1, "d_conv": 1},
    )

    def __init__(self, d_in: int, options: Options, *, d_out: int | None = None, parts=None):
        super().__init__(d_in, options, d_out=d_out)
        o, d = options, options.d_inner or d_in
        self.d_inner, self.n_heads, self.d_conv, self.c = d, o.n_heads, o.d_conv, o.c
        self.gate_proj = Linear(d_in, d, bias=o.bias)
        self.x_proj = Linear(d_in, d, bias=o.bias)
        self.add("conv_weight", (d, o.d_conv), "conv", conv_start)
        if o.bias:
            self.add("conv_bias", (d,), "bias")
        else:
            self.register_parameter("conv_bias", None)
        # A block is (inputs outputs): u W, as in the published models.
        block = (o.n_heads, d // o.n_heads, d // o.n_heads)
        self.add("input_gate_weight", block, "matrix")
        self.add("input_gate_bias", block[:2], "bias")
        self.add("recurrent_gate_weight", block, "matrix")
        self.add("recurrent_gate_bias", block[:2], "bias")
        self.add("decay", (d,), "dynamics", decay_start(o.c))
        self.out_proj = Linear(d, self.d_out, bias=o.bias, kind="output")

    def empty_state(self, batch: int, *, max_tokens: int | None = None) -> LRUState:
        conv = self.conv_weight.new_zeros(batch, self.d_conv - 1, self.d_inner).detach()
        return LRUState(conv, self.decay.new_zeros(batch, self.d_inner).detach())

    def forward(self, x: Tensor, state: LRUState | None, ctx: Context) -> tuple[Tensor, LRUState | None]:
        u, conv = causal_conv1d(
            self.x_proj(x, ctx),
            self.conv_weight,
            self.conv_bias,
            initial=None if state is None else state.conv,
            reset=ctx.reset,
            donate=True,
            backend=ctx.backends.get("causal_conv1d"),
        )
        # A call without documents may still begin one: there is nothing to weigh its first token against.
        first = ctx.positions == 0 if ctx.reset is None else ctx.reset
        r = torch.sigmoid(self.gate(u, self.recurrent_gate_weight, self.recurrent_gate_bias))
        log_a = -self.c * r * F.softplus(self.decay)
        # The root of exactly 0 has no slope; the smallest number in its place changes nothing else.
        factor = (-torch.expm1(2 * log_a)).clamp(min=torch.finfo(log_a.dtype).tiny).sqrt()
        factor = torch.where(first[..., None], 1.0, factor)
        i = torch.sigmoid(self.gate(u, self.input_gate_weight, self.input_gate_bias))
        h, last = linear_recurrence(
            factor * i * u.to(factor.dtype),
            log_a,
            initial=None if state is None else state.h,
            reset=first,
            donate=True,
            backend=ctx.backends.get("linear_recurrence"),
        )
        gate = F.gelu(self.gate_proj(x, ctx), approximate="tanh")
        y = self.out_proj(gate * h.to(gate.dtype), ctx)
        return y, None if state is None else LRUState(conv, last)

    def gate(self, u: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """A block-diagonal product (b t d), in the precision of the decays."""
        blocks = torch.einsum("bthi,hij->bthj", u.unflatten(-1, (self.n_heads, -1)), weight)
        return (blocks.to(self.decay.dtype) + bias.to(self.decay.dtype)).flatten(-2)

    def mixing_flops(self, context: int) -> float:
        # Per channel: the taps, the gates' blocks are matrices already, and about twenty elementwise
        # operations from the gates to the product with h.
        return self.d_inner * (2.0 * self.d_conv + 20.0)


def decay_start(c: float) -> Init:
    """`decay` such that a^c = exp(-c softplus(decay)) is uniform in [0.9, 0.999]. De et al. 2024, section
    2.4."""

    def start(decay: Tensor, rng: torch.Generator) -> None:
        rate = -torch.log(decay.uniform_(0.9, 0.999, generator=rng)) / c
        # The inverse of softplus, written so that it does not lose small rates.
        decay.copy_(rate + torch.log(-torch.expm1(-rate)))

    return start
