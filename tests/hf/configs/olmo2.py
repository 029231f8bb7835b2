"""Configurations of olmo2 that together set every field off its default."""

from native_sizes import DECODER, LLAMA3

CONFIGS = [
    {**DECODER, "rms_norm_eps": 1e-2, "attention_bias": True, "hidden_act": "relu"},
    {**DECODER, "head_dim": 24, "tie_word_embeddings": True, "rope_parameters": LLAMA3},
]
