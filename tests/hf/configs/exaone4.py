"""Configurations of exaone4 that together set every field off its default."""

from native_sizes import DECODER, LLAMA3

CONFIGS = [
    {**DECODER, "num_hidden_layers": 4, "rms_norm_eps": 1e-2, "sliding_window": 8},
    {
        **DECODER,
        "head_dim": 24,
        "sliding_window": 8,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        "rope_parameters": LLAMA3,
        "tie_word_embeddings": True,
        "hidden_act": "gelu",
    },
    # Positions everywhere, and nowhere.
    {**DECODER, "sliding_window": None, "layer_types": ["full_attention"] * 3, "num_key_value_heads": 4},
    {**DECODER, "layer_types": ["full_attention"] * 3},
]
REWORDED = ("max_position_embeddings", "rope_parameters")
"""Lengths and wavelengths that no layer has."""
