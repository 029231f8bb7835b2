"""RecurrentGemma: RG-LRU blocks with local attention between them, an MLP behind each. Botev et al. 2024,
arXiv:2404.07839; the class is `RecurrentGemmaForCausalLM` of transformers.

The class keeps its state on the module: a batch with padding on the left is not exact there.
"""

from collections.abc import Sequence
from typing import Any

import torch

from hybrid_lm.hf.attention_rules import Rope
from hybrid_lm.hf.families.bamba import with_attention
from hybrid_lm.hf.families.llama import head_dim
from hybrid_lm.hf.family import Family
from hybrid_lm.hf.fields import Agrees, Derived, Either, Must, Same, Whole
from hybrid_lm.hf.layouts import Layout, block
from hybrid_lm.hf.options import Block, ConversionError, Fields, Options, listed
from hybrid_lm.hf.weights import DEPTHWISE, linear, row

KINDS = {"recurrent": block("rg_lru mlp"), "attention": block("attention mlp")}


class Cycle(Layout):
    """A list of kinds that is repeated down the model, cut where the model ends."""

    theirs = ("block_types", "num_hidden_layers")
    blocks = tuple(KINDS.values())

    def read(self, fields: Fields) -> list[Block]:
        kinds, n = list(fields["block_types"]), fields["num_hidden_layers"]
        for kind in kinds:
            if kind not in KINDS:
                raise ConversionError(f"block_types: {kind!r}: only {listed(KINDS)}")
        return with_attention(KINDS[kinds[i % len(kinds)]] for i in range(n))

    def write(self, blocks: Sequence[Block], fields: dict[str, Any]) -> None:
        names = {what: name for name, what in KINDS.items()}
        kinds = [names[what] for what in with_attention(blocks)]
        period = next(p for p in range(1, len(kinds) + 1) if kinds[p:] == kinds[:-p])
        fields["block_types"], fields["num_hidden_layers"] = kinds[:period], len(kinds)


class Positions(Rope):
    """`rope_parameters` without a length: the class has no scaling that would need it."""

    theirs = ("rope_parameters",)
    rules = ()

    def read(self, fields: Fields, ours: Options) -> None:
        super().read({**fields, "max_position_embeddings": None}, ours)

    def write(self, ours: Options, fields: dict[str, Any]) -> None:
        super().write(ours, fields)
        fields.pop("max_position_embeddings", None)


def embedding_multiplier(fields: Fields) -> float:
    """The root of the width, which the class has in bfloat16."""
    return float(torch.tensor(fields["hidden_size"] ** 0.5, dtype=torch.bfloat16))


FAMILY = Family(
    name="recurrent_gemma",
    class_name="RecurrentGemmaForCausalLM",
    layout=Cycle(),
    rules=(
        Same("vocab_size", "vocab_size"),
        Same("hidden_size", "d_model"),
        Derived("embedding.multiplier", embedding_multiplier),
        # Gate and up together.
        Derived("mlp.d_ff", lambda f: f["intermediate_size"] // 2),
        Whole("intermediate_size", lambda ours: 2 * ours["mlp.d_ff"]),
        Either("num_attention_heads", "attention.n_heads", "rg_lru.n_heads"),
        Same("num_key_value_heads", "attention.n_kv_heads", default=lambda f: f["num_attention_heads"]),
        # No field of the class, and read by it all the same.
        Same("head_dim", "attention.head_dim", default=head_dim),
        Same("attention_window_size", "attention.window"),
        Same("attention_bias", "attention.qkv_bias"),
        Same("attention_dropout", "attention.dropout"),
        Positions(partial=True),
        Same("lru_width", "rg_lru.d_inner", default=lambda f: f["hidden_size"]),
        Same("conv1d_width", "rg_lru.d_conv"),
        Same("rms_norm_eps", "block.eps"),
        Same("logits_soft_cap", "head.softcap"),
        Same("tie_word_embeddings", "embedding.tied"),
        # The RG-LRU's gate too.
        Must("hidden_activation", "gelu_pytorch_tanh"),
        # In the published files, and not read by the class.
        Agrees("embeddings_scale_by_sqrt_dim", lambda f: True),
    ),
    fixed={
        "block.unit_offset": True,
        "attention.out_bias": True,
        "mlp.act": "gelu_tanh",
        "mlp.bias": True,
        "rg_lru.bias": True,
        "rg_lru.c": 8.0,
    },
    # Starting values.
    ignored=frozenset(["w_init_variance_scale", "final_w_init_variance_scale"]),
    rows=(
        row("model.embed_tokens.weight", "embed.weight"),
        row("model.layers.#.temporal_pre_norm.weight", "rg_lru:pre_norm.weight"),
        *linear("model.layers.#.temporal_block.linear_y", "rg_lru:layer.gate_proj"),
        *linear("model.layers.#.temporal_block.linear_x", "rg_lru:layer.x_proj"),
        row("model.layers.#.temporal_block.conv_1d.weight", "rg_lru:layer.conv_weight", how=DEPTHWISE),
        row("model.layers.#.temporal_block.conv_1d.bias", "rg_lru:layer.conv_bias"),
        row("model.layers.#.temporal_block.rg_lru.recurrent_param", "rg_lru:layer.decay"),
        *(
            row(f"model.layers.#.temporal_block.rg_lru.{name}", f"rg_lru:layer.{name}")
            for gate in ("input_gate", "recurrent_gate")
            for name in (f"{gate}_weight", f"{gate}_bias")
        ),
        *linear("model.layers.#.temporal_block.linear_out", "rg_lru:layer.out_proj"),
        row("model.layers.#.temporal_pre_norm.weight", "attention:pre_norm.weight"),
        *(
            entry
            for part in "qkvo"
            for entry in linear(f"model.layers.#.temporal_block.{part}_proj", f"attention:layer.{part}_proj")
        ),
        row("model.layers.#.channel_pre_norm.weight", "mlp:pre_norm.weight"),
        *(
            entry
            for part in ("gate", "up", "down")
            for entry in linear(f"model.layers.#.mlp_block.{part}_proj", f"mlp:layer.{part}_proj")
        ),
        row("model.final_norm.weight", "final_norm.weight"),
        row("lm_head.weight", "lm_head.weight"),
    ),
)
