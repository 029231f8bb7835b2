"""OLMo 3: OLMo 2 with windows on most layers, and wavelengths of their own where there are none. Team OLMo
2025, arXiv:2512.13961."""

from hybrid_lm.hf.attention_rules import RopeByType, WindowsByLayer
from hybrid_lm.hf.families.llama import SIZES, head_dim
from hybrid_lm.hf.families.olmo2 import FIXED, ROWS
from hybrid_lm.hf.family import Family
from hybrid_lm.hf.fields import Same
from hybrid_lm.hf.layouts import Uniform

FAMILY = Family(
    name="olmo3",
    class_name="Olmo3ForCausalLM",
    layout=Uniform("attention mlp"),
    rules=(
        *SIZES,
        Same("head_dim", "attention.head_dim", default=head_dim),
        Same("rms_norm_eps", "block.eps", "attention.qk_norm_eps"),
        Same("attention_bias", "attention.qkv_bias", "attention.out_bias"),
        WindowsByLayer(switched=False),
        RopeByType(),
    ),
    fixed=FIXED,
    rows=ROWS,
)
