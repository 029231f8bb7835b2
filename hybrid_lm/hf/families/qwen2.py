"""Qwen2: Llama with biases of queries, keys and values, and windows on some layers. Yang et al. 2024,
arXiv:2407.10671."""

from hybrid_lm.hf.attention_rules import Rope, WindowsByLayer
from hybrid_lm.hf.families.llama import ROWS, SIZES, head_dim
from hybrid_lm.hf.family import Family
from hybrid_lm.hf.fields import Agrees, Same
from hybrid_lm.hf.layouts import Uniform

FAMILY = Family(
    name="qwen2",
    class_name="Qwen2ForCausalLM",
    layout=Uniform("attention mlp"),
    rules=(
        *SIZES,
        Same("head_dim", "attention.head_dim", default=head_dim),
        Same("rms_norm_eps", "block.eps"),
        WindowsByLayer(),
        Rope(),
        # In the published files of Qwen2.5, and not read by the class.
        Agrees("use_mrope", lambda f: False),
    ),
    fixed={"attention.qkv_bias": True},
    rows=ROWS,
)
