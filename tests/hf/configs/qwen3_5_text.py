"""Configurations of qwen3_5_text that together set every field off its default."""

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
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 500.0,
        "partial_rotary_factor": 0.25,
        "mrope_section": [1, 1, 1],
    },
}
CONFIGS = [
    {
        **SIZES,
        "tie_word_embeddings": True,
        "linear_num_key_heads": 4,
        "layer_types": ["full_attention", "linear_attention", "linear_attention"],
    },
    {**SIZES, "rms_norm_eps": 1e-2, "attention_bias": True, "linear_conv_kernel_dim": 3},
]
