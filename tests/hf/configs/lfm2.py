"""Configurations of lfm2 that together set every field off its default."""

from native_sizes import LLAMA3, SIZES

HYBRID = {
    **SIZES,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "intermediate_size": 96,
    "block_auto_adjust_ff_dim": False,
}
CONFIGS = [
    {
        **HYBRID,
        "layer_types": ["conv", "full_attention", "conv"],
        "norm_eps": 1e-2,
        "conv_bias": True,
        "conv_L_cache": 4,
        "tie_word_embeddings": False,
    },
    {
        **HYBRID,
        "full_attn_idxs": [1, 2],
        "head_dim": 24,
        "rope_parameters": LLAMA3,
        # int(2 / 3 * 150) = 100, times 1.1 and up to the next 16: 112
        "intermediate_size": 150,
        "block_auto_adjust_ff_dim": True,
        "block_ffn_dim_multiplier": 1.1,
        "block_multiple_of": 16,
    },
    {**HYBRID, "num_hidden_layers": 2},
]
REWORDED = (
    "intermediate_size",
    "block_auto_adjust_ff_dim",
    "block_ffn_dim_multiplier",
    "block_multiple_of",
    "full_attn_idxs",
)
"""Fields that come out in other words: the width by itself, the attention layers by `layer_types`."""
