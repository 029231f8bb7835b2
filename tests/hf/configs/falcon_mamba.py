"""Configurations of falcon_mamba that together set every field off its default."""

from native_sizes import MAMBA

CONFIGS = [
    {**MAMBA, "layer_norm_epsilon": 1e-2, "mixer_rms_eps": 5e-2, "use_bias": True},
    {
        **MAMBA,
        "use_conv_bias": False,
        "conv_kernel": 3,
        "intermediate_size": 96,
        "tie_word_embeddings": False,
    },
]
