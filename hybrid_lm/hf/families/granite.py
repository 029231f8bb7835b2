"""Granite: Llama with factors on embeddings, scores, residuals and logits. IBM 2024; the class is
`GraniteForCausalLM` of transformers."""

from hybrid_lm.hf.attention_rules import Rope, ScaleOf
from hybrid_lm.hf.families.llama import ROWS, SIZES, head_dim
from hybrid_lm.hf.family import Family
from hybrid_lm.hf.fields import Inverse, Rule, Same
from hybrid_lm.hf.layouts import Uniform

MULTIPLIERS: tuple[Rule, ...] = (
    Same("embedding_multiplier", "embedding.multiplier"),
    ScaleOf("attention_multiplier", power=1),
    Same("residual_multiplier", "block.residual_multiplier"),
    Inverse("logits_scaling", "head.multiplier"),
)

FAMILY = Family(
    name="granite",
    class_name="GraniteForCausalLM",
    layout=Uniform("attention mlp"),
    rules=(
        *SIZES,
        *MULTIPLIERS,
        Same("head_dim", "attention.head_dim", default=head_dim),
        Same("rms_norm_eps", "block.eps"),
        Same("mlp_bias", "mlp.bias"),
        Same("attention_bias", "attention.qkv_bias", "attention.out_bias"),
        Rope(),
    ),
    rows=ROWS,
)
