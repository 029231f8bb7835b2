"""MPT: a penalty that grows with distance in place of positions. MosaicML 2023, Press et al. 2021,
arXiv:2108.12409; the class is `MptForCausalLM` of transformers.

The class makes its table of penalties `max_seq_len` long and cannot go beyond it; ours can.
"""

from typing import Any

from hybrid_lm.hf.family import COMMON, Family
from hybrid_lm.hf.fields import Derived, Must, Rule, Same
from hybrid_lm.hf.layouts import Uniform
from hybrid_lm.hf.options import ConversionError, Fields, Options, shown
from hybrid_lm.hf.weights import FUSED, row

QKV = ("attention:layer.q_proj", "attention:layer.k_proj", "attention:layer.v_proj")
USUAL = {
    "alibi": True,
    "alibi_bias_max": 8,
    "attn_type": "multihead_attention",
    "attn_uses_sequence_id": False,
    "clip_qkv": None,
    "prefix_lm": False,
    "qk_ln": False,
}
"""What the class can do of `attn_config`; most of it is not even read."""


class AttnConfig(Rule):
    """The section `attn_config`."""

    theirs = ("attn_config",)

    def read(self, fields: Fields, ours: Options) -> None:
        given = fields["attn_config"]
        for key, value in given.items():
            if key in USUAL and value != USUAL[key]:
                raise ConversionError(f"attn_config.{key} = {value!r}: only {shown(USUAL[key])}")
            if value and key not in (*USUAL, *COMMON, "attn_impl", "attn_pdrop", "softmax_scale"):
                raise ConversionError(f"unknown field attn_config.{key} = {value!r}")
        ours["attention.scale"] = given.get("softmax_scale")
        # Their one rate is for attention weights and for the outputs of both layers.
        ours["attention.dropout"] = ours["block.dropout"] = float(given.get("attn_pdrop", 0.0))

    def write(self, ours: Options, fields: dict[str, Any]) -> None:
        # Only whole numbers are allowed as their rate.
        fields["attn_config"] = {**USUAL, "softmax_scale": ours["attention.scale"], "attn_pdrop": 0}


class Length(Rule):
    """`max_seq_len`, which here is a length to advertise."""

    theirs = ("max_seq_len",)

    def read(self, fields: Fields, ours: Options) -> None:
        ours["embedding.max_positions"] = fields["max_seq_len"]

    def write(self, ours: Options, fields: dict[str, Any]) -> None:
        if ours["embedding.max_positions"] is not None:
            fields["max_seq_len"] = ours["embedding.max_positions"]


FAMILY = Family(
    name="mpt",
    class_name="MptForCausalLM",
    layout=Uniform("attention mlp", depth="n_layers"),
    rules=(
        Same("vocab_size", "vocab_size"),
        Same("d_model", "d_model"),
        Derived("mlp.d_ff", lambda f: 4 * f["d_model"]),
        Same("n_heads", "attention.n_heads"),
        Derived("attention.n_kv_heads", lambda f: f["n_heads"]),
        Derived("attention.head_dim", lambda f: f["d_model"] // f["n_heads"]),
        AttnConfig(),
        Length(),
        Same("layer_norm_epsilon", "block.eps"),
        Same("tie_word_embeddings", "embedding.tied"),
        Must("expansion_ratio", 4),
        Must("no_bias", True),
        Must("logit_scale", None),
    ),
    fixed={
        "block.norm": "layernorm",
        "attention.alibi": True,
        "mlp.gated": False,
        "mlp.act": "gelu",
    },
    # Other implementations' settings, and rates of dropout that the class does not read.
    ignored=frozenset(
        [
            "emb_pdrop",
            "embedding_fraction",
            "init_config",
            "init_device",
            "learned_pos_emb",
            "norm_type",
            "resid_pdrop",
            "tokenizer_name",
            "verbose",
        ]
    ),
    rows=(
        row("transformer.wte.weight", "embed.weight"),
        row("transformer.blocks.#.norm_1.weight", "attention:pre_norm.weight"),
        row(
            "transformer.blocks.#.attn.Wqkv.weight",
            *(f"{name}.weight" for name in QKV),
            how=FUSED,
        ),
        row("transformer.blocks.#.attn.out_proj.weight", "attention:layer.o_proj.weight"),
        row("transformer.blocks.#.norm_2.weight", "mlp:pre_norm.weight"),
        row("transformer.blocks.#.ffn.up_proj.weight", "mlp:layer.up_proj.weight"),
        row("transformer.blocks.#.ffn.down_proj.weight", "mlp:layer.down_proj.weight"),
        row("transformer.norm_f.weight", "final_norm.weight"),
        row("lm_head.weight", "lm_head.weight"),
    ),
)
