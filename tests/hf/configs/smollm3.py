"""Configurations of smollm3 that together set every field off its default."""

from native_sizes import DECODER, YARN

CONFIGS = [
    {**DECODER, "num_hidden_layers": 4, "rms_norm_eps": 1e-2, "mlp_bias": True},
    {
        **DECODER,
        "no_rope_layers": [0, 1, 0],
        "use_sliding_window": True,
        "sliding_window": 8,
        "tie_word_embeddings": False,
    },
    {
        **DECODER,
        "head_dim": 24,
        "no_rope_layers": [1, 0, 1],
        "use_sliding_window": True,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        "rope_parameters": YARN,
        "attention_bias": True,
        "hidden_act": "gelu",
    },
    {**DECODER, "no_rope_layers": [0, 0, 0]},
]
REWORDED = ("max_position_embeddings", "rope_parameters")
"""Lengths and wavelengths that no layer has."""
