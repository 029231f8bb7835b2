"""Configurations of phi3 that together set every field off its default."""

from native_sizes import DECODER

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 500.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7],
    "long_factor": [2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0, 5.5],
}

CONFIGS = [
    {**DECODER, "rms_norm_eps": 1e-2, "sliding_window": 8, "resid_pdrop": 0.1},
    # 0.75 of 16 channels.
    {
        **DECODER,
        "rope_parameters": {"rope_theta": 300.0, "partial_rotary_factor": 0.75},
        "hidden_act": "gelu",
    },
    {
        **DECODER,
        "rope_parameters": LONGROPE,
        "original_max_position_embeddings": 96,
        "tie_word_embeddings": True,
    },
]
