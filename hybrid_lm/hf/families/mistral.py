"""Mistral: Llama with a window on every layer or on none. Jiang et al. 2023, arXiv:2310.06825."""

from hybrid_lm.hf.attention_rules import Rope
from hybrid_lm.hf.families.llama import ROWS, SIZES, head_dim
from hybrid_lm.hf.family import Family
from hybrid_lm.hf.fields import Same
from hybrid_lm.hf.layouts import Uniform

FAMILY = Family(
    name="mistral",
    class_name="MistralForCausalLM",
    layout=Uniform("attention mlp"),
    rules=(
        *SIZES,
        Same("head_dim", "attention.head_dim", default=head_dim),
        Same("rms_norm_eps", "block.eps"),
        Same("sliding_window", "attention.window"),
        Rope(),
    ),
    rows=ROWS,
)
