"""Configurations of mixtral that together set every field off its default."""

from native_sizes import DECODER, LLAMA3

EXPERTS = {**DECODER, "num_local_experts": 4, "intermediate_size": 48}

CONFIGS = [
    {**EXPERTS, "rms_norm_eps": 1e-2, "sliding_window": 8, "num_experts_per_tok": 3},
    {
        **EXPERTS,
        "head_dim": 24,
        "tie_word_embeddings": True,
        "hidden_act": "gelu",
        "rope_parameters": LLAMA3,
        "num_experts_per_tok": 1,
    },
    {**EXPERTS, "num_local_experts": 5, "num_experts_per_tok": 2},
]
REWORDED = ("head_dim",)
"""A null by its number."""
