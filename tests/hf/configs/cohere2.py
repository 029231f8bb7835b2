"""Configurations of cohere2 that together set every field off its default."""

from native_sizes import DECODER, LLAMA3

COHERE2 = {**DECODER, "sliding_window": 8, "logit_scale": 0.5}

CONFIGS = [
    {**COHERE2, "num_hidden_layers": 4, "layer_norm_eps": 1e-2},
    {
        **COHERE2,
        "head_dim": 24,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        "rope_parameters": LLAMA3,
        "attention_bias": True,
        "tie_word_embeddings": False,
        "hidden_act": "gelu",
    },
]
