"""LFM2: gated short convolutions with a few attention layers, an MLP behind each. Liquid AI 2025,
arXiv:2511.23404; the class is `Lfm2ForCausalLM` of transformers."""

from collections.abc import Sequence
from typing import Any

from hybrid_lm.hf.attention_rules import Rope
from hybrid_lm.hf.families.bamba import with_attention
from hybrid_lm.hf.families.llama import head_dim
from hybrid_lm.hf.family import Family
from hybrid_lm.hf.fields import Agrees, Rule, Same
from hybrid_lm.hf.layouts import Listed
from hybrid_lm.hf.options import Block, Fields, Options
from hybrid_lm.hf.weights import DEPTHWISE, linear, row


class Kinds(Listed):
    """`layer_types`, of which one at least is attention."""

    def __init__(self) -> None:
        super().__init__("layer_types", {"conv": "short_conv mlp", "full_attention": "attention mlp"})

    def read(self, fields: Fields) -> list[Block]:
        return with_attention(super().read(fields))

    def write(self, blocks: Sequence[Block], fields: dict[str, Any]) -> None:
        super().write(with_attention(blocks), fields)


class Width(Rule):
    """The MLP's width: two thirds of `intermediate_size`, times a factor and rounded up, or that itself.

    Itself is what is written: every width can be said so.
    """

    theirs = (
        "intermediate_size",
        "block_auto_adjust_ff_dim",
        "block_ffn_dim_multiplier",
        "block_multiple_of",
    )

    def read(self, fields: Fields, ours: Options) -> None:
        width, adjusted, factor, step = (fields[name] for name in self.theirs)
        if adjusted:
            width = -(-int(factor * int(2 * width / 3)) // step) * step
        ours["mlp.d_ff"] = width

    def write(self, ours: Options, fields: dict[str, Any]) -> None:
        fields["intermediate_size"], fields["block_auto_adjust_ff_dim"] = ours["mlp.d_ff"], False


def attention_layers(fields: Fields) -> list[int]:
    """The numbers of the attention layers."""
    return [i for i, kind in enumerate(fields["layer_types"]) if kind == "full_attention"]


FAMILY = Family(
    name="lfm2",
    class_name="Lfm2ForCausalLM",
    layout=Kinds(),
    rules=(
        Same("vocab_size", "vocab_size"),
        Same("hidden_size", "d_model"),
        Width(),
        Same("num_attention_heads", "attention.n_heads"),
        Same("num_key_value_heads", "attention.n_kv_heads"),
        # No field of the class, and read by it all the same.
        Same("head_dim", "attention.head_dim", default=head_dim),
        Same("norm_eps", "block.eps", "attention.qk_norm_eps"),
        Same("conv_L_cache", "short_conv.width"),
        Same("conv_bias", "short_conv.bias"),
        Same("tie_word_embeddings", "embedding.tied"),
        Rope(),
        # What the published files say besides, and the class does not read.
        Agrees("full_attn_idxs", attention_layers),
        Agrees("num_heads", lambda f: f["num_attention_heads"]),
        *(Agrees(name, lambda f: f["hidden_size"]) for name in ("block_dim", "conv_dim", "conv_dim_out")),
        Agrees("block_norm_eps", lambda f: f["norm_eps"]),
        Agrees("theta", lambda f: f["rope_parameters"]["rope_theta"]),
        *(Agrees(name, lambda f: True) for name in ("block_use_swiglu", "use_pos_enc")),
    ),
    fixed={"attention.qk_norm": "head"},
    # Names, and starting values.
    ignored=frozenset(
        [
            "model_name",
            "block_mlp_init_scale",
            "block_out_init_scale",
            "block_use_xavier_init",
            "conv_use_xavier_init",
        ]
    ),
    rows=(
        row("model.embed_tokens.weight", "embed.weight"),
        row("model.layers.#.operator_norm.weight", "short_conv:pre_norm.weight"),
        *linear("model.layers.#.conv.in_proj", "short_conv:layer.in_proj"),
        row("model.layers.#.conv.conv.weight", "short_conv:layer.conv_weight", how=DEPTHWISE),
        row("model.layers.#.conv.conv.bias", "short_conv:layer.conv_bias"),
        *linear("model.layers.#.conv.out_proj", "short_conv:layer.out_proj"),
        row("model.layers.#.operator_norm.weight", "attention:pre_norm.weight"),
        *(
            row(f"model.layers.#.self_attn.{part}_proj.weight", f"attention:layer.{part}_proj.weight")
            for part in "qkv"
        ),
        row("model.layers.#.self_attn.out_proj.weight", "attention:layer.o_proj.weight"),
        row("model.layers.#.self_attn.q_layernorm.weight", "attention:layer.q_norm.weight"),
        row("model.layers.#.self_attn.k_layernorm.weight", "attention:layer.k_norm.weight"),
        row("model.layers.#.ffn_norm.weight", "mlp:pre_norm.weight"),
        row("model.layers.#.feed_forward.w1.weight", "mlp:layer.gate_proj.weight"),
        row("model.layers.#.feed_forward.w3.weight", "mlp:layer.up_proj.weight"),
        row("model.layers.#.feed_forward.w2.weight", "mlp:layer.down_proj.weight"),
        row("model.embedding_norm.weight", "final_norm.weight"),
        row("lm_head.weight", "lm_head.weight"),
    ),
)
