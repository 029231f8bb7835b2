"""Gemma 3, the language model: Gemma 2 with norms of queries and keys, without the cap on scores, and with
other wavelengths where there is a window. Gemma Team 2025, arXiv:2503.19786."""

from hybrid_lm.hf.attention_rules import RopeByType
from hybrid_lm.hf.families.gemma2 import FIXED, IGNORED, ROWS, RULES
from hybrid_lm.hf.families.qwen3 import QK_NORMS
from hybrid_lm.hf.family import Family
from hybrid_lm.hf.fields import Must, Same
from hybrid_lm.hf.layouts import Uniform

FAMILY = Family(
    name="gemma3_text",
    class_name="Gemma3ForCausalLM",
    layout=Uniform("attention mlp"),
    rules=(
        *RULES,
        Same("rms_norm_eps", "block.eps", "attention.qk_norm_eps"),
        # The class has the field and does not use it.
        Must("attn_logit_softcapping", None),
        RopeByType(),
    ),
    fixed={**FIXED, "attention.qk_norm": "head", "attention.qk_norm_unit_offset": True},
    # Patterns of windows are told by layer_types.
    ignored=IGNORED | {"sliding_window_pattern", "_sliding_window_pattern"},
    rows=(*ROWS, *QK_NORMS),
)
