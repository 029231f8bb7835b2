"""Configurations of recurrent_gemma that together set every field off its default."""

from native_sizes import SIZES

GRIFFIN = {
    **SIZES,
    "num_attention_heads": 4,
    "intermediate_size": 192,
    "attention_window_size": 8,
    "attention_dropout": 0.1,
}
CONFIGS = [
    {
        **GRIFFIN,
        "num_hidden_layers": 4,
        "num_key_value_heads": 1,
        "rms_norm_eps": 1e-2,
        "logits_soft_cap": 3.0,
        "conv1d_width": 3,
    },
    {
        **GRIFFIN,
        "block_types": ["attention", "recurrent"],
        "lru_width": 96,
        "head_dim": 24,
        "attention_bias": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.25},
        "tie_word_embeddings": False,
    },
    {**GRIFFIN, "block_types": ["attention"], "num_key_value_heads": 2, "num_hidden_layers": 2},
]
