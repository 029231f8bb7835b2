"""Softmax attention; grouped keys, windows, positions, norms and caps are options of one layer."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from hybrid_lm.config.base import Positive
from hybrid_lm.layers.base import Context, Layer, LayerOptions, Module
from hybrid_lm.layers.memory import KVState, slack
from hybrid_lm.layers.parts import Linear, RMSNorm, ones, zeros
from hybrid_lm.layers.rotary import RopeOptions, Rotation
from hybrid_lm.ops import alibi_slopes, attention


class Attention(Layer):
    """softmax(q k^T scale + bias) v over the tokens of one document. Vaswani et al. 2017, arXiv:1706.03762.

    Grouped keys: Ainslie et al. 2023, arXiv:2305.13245. Without `rope` and `alibi` it has no positions of its
    own (NoPE).
    """

    class Options(LayerOptions):
        """Settings of attention."""

        n_heads: Positive = 8
        """Query heads."""
        n_kv_heads: Positive | None = None
        """Key and value heads; by default as many as query heads, 1: multi-query."""
        head_dim: Positive | None = None
        """Width of a head; by default d_model / n_heads."""
        window: Positive | None = None
        """Tokens that a token sees, itself included; null: all before it."""
        rope: RopeOptions | None = None
        """Rotary positions; `{}` for the usual ones."""
        alibi: bool = False
        """A penalty that grows with distance. Press et al. 2021, arXiv:2108.12409."""
        qk_norm: Literal["none", "head", "full", "layernorm"] = "none"
        """Norm of queries and keys, before rope: RMS norm per head (Qwen3) or over all heads (OLMo-2), or
        layer norm per head with weights for each of them (StableLM 2 12B)."""
        qk_norm_eps: Annotated[float, Field(gt=0.0)] = 1e-5
        qk_norm_unit_offset: bool = False
        """RMS norms: scale by (1 + w) (Gemma-3)."""
        softcap: Annotated[float, Field(gt=0.0)] | None = None
        """Scores become softcap * tanh(scores / softcap) (Gemma-2)."""
        scale: Annotated[float, Field(gt=0.0)] | None = None
        """Factor on the scores; by default head_dim^-1/2."""
        sinks: bool = False
        """One learned score per head that takes weight and gives nothing (gpt-oss, arXiv:2508.10925)."""
        out_gate: Literal["none", "element", "head"] = "none"
        """Factor sigmoid(gate_proj(x)) on the heads' output: one per number (Qwen3-Next) or one per head
        (arXiv:2505.06708)."""
        in_multiplier: float = 1.0
        """Factor on the layer's input (Falcon-H1, with the two below)."""
        key_multiplier: float = 1.0
        """Factor on keys, before their norm and rope."""
        out_multiplier: float = 1.0
        """Factor on the layer's output."""
        qkv_bias: bool = False
        """Bias of queries, keys, values and of the gate."""
        out_bias: bool = False
        """Bias of the output projection."""
        dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
        """Probability of dropping an attention weight, in training."""

        def resolved(self, d_in: int) -> dict[str, Any]:
            width = self.head_dim or d_in // self.n_heads
            usual = self.scale is None or math.isclose(self.scale, width**-0.5, rel_tol=1e-12)
            offset = ("qk_norm_unit_offset",)
            quiet = {"none": ("qk_norm_eps", *offset), "layernorm": offset, "head": (), "full": ()}
            return self.model_dump() | {
                "n_kv_heads": self.n_kv_heads or self.n_heads,
                "head_dim": width,
                "scale": None if usual else self.scale,
                **self.without_effect(*quiet[self.qk_norm]),
            }

        def check(self, d_in: int) -> Iterable[tuple[str, str]]:
            kv = self.n_kv_heads or self.n_heads
            if self.n_heads % kv:
                yield "n_kv_heads", f"{kv} does not divide n_heads {self.n_heads}"
            width = self.head_dim or d_in // self.n_heads
            if self.head_dim is None and d_in % self.n_heads:
                yield (
                    "n_heads",
                    f"{self.n_heads} does not divide the width {d_in}; choose a divisor or set head_dim",
                )
            elif self.rope and round(self.rope.fraction * width) % 2:
                yield (
                    "rope",
                    f"the rotated part of a head must be even, not {self.rope.fraction} of {width}",
                )
            elif self.rope and self.rope.scaling:
                rotated = round(self.rope.fraction * width)
                for problem in self.rope.scaling.problems(rotated, self.rope.max_positions):
                    yield "rope.scaling", problem
            if self.rope and self.alibi:
                yield "alibi", "choose rope or alibi, not both"

    EXAMPLES = (
        {"n_heads": 4, "n_kv_heads": 2, "rope": {}},
        {
            "n_heads": 4,
            "n_kv_heads": 1,
            "window": 5,
            "rope": {"theta": 500.0, "fraction": 0.5},
            "qk_norm": "head",
        },
        {"n_heads": 3, "head_dim": 12, "alibi": True, "qkv_bias": True, "out_bias": True},
        {
            "n_heads": 2,
            "window": 70,
            "softcap": 4.0,
            "scale": 0.3,
            "qk_norm": "full",
            "rope": {"interleaved": True},
        },
        {"n_heads": 4},
        {"n_heads": 4, "n_kv_heads": 2, "qk_norm": "layernorm", "qk_norm_eps": 1e-2, "rope": {}},
        {"n_heads": 4, "qk_norm": "head", "qk_norm_unit_offset": True},
        {"n_heads": 4, "n_kv_heads": 2, "sinks": True, "window": 6, "rope": {}},
        {"n_heads": 4, "out_gate": "element", "qkv_bias": True, "sinks": True},
        {
            "n_heads": 4,
            "out_gate": "head",
            "in_multiplier": 0.7,
            "key_multiplier": 1.6,
            "out_multiplier": 0.4,
            "out_bias": True,
        },
        {"n_heads": 4, "rope": {"scaling": {"rope_type": "dynamic", "factor": 2.0}, "max_positions": 40}},
    )

    def __init__(self, d_in: int, options: Options, *, d_out: int | None = None, parts=None):
        super().__init__(d_in, options, d_out=d_out)
        self.n_heads, self.n_kv_heads = options.n_heads, options.n_kv_heads or options.n_heads
        self.head_dim = options.head_dim or d_in // options.n_heads
        self.options = options
        self.rotation = Rotation(options.rope, self.head_dim) if options.rope else None
        q, kv, bias = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim, options.qkv_bias
        self.q_proj = Linear(d_in, q, bias=bias)
        self.k_proj = Linear(d_in, kv, bias=bias)
        self.v_proj = Linear(d_in, kv, bias=bias)
        self.o_proj = Linear(q, self.d_out, bias=options.out_bias, kind="output")
        self.gate_proj: Any = None
        if options.out_gate != "none":
            self.gate_proj = Linear(d_in, q if options.out_gate == "element" else self.n_heads, bias=bias)
        self.register_parameter("sinks", None)
        if options.sinks:
            self.add("sinks", (self.n_heads,), "bias", zeros)
        self.q_norm: Any = None
        self.k_norm: Any = None
        if options.qk_norm == "layernorm":
            self.q_norm = HeadNorm(self.n_heads, self.head_dim, options.qk_norm_eps)
            self.k_norm = HeadNorm(self.n_kv_heads, self.head_dim, options.qk_norm_eps)
        elif options.qk_norm != "none":
            how = {"eps": options.qk_norm_eps, "unit_offset": options.qk_norm_unit_offset}
            whole = options.qk_norm == "full"
            self.q_norm = RMSNorm(q if whole else self.head_dim, **how)
            self.k_norm = RMSNorm(kv if whole else self.head_dim, **how)

    def empty_state(self, batch: int, *, max_tokens: int | None = None) -> KVState:
        weight, window = self.k_proj.weight, self.options.window or 0
        room = max_tokens or 0
        if window:
            room = min(room, window - 1 + slack(window))
        empty = weight.new_zeros(batch, room, self.n_kv_heads, self.head_dim).detach()
        docs = torch.zeros(batch, room, dtype=torch.int32, device=weight.device)
        return KVState(empty, empty.clone(), docs, 0, window)

    def forward(self, x: Tensor, state: KVState | None, ctx: Context) -> tuple[Tensor, KVState | None]:
        o = self.options
        x = x if o.in_multiplier == 1.0 else x * o.in_multiplier
        q, k, v = self.q_proj(x, ctx), self.k_proj(x, ctx), self.v_proj(x, ctx)
        k = k if o.key_multiplier == 1.0 else k * o.key_multiplier
        if o.qk_norm == "full":
            q, k = self.q_norm(q, ctx), self.k_norm(k, ctx)
        q = q.unflatten(-1, (self.n_heads, self.head_dim))
        k = k.unflatten(-1, (self.n_kv_heads, self.head_dim))
        v = v.unflatten(-1, (self.n_kv_heads, self.head_dim))
        if o.qk_norm in ("head", "layernorm"):
            q, k = self.q_norm(q, ctx), self.k_norm(k, ctx)
        if self.rotation is not None:
            q, k = self.rotation(q, k, ctx)
        docs = ctx.doc_ids
        if state is not None:
            # Without documents, all tokens are of document 1.
            mine = torch.ones(x.shape[:2], dtype=torch.int32, device=x.device) if docs is None else docs
            k, v, seen = state.append(k, v, mine)
            docs = None if docs is None else seen
        y = attention(
            q,
            k,
            v,
            scale=o.scale,
            window=o.window,
            softcap=o.softcap,
            alibi_slopes=self.slopes(ctx) if o.alibi else None,
            sinks=self.sinks,
            q_docs=ctx.doc_ids,
            k_docs=docs,
            dropout_p=o.dropout if self.training else 0.0,
            backend=ctx.backends.get("attention"),
        )
        if self.gate_proj is not None:
            # (b t h p) or (b t h 1)
            y = y * self.gate_proj(x, ctx).unflatten(-1, (self.n_heads, -1)).sigmoid()
        y = self.o_proj(y.flatten(-2), ctx)
        return (y if o.out_multiplier == 1.0 else y * o.out_multiplier), state

    def slopes(self, ctx: Context) -> Tensor:
        """ALiBi's slopes (h), made once per call."""
        device = ctx.positions.device
        return ctx.once(f"alibi {self.n_heads}", lambda: alibi_slopes(self.n_heads).to(device))

    def mixing_flops(self, context: int) -> float:
        # q k^T and weights v: two products of 2 head_dim operations per key and head.
        seen = min(context, self.options.window or context)
        return 4.0 * self.n_heads * self.head_dim * seen


class HeadNorm(Module):
    """Layer norm of each head, with weights of its own and no shift. Ba et al. 2016, arXiv:1607.06450."""

    def __init__(self, n_heads: int, head_dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.add("weight", (n_heads, head_dim), "norm", ones)

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        """x (b t h p) -> (b t h p)."""
        return F.layer_norm(x, x.shape[-1:], eps=self.eps) * self.weight.to(x.dtype)
