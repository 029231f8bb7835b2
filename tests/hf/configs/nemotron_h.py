"""Configurations of nemotron_h that together set every field off its default."""

from native_sizes import IDS

MAMBA = {"mamba_num_heads": 8, "mamba_head_dim": 16, "n_groups": 2, "ssm_state_size": 16, "chunk_size": 8}
ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 24, "attention_dropout": 0.1}
MLP = {"intermediate_size": 96}
EXPERTS = {
    "n_routed_experts": 6,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 48,
    "moe_shared_expert_intermediate_size": 40,
}
SIZES = {"vocab_size": 257, "hidden_size": 64, "initializer_range": 0.08, **IDS}
HYBRID = {**SIZES, **MAMBA, **ATTENTION, **MLP, **EXPERTS}
CONFIGS = [
    {
        **HYBRID,
        "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"],
        "n_group": 3,
        "topk_group": 2,
        "routed_scaling_factor": 2.5,
        "layer_norm_epsilon": 1e-2,
    },
    {
        **HYBRID,
        "layers_block_type": ["mlp", "full_attention", "moe", "linear_attention", "linear_attention"],
        "moe_latent_size": 24,
        "norm_topk_prob": False,
        "mlp_hidden_act": "silu",
        "time_step_min": 0.05,
        "conv_kernel": 3,
        "use_conv_bias": False,
    },
    {
        **SIZES,
        **MAMBA,
        **ATTENTION,
        **MLP,
        "layers_block_type": ["linear_attention", "full_attention", "mlp"],
        "use_bias": True,
        "mlp_bias": True,
        "time_step_min": 2.0**-126,
    },
    # Attention and experts only: the sizes of the other kinds are as the class has them.
    {**SIZES, **ATTENTION, **EXPERTS, "layers_block_type": ["full_attention", "moe"]},
]
