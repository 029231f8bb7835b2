"""GPT-NeoX: attention and MLP beside each other, with a norm each (Pythia), or one after the other
(RedPajama-INCITE). Black et al. 2022, arXiv:2204.06745."""

from hybrid_lm.hf.attention_rules import Rope
from hybrid_lm.hf.family import Family
from hybrid_lm.hf.fields import Agrees, Choice, Derived, Same
from hybrid_lm.hf.layouts import Switch
from hybrid_lm.hf.weights import BY_HEAD, linear, row

ACTS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
}
QKV = ("attention:layer.q_proj", "attention:layer.k_proj", "attention:layer.v_proj")

FAMILY = Family(
    name="gpt_neox",
    class_name="GPTNeoXForCausalLM",
    layout=Switch("use_parallel_residual", {True: "attention+mlp", False: "attention mlp"}),
    rules=(
        Same("vocab_size", "vocab_size"),
        Same("hidden_size", "d_model"),
        Same("intermediate_size", "mlp.d_ff"),
        Same("num_attention_heads", "attention.n_heads"),
        Derived("attention.n_kv_heads", lambda f: f["num_attention_heads"]),
        Derived("attention.head_dim", lambda f: f["hidden_size"] // f["num_attention_heads"]),
        Choice("hidden_act", "mlp.act", ACTS),
        Same("attention_bias", "attention.qkv_bias", "attention.out_bias"),
        Same("layer_norm_eps", "block.eps"),
        Same("attention_dropout", "attention.dropout"),
        Same("hidden_dropout", "block.dropout", "embedding.dropout"),
        Same("tie_word_embeddings", "embedding.tied"),
        Rope(partial=True),
        # transformers 4 wrote it a second time.
        Agrees("partial_rotary_factor", lambda f: f["rope_parameters"].get("partial_rotary_factor")),
        Derived("block.placement", lambda f: "pre_each" if f["use_parallel_residual"] else "pre"),
    ),
    fixed={"block.norm": "layernorm", "block.bias": True, "mlp.gated": False, "mlp.bias": True},
    ignored=frozenset(["classifier_dropout"]),
    rows=(
        row("gpt_neox.embed_in.weight", "embed.weight"),
        *linear("gpt_neox.layers.#.input_layernorm", "attention:pre_norm"),
        *(
            row(
                f"gpt_neox.layers.#.attention.query_key_value.{part}",
                *(f"{name}.{part}" for name in QKV),
                how=BY_HEAD,
            )
            for part in ("weight", "bias")
        ),
        *linear("gpt_neox.layers.#.attention.dense", "attention:layer.o_proj"),
        *linear("gpt_neox.layers.#.post_attention_layernorm", "mlp:pre_norm"),
        *linear("gpt_neox.layers.#.mlp.dense_h_to_4h", "mlp:layer.up_proj"),
        *linear("gpt_neox.layers.#.mlp.dense_4h_to_h", "mlp:layer.down_proj"),
        *linear("gpt_neox.final_layer_norm", "final_norm"),
        row("embed_out.weight", "lm_head.weight"),
    ),
    buffers=(".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq"),
)
