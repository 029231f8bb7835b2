"""Tiny native models for these tests: for each family, configurations that together set every field off its
default, and weights that are all off their start."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

IDS = {"eos_token_id": None, "bos_token_id": None, "pad_token_id": None}
SIZES = {"vocab_size": 257, "hidden_size": 64, "num_hidden_layers": 3, "initializer_range": 0.08, **IDS}
DECODER = {
    **SIZES,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "attention_dropout": 0.1,
}
LLAMA3 = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"rope_type": "llama3", "rope_theta": 500.0, "original_max_position_embeddings": 16}
YARN = {"rope_type": "yarn", "rope_theta": 700.0, "factor": 4.0, "original_max_position_embeddings": 16}
GPT2 = {"vocab_size": 257, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 96, **IDS}
MAMBA = {**SIZES, "state_size": 8, "time_step_min": 0.01, "time_step_max": 0.5, "time_step_floor": 0.02}
MAMBA2 = {**SIZES, "state_size": 16, "num_heads": 8, "head_dim": 16, "n_groups": 2, "chunk_size": 8}

NEOX = {key: value for key, value in DECODER.items() if key != "num_key_value_heads"}
NEOX |= {"use_parallel_residual": False}

CONFIGS: dict[str, list[dict[str, Any]]] = {
    "llama": [
        {**DECODER, "rms_norm_eps": 1e-2, "attention_bias": True, "tie_word_embeddings": True},
        {**DECODER, "head_dim": 24, "mlp_bias": True, "rope_parameters": LLAMA3, "hidden_act": "gelu"},
        {
            **DECODER,
            "num_key_value_heads": 4,
            "rope_parameters": {"rope_type": "linear", "rope_theta": 300.0, "factor": 3.0},
        },
        {**DECODER, "num_key_value_heads": 1, "rope_parameters": YARN, "hidden_act": "relu"},
    ],
    "mistral": [
        {**DECODER, "rms_norm_eps": 1e-2, "sliding_window": 8, "head_dim": 24},
        {**DECODER, "sliding_window": 5, "tie_word_embeddings": True, "rope_parameters": YARN},
    ],
    "qwen2": [
        {
            **DECODER,
            "rms_norm_eps": 1e-2,
            "use_sliding_window": True,
            "sliding_window": 8,
            "max_window_layers": 1,
        },
        {**DECODER, "head_dim": 24, "tie_word_embeddings": True, "hidden_act": "gelu_pytorch_tanh"},
        {
            **DECODER,
            "use_sliding_window": True,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ],
    "olmo2": [
        {**DECODER, "rms_norm_eps": 1e-2, "attention_bias": True},
        {**DECODER, "head_dim": 24, "tie_word_embeddings": True, "rope_parameters": LLAMA3},
    ],
    "gpt2": [
        {**GPT2, "layer_norm_epsilon": 1e-2, "n_inner": 80, "initializer_range": 0.08},
        {**GPT2, "activation_function": "gelu", "tie_word_embeddings": False, "attn_pdrop": 0.2},
        {**GPT2, "activation_function": "relu", "scale_attn_weights": False, "resid_pdrop": 0.0},
    ],
    "gpt_neox": [
        {**NEOX, "layer_norm_eps": 1e-2, "hidden_dropout": 0.1},
        {**NEOX, "attention_bias": False, "hidden_act": "relu", "tie_word_embeddings": True},
        # 0.3 of 16 channels is 4.8: they rotate 4.
        {**NEOX, "rope_parameters": {**YARN, "partial_rotary_factor": 0.3}},
    ],
    "mamba": [
        {**MAMBA, "layer_norm_epsilon": 1e-2, "use_bias": True, "time_step_rank": 3},
        {**MAMBA, "use_conv_bias": False, "conv_kernel": 3, "expand": 1, "tie_word_embeddings": False},
    ],
    "falcon_mamba": [
        {**MAMBA, "layer_norm_epsilon": 1e-2, "mixer_rms_eps": 5e-2, "use_bias": True},
        {**MAMBA, "use_conv_bias": False, "intermediate_size": 96, "tie_word_embeddings": False},
    ],
    "mamba2": [
        {**MAMBA2, "layer_norm_epsilon": 1e-2, "use_bias": True, "tie_word_embeddings": True},
        {**MAMBA2, "use_conv_bias": False, "n_groups": 1, "head_dim": 8, "conv_kernel": 3, "expand": 1},
        {**MAMBA2, "time_step_limit": (0.01, 0.5), "time_step_min": 0.01},
    ],
}


@torch.no_grad()
def native(name: str, options: dict[str, Any], seed: int = 0) -> Any:
    """A model of a family with every parameter moved: norms of one and biases of zero hide mistakes."""
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **options)).eval()
    for parameter in model.parameters():
        flat = parameter.dim() < 2 or 1 in parameter.shape
        scale = 0.1 if flat else 0.25 * float(parameter.std())
        parameter.add_(torch.randn_like(parameter), alpha=scale)
    return model
