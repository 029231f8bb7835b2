"""Configurations of mamba2 that together set every field off its default."""

from native_sizes import MAMBA2

CONFIGS = [
    {**MAMBA2, "layer_norm_epsilon": 1e-2, "use_bias": True, "tie_word_embeddings": True},
    {**MAMBA2, "use_conv_bias": False, "n_groups": 1, "head_dim": 8, "conv_kernel": 3, "expand": 1},
    {
        **MAMBA2,
        "time_step_limit": (0.01, 0.5),
        "time_step_min": 0.01,
        "time_step_max": 0.5,
        "time_step_floor": 0.02,
    },
]
