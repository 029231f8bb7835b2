"""GPT-2: learned positions, layer norms and biases everywhere, matrices kept as (in out). Radford et al.
2019."""

from hybrid_lm.hf.family import Family
from hybrid_lm.hf.fields import Choice, Derived, Must, Same
from hybrid_lm.hf.layouts import Uniform
from hybrid_lm.hf.weights import FUSED, FUSED_TRANSPOSED, TRANSPOSED, Row, linear, row

ACTS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
    "silu": "silu",
}
QKV = ("attention:layer.q_proj", "attention:layer.k_proj", "attention:layer.v_proj")


def conv1d(theirs: str, ours: str) -> list[Row]:
    """A matrix kept as (in out), and its bias."""
    return [row(f"{theirs}.weight", f"{ours}.weight", how=TRANSPOSED), row(f"{theirs}.bias", f"{ours}.bias")]


FAMILY = Family(
    name="gpt2",
    class_name="GPT2LMHeadModel",
    layout=Uniform("attention mlp", depth="n_layer"),
    rules=(
        Same("vocab_size", "vocab_size"),
        Same("n_embd", "d_model"),
        Same("n_head", "attention.n_heads"),
        Derived("attention.n_kv_heads", lambda f: f["n_head"]),
        Derived("attention.head_dim", lambda f: f["n_embd"] // f["n_head"]),
        Same("n_positions", "embedding.max_positions"),
        Same("n_inner", "mlp.d_ff", default=lambda f: 4 * f["n_embd"]),
        Choice("activation_function", "mlp.act", ACTS),
        Same("layer_norm_epsilon", "block.eps"),
        Choice("scale_attn_weights", "attention.scale", {True: None, False: 1.0}),
        Same("attn_pdrop", "attention.dropout"),
        Same("resid_pdrop", "block.dropout"),
        Same("embd_pdrop", "embedding.dropout"),
        Same("tie_word_embeddings", "embedding.tied"),
        Must("scale_attn_by_inverse_layer_idx", False),
        Must("add_cross_attention", False),
    ),
    fixed={
        "block.norm": "layernorm",
        "block.bias": True,
        "embedding.positions": "learned",
        "attention.qkv_bias": True,
        "attention.out_bias": True,
        "mlp.gated": False,
        "mlp.bias": True,
    },
    # reorder_and_upcast_attn changes the order of roundings; summary_* belong to another head; three are of
    # the first releases and read by nothing.
    ignored=frozenset(
        [
            "n_ctx",
            "n_special",
            "output_past",
            "predict_special_tokens",
            "reorder_and_upcast_attn",
            "summary_activation",
            "summary_first_dropout",
            "summary_proj_to_labels",
            "summary_type",
            "summary_use_proj",
            "task_specific_params",
        ]
    ),
    rows=(
        row("transformer.wte.weight", "embed.weight"),
        row("transformer.wpe.weight", "embed_positions.weight"),
        *linear("transformer.h.#.ln_1", "attention:pre_norm"),
        row("transformer.h.#.attn.c_attn.weight", *(f"{name}.weight" for name in QKV), how=FUSED_TRANSPOSED),
        row("transformer.h.#.attn.c_attn.bias", *(f"{name}.bias" for name in QKV), how=FUSED),
        *conv1d("transformer.h.#.attn.c_proj", "attention:layer.o_proj"),
        *linear("transformer.h.#.ln_2", "mlp:pre_norm"),
        *conv1d("transformer.h.#.mlp.c_fc", "mlp:layer.up_proj"),
        *conv1d("transformer.h.#.mlp.c_proj", "mlp:layer.down_proj"),
        *linear("transformer.ln_f", "final_norm"),
        row("lm_head.weight", "lm_head.weight"),
    ),
    prefix="transformer.",
    buffers=(".attn.bias", ".attn.masked_bias"),
)
