"""Configurations of qwen3_moe that together set every field off its default."""

from native_sizes import DECODER, YARN

EXPERTS = {**DECODER, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
# Without a dense layer, its width is as the class has it.
ALL_EXPERTS = {key: value for key, value in EXPERTS.items() if key != "intermediate_size"}

CONFIGS = [
    {**ALL_EXPERTS, "rms_norm_eps": 1e-2, "attention_bias": True, "norm_topk_prob": True, "head_dim": 24},
    {
        **EXPERTS,
        "num_hidden_layers": 4,
        "decoder_sparse_step": 2,
        "tie_word_embeddings": True,
        "use_sliding_window": True,
        "sliding_window": 8,
        "rope_parameters": YARN,
    },
    {**EXPERTS, "num_experts_per_tok": 3, "mlp_only_layers": [0, 2], "hidden_act": "gelu"},
]
REWORDED = ("decoder_sparse_step", "mlp_only_layers")
"""Fields that come out in other words: which layers are dense is named one by one."""
