"""Qwen3: Qwen2 with norms of each head's queries and keys. Yang et al. 2025, arXiv:2505.09388."""

from hybrid_lm.hf.attention_rules import Rope, WindowsByLayer
from hybrid_lm.hf.families.llama import ROWS, SIZES, head_dim
from hybrid_lm.hf.family import Family
from hybrid_lm.hf.fields import Same
from hybrid_lm.hf.layouts import Uniform
from hybrid_lm.hf.weights import row

QK_NORMS = (
    row("model.layers.#.self_attn.q_norm.weight", "attention:layer.q_norm.weight"),
    row("model.layers.#.self_attn.k_norm.weight", "attention:layer.k_norm.weight"),
)

FAMILY = Family(
    name="qwen3",
    class_name="Qwen3ForCausalLM",
    layout=Uniform("attention mlp"),
    rules=(
        *SIZES,
        Same("head_dim", "attention.head_dim", default=head_dim),
        Same("rms_norm_eps", "block.eps", "attention.qk_norm_eps"),
        Same("attention_bias", "attention.qkv_bias", "attention.out_bias"),
        WindowsByLayer(),
        Rope(),
    ),
    fixed={"attention.qk_norm": "head"},
    rows=(*ROWS, *QK_NORMS),
)
