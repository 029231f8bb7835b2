"""Configurations of qwen3_next that together set every field off its default."""

from native_sizes import DECODER

SIZES = {
    **DECODER,
    "head_dim": 24,
    # With their 1e-6, rounding alone moves logits by 8e-5: see the family's tolerance.
    "rms_norm_eps": 1e-3,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "shared_expert_intermediate_size": 40,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.25},
}
CONFIGS = [
    {
        **SIZES,
        "tie_word_embeddings": True,
        "norm_topk_prob": False,
        "linear_num_key_heads": 4,
        "layer_types": ["full_attention", "linear_attention", "linear_attention"],
        "mlp_only_layers": [2],
    },
    {
        **SIZES,
        "num_hidden_layers": 4,
        "decoder_sparse_step": 2,
        "layer_types": ["linear_attention", "linear_attention", "full_attention", "full_attention"],
    },
    {
        **SIZES,
        "rms_norm_eps": 1e-2,
        "attention_bias": True,
        "linear_conv_kernel_dim": 3,
        "num_key_value_heads": 1,
    },
]
REWORDED = ("decoder_sparse_step", "intermediate_size", "mlp_only_layers")
"""Fields that come out in other words: which layers are dense is named one by one, and without such layers
they have no width."""
