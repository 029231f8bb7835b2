"""Mamba-1."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from hybrid_lm.config.base import Positive
from hybrid_lm.layers.base import Context, Init, Layer, LayerOptions, Module
from hybrid_lm.layers.parts import Linear, RMSNorm, ones
from hybrid_lm.layers.ssm import SSMState, check_dt, conv_start, dt_bias_start, s4d_real
from hybrid_lm.ops import causal_conv1d, selective_scan


class HeadLinear(Module):
    """A matrix per head: y_h = x_h W_h^T, W (h d_out d_in)."""

    def __init__(self, n_heads: int, d_in: int, d_out: int, *, init: Init | None = None):
        super().__init__()
        self.add("weight", (n_heads, d_out, d_in), "matrix", init)

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        """x (b t h d_in) -> (b t h d_out)."""
        return torch.einsum("bthi,hoi->btho", x, self.weight)


class Mamba(Layer):
    """A selective state-space layer. Gu & Dao 2023, arXiv:2312.00752, section 3.4 and algorithm 2.

    [u z] = in(x); u = silu(conv(u)); [dt B C] = x_proj(u); y = scan(u, softplus(dt_proj(dt)), A, B, C) *
    silu(z); out(y). With several heads (Zamba, arXiv:2405.16712) each has a part of u's channels, and its own
    x_proj, dt, B and C.
    """

    class Options(LayerOptions):
        """Settings of Mamba-1."""

        d_state: Positive = 16
        """State size n per channel."""
        d_conv: Positive = 4
        """Taps of the convolution."""
        expand: Annotated[float, Field(gt=0.0)] = 2.0
        """Inner width as a multiple of d_model."""
        d_inner: Positive | None = None
        """Inner width, instead of `expand`."""
        dt_rank: Positive | None = None
        """Rank of dt's projection; by default d_model / 16, rounded up."""
        n_heads: Positive = 1
        """Parts of the inner width that have a dt, B and C of their own (Zamba: 2)."""
        inner_norm: Literal["none", "weightless", "weighted"] = "none"
        """RMS norms on dt, B and C: none (Mamba), without weights (Falcon-Mamba), with them (Jamba); one for
        all heads."""
        inner_norm_eps: Annotated[float, Field(gt=0.0)] = 1e-5
        conv_bias: bool = True
        bias: bool = False
        """Biases of the input and output projections."""
        dt_min: Annotated[float, Field(gt=0.0)] = 1e-3
        """Smallest step size at the start."""
        dt_max: Annotated[float, Field(gt=0.0)] = 0.1
        """Largest step size at the start."""
        dt_floor: Annotated[float, Field(gt=0.0)] = 1e-4
        """Step sizes at the start are not below this."""

        def resolved(self, d_in: int) -> dict[str, Any]:
            return self.model_dump() | {
                "d_inner": self.inner(d_in),
                "dt_rank": self.rank(d_in),
                **(self.without_effect("inner_norm_eps") if self.inner_norm == "none" else {}),
            }

        def inner(self, d_in: int) -> int:
            """Inner width at input width `d_in`."""
            return self.d_inner or round(self.expand * d_in)

        def rank(self, d_in: int) -> int:
            """Rank of dt's projection at input width `d_in`."""
            return self.dt_rank or math.ceil(d_in / 16)

        def check(self, d_in: int) -> Iterable[tuple[str, str]]:
            if self.inner(d_in) % self.n_heads:
                yield "n_heads", f"{self.n_heads} does not divide the inner width {self.inner(d_in)}"
            yield from check_dt(self.dt_min, self.dt_max)

    EXAMPLES = (
        {"d_state": 8},
        {"d_state": 5, "d_conv": 3, "dt_rank": 4, "inner_norm": "weighted", "conv_bias": False, "bias": True},
        {"d_state": 4, "d_inner": 40, "inner_norm": "weightless"},
        {"d_state": 6, "n_heads": 2, "inner_norm": "weighted", "inner_norm_eps": 1e-2},
    )

    def __init__(self, d_in: int, options: Options, *, d_out: int | None = None, parts=None):
        super().__init__(d_in, options, d_out=d_out)
        o, d, heads = options, options.inner(d_in), options.n_heads
        rank = o.rank(d_in)
        self.d_inner, self.d_state, self.d_conv, self.dt_rank = d, o.d_state, o.d_conv, rank
        self.n_heads = heads
        self.in_proj = Linear(d_in, 2 * d, bias=o.bias)
        self.add("conv_weight", (d, o.d_conv), "conv", conv_start)
        if o.conv_bias:
            self.add("conv_bias", (d,), "bias")
        else:
            self.register_parameter("conv_bias", None)
        self.x_proj: Module
        self.dt_proj: Module
        if heads == 1:
            self.x_proj = Linear(d, rank + 2 * o.d_state)
            self.dt_proj = Linear(rank, d, init=self._dt_start)
        else:
            self.x_proj = HeadLinear(heads, d // heads, rank + 2 * o.d_state)
            self.dt_proj = HeadLinear(heads, rank, d // heads, init=self._dt_start)
        self.add("dt_bias", (d,), "dynamics", dt_bias_start(o.dt_min, o.dt_max, o.dt_floor))
        self.add("A_log", (d, o.d_state), "dynamics", s4d_real)
        self.add("D", (d,), "dynamics", ones)
        self.out_proj = Linear(d, self.d_out, bias=o.bias, kind="output")
        self.dt_norm: Any = None
        if o.inner_norm != "none":
            how = {"eps": o.inner_norm_eps, "weight": o.inner_norm == "weighted"}
            self.dt_norm, self.B_norm, self.C_norm = (RMSNorm(k, **how) for k in (rank, o.d_state, o.d_state))

    def _dt_start(self, weight: Tensor, rng: torch.Generator) -> None:
        # Keeps the variance of dt over the low rank, so that dt_bias decides the step sizes at the start.
        bound = self.dt_rank**-0.5
        weight.uniform_(-bound, bound, generator=rng)

    def empty_state(self, batch: int, *, max_tokens: int | None = None) -> SSMState:
        conv = self.conv_weight.new_zeros(batch, self.d_conv - 1, self.d_inner).detach()
        return SSMState(conv, self.A_log.new_zeros(batch, self.d_inner, self.d_state).detach())

    def forward(self, x: Tensor, state: SSMState | None, ctx: Context) -> tuple[Tensor, SSMState | None]:
        u, z = self.in_proj(x, ctx).chunk(2, -1)
        u, conv = causal_conv1d(
            u,
            self.conv_weight,
            self.conv_bias,
            activation="silu",
            initial=None if state is None else state.conv,
            reset=ctx.reset,
            donate=True,
            backend=ctx.backends.get("causal_conv1d"),
        )
        heads = self.n_heads
        # One head has no axis of its own: the matrices and the scan of Mamba, as they are.
        x = u if heads == 1 else u.unflatten(-1, (heads, -1))
        dt, B, C = self.x_proj(x, ctx).split([self.dt_rank, self.d_state, self.d_state], -1)
        if self.dt_norm is not None:
            dt, B, C = self.dt_norm(dt, ctx), self.B_norm(B, ctx), self.C_norm(C, ctx)
        y, ssm = self.scan(u, z, self.dt_proj(dt, ctx), B, C, None if state is None else state.ssm, ctx)
        return self.out_proj(y, ctx), None if state is None else SSMState(conv, ssm)

    def scan(
        self, u: Tensor, z: Tensor, dt: Tensor, B: Tensor, C: Tensor, initial: Tensor | None, ctx: Context
    ) -> tuple[Tensor, Tensor]:
        """The recurrence, one head after the other: y (b t d) and the final state (b d n).

        u, z (b t d); initial (b d n). With one head dt (b t d), B and C (b t n); with several dt (b t h p), B
        and C (b t h n).
        """
        heads, A = self.n_heads, -torch.exp(self.A_log)
        backend = ctx.backends.get("selective_scan")
        how: dict[str, Any] = {"dt_softplus": True, "reset": ctx.reset, "donate": True, "backend": backend}
        if heads == 1:
            return selective_scan(u, dt, A, B, C, D=self.D, z=z, dt_bias=self.dt_bias, initial=initial, **how)
        parts = zip(
            u.chunk(heads, -1),
            dt.unbind(2),
            A.chunk(heads),
            B.unbind(2),
            C.unbind(2),
            self.D.chunk(heads),
            z.chunk(heads, -1),
            self.dt_bias.chunk(heads),
            [None] * heads if initial is None else initial.chunk(heads, 1),
            strict=True,
        )
        done = [
            selective_scan(u, dt, A, B, C, D=D, z=z, dt_bias=bias, initial=h, **how)
            for u, dt, A, B, C, D, z, bias, h in parts
        ]
        return torch.cat([y for y, _ in done], -1), torch.cat([h for _, h in done], 1)

    def mixing_flops(self, context: int) -> float:
        # Per channel and state: decay, two products and a sum of the update, two of the read-out, and the
        # exponential.
        return 2.0 * self.d_inner * self.d_conv + 7.0 * self.d_inner * self.d_state
