"""Softmax attention: full, grouped or single keys, windows, positions, norms and caps, all as options of one
layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from hybrid_lm.config.base import Config, Positive
from hybrid_lm.layers.base import Context, Layer, LayerOptions, State
from hybrid_lm.layers.parts import Linear, RMSNorm
from hybrid_lm.ops import alibi_slopes, apply_rope, attention, rope_table

SLACK = 64
"""Tokens that a windowed memory has room for beyond its window, so that it is moved once in 64 steps and not
in each."""


@dataclass
class KVState(State):
    """Keys, values (b s h p) and document numbers (b s) of the tokens that can still be seen.

    The tensors may be longer than `length`: the rest is room to grow.
    """

    k: Tensor
    v: Tensor
    docs: Tensor
    length: int
    window: int
    """0: all tokens can be seen."""

    def tensors(self, prefix: str = "") -> dict[str, Tensor]:
        return {name: x[:, : self.length] for name, x in super().tensors(prefix).items()}

    def map(self, fn: Callable[[str, Tensor | None], Tensor | None], prefix: str = "") -> KVState:
        return super().map(lambda name, x: fn(name, None if x is None else x[:, : self.length]), prefix)

    def append(self, k: Tensor, v: Tensor, docs: Tensor) -> tuple[Tensor, ...]:
        """Remembers t more tokens; returns keys, values and documents of all that they may look at, oldest
        first."""
        new, t = (k, v, docs), k.shape[1]
        keep = min(self.length, self.window - 1) if self.window else self.length
        # In place would change what the graph of earlier tokens has saved; and what is long is not copied
        # into room.
        in_graph = torch.is_grad_enabled() and (k.requires_grad or self.k.requires_grad)
        if in_graph or (self.window and t > SLACK):
            seen = [torch.cat([a, x], 1) for a, x in zip(self._last(keep), new, strict=True)]
            self.length = min(self.window - 1, keep + t) if self.window else keep + t
            room = SLACK if self.window and not in_graph else 0
            self._hold([_room(x[:, keep + t - self.length :], room) for x in seen])
            return tuple(seen)
        if self.length + t > self.k.shape[1]:
            room = SLACK if self.window else max(t, self.length)
            self._hold([_room(a, room) for a in self._last(keep)])
            self.length = keep
        buffers, end = (self.k, self.v, self.docs), self.length + t
        for buffer, x in zip(buffers, new, strict=True):
            buffer[:, self.length : end] = x
        self.length = end
        return tuple(buffer[:, :end] for buffer in buffers)

    def _last(self, n: int) -> tuple[Tensor, ...]:
        return tuple(x[:, self.length - n : self.length] for x in (self.k, self.v, self.docs))

    def _hold(self, tensors: Sequence[Tensor]) -> None:
        self.k, self.v, self.docs = tensors


def _room(x: Tensor, more: int) -> Tensor:
    """x (b s ...) with room for `more` tokens behind it."""
    if not more:
        return x
    grown = x.new_zeros(x.shape[0], x.shape[1] + more, *x.shape[2:])
    grown[:, : x.shape[1]] = x
    return grown


class RopeOptions(Config):
    """Rotary positions. Su et al. 2021, arXiv:2104.09864."""

    theta: Annotated[float, Field(gt=0.0)] = 10000.0
    """Base of the wavelengths."""
    fraction: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Part of each head that is rotated."""
    interleaved: bool = False
    """Rotate neighbouring pairs (GPT-J) instead of the two halves (NeoX)."""
    scaling: dict[str, Any] | None = None
    """Length scaling as in a Hugging Face config: `{rope_type: llama3, factor: 8.0, ...}`."""
    max_positions: Positive | None = None
    """Length trained on, for the scaling types that need it."""


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
        qk_norm: Literal["none", "head", "full"] = "none"
        """RMS norm of queries and keys, before rope: per head (Qwen3) or over all heads (OLMo-2)."""
        qk_norm_eps: Annotated[float, Field(gt=0.0)] = 1e-5
        qk_norm_unit_offset: bool = False
        """Scale by (1 + w) (Gemma-3)."""
        softcap: Annotated[float, Field(gt=0.0)] | None = None
        """Scores become softcap * tanh(scores / softcap) (Gemma-2)."""
        scale: Annotated[float, Field(gt=0.0)] | None = None
        """Factor on the scores; by default head_dim^-1/2."""
        qkv_bias: bool = False
        out_bias: bool = False
        dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
        """Probability of dropping an attention weight, in training."""

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
    )

    def __init__(self, d_in: int, options: Options, *, d_out: int | None = None, parts=None):
        super().__init__(d_in, options, d_out=d_out)
        self.n_heads, self.n_kv_heads = options.n_heads, options.n_kv_heads or options.n_heads
        self.head_dim = options.head_dim or d_in // options.n_heads
        self.options = options
        q, kv, bias = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim, options.qkv_bias
        self.q_proj = Linear(d_in, q, bias=bias)
        self.k_proj = Linear(d_in, kv, bias=bias)
        self.v_proj = Linear(d_in, kv, bias=bias)
        self.o_proj = Linear(q, self.d_out, bias=options.out_bias, kind="output")
        self.q_norm: Any = None
        self.k_norm: Any = None
        if options.qk_norm != "none":
            how = {"eps": options.qk_norm_eps, "unit_offset": options.qk_norm_unit_offset}
            whole = options.qk_norm == "full"
            self.q_norm = RMSNorm(q if whole else self.head_dim, **how)
            self.k_norm = RMSNorm(kv if whole else self.head_dim, **how)

    def empty_state(self, batch: int, *, max_tokens: int | None = None) -> KVState:
        weight, window = self.k_proj.weight, self.options.window or 0
        room = max_tokens or 0
        if window:
            room = min(room, window - 1 + SLACK)
        empty = weight.new_zeros(batch, room, self.n_kv_heads, self.head_dim).detach()
        docs = torch.zeros(batch, room, dtype=torch.int32, device=weight.device)
        return KVState(empty, empty.clone(), docs, 0, window)

    def forward(self, x: Tensor, state: KVState | None, ctx: Context) -> tuple[Tensor, KVState | None]:
        o = self.options
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if o.qk_norm == "full":
            q, k = self.q_norm(q), self.k_norm(k)
        q = q.unflatten(-1, (self.n_heads, self.head_dim))
        k = k.unflatten(-1, (self.n_kv_heads, self.head_dim))
        v = v.unflatten(-1, (self.n_kv_heads, self.head_dim))
        if o.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        if o.rope:
            q, k = rotate(q, k, o.rope, ctx)
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
            alibi_slopes=alibi_slopes(self.n_heads).to(q.device) if o.alibi else None,
            q_docs=ctx.doc_ids,
            k_docs=docs,
            dropout_p=o.dropout if self.training else 0.0,
            backend=ctx.backends.get("attention"),
        )
        return self.o_proj(y.flatten(-2)), state

    def mixing_flops(self, context: int) -> float:
        # q k^T and weights v: two products of 2 head_dim operations per key and head.
        seen = min(context, self.options.window or context)
        return 4.0 * self.n_heads * self.head_dim * seen


def rotate(q: Tensor, k: Tensor, rope: RopeOptions, ctx: Context) -> tuple[Tensor, Tensor]:
    """Rotates the first part of each head of q and k (b t h p) by its token's position."""
    d = round(rope.fraction * q.shape[-1])
    settings = {"theta": rope.theta, "scaling": rope.scaling, "max_positions": rope.max_positions}
    cos, sin = ctx.once(f"rope {d} {settings}", lambda: rope_table(ctx.positions, d, **settings))
    how = {"interleaved": rope.interleaved}
    return apply_rope(q, cos, sin, **how), apply_rope(k, cos, sin, **how)
