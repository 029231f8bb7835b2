"""Qwen3-Next: Gated DeltaNet, gated attention in every fourth layer, and a mixture of experts behind each.
The class is `Qwen3NextForCausalLM` of transformers."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hybrid_lm.hf.attention_rules import Rope
from hybrid_lm.hf.families.bamba import with_attention
from hybrid_lm.hf.families.llama import ENDS, MLP
from hybrid_lm.hf.families.mixtral import IGNORED
from hybrid_lm.hf.families.qwen3_5_text import ATTENTION, DELTA, FIXED, NORMS, ROUGH, SIZES
from hybrid_lm.hf.family import Family
from hybrid_lm.hf.fields import Same
from hybrid_lm.hf.layouts import Layout, block
from hybrid_lm.hf.options import Block, ConversionError, Fields, listed
from hybrid_lm.hf.weights import GATE_UP_STACKED, STACKED, Transform, Values, row

MIXERS = {"linear_attention": "gated_deltanet", "full_attention": "attention"}


class Sparse(Layout):
    """`layer_types`, and a mixture of experts in each `decoder_sparse_step`-th layer but for those named."""

    blocks = tuple(block(f"{mixer} {ff}") for mixer in MIXERS.values() for ff in ("moe", "mlp"))
    theirs = ("num_hidden_layers", "layer_types", "mlp_only_layers", "decoder_sparse_step")

    def read(self, fields: Fields) -> list[Block]:
        kinds, step = fields["layer_types"], fields["decoder_sparse_step"]
        if len(kinds) != fields["num_hidden_layers"]:
            raise ConversionError(
                f"layer_types has {len(kinds)} entries for {fields['num_hidden_layers']} layers"
            )
        for kind in kinds:
            if kind not in MIXERS:
                raise ConversionError(f"layer_types: {kind!r}: only {listed(MIXERS)}")
        experts = [
            fields["num_experts"] > 0 and i not in fields["mlp_only_layers"] and (i + 1) % step == 0
            for i in range(len(kinds))
        ]
        return with_attention(
            block(f"{MIXERS[kind]} {'moe' if sparse else 'mlp'}")
            for kind, sparse in zip(kinds, experts, strict=True)
        )

    def write(self, blocks: Sequence[Block], fields: dict[str, Any]) -> None:
        with_attention(blocks)
        names = {mixer: kind for kind, mixer in MIXERS.items()}
        fields["num_hidden_layers"] = len(blocks)
        fields["layer_types"] = [names[mixer] for (mixer,), _ in blocks]
        fields["mlp_only_layers"] = [i for i, (_, ff) in enumerate(blocks) if ff == ("mlp",)]
        fields["decoder_sparse_step"] = 1


def _apart(theirs: Sequence[Tensor], shapes: Sequence[torch.Size], o: Values) -> list[Tensor]:
    heads = o["gated_deltanet.n_heads"]
    parts = theirs[0].unflatten(0, (heads, -1)).split([shape[0] // heads for shape in shapes], 1)
    return [part.flatten(0, 1) for part in parts]


def _together(ours: Sequence[Tensor], o: Values) -> list[Tensor]:
    heads = o["gated_deltanet.n_heads"]
    return [torch.cat([x.unflatten(0, (heads, -1)) for x in ours], 1).flatten(0, 1)]


BY_KEY_HEAD = Transform("by_key_head", _apart, _together)
"""The rows of all matrices that belong to a head of keys and its heads of values, then those of the next."""

FAMILY = Family(
    name="qwen3_next",
    class_name="Qwen3NextForCausalLM",
    layout=Sparse(),
    rules=(
        *SIZES,
        Rope(partial=True),
        Same("num_experts", "moe.n_experts"),
        Same("num_experts_per_tok", "moe.top_k"),
        Same("moe_intermediate_size", "moe.d_ff"),
        Same("shared_expert_intermediate_size", "moe.d_shared"),
        Same("norm_topk_prob", "moe.renormalise"),
    ),
    fixed={**FIXED, "moe.shared_gate": True},
    # The class has no windows.
    ignored=IGNORED | {"use_sliding_window"},
    rows=(
        *ENDS,
        *NORMS,
        *ATTENTION,
        row(
            "model.layers.#.linear_attn.in_proj_qkvz.weight",
            *(f"gated_deltanet:layer.{x}_proj.weight" for x in "qkvz"),
            how=BY_KEY_HEAD,
        ),
        row(
            "model.layers.#.linear_attn.in_proj_ba.weight",
            *(f"gated_deltanet:layer.{x}_proj.weight" for x in "ba"),
            how=BY_KEY_HEAD,
        ),
        *DELTA,
        *MLP,
        row("model.layers.#.mlp.gate.weight", "moe:layer.router.weight"),
        row(
            [f"model.layers.#.mlp.experts.@.{x}_proj.weight" for x in ("gate", "up")],
            "moe:layer.experts.gate_up",
            how=GATE_UP_STACKED,
        ),
        row("model.layers.#.mlp.experts.@.down_proj.weight", "moe:layer.experts.down", how=STACKED),
        *(
            row(f"model.layers.#.mlp.shared_expert.{x}_proj.weight", f"moe:layer.shared.{x}_proj.weight")
            for x in ("gate", "up", "down")
        ),
        row("model.layers.#.mlp.shared_expert_gate.weight", "moe:layer.shared_gate.weight"),
    ),
    tolerance=ROUGH,
    unread=("mtp.",),
)
