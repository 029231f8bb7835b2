"""Llama: grouped attention with rotary positions, SwiGLU, RMS norms before. Touvron et al. 2023,
arXiv:2302.13971; the class is `LlamaForCausalLM` of transformers."""

from hybrid_lm.hf.attention_rules import Rope
from hybrid_lm.hf.family import Family
from hybrid_lm.hf.fields import Agrees, Choice, Must, Rule, Same
from hybrid_lm.hf.layouts import Uniform
from hybrid_lm.hf.options import Fields
from hybrid_lm.hf.weights import linear, row

ACTS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}
"""Their activations that are ours, the name that is written first."""


def head_dim(fields: Fields) -> int:
    """Width of a head where the configuration does not say it."""
    return fields["hidden_size"] // fields["num_attention_heads"]


SIZES: tuple[Rule, ...] = (
    Same("vocab_size", "vocab_size"),
    Same("hidden_size", "d_model"),
    Same("intermediate_size", "mlp.d_ff"),
    Same("num_attention_heads", "attention.n_heads"),
    Same("num_key_value_heads", "attention.n_kv_heads", default=lambda f: f["num_attention_heads"]),
    Choice("hidden_act", "mlp.act", ACTS),
    Same("tie_word_embeddings", "embedding.tied"),
    Same("attention_dropout", "attention.dropout"),
)
"""The fields that Llama and those who followed it have in common."""

ATTENTION = (
    *linear("model.layers.#.self_attn.q_proj", "attention:layer.q_proj"),
    *linear("model.layers.#.self_attn.k_proj", "attention:layer.k_proj"),
    *linear("model.layers.#.self_attn.v_proj", "attention:layer.v_proj"),
    *linear("model.layers.#.self_attn.o_proj", "attention:layer.o_proj"),
)
MLP = (
    *linear("model.layers.#.mlp.gate_proj", "mlp:layer.gate_proj"),
    *linear("model.layers.#.mlp.up_proj", "mlp:layer.up_proj"),
    *linear("model.layers.#.mlp.down_proj", "mlp:layer.down_proj"),
)
ENDS = (
    row("model.embed_tokens.weight", "embed.weight"),
    row("model.norm.weight", "final_norm.weight"),
    row("lm_head.weight", "lm_head.weight"),
)
ROWS = (
    *ENDS,
    row("model.layers.#.input_layernorm.weight", "attention:pre_norm.weight"),
    *ATTENTION,
    row("model.layers.#.post_attention_layernorm.weight", "mlp:pre_norm.weight"),
    *MLP,
)

FAMILY = Family(
    name="llama",
    class_name="LlamaForCausalLM",
    layout=Uniform("attention mlp"),
    rules=(
        *SIZES,
        Same("head_dim", "attention.head_dim", default=head_dim),
        Same("rms_norm_eps", "block.eps"),
        Same("mlp_bias", "mlp.bias"),
        Same("attention_bias", "attention.qkv_bias", "attention.out_bias"),
        Rope(),
        Must("pretraining_tp", 1),
        # Of the program that trained SmolLM2, which could do either; this class cannot.
        Agrees("rope_interleaved", lambda f: False),
    ),
    ignored=frozenset(["is_llama_config"]),
    rows=ROWS,
)
