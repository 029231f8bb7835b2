"""Mixtral: Mistral with a mixture of experts in the place of each MLP. Jiang et al. 2024,
arXiv:2401.04088."""

from hybrid_lm.hf.attention_rules import Rope
from hybrid_lm.hf.families.llama import ACTS, ATTENTION, ENDS, head_dim
from hybrid_lm.hf.family import Family
from hybrid_lm.hf.fields import Choice, Must, Rule, Same
from hybrid_lm.hf.layouts import Uniform
from hybrid_lm.hf.weights import GATE_UP_STACKED, STACKED, row

SIZES: tuple[Rule, ...] = (
    Same("vocab_size", "vocab_size"),
    Same("hidden_size", "d_model"),
    Same("num_attention_heads", "attention.n_heads"),
    Same("num_key_value_heads", "attention.n_kv_heads", default=lambda f: f["num_attention_heads"]),
    Same("head_dim", "attention.head_dim", default=head_dim),
    Same("tie_word_embeddings", "embedding.tied"),
    Same("attention_dropout", "attention.dropout"),
    Same("num_local_experts", "moe.n_experts"),
    Same("num_experts_per_tok", "moe.top_k"),
)
"""The fields that models with experts have in common."""

# About the loss in training: how experts are kept in use is for the run to say (`balance`).
IGNORED = frozenset(["output_router_logits", "router_aux_loss_coef"])

NORMS = (
    row("model.layers.#.input_layernorm.weight", "attention:pre_norm.weight"),
    row("model.layers.#.post_attention_layernorm.weight", "moe:pre_norm.weight"),
)

FAMILY = Family(
    name="mixtral",
    class_name="MixtralForCausalLM",
    layout=Uniform("attention moe"),
    rules=(
        *SIZES,
        Same("intermediate_size", "moe.d_ff"),
        Choice("hidden_act", "moe.act", ACTS),
        Same("rms_norm_eps", "block.eps"),
        Same("sliding_window", "attention.window"),
        Rope(),
        # Noise in training, which ours has not.
        Must("router_jitter_noise", 0.0),
    ),
    ignored=IGNORED,
    rows=(
        *ENDS,
        *NORMS,
        *ATTENTION,
        row("model.layers.#.block_sparse_moe.gate.weight", "moe:layer.router.weight"),
        row(
            [f"model.layers.#.block_sparse_moe.experts.@.{x}.weight" for x in ("w1", "w3")],
            "moe:layer.experts.gate_up",
            how=GATE_UP_STACKED,
        ),
        row(
            "model.layers.#.block_sparse_moe.experts.@.w2.weight",
            "moe:layer.experts.down",
            how=STACKED,
        ),
    ),
)
