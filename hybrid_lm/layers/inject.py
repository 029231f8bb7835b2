"""Zamba's way of using a shared Transformer block: its output goes into the input of a Mamba layer only."""

from __future__ import annotations

import torch
from torch import Tensor

from hybrid_lm.config.base import PartPattern
from hybrid_lm.layers.base import Context, Layer, LayerList, LayerOptions, Parts, StateList


class Inject(Layer):
    """into(x + block([x, embeddings])). Glorioso et al. 2024, arXiv:2405.16712, section 2; Zamba2,
    arXiv:2411.15242.

    `block` reads the stream beside the embeddings (width 2 d) and has no residual of its own; the stream that
    goes on is x.
    """

    class Options(LayerOptions):
        """Settings of an injection."""

        block: PartPattern
        """Recipes applied one after another to [x, embeddings], each with its own norms; usually shared: `"sa
        sf"`."""
        into: PartPattern
        """The recipe that reads x plus the block's output."""

    EXAMPLES = (
        {
            "block": "sa sf",
            "into": "m",
            "recipes": {
                "sa": {
                    "type": "attention",
                    "n_heads": 4,
                    "head_dim": 16,
                    "share": {"copies": 2},
                    "per_call": {"lora": {"rank": 2, "on": ["q_proj", "v_proj"]}},
                },
                "sf": {
                    "type": "mlp",
                    "d_ff": 40,
                    "act": "gelu",
                    "share": {"copies": 2, "norms": True},
                    "per_call": {"lora": {"rank": 3, "on": ["gate_proj+up_proj"]}, "out_proj": True},
                },
                "m": {"type": "mamba2", "d_state": 8, "head_dim": 16, "chunk": 8},
            },
        },
    )
    reads_raw = True

    def __init__(self, d_in: int, options: Options, *, d_out: int | None = None, parts: Parts | None = None):
        super().__init__(d_in, options, d_out=d_out)
        assert parts is not None
        self.block, self.into = LayerList(parts["block"]), LayerList(parts["into"])

    @classmethod
    def part_width(cls, key: str, index: int, d_in: int) -> int:
        return 2 * d_in if key == "block" and index == 0 else d_in

    def empty_state(self, batch: int, *, max_tokens: int | None = None) -> StateList:
        return StateList(
            [part.empty_state(batch, max_tokens=max_tokens) for part in [*self.block, *self.into]]
        )

    def forward(self, x: Tensor, state: StateList | None, ctx: Context) -> tuple[Tensor, StateList | None]:
        assert ctx.embeddings is not None
        states = [None] * (len(self.block) + len(self.into)) if state is None else state.items
        y, after = torch.cat([x, ctx.embeddings], -1), []
        for i, part in enumerate([*self.block, *self.into]):
            if i == len(self.block):
                y = x + y
            y, item = part(y, states[i], ctx)
            after.append(item)
        return y, None if state is None else StateList(after)

    def mixing_flops(self, context: int) -> float:
        return sum(part.mixing_flops(context) for part in [*self.block, *self.into])
