"""Configurations of bamba that together set every field off its default."""

from native_sizes import DECODER

MAMBA = {"mamba_n_heads": 8, "mamba_n_groups": 2, "mamba_d_state": 16, "mamba_chunk_size": 8}
HYBRID = {**DECODER, **MAMBA, "num_hidden_layers": 4}
CONFIGS = [
    {**HYBRID, "attn_layer_indices": [1, 2], "rms_norm_eps": 1e-2, "tie_word_embeddings": True},
    {
        **HYBRID,
        "attn_layer_indices": [0],
        "head_dim": 24,
        "mamba_d_head": 8,
        "mamba_expand": 1,
        "mamba_d_conv": 3,
        "mamba_conv_bias": False,
        "mamba_proj_bias": True,
        "attention_bias": True,
        "mlp_bias": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.25},
    },
    {**HYBRID, "num_hidden_layers": 2, "attn_layer_indices": [1], "time_step_limit": (0.01, 0.5)},
    # Attention only: the sizes of the other kind are as the class has them.
    {**DECODER, "attn_layer_indices": [0, 1, 2], "mamba_n_heads": 1},
]
