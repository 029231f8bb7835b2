"""Gated DeltaNet."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from hybrid_lm.config.base import Positive
from hybrid_lm.layers.base import Context, Layer, LayerOptions
from hybrid_lm.layers.parts import Linear, ones
from hybrid_lm.layers.ssm import SSMState, check_dt, conv_start, dt_bias_start, log_uniform_A
from hybrid_lm.ops import causal_conv1d, delta_rule, gated_rms_norm
from hybrid_lm.ops.precision import wide


def unit(x: Tensor) -> Tensor:
    """x (... d) / sqrt(sum x^2 + 1e-6): length 1, except of a vector near zero. In float32 (float64)."""
    x = x.to(wide(x))
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


class GatedDeltaNet(Layer):
    """A matrix per head that maps keys to values, corrected at each token. Yang et al. 2024,
    arXiv:2412.06464, section 3 and figure 1.

    [q k v] = silu(conv([q_proj(x) k_proj(x) v_proj(x)])); g = -exp(A_log) softplus(a_proj(x) + dt_bias);
    y = delta_rule(q / |q|, k / |k|, v, g, sigmoid(b_proj(x))); out(rmsnorm(y) silu(z_proj(x))).
    """

    class Options(LayerOptions):
        """Settings of Gated DeltaNet."""

        n_heads: Positive = 8
        """Heads of queries and keys."""
        n_v_heads: Positive | None = None
        """Heads of values, each with a state of its own; by default as many as keys, else a multiple."""
        head_dim: Positive | None = None
        """Width of a query and of a key; by default 3/4 of d_model / n_heads, as the authors have it."""
        v_head_dim: Positive | None = None
        """Width of a value; by default 2 head_dim."""
        d_conv: Positive = 4
        """Taps of the convolution."""
        negative_eigenvalues: bool = False
        """Betas up to 2 instead of 1: a token can turn a direction of the state around. Grazzi et al. 2024,
        arXiv:2411.12537."""
        norm_eps: Annotated[float, Field(gt=0.0)] = 1e-5
        chunk: Positive = 64
        """Tokens worked on at a time; changes speed, not results."""
        A_range: Annotated[tuple[float, float], Field(strict=False)] = (0.0, 16.0)
        """exp(A_log) at the start is uniform in this range."""
        dt_min: Annotated[float, Field(gt=0.0)] = 1e-3
        """Smallest softplus(dt_bias) at the start."""
        dt_max: Annotated[float, Field(gt=0.0)] = 0.1
        """Largest softplus(dt_bias) at the start."""
        dt_floor: Annotated[float, Field(gt=0.0)] = 1e-4
        """softplus(dt_bias) at the start is not below this."""

        def key_width(self, d_in: int) -> int:
            """Width of a key at input width `d_in`."""
            return self.head_dim or 3 * d_in // (4 * self.n_heads)

        def check(self, d_in: int) -> Iterable[tuple[str, str]]:
            if not self.key_width(d_in):
                yield "n_heads", f"{self.n_heads} heads leave no width to a key at width {d_in}; set head_dim"
            if (self.n_v_heads or self.n_heads) % self.n_heads:
                yield "n_v_heads", f"{self.n_v_heads} is no multiple of n_heads {self.n_heads}"
            yield from check_dt(self.dt_min, self.dt_max)
            if not 0.0 <= self.A_range[0] <= self.A_range[1] < math.inf or not self.A_range[1]:
                yield "A_range", f"needs 0 <= low <= high and high > 0, not {list(self.A_range)}"

        def resolved(self, d_in: int) -> dict[str, Any]:
            width = self.key_width(d_in)
            heads = {"n_v_heads": self.n_v_heads or self.n_heads, "head_dim": width}
            return {**super().resolved(d_in), **heads, "v_head_dim": self.v_head_dim or 2 * width}

    EXAMPLES = (
        {"n_heads": 4, "chunk": 8},
        {
            "n_heads": 2,
            "n_v_heads": 4,
            "head_dim": 6,
            "v_head_dim": 8,
            "d_conv": 3,
            "negative_eigenvalues": True,
            "norm_eps": 1e-2,
            "chunk": 16,
        },
    )

    def __init__(self, d_in: int, options: Options, *, d_out: int | None = None, parts=None):
        super().__init__(d_in, options, d_out=d_out)
        o = options
        self.n_heads, self.n_v_heads = o.n_heads, o.n_v_heads or o.n_heads
        self.head_dim = o.key_width(d_in)
        self.v_head_dim = o.v_head_dim or 2 * self.head_dim
        self.d_conv, self.chunk, self.norm_eps = o.d_conv, o.chunk, o.norm_eps
        self.beta_max = 2.0 if o.negative_eigenvalues else 1.0
        keys, values = self.n_heads * self.head_dim, self.n_v_heads * self.v_head_dim
        self.sizes = (keys, keys, values)
        self.q_proj = Linear(d_in, keys)
        self.k_proj = Linear(d_in, keys)
        self.v_proj = Linear(d_in, values)
        self.z_proj = Linear(d_in, values)
        self.a_proj = Linear(d_in, self.n_v_heads)
        self.b_proj = Linear(d_in, self.n_v_heads)
        self.add("conv_weight", (sum(self.sizes), o.d_conv), "conv", conv_start)
        self.add("dt_bias", (self.n_v_heads,), "dynamics", dt_bias_start(o.dt_min, o.dt_max, o.dt_floor))
        self.add("A_log", (self.n_v_heads,), "dynamics", log_uniform_A(*o.A_range))
        self.add("norm_weight", (self.v_head_dim,), "norm", ones)
        self.o_proj = Linear(values, self.d_out, kind="output")

    def empty_state(self, batch: int, *, max_tokens: int | None = None) -> SSMState:
        conv = self.conv_weight.new_zeros(batch, self.d_conv - 1, sum(self.sizes)).detach()
        shape = (batch, self.n_v_heads, self.head_dim, self.v_head_dim)
        return SSMState(conv, self.A_log.new_zeros(shape).detach())

    def forward(self, x: Tensor, state: SSMState | None, ctx: Context) -> tuple[Tensor, SSMState | None]:
        qkv, conv = causal_conv1d(
            torch.cat((self.q_proj(x, ctx), self.k_proj(x, ctx), self.v_proj(x, ctx)), -1),
            self.conv_weight,
            activation="silu",
            initial=None if state is None else state.conv,
            reset=ctx.reset,
            donate=True,
            backend=ctx.backends.get("causal_conv1d"),
        )
        q, k, v = qkv.split(self.sizes, -1)
        beta = self.beta_max * self.b_proj(x, ctx).to(self.A_log.dtype).sigmoid()
        y, memory = delta_rule(
            unit(q.unflatten(-1, (self.n_heads, self.head_dim))),
            unit(k.unflatten(-1, (self.n_heads, self.head_dim))),
            v.unflatten(-1, (self.n_v_heads, self.v_head_dim)),
            -torch.exp(self.A_log) * F.softplus(self.a_proj(x, ctx) + self.dt_bias),
            beta,
            initial=None if state is None else state.ssm,
            reset=ctx.reset,
            chunk=self.chunk,
            donate=True,
            backend=ctx.backends.get("delta_rule"),
        )
        y = gated_rms_norm(
            y,
            self.z_proj(x, ctx).unflatten(-1, (self.n_v_heads, self.v_head_dim)),
            self.norm_weight,
            eps=self.norm_eps,
            order="norm_gate",
            backend=ctx.backends.get("gated_rms_norm"),
        )
        return self.o_proj(y.flatten(-2), ctx), None if state is None else SSMState(conv, memory)

    def mixing_flops(self, context: int) -> float:
        # The convolution, and per number of the state: decay, what it says of the key, correction, read-out.
        states = self.n_v_heads * self.head_dim * self.v_head_dim
        return 2.0 * sum(self.sizes) * self.d_conv + 7.0 * states
