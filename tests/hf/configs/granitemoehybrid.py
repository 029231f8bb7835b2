"""Configurations of granitemoehybrid that together set every field off its default."""

from native_sizes import DECODER, LLAMA3, SIZES

MAMBA = {"mamba_n_heads": 8, "mamba_n_groups": 2, "mamba_d_state": 16, "mamba_chunk_size": 8}
FACTORS = {"embedding_multiplier": 2.0, "residual_multiplier": 0.7, "attention_multiplier": 0.3}
FACTORS |= {"logits_scaling": 1.5}
MLP = {"shared_intermediate_size": 80, "num_local_experts": 0}
EXPERTS = {"shared_intermediate_size": 40, "intermediate_size": 48, "num_local_experts": 4}
# Without experts and without positions, their fields are as the class has them.
HYBRID = {key: value for key, value in {**DECODER, **MAMBA, **MLP}.items() if key != "intermediate_size"}
NOPE = {key: value for key, value in HYBRID.items() if key != "max_position_embeddings"}
LAYERS = {"num_hidden_layers": 3, "layer_types": ["linear_attention", "full_attention", "linear_attention"]}
CONFIGS = [
    {**NOPE, **EXPERTS, **FACTORS, **LAYERS, "num_experts_per_tok": 3, "rms_norm_eps": 1e-2},
    {**NOPE, **FACTORS, **LAYERS, "rms_norm_eps": 1e-2, "tie_word_embeddings": True},
    {
        **HYBRID,
        "num_hidden_layers": 2,
        "layer_types": ["full_attention", "linear_attention"],
        "position_embedding_type": "rope",
        "rope_parameters": LLAMA3,
        "head_dim": 24,
        "attention_multiplier": 24**-0.5,
        "attention_bias": True,
        "mamba_d_head": 8,
        "mamba_expand": 1,
        "mamba_d_conv": 3,
        "mamba_conv_bias": False,
        "mamba_proj_bias": True,
        "time_step_limit": (0.01, 0.5),
    },
    {
        **SIZES,
        **MLP,
        "layer_types": ["full_attention"] * 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "mamba_n_heads": 1,
        "position_embedding_type": "nope",
    },
]
REWORDED = ("position_embedding_type",)
"""`nope` as null."""
