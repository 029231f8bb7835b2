"""Configurations of gpt_oss that together set every field off its default."""

from native_sizes import DECODER, LLAMA3, YARN

EXPERTS = {
    **DECODER,
    "head_dim": 16,
    "intermediate_size": 48,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "swiglu_limit": 0.3,
    "sliding_window": 8,
}

CONFIGS = [
    {**EXPERTS, "rms_norm_eps": 1e-2, "rope_parameters": {**YARN, "truncate": False}},
    {
        **EXPERTS,
        "head_dim": 24,
        "num_experts_per_tok": 3,
        "swiglu_alpha": 1.3,
        "swiglu_limit": 7.0,
        "attention_bias": False,
        "tie_word_embeddings": True,
        "layer_types": ["full_attention", "full_attention", "sliding_attention"],
        "rope_parameters": LLAMA3,
    },
]
