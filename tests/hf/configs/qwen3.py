"""Configurations of qwen3 that together set every field off its default."""

from native_sizes import DECODER, LLAMA3

CONFIGS = [
    {**DECODER, "head_dim": 24, "rms_norm_eps": 1e-2, "attention_bias": True, "tie_word_embeddings": True},
    {
        **DECODER,
        "head_dim": 16,
        "use_sliding_window": True,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": LLAMA3,
    },
    {
        **DECODER,
        "use_sliding_window": True,
        "sliding_window": 8,
        "max_window_layers": 1,
        "hidden_act": "gelu",
    },
]
REWORDED = ("max_window_layers", "use_sliding_window")
"""Windows go out by `layer_types`."""
