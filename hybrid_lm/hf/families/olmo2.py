"""OLMo 2: norms behind attention and MLP, and over all queries and keys. OLMo et al. 2024,
arXiv:2501.00656."""

from hybrid_lm.hf.attention_rules import Rope
from hybrid_lm.hf.families.llama import ATTENTION, ENDS, MLP, SIZES, head_dim
from hybrid_lm.hf.family import Family
from hybrid_lm.hf.fields import Same
from hybrid_lm.hf.layouts import Uniform
from hybrid_lm.hf.weights import row

FIXED = {"block.placement": "post", "attention.qk_norm": "full"}
ROWS = (
    *ENDS,
    *ATTENTION,
    row("model.layers.#.self_attn.q_norm.weight", "attention:layer.q_norm.weight"),
    row("model.layers.#.self_attn.k_norm.weight", "attention:layer.k_norm.weight"),
    row("model.layers.#.post_attention_layernorm.weight", "attention:post_norm.weight"),
    *MLP,
    row("model.layers.#.post_feedforward_layernorm.weight", "mlp:post_norm.weight"),
)

FAMILY = Family(
    name="olmo2",
    class_name="Olmo2ForCausalLM",
    layout=Uniform("attention mlp"),
    rules=(
        *SIZES,
        Same("head_dim", "attention.head_dim", default=head_dim),
        Same("rms_norm_eps", "block.eps", "attention.qk_norm_eps"),
        Same("attention_bias", "attention.qkv_bias", "attention.out_bias"),
        Rope(),
    ),
    fixed=FIXED,
    rows=ROWS,
)
