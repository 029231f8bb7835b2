"""Configurations of olmo3 that together set every field off its default."""

from native_sizes import DECODER, YARN

OLMO3 = {**DECODER, "sliding_window": 8}

CONFIGS = [
    {**OLMO3, "num_hidden_layers": 4, "rms_norm_eps": 1e-2, "attention_bias": True},
    {
        **OLMO3,
        "head_dim": 24,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
            "full_attention": YARN,
        },
        "tie_word_embeddings": True,
        "hidden_act": "gelu",
    },
]
