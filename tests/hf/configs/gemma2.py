"""Configurations of gemma2 that together set every field off its default."""

from native_sizes import DECODER, LLAMA3

GEMMA2 = {**DECODER, "head_dim": 24, "query_pre_attn_scalar": 20, "sliding_window": 8}
CAPS = {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0}

CONFIGS = [
    {**GEMMA2, **CAPS, "rms_norm_eps": 1e-2, "attention_bias": True},
    {**GEMMA2, **CAPS, "rope_parameters": LLAMA3, "tie_word_embeddings": False, "hidden_activation": "gelu"},
    {
        **GEMMA2,
        "query_pre_attn_scalar": 24,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
        "use_bidirectional_attention": False,
    },
]
REWORDED = ("use_bidirectional_attention",)
"""A null goes out as false."""
