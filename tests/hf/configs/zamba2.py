"""Configurations of zamba2 that together set every field off its default."""

from native_sizes import LLAMA3, SIZES

M, H = "linear_attention", "hybrid"
ZAMBA2 = {
    **SIZES,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "mamba_d_state": 16,
    "mamba_ngroups": 2,
    "n_mamba_heads": 8,
    "chunk_size": 8,
}

CONFIGS = [
    {
        **ZAMBA2,
        "num_hidden_layers": 6,
        "layers_block_type": [M, H, H, M, H, M],
        "num_mem_blocks": 2,
        "use_shared_attention_adapter": True,
        "adapter_rank": 4,
        "use_mem_rope": True,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-2,
        "add_bias_linear": True,
        "attention_dropout": 0.1,
        "time_step_min": 0.01,
        "time_step_max": 0.5,
        "time_step_floor": 0.02,
    },
    # One block, used once; grouped keys.
    {
        **ZAMBA2,
        "layers_block_type": [M, M, H],
        "num_key_value_heads": 2,
        "adapter_rank": 3,
        "hidden_act": "silu",
        "mamba_d_conv": 3,
        "mamba_expand": 1,
        "mamba_ngroups": 1,
        "n_mamba_heads": 4,
    },
    # More blocks than layers that use one; nothing but such layers.
    {
        **ZAMBA2,
        "num_hidden_layers": 2,
        "layers_block_type": [H, H],
        "num_mem_blocks": 3,
        "adapter_rank": 2,
        "use_mem_rope": True,
        "rope_parameters": LLAMA3,
        "max_position_embeddings": 64,
        "use_long_context": False,
    },
]
