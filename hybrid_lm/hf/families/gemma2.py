"""Gemma 2: norms of scale 1 + w before and behind each layer, scores and logits capped. Gemma Team 2024,
arXiv:2408.00118."""

from hybrid_lm.hf.attention_rules import Rope, ScaleOf, WindowsByLayer
from hybrid_lm.hf.families.llama import ACTS, ATTENTION, ENDS, MLP, head_dim
from hybrid_lm.hf.family import Family
from hybrid_lm.hf.fields import Choice, Derived, Must, Rule, Same
from hybrid_lm.hf.layouts import Uniform
from hybrid_lm.hf.weights import row

RULES: tuple[Rule, ...] = (
    Same("vocab_size", "vocab_size"),
    Same("hidden_size", "d_model"),
    Derived("embedding.multiplier", lambda f: f["hidden_size"] ** 0.5),
    Same("intermediate_size", "mlp.d_ff"),
    Choice("hidden_activation", "mlp.act", ACTS),
    Same("num_attention_heads", "attention.n_heads"),
    Same("num_key_value_heads", "attention.n_kv_heads"),
    Same("head_dim", "attention.head_dim", default=head_dim),
    ScaleOf("query_pre_attn_scalar", power=-0.5, kind=int),
    Same("attention_bias", "attention.qkv_bias", "attention.out_bias"),
    Same("attention_dropout", "attention.dropout"),
    WindowsByLayer(switched=False),
    Same("final_logit_softcapping", "head.softcap"),
    Same("tie_word_embeddings", "embedding.tied"),
    Must("use_bidirectional_attention", False, None),
)
"""The fields that Gemma 2 and 3 have in common."""

FIXED = {"block.placement": "sandwich", "block.unit_offset": True}
# Checkpoints say the activation and the window a second time, under names that the class does not read.
IGNORED = frozenset(["hidden_act", "sliding_window_size"])
ROWS = (
    *ENDS,
    row("model.layers.#.input_layernorm.weight", "attention:pre_norm.weight"),
    *ATTENTION,
    row("model.layers.#.post_attention_layernorm.weight", "attention:post_norm.weight"),
    row("model.layers.#.pre_feedforward_layernorm.weight", "mlp:pre_norm.weight"),
    *MLP,
    row("model.layers.#.post_feedforward_layernorm.weight", "mlp:post_norm.weight"),
)

FAMILY = Family(
    name="gemma2",
    class_name="Gemma2ForCausalLM",
    layout=Uniform("attention mlp"),
    rules=(
        *RULES,
        Same("rms_norm_eps", "block.eps"),
        Same("attn_logit_softcapping", "attention.softcap"),
        Rope(),
    ),
    fixed=FIXED,
    ignored=IGNORED,
    rows=ROWS,
)
