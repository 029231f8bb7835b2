"""Configurations of gpt_neox that together set every field off its default."""

from native_sizes import NEOX, YARN

CONFIGS = [
    {**NEOX, "use_parallel_residual": False, "layer_norm_eps": 1e-2, "hidden_dropout": 0.1},
    {**NEOX, "layer_norm_eps": 1e-2, "attention_bias": False, "hidden_act": "relu"},
    {**NEOX, "use_parallel_residual": False, "tie_word_embeddings": True},
    # 0.3 of 16 channels is 4.8: they rotate 4.
    {**NEOX, "rope_parameters": {**YARN, "partial_rotary_factor": 0.3}},
]
REWORDED = ("rope_parameters",)
"""Fields that come out in other words: a null by its number, windows by `layer_types`."""
