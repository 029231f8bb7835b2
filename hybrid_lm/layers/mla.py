"""Multi-head latent attention: keys and values of all heads from one short vector per token."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from hybrid_lm.config.base import Positive
from hybrid_lm.layers.base import Context, Layer, LayerOptions
from hybrid_lm.layers.memory import LatentState
from hybrid_lm.layers.parts import Linear, RMSNorm
from hybrid_lm.layers.rotary import RopeOptions, Rotation
from hybrid_lm.ops import attention


class MLA(Layer):
    """Attention whose keys and values come from a latent c per token. DeepSeek-AI 2024, arXiv:2405.04434,
    section 2.1 and appendix C.

    [c k_rope] = kv_a_proj(x); [k_nope v] = kv_b_proj(norm(c)), per head; [q_nope q_rope] = q_proj(x), per
    head, or q_b_proj(norm(q_a_proj(x))); scores [q_nope rope(q_rope)] . [k_nope rope(k_rope)], where all
    heads share k_rope. Remembered are norm(c) and rope(k_rope): kv_rank + rope_dim numbers per token.
    """

    class Options(LayerOptions):
        """Settings of multi-head latent attention; the defaults are the sizes of DeepSeek-V2-Lite."""

        n_heads: Positive = 16
        """Heads."""
        kv_rank: Positive = 512
        """Width of the latent that keys and values are made of."""
        q_rank: Positive | None = None
        """Width of the latent that queries are made of; null: they are made of x."""
        nope_dim: Positive = 128
        """Channels of a head's query and key without positions."""
        rope_dim: Positive = 64
        """Channels with positions; their key is shared by the heads."""
        v_dim: Positive = 128
        """Channels of a head's value."""
        rope: RopeOptions | None = RopeOptions(interleaved=True)
        """Rotary positions; null: none."""
        scale: Annotated[float, Field(gt=0.0)] | None = None
        """Factor on the scores; by default (nope_dim + rope_dim)^-1/2, times the square of yarn's
        0.1 mscale_all_dim log(factor) + 1 where rope has it."""
        norm_eps: Annotated[float, Field(gt=0.0)] = 1e-6
        """Added to the mean square by the norms of the latents."""
        bias: bool = False
        """Biases of the projections to the latents and of the output."""
        dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
        """Probability of dropping an attention weight, in training."""

        def usual_scale(self) -> float:
            """The factor on the scores that `scale: null` stands for."""
            plain = (self.nope_dim + self.rope_dim) ** -0.5
            scaling = self.rope.scaling if self.rope else None
            if scaling is None or scaling.rope_type != "yarn" or not scaling.mscale_all_dim:
                return plain
            longest = (self.rope.max_positions if self.rope else None) or 1
            factor = scaling.factor or longest / (scaling.original_max_position_embeddings or longest)
            stretch = 1.0 if factor <= 1 else 0.1 * scaling.mscale_all_dim * math.log(factor) + 1.0
            return plain * stretch * stretch

        def resolved(self, d_in: int) -> dict[str, Any]:
            usual = self.scale is None or math.isclose(self.scale, self.usual_scale(), rel_tol=1e-12)
            return self.model_dump() | {"scale": None if usual else self.scale}

        def check(self, d_in: int) -> Iterable[tuple[str, str]]:
            if self.rope is None:
                return
            if self.rope.fraction != 1.0:
                yield "rope.fraction", "rope_dim says how many channels have positions; leave it 1"
            elif self.rope_dim % 2:
                yield "rope_dim", f"channels are rotated in pairs, and {self.rope_dim} is odd"
            elif self.rope.scaling:
                for problem in self.rope.scaling.problems(self.rope_dim, self.rope.max_positions):
                    yield "rope.scaling", problem

    EXAMPLES = (
        {"n_heads": 4, "kv_rank": 12, "nope_dim": 8, "rope_dim": 4, "v_dim": 6},
        {
            "n_heads": 3, "kv_rank": 10, "q_rank": 14, "nope_dim": 6, "rope_dim": 8, "v_dim": 8,
            "rope": {"theta": 500.0, "interleaved": False}, "norm_eps": 1e-2, "bias": True, "scale": 0.3,
        },
        {"n_heads": 2, "kv_rank": 40, "nope_dim": 8, "rope_dim": 3, "v_dim": 8, "rope": None},
        {
            "n_heads": 2, "kv_rank": 9, "nope_dim": 8, "rope_dim": 4, "v_dim": 8,
            "rope": {
                "scaling": {"rope_type": "yarn", "factor": 4.0, "mscale": 0.7, "mscale_all_dim": 0.9},
                "max_positions": 20,
            },
        },
    )  # fmt: skip

    def __init__(self, d_in: int, options: Options, *, d_out: int | None = None, parts=None):
        super().__init__(d_in, options, d_out=d_out)
        o, h, width = options, options.n_heads, options.nope_dim + options.rope_dim
        self.n_heads, self.kv_rank, self.dropout = h, o.kv_rank, o.dropout
        self.nope_dim, self.rope_dim, self.v_dim = o.nope_dim, o.rope_dim, o.v_dim
        self.scale = o.usual_scale() if o.scale is None else o.scale
        self.rotation = Rotation(o.rope, o.rope_dim) if o.rope else None
        self.q_proj: Any = None
        if o.q_rank is None:
            self.q_proj = Linear(d_in, h * width)
        else:
            self.q_a_proj = Linear(d_in, o.q_rank, bias=o.bias)
            self.q_a_norm = RMSNorm(o.q_rank, eps=o.norm_eps)
            self.q_b_proj = Linear(o.q_rank, h * width)
        self.kv_a_proj = Linear(d_in, o.kv_rank + o.rope_dim, bias=o.bias)
        self.kv_a_norm = RMSNorm(o.kv_rank, eps=o.norm_eps)
        self.kv_b_proj = Linear(o.kv_rank, h * (o.nope_dim + o.v_dim))
        self.o_proj = Linear(h * o.v_dim, self.d_out, bias=o.bias, kind="output")

    def empty_state(self, batch: int, *, max_tokens: int | None = None) -> LatentState:
        weight, room = self.kv_a_proj.weight, max_tokens or 0
        latent = weight.new_zeros(batch, room, self.kv_rank + self.rope_dim).detach()
        docs = torch.zeros(batch, room, dtype=torch.int32, device=weight.device)
        return LatentState(latent, docs, 0, 0)

    def forward(
        self, x: Tensor, state: LatentState | None, ctx: Context
    ) -> tuple[Tensor, LatentState | None]:
        if self.q_proj is None:
            q = self.q_b_proj(self.q_a_norm(self.q_a_proj(x, ctx), ctx), ctx)
        else:
            q = self.q_proj(x, ctx)
        q, q_rope = q.unflatten(-1, (self.n_heads, -1)).split([self.nope_dim, self.rope_dim], -1)
        c, k_rope = self.kv_a_proj(x, ctx).split([self.kv_rank, self.rope_dim], -1)
        if self.rotation is not None:
            q_rope, k_rope = self.rotation(q_rope, k_rope.unsqueeze(2), ctx)
            k_rope = k_rope.squeeze(2)
        latent, docs = torch.cat((self.kv_a_norm(c, ctx), k_rope), -1), ctx.doc_ids
        if state is not None:
            # Without documents, all tokens are of document 1.
            mine = torch.ones(x.shape[:2], dtype=torch.int32, device=x.device) if docs is None else docs
            latent, seen = state.append(latent, mine)
            docs = None if docs is None else seen
        # For one query it costs less to work in the width of the latents than to make keys and values of all
        # of them. An adapter around the matrix (LoRA) is not in its weight, and a weight that is fetched when
        # its module is called (accelerate's offloading) is not there.
        absorbs = x.shape[1] == 1 and type(self.kv_b_proj) is Linear and not self.kv_b_proj.weight.is_meta
        look = self.absorbed if absorbs else self.expanded
        y = look(q, q_rope, latent, docs, ctx)
        return self.o_proj(y.flatten(-2), ctx), state

    def expanded(
        self, q: Tensor, q_rope: Tensor, latent: Tensor, docs: Tensor | None, ctx: Context
    ) -> Tensor:
        """Attention (b t h v_dim) to keys and values made of the latents (b s kv_rank + rope_dim)."""
        c, k_rope = latent.split([self.kv_rank, self.rope_dim], -1)
        made = self.kv_b_proj(c, ctx).unflatten(-1, (self.n_heads, -1))
        k, v = made.split([self.nope_dim, self.v_dim], -1)
        k = torch.cat((k, k_rope.unsqueeze(2).expand(-1, -1, self.n_heads, -1)), -1)
        return self.attend(torch.cat((q, q_rope), -1), k, v, docs, ctx)

    def absorbed(
        self, q: Tensor, q_rope: Tensor, latent: Tensor, docs: Tensor | None, ctx: Context
    ) -> Tensor:
        """The same with kv_b_proj moved to the queries and to the average: the latents are the one key, and
        their first part the one value, of all heads (appendix C of the paper)."""
        to_k, to_v = self.kv_b_proj.weight.unflatten(0, (self.n_heads, -1)).split(
            [self.nope_dim, self.v_dim], 1
        )
        q = torch.einsum("bthn,hnr->bthr", q, to_k)
        # To average all of a latent and cut off what is no value costs less than a copy of the part that is.
        k = latent.unsqueeze(2)
        y = self.attend(torch.cat((q, q_rope), -1), k, k, docs, ctx)[..., : self.kv_rank]
        return torch.einsum("bthr,hvr->bthv", y, to_v)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, docs: Tensor | None, ctx: Context) -> Tensor:
        """softmax(scale q k^T) v over the tokens of one document."""
        return attention(
            q,
            k,
            v,
            scale=self.scale,
            q_docs=ctx.doc_ids,
            k_docs=docs,
            dropout_p=self.dropout if self.training else 0.0,
            backend=ctx.backends.get("attention"),
        )

    def mixing_flops(self, context: int) -> float:
        # q k^T and weights v: two operations per channel, key and head.
        return 2.0 * self.n_heads * (self.nope_dim + self.rope_dim + self.v_dim) * context
