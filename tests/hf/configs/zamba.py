"""Configurations of zamba that together set every field off its default."""

from native_sizes import SIZES

M, H = "linear_attention", "hybrid"
ZAMBA = {
    **SIZES,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "mamba_d_state": 8,
    "use_associative_scan": False,
}

CONFIGS = [
    {
        **ZAMBA,
        "num_hidden_layers": 5,
        "layers_block_type": [M, H, M, H, H],
        "rms_norm_eps": 1e-2,
        "mamba_proj_bias": True,
        "mamba_dt_rank": 3,
        "n_mamba_heads": 4,
        "attention_dropout": 0.1,
        "time_step_min": 0.01,
        "time_step_max": 0.5,
        "time_step_floor": 0.02,
    },
    {
        **ZAMBA,
        "layers_block_type": [H, M, H],
        "attention_head_dim": 24,
        "num_key_value_heads": 4,
        "n_mamba_heads": 1,
        "mamba_conv_bias": False,
        "mamba_d_conv": 3,
        "mamba_expand": 1,
        "hidden_act": "gelu_pytorch_tanh",
    },
    # The layers by their period.
    {**ZAMBA, "num_hidden_layers": 6, "attn_layer_period": 2, "attn_layer_offset": 1},
]
