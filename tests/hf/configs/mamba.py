"""Configurations of mamba that together set every field off its default."""

from native_sizes import MAMBA

CONFIGS = [
    {**MAMBA, "layer_norm_epsilon": 1e-2, "use_bias": True, "time_step_rank": 3},
    {**MAMBA, "use_conv_bias": False, "conv_kernel": 3, "expand": 1, "tie_word_embeddings": False},
]
