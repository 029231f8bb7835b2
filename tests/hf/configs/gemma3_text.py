"""Configurations of gemma3_text that together set every field off its default."""

from native_sizes import DECODER, YARN

GEMMA3 = {**DECODER, "head_dim": 24, "query_pre_attn_scalar": 20, "sliding_window": 8}

CONFIGS = [
    # A whole turn of a pattern of windows.
    {**GEMMA3, "num_hidden_layers": 6, "rms_norm_eps": 1e-2, "attention_bias": True},
    {
        **GEMMA3,
        "final_logit_softcapping": 3.0,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
            "full_attention": YARN,
        },
        "tie_word_embeddings": False,
        "hidden_activation": "silu",
    },
    {**GEMMA3, "num_hidden_layers": 2, "layer_types": ["full_attention"] * 2, "query_pre_attn_scalar": 24},
]
REWORDED = ("rope_parameters", "sliding_window")
"""Wavelengths and windows of layers that there are none of."""
