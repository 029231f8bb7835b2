"""Granite 4: Mamba-2 or attention, then an MLP that may stand beside a mixture of experts, with Granite's
factors. IBM 2025; the class is `GraniteMoeHybridForCausalLM` of transformers."""

from collections.abc import Sequence
from typing import Any

from hybrid_lm.hf.attention_rules import Rope, ScaleOf
from hybrid_lm.hf.families.bamba import (
    ATTENTION_ROWS,
    HEADS,
    MAMBA2,
    MAMBA2_ROWS,
    clamps,
    with_attention,
)
from hybrid_lm.hf.families.llama import ENDS
from hybrid_lm.hf.family import Family
from hybrid_lm.hf.fields import Agrees, Inverse, Must, Same, Unused, Whole
from hybrid_lm.hf.layouts import Layout, block
from hybrid_lm.hf.options import Block, ConversionError, Fields, Options
from hybrid_lm.hf.weights import fused, row

KINDS = {"linear_attention": "mamba2", "full_attention": "attention"}


class Mixed(Layout):
    """`layer_types`, and experts in all layers or in none."""

    theirs = ("layer_types", "num_hidden_layers", "num_local_experts")
    blocks = tuple(block(f"{kind} {rest}") for rest in ("mlp", "mlp+moe") for kind in KINDS.values())

    def read(self, fields: Fields) -> list[Block]:
        rest, kinds = "mlp+moe" if fields["num_local_experts"] else "mlp", fields["layer_types"]
        if len(kinds) != fields["num_hidden_layers"]:
            raise ConversionError(
                f"layer_types has {len(kinds)} entries for {fields['num_hidden_layers']} layers"
            )
        for kind in kinds:
            if kind not in KINDS:
                raise ConversionError(f"layer_types: {kind!r}: only {', '.join(KINDS)}")
        return with_attention(block(f"{KINDS[kind]} {rest}") for kind in kinds)

    def write(self, blocks: Sequence[Block], fields: dict[str, Any]) -> None:
        names = {what: name for name, what in KINDS.items()}
        fields["layer_types"] = [names[mixer] for ((mixer,), _) in with_attention(blocks)]
        fields["num_hidden_layers"] = len(blocks)
        with_experts = [i for i, (_, rest) in enumerate(blocks) if "moe" in rest]
        if len(with_experts) not in (0, len(blocks)):
            raise ConversionError(
                f"experts in {len(with_experts)} of {len(blocks)} layers, it has all or none"
            )
        fields["num_local_experts"] = int(bool(with_experts))


class RopeOrNone(Rope):
    """Rotary positions if `position_embedding_type` says so, otherwise none."""

    theirs = (*Rope.theirs, "position_embedding_type")

    def read(self, fields: Fields, ours: Options) -> None:
        kind = fields.get("position_embedding_type")
        if kind not in (None, "nope", "rope"):
            raise ConversionError(f"position_embedding_type = {kind!r}: only null, nope, rope")
        if kind == "rope":
            super().read(fields, ours)
        else:
            ours["attention.rope"] = None

    def write(self, ours: Options, fields: dict[str, Any]) -> None:
        if ours["attention.rope"] is None:
            fields["position_embedding_type"] = None
        else:
            fields["position_embedding_type"] = "rope"
            super().write(ours, fields)


FAMILY = Family(
    name="granitemoehybrid",
    class_name="GraniteMoeHybridForCausalLM",
    layout=Mixed(),
    rules=(
        Same("vocab_size", "vocab_size"),
        Same("hidden_size", "d_model"),
        Same("shared_intermediate_size", "mlp.d_ff"),
        Same("intermediate_size", "moe.d_ff"),
        Same("num_local_experts", "moe.n_experts"),
        Same("num_experts_per_tok", "moe.top_k"),
        Same("rms_norm_eps", "block.eps", "mamba2.norm_eps"),
        Same("tie_word_embeddings", "embedding.tied"),
        *HEADS,
        Same("attention_bias", "attention.qkv_bias", "attention.out_bias"),
        ScaleOf("attention_multiplier", 1.0),
        RopeOrNone(),
        *MAMBA2,
        Same("mamba_proj_bias", "mamba2.bias"),
        Whole("mamba_expand", lambda ours: ours["mamba2.d_inner"] / ours["d_model"]),
        Unused("mamba2", mamba_n_heads=1),
        Same("embedding_multiplier", "embedding.multiplier"),
        Same("residual_multiplier", "block.residual_multiplier"),
        Inverse("logits_scaling", "head.multiplier"),
        # The activation of the convolution and of the experts too.
        Must("hidden_act", "silu", "swish"),
        Agrees("normalization_function", lambda f: "rmsnorm"),
    ),
    fixed={"moe.router": "topk_softmax"},
    # About the loss in training, and where it starts.
    ignored=frozenset(["init_method", "output_router_logits", "router_aux_loss_coef"]),
    rows=(
        *ENDS,
        row("model.layers.#.input_layernorm.weight", "mamba2:pre_norm.weight"),
        row("model.layers.#.input_layernorm.weight", "attention:pre_norm.weight"),
        *MAMBA2_ROWS,
        *ATTENTION_ROWS,
        row("model.layers.#.post_attention_layernorm.weight", "mlp:pre_norm.weight"),
        *fused("model.layers.#.shared_mlp.input_linear", "mlp:layer.gate_proj", "mlp:layer.up_proj"),
        row("model.layers.#.shared_mlp.output_linear.weight", "mlp:layer.down_proj.weight"),
        row("model.layers.#.block_sparse_moe.router.layer.weight", "moe:layer.router.weight"),
        row("model.layers.#.block_sparse_moe.input_linear.weight", "moe:layer.experts.gate_up"),
        row("model.layers.#.block_sparse_moe.output_linear.weight", "moe:layer.experts.down"),
    ),
    cached_differs=clamps,
)
