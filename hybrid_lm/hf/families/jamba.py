"""Jamba: Mamba with an attention layer now and then, an MLP or a mixture of experts behind each. Lieber et
al. 2024, arXiv:2403.19887.

Which layers are attention, and which have experts, is said there by a period and an offset: other orders have
no words in this class.
"""

from collections.abc import Sequence
from typing import Any

from hybrid_lm.hf.families.bamba import ATTENTION_ROWS, ENDS, HEADS, MLP_ROWS, with_attention
from hybrid_lm.hf.family import Family
from hybrid_lm.hf.fields import Agrees, Derived, Either, Must, Same, Whole
from hybrid_lm.hf.layouts import Layout, block
from hybrid_lm.hf.options import Block, ConversionError, Fields
from hybrid_lm.hf.weights import DEPTHWISE, GATE_UP_STACKED, STACKED, linear, row


class Periodic(Layout):
    """A period and an offset for attention, and for experts."""

    theirs = (
        *("attn_layer_period", "attn_layer_offset", "expert_layer_period", "expert_layer_offset"),
        *("num_experts", "num_hidden_layers"),
    )
    blocks = tuple(block(f"{mixer} {rest}") for mixer in ("mamba", "attention") for rest in ("mlp", "moe"))

    def read(self, fields: Fields) -> list[Block]:
        def at(i: int, kind: str) -> bool:
            return i % fields[f"{kind}_layer_period"] == fields[f"{kind}_layer_offset"]

        experts = fields["num_experts"] > 1
        return with_attention(
            self.blocks[2 * at(i, "attn") + (experts and at(i, "expert"))]
            for i in range(fields["num_hidden_layers"])
        )

    def write(self, blocks: Sequence[Block], fields: dict[str, Any]) -> None:
        kinds = [self.blocks.index(what) for what in with_attention(blocks)]
        fields["attn_layer_period"], fields["attn_layer_offset"] = period(
            "attention", [i for i, kind in enumerate(kinds) if kind >= 2], len(kinds)
        )
        experts = [i for i, kind in enumerate(kinds) if kind % 2]
        fields["num_experts"] = 1
        if experts:
            fields["expert_layer_period"], fields["expert_layer_offset"] = period(
                "experts", experts, len(kinds)
            )
        fields["num_hidden_layers"] = len(kinds)


def period(what: str, there: Sequence[int], n: int) -> tuple[int, int]:
    """Period and offset of these numbers of `n`. Raises ConversionError if they have none."""
    every = there[1] - there[0] if len(there) > 1 else n
    if list(there) != list(range(there[0], n, every)) or there[0] >= every:
        raise ConversionError(
            f"{what} in the layers {', '.join(map(str, there))}: it has one in every so many"
        )
    return every, there[0]


FAMILY = Family(
    name="jamba",
    class_name="JambaForCausalLM",
    layout=Periodic(),
    rules=(
        Same("vocab_size", "vocab_size"),
        Same("hidden_size", "d_model"),
        Either("intermediate_size", "mlp.d_ff", "moe.d_ff"),
        Same("num_experts", "moe.n_experts"),
        Same("num_experts_per_tok", "moe.top_k"),
        Same("rms_norm_eps", "block.eps", "mamba.inner_norm_eps"),
        Same("tie_word_embeddings", "embedding.tied"),
        *HEADS,
        Same("mamba_d_state", "mamba.d_state"),
        Same("mamba_d_conv", "mamba.d_conv"),
        Same("mamba_dt_rank", "mamba.dt_rank"),
        Same("mamba_conv_bias", "mamba.conv_bias"),
        Same("mamba_proj_bias", "mamba.bias"),
        Derived("mamba.d_inner", lambda f: f["mamba_expand"] * f["hidden_size"]),
        Whole("mamba_expand", lambda ours: ours["mamba.d_inner"] / ours["d_model"]),
        # The activation of the convolution and of the experts too.
        Must("hidden_act", "silu", "swish"),
        Agrees("mamba_inner_layernorms", lambda f: True),
    ),
    fixed={"mamba.inner_norm": "weighted", "moe.renormalise": False},
    # There are no positions; the rest is about kernels, the loss in training, and generating.
    ignored=frozenset(
        [
            "calc_logits_for_entire_prompt",
            "max_position_embeddings",
            "n_ctx",
            "num_logits_to_keep",
            "output_router_logits",
            "router_aux_loss_coef",
            "use_associative_scan",
            "use_mamba_kernels",
            "use_mambapy",
        ]
    ),
    rows=(
        *ENDS,
        row("model.layers.#.input_layernorm.weight", "mamba:pre_norm.weight"),
        row("model.layers.#.input_layernorm.weight", "attention:pre_norm.weight"),
        *linear("model.layers.#.mamba.in_proj", "mamba:layer.in_proj"),
        row("model.layers.#.mamba.conv1d.weight", "mamba:layer.conv_weight", how=DEPTHWISE),
        row("model.layers.#.mamba.conv1d.bias", "mamba:layer.conv_bias"),
        row("model.layers.#.mamba.x_proj.weight", "mamba:layer.x_proj.weight"),
        row("model.layers.#.mamba.dt_layernorm.weight", "mamba:layer.dt_norm.weight"),
        row("model.layers.#.mamba.b_layernorm.weight", "mamba:layer.B_norm.weight"),
        row("model.layers.#.mamba.c_layernorm.weight", "mamba:layer.C_norm.weight"),
        row("model.layers.#.mamba.dt_proj.weight", "mamba:layer.dt_proj.weight"),
        row("model.layers.#.mamba.dt_proj.bias", "mamba:layer.dt_bias"),
        row("model.layers.#.mamba.A_log", "mamba:layer.A_log"),
        row("model.layers.#.mamba.D", "mamba:layer.D"),
        *linear("model.layers.#.mamba.out_proj", "mamba:layer.out_proj"),
        *ATTENTION_ROWS,
        *MLP_ROWS,
        row("model.layers.#.pre_ff_layernorm.weight", "moe:pre_norm.weight"),
        row("model.layers.#.feed_forward.router.weight", "moe:layer.router.weight"),
        row(
            (
                "model.layers.#.feed_forward.experts.@.gate_proj.weight",
                "model.layers.#.feed_forward.experts.@.up_proj.weight",
            ),
            "moe:layer.experts.gate_up",
            how=GATE_UP_STACKED,
        ),
        row("model.layers.#.feed_forward.experts.@.down_proj.weight", "moe:layer.experts.down", how=STACKED),
    ),
)
