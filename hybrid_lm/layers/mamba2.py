"""Mamba-2."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from hybrid_lm.config.base import Positive
from hybrid_lm.layers.base import Context, Layer, LayerOptions
from hybrid_lm.layers.parts import Linear, ones
from hybrid_lm.layers.ssm import SSMState, check_dt, conv_start, dt_bias_start, log_uniform_A
from hybrid_lm.ops import mamba2_mixer

Factors = Annotated[tuple[float, float, float, float, float], Field(strict=False)]
"""Of z, x, B, C and dt."""


class Mamba2(Layer):
    """State-space duality. Dao & Gu 2024, arXiv:2405.21060, section 7 and figure 6.

    [z x B C dt] = in(x); [x B C] = silu(conv([x B C])); y = ssd(x, softplus(dt + dt_bias), A, B, C) + D x;
    out(norm(y, z)).
    """

    class Options(LayerOptions):
        """Settings of Mamba-2."""

        d_state: Positive = 128
        """State size n per channel of a head."""
        head_dim: Positive = 64
        """Channels p of a head, which share one decay."""
        n_groups: Positive = 1
        """Sets of B and C that the heads share."""
        d_conv: Positive = 4
        """Taps of the convolution."""
        expand: Annotated[float, Field(gt=0.0)] = 2.0
        """Inner width as a multiple of d_model."""
        d_inner: Positive | None = None
        """Inner width, instead of `expand`."""
        norm: Literal["gate_norm", "norm_gate", "gate"] = "gate_norm"
        """norm(y silu(z)) (Mamba-2), norm(y) silu(z), or y silu(z) (Falcon-H1 has all three)."""
        norm_eps: Annotated[float, Field(gt=0.0)] = 1e-5
        dt_limit: Annotated[tuple[float, float], Field(strict=False)] = (0.0, math.inf)
        """Step sizes are kept within these."""
        in_multiplier: float = 1.0
        """Factor on the input (Falcon-H1)."""
        out_multiplier: float = 1.0
        """Factor on the output (Falcon-H1)."""
        multipliers: Factors = (1.0, 1.0, 1.0, 1.0, 1.0)
        """Factors on z, x, B, C and dt as the input projection gives them (Falcon-H1)."""
        conv_bias: bool = True
        bias: bool = False
        """Biases of the input and output projections."""
        chunk: Positive = 64
        """Tokens worked on at a time; changes speed, not results."""
        A_range: Annotated[tuple[float, float], Field(strict=False)] = (1.0, 16.0)
        """-A at the start is uniform in this range."""
        dt_min: Annotated[float, Field(gt=0.0)] = 1e-3
        """Smallest step size at the start."""
        dt_max: Annotated[float, Field(gt=0.0)] = 0.1
        """Largest step size at the start."""
        dt_floor: Annotated[float, Field(gt=0.0)] = 1e-4
        """Step sizes at the start are not below this."""

        def inner(self, d_in: int) -> int:
            """Inner width at input width `d_in`."""
            return self.d_inner or round(self.expand * d_in)

        def resolved(self, d_in: int) -> dict[str, Any]:
            quiet = self.without_effect("norm_eps") if self.norm == "gate" else {}
            return self.model_dump() | {"d_inner": self.inner(d_in), **quiet}

        def check(self, d_in: int) -> Iterable[tuple[str, str]]:
            inner = self.inner(d_in)
            if inner % self.head_dim:
                yield "head_dim", f"{self.head_dim} does not divide the inner width {inner}"
            elif (inner // self.head_dim) % self.n_groups:
                yield "n_groups", f"{self.n_groups} does not divide the {inner // self.head_dim} heads"
            yield from check_dt(self.dt_min, self.dt_max)
            if not 0.0 < self.A_range[0] <= self.A_range[1] < math.inf:
                yield "A_range", f"needs 0 < low <= high, not {list(self.A_range)}"
            if not 0.0 <= self.dt_limit[0] <= self.dt_limit[1]:
                yield "dt_limit", f"needs 0 <= low <= high, not {list(self.dt_limit)}"

    EXAMPLES = (
        {"d_state": 8, "head_dim": 16, "chunk": 8},
        {
            "d_state": 5,
            "head_dim": 8,
            "n_groups": 2,
            "d_conv": 3,
            "norm": "norm_gate",
            "conv_bias": False,
            "chunk": 16,
        },
        {
            "d_state": 4,
            "d_inner": 48,
            "head_dim": 12,
            "norm": "gate",
            "dt_limit": [0.002, 0.08],
            "bias": True,
            "in_multiplier": 1.2,
            "out_multiplier": 0.7,
            "multipliers": [0.8, 1.1, 0.9, 1.3, 0.6],
        },
    )

    def __init__(self, d_in: int, options: Options, *, d_out: int | None = None, parts=None):
        super().__init__(d_in, options, d_out=d_out)
        o, d = options, options.inner(d_in)
        self.options, self.d_inner, self.n_heads = o, d, d // o.head_dim
        self.d_xBC = d + 2 * o.n_groups * o.d_state
        self.in_proj = Linear(d_in, d + self.d_xBC + self.n_heads, bias=o.bias)
        self.add("conv_weight", (self.d_xBC, o.d_conv), "conv", conv_start)
        if o.conv_bias:
            self.add("conv_bias", (self.d_xBC,), "bias")
        else:
            self.register_parameter("conv_bias", None)
        self.add("dt_bias", (self.n_heads,), "dynamics", dt_bias_start(o.dt_min, o.dt_max, o.dt_floor))
        self.add("A_log", (self.n_heads,), "dynamics", log_uniform_A(*o.A_range))
        self.add("D", (self.n_heads,), "dynamics", ones)
        if o.norm == "gate":
            self.register_parameter("norm_weight", None)
        else:
            self.add("norm_weight", (d,), "norm", ones)
        self.out_proj = Linear(d, self.d_out, bias=o.bias, kind="output")

    def empty_state(self, batch: int, *, max_tokens: int | None = None) -> SSMState:
        o = self.options
        conv = self.conv_weight.new_zeros(batch, o.d_conv - 1, self.d_xBC).detach()
        return SSMState(conv, self.A_log.new_zeros(batch, self.n_heads, o.head_dim, o.d_state).detach())

    def forward(self, x: Tensor, state: SSMState | None, ctx: Context) -> tuple[Tensor, SSMState | None]:
        o = self.options
        z, xBC, dt = self.projected(x, ctx).split([self.d_inner, self.d_xBC, self.n_heads], -1)
        y, conv, ssm = mamba2_mixer(
            xBC,
            z,
            dt,
            -torch.exp(self.A_log),
            self.conv_weight,
            self.conv_bias,
            self.norm_weight,
            D=self.D,
            dt_bias=self.dt_bias,
            dt_limit=o.dt_limit,
            groups=o.n_groups,
            eps=o.norm_eps,
            order=o.norm,
            conv=None if state is None else state.conv,
            initial=None if state is None else state.ssm,
            reset=ctx.reset,
            chunk=o.chunk,
            donate=True,
            once=ctx.once,
            backends=ctx.backends,
            backend=ctx.backends.get("mamba2_mixer"),
        )
        y = self.out_proj(y, ctx)
        y = y if o.out_multiplier == 1.0 else y * o.out_multiplier
        return y, None if state is None else SSMState(conv, ssm)

    def projected(self, x: Tensor, ctx: Context) -> Tensor:
        """x (b t d_in) -> [z x B C dt] (b t -1), each with its factor."""
        o = self.options
        p = self.in_proj(x if o.in_multiplier == 1.0 else x * o.in_multiplier, ctx)
        if all(factor == 1.0 for factor in o.multipliers):
            return p
        n = o.n_groups * o.d_state
        sizes = (self.d_inner, self.d_inner, n, n, self.n_heads)
        factors = zip(o.multipliers, sizes, strict=True)
        return p * torch.cat([p.new_full((size,), factor) for factor, size in factors])

    def mixing_flops(self, context: int) -> float:
        # The recurrent form: decay, update and read-out of a state of d_inner n numbers, and the convolution.
        return 2.0 * self.d_xBC * self.options.d_conv + 6.0 * self.d_inner * self.options.d_state
