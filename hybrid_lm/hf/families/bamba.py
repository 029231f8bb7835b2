"""Bamba: Mamba-2 with a few attention layers, an MLP behind each. Goyal et al. 2024, "Bamba:
Inference-Efficient Hybrid Mamba2 Model"; the class is `BambaForCausalLM` of transformers."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

from hybrid_lm.hf.attention_rules import Rope
from hybrid_lm.hf.families.llama import head_dim
from hybrid_lm.hf.family import Family
from hybrid_lm.hf.fields import Agrees, Derived, Must, Rule, Same, Unused, Whole
from hybrid_lm.hf.layouts import Layout, block
from hybrid_lm.hf.options import Block, ConversionError, Fields
from hybrid_lm.hf.weights import DEPTHWISE, linear, row


def with_attention(blocks: Iterable[Block]) -> list[Block]:
    """The blocks. Raises ConversionError if none has attention: these classes count tokens by its cache, and
    neither run nor generate without one."""
    found = list(blocks)
    if not any("attention" in item for what in found for item in what):
        raise ConversionError("no layer is attention, and the class does not run without one")
    return found


class Indexed(Layout):
    """A list of the attention layers' numbers."""

    theirs = ("attn_layer_indices", "num_hidden_layers")
    blocks = (block("mamba2 mlp"), block("attention mlp"))

    def read(self, fields: Fields) -> list[Block]:
        there = fields.get("attn_layer_indices") or []
        return with_attention(self.blocks[i in there] for i in range(fields["num_hidden_layers"]))

    def write(self, blocks: Sequence[Block], fields: dict[str, Any]) -> None:
        with_attention(blocks)
        fields["attn_layer_indices"] = [i for i, what in enumerate(blocks) if what == self.blocks[1]]
        fields["num_hidden_layers"] = len(blocks)


def clamps(fields: Fields) -> bool:
    """Whether step sizes are limited, which the class forgets when it decodes with a cache."""
    return tuple(fields["time_step_limit"] or (0.0, math.inf)) != (0.0, math.inf)


HEADS: tuple[Rule, ...] = (
    Same("num_attention_heads", "attention.n_heads"),
    Same("num_key_value_heads", "attention.n_kv_heads", default=lambda f: f["num_attention_heads"]),
    # No field of the class, and read by it all the same.
    Same("head_dim", "attention.head_dim", default=head_dim),
    Same("attention_dropout", "attention.dropout"),
)
"""Sizes of the attention layers, for Jamba and those who followed it."""

MAMBA2: tuple[Rule, ...] = (
    Same("mamba_d_state", "mamba2.d_state"),
    Same("mamba_d_head", "mamba2.head_dim"),
    Same("mamba_n_groups", "mamba2.n_groups"),
    Same("mamba_d_conv", "mamba2.d_conv"),
    Derived("mamba2.d_inner", lambda f: f["mamba_n_heads"] * f["mamba_d_head"]),
    Whole("mamba_n_heads", lambda ours: ours["mamba2.d_inner"] / ours["mamba2.head_dim"]),
    Same("mamba_conv_bias", "mamba2.conv_bias"),
    Same("mamba_chunk_size", "mamba2.chunk"),
    Same("time_step_limit", "mamba2.dt_limit"),
)
"""Sizes of the Mamba-2 layers, for Bamba and those who followed it."""

MAMBA2_ROWS = (
    *linear("model.layers.#.mamba.in_proj", "mamba2:layer.in_proj"),
    row("model.layers.#.mamba.conv1d.weight", "mamba2:layer.conv_weight", how=DEPTHWISE),
    row("model.layers.#.mamba.conv1d.bias", "mamba2:layer.conv_bias"),
    row("model.layers.#.mamba.dt_bias", "mamba2:layer.dt_bias"),
    row("model.layers.#.mamba.A_log", "mamba2:layer.A_log"),
    row("model.layers.#.mamba.D", "mamba2:layer.D"),
    row("model.layers.#.mamba.norm.weight", "mamba2:layer.norm_weight"),
    *linear("model.layers.#.mamba.out_proj", "mamba2:layer.out_proj"),
)
ATTENTION_ROWS = (
    *linear("model.layers.#.self_attn.q_proj", "attention:layer.q_proj"),
    *linear("model.layers.#.self_attn.k_proj", "attention:layer.k_proj"),
    *linear("model.layers.#.self_attn.v_proj", "attention:layer.v_proj"),
    *linear("model.layers.#.self_attn.o_proj", "attention:layer.o_proj"),
)
MLP_ROWS = (
    row("model.layers.#.pre_ff_layernorm.weight", "mlp:pre_norm.weight"),
    *linear("model.layers.#.feed_forward.gate_proj", "mlp:layer.gate_proj"),
    *linear("model.layers.#.feed_forward.up_proj", "mlp:layer.up_proj"),
    *linear("model.layers.#.feed_forward.down_proj", "mlp:layer.down_proj"),
)
ENDS = (
    row("model.embed_tokens.weight", "embed.weight"),
    row("model.final_layernorm.weight", "final_norm.weight"),
    row("lm_head.weight", "lm_head.weight"),
)

FAMILY = Family(
    name="bamba",
    class_name="BambaForCausalLM",
    layout=Indexed(),
    rules=(
        Same("vocab_size", "vocab_size"),
        Same("hidden_size", "d_model"),
        Same("intermediate_size", "mlp.d_ff"),
        Same("rms_norm_eps", "block.eps", "mamba2.norm_eps"),
        Same("tie_word_embeddings", "embedding.tied"),
        Same("mlp_bias", "mlp.bias"),
        *HEADS,
        Same("attention_bias", "attention.qkv_bias", "attention.out_bias"),
        Rope(partial=True),
        *MAMBA2,
        Same("mamba_proj_bias", "mamba2.bias"),
        Whole("mamba_expand", lambda ours: ours["mamba2.d_inner"] / ours["d_model"]),
        Unused("mamba2", mamba_n_heads=1),
        # The activation of the convolution too.
        Must("hidden_act", "silu", "swish"),
        Agrees("attn_rotary_emb", lambda f: int(head_dim(f) * f["rope_parameters"]["partial_rotary_factor"])),
    ),
    # The last two are about training and generating.
    ignored=frozenset(["use_mamba_kernels", "num_logits_to_keep", "z_loss_coefficient"]),
    rows=(
        *ENDS,
        row("model.layers.#.input_layernorm.weight", "mamba2:pre_norm.weight"),
        row("model.layers.#.input_layernorm.weight", "attention:pre_norm.weight"),
        *MAMBA2_ROWS,
        *ATTENTION_ROWS,
        *MLP_ROWS,
    ),
    cached_differs=clamps,
)
