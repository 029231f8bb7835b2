"""Configurations of qwen2 that together set every field off its default."""

from native_sizes import DECODER, YARN

CONFIGS = [
    {
        **DECODER,
        "rms_norm_eps": 1e-2,
        "use_sliding_window": True,
        "sliding_window": 8,
        "max_window_layers": 1,
    },
    {
        **DECODER,
        "head_dim": 24,
        "tie_word_embeddings": True,
        "hidden_act": "gelu_pytorch_tanh",
        "rope_parameters": YARN,
    },
    {
        **DECODER,
        "use_sliding_window": True,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
]
REWORDED = ("max_window_layers", "use_sliding_window")
"""Fields that come out in other words: a null by its number, windows by `layer_types`."""
