"""Configurations of deepseek_v3 that together set every field off its default."""

from native_sizes import DECODER, YARN

LATENT = {
    **{key: value for key, value in DECODER.items() if key != "intermediate_size"},
    "num_key_value_heads": 4,
    "q_lora_rank": 20,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
}
EXPERTS = {
    "moe_intermediate_size": 48,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
}
CONFIGS = [
    {
        **LATENT,
        **EXPERTS,
        "intermediate_size": 96,
        "first_k_dense_replace": 1,
        "rms_norm_eps": 1e-2,
        "n_shared_experts": 2,
        "routed_scaling_factor": 1.7,
        "rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 0.9, "beta_fast": 16.0},
    },
    # Experts in all layers.
    {
        **LATENT,
        **EXPERTS,
        "q_lora_rank": None,
        "attention_bias": True,
        "hidden_act": "gelu_pytorch_tanh",
        "rope_interleave": False,
        "norm_topk_prob": False,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 0,
        "num_hidden_layers": 2,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    },
    # In none: their sizes are as the class has them.
    {**LATENT, "intermediate_size": 96, "first_k_dense_replace": 2, "num_hidden_layers": 2},
]
