"""Configurations of stablelm that together set every field off its default."""

from native_sizes import DECODER, YARN

CONFIGS = [
    {**DECODER, "layer_norm_eps": 1e-2, "hidden_dropout": 0.1, "use_qkv_bias": True},
    {**DECODER, "layer_norm_eps": 1e-2, "qk_layernorm": True, "use_parallel_residual": True},
    {**DECODER, "use_parallel_residual": True, "tie_word_embeddings": True, "hidden_act": "gelu"},
    # 0.3 of 16 channels is 4.8: they rotate 4.
    {**DECODER, "rope_parameters": {**YARN, "partial_rotary_factor": 0.3}, "num_key_value_heads": 4},
]
REWORDED = ("rope_parameters",)
"""The part that is rotated, by what they make of it."""
