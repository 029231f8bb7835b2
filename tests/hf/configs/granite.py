"""Configurations of granite that together set every field off its default."""

from native_sizes import DECODER, LLAMA3

GRANITE = {
    **DECODER,
    "embedding_multiplier": 2.0,
    "residual_multiplier": 0.7,
    "attention_multiplier": 0.3,
    "logits_scaling": 1.5,
}

CONFIGS = [
    {**GRANITE, "rms_norm_eps": 1e-2, "attention_bias": True, "tie_word_embeddings": True},
    {**GRANITE, "rope_parameters": LLAMA3, "mlp_bias": True, "hidden_act": "gelu", "logits_scaling": 49},
    {**GRANITE, "head_dim": 16, "attention_multiplier": 0.25, "num_key_value_heads": 4},
]
