"""Configurations of llama that together set every field off its default."""

from native_sizes import DECODER, LLAMA3, YARN

CONFIGS = [
    {**DECODER, "rms_norm_eps": 1e-2, "attention_bias": True, "tie_word_embeddings": True},
    {**DECODER, "head_dim": 24, "mlp_bias": True, "rope_parameters": LLAMA3, "hidden_act": "gelu"},
    {
        **DECODER,
        "num_key_value_heads": 4,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 300.0, "factor": 3.0},
    },
    {**DECODER, "num_key_value_heads": 1, "rope_parameters": YARN, "hidden_act": "relu"},
]
