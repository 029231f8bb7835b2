"""Configurations of olmo_hybrid that together set every field off its default."""

from native_sizes import DECODER, LLAMA3

# Queries, keys and values are equally wide: transformers writes the taps of their convolution in thirds.
SIZES = {
    **DECODER,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}
NOPE = {"rope_type": "default", "rope_theta": None}
CONFIGS = [
    {
        **SIZES,
        "rms_norm_eps": 1e-2,
        "attention_bias": True,
        "linear_allow_neg_eigval": False,
        "linear_a_log_min": 0.5,
        "linear_a_log_max": 8.0,
        "rope_parameters": LLAMA3,
    },
    {
        **SIZES,
        "tie_word_embeddings": True,
        "linear_num_value_heads": 2,
        "linear_value_head_dim": 16,
        "linear_conv_kernel_dim": 3,
        "linear_dt_min": 0.01,
        "linear_dt_max": 0.5,
        "linear_dt_init_floor": 0.02,
        "layer_types": ["full_attention", "linear_attention", "linear_attention"],
        "rope_parameters": NOPE,
    },
    {**SIZES, "num_key_value_heads": 1, "head_dim": 24},
]
REWORDED = ("max_position_embeddings",)
"""Fields that come out in other words: without rotary positions there is no length."""
