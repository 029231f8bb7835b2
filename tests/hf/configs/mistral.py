"""Configurations of mistral that together set every field off its default."""

from native_sizes import DECODER, YARN

CONFIGS = [
    {**DECODER, "rms_norm_eps": 1e-2, "sliding_window": 8, "head_dim": 24, "hidden_act": "gelu"},
    {**DECODER, "sliding_window": 5, "tie_word_embeddings": True, "rope_parameters": YARN},
]
