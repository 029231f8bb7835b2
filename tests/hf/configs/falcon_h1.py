"""Configurations of falcon_h1 that together set every field off its default."""

from native_sizes import DECODER, LLAMA3

MAMBA = {"mamba_n_heads": 8, "mamba_n_groups": 2, "mamba_d_state": 16, "mamba_chunk_size": 8}
HYBRID = {
    **DECODER,
    "num_hidden_layers": 2,
    "mamba_d_ssm": 128,
    **MAMBA,
    "lm_head_multiplier": 0.9,
    "embedding_multiplier": 2.5,
    "mlp_multipliers": [0.7, 1.4],
    "key_multiplier": 0.6,
    "attention_in_multiplier": 1.3,
    "attention_out_multiplier": 0.8,
    "ssm_multipliers": [0.9, 1.2, 0.75, 1.5, 0.65],
    "ssm_in_multiplier": 1.25,
    "ssm_out_multiplier": 0.55,
}
CONFIGS = [
    {**HYBRID, "rms_norm_eps": 1e-2, "tie_word_embeddings": True},
    {
        **HYBRID,
        "head_dim": 24,
        "mamba_d_ssm": 96,
        "mamba_rms_norm": True,
        "mamba_d_conv": 3,
        "mamba_conv_bias": False,
        "rope_parameters": LLAMA3,
        "rms_norm_eps": 1e-2,
    },
    {
        **HYBRID,
        "mamba_rms_norm": True,
        "mamba_norm_before_gate": False,
        "mamba_proj_bias": True,
        "projectors_bias": True,
        "attention_bias": True,
        "mlp_bias": True,
        "time_step_limit": (0.01, 0.5),
    },
    {**HYBRID, "num_hidden_layers": 1, "mamba_d_ssm": None, "mamba_expand": 2},
]
REWORDED = ("mamba_d_ssm", "mamba_norm_before_gate")
"""A null by its number, and where a norm would be that is not there."""
