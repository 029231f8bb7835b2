"""Configurations of gpt2 that together set every field off its default."""

from native_sizes import GPT2

CONFIGS = [
    {**GPT2, "layer_norm_epsilon": 1e-2, "n_inner": 80, "initializer_range": 0.08},
    {
        **GPT2,
        "activation_function": "gelu",
        "tie_word_embeddings": False,
        "attn_pdrop": 0.2,
        "embd_pdrop": 0.0,
    },
    {**GPT2, "activation_function": "relu", "scale_attn_weights": False, "resid_pdrop": 0.0},
]
REWORDED = ("n_inner",)
"""Fields that come out in other words: a null by its number, windows by `layer_types`."""
