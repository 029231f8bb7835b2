"""Configurations of jamba that together set every field off its default."""

from native_sizes import DECODER

HYBRID = {
    **DECODER,
    "num_hidden_layers": 4,
    "mamba_d_state": 8,
    "num_experts": 4,
    "num_experts_per_tok": 3,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "expert_layer_period": 3,
    "expert_layer_offset": 0,
}
CONFIGS = [
    {**HYBRID, "rms_norm_eps": 1e-2, "tie_word_embeddings": True},
    {
        **DECODER,
        "num_hidden_layers": 3,
        "num_experts": 1,
        "attn_layer_period": 3,
        "attn_layer_offset": 2,
        "head_dim": 24,
        "mamba_d_conv": 3,
        "mamba_dt_rank": 6,
        "mamba_expand": 3,
        "mamba_conv_bias": False,
        "mamba_proj_bias": True,
    },
    # Experts in every layer.
    {**HYBRID, "num_hidden_layers": 2, "expert_layer_period": 1},
]
