"""Configurations of attention-only models as the hub has them: old names of fields, and fields that the class
does not read. Sizes are those of the models; nothing is built."""

from __future__ import annotations

import json
from typing import Any

import pytest
from transformers import AutoConfig

from hybrid_lm.config.dump import architecture_hash
from hybrid_lm.hf.families import FAMILIES
from hybrid_lm.hf.options import ConversionError
from hybrid_lm.layers import LAYERS

COMMAND_R7B: dict[str, Any] = {
    "cache_implementation": "hybrid",
    "head_dim": 128,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "layer_switch": 4,
    "logit_scale": 0.25,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "order_of_interleaved_layers": "local_attn_first",
    "position_embedding_type": "rope_gptj",
    "rope_scaling": None,
    "rope_theta": 50000,
    "rotary_pct": 1.0,
    "sliding_window": 4096,
    "sliding_window_pattern": 4,
    "torch_dtype": "bfloat16",
    "use_embedding_sharing": True,
    "use_gated_activation": True,
    "use_parallel_block": True,
    "use_parallel_embedding": False,
    "use_qk_norm": False,
}
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 8192}
YARN |= {"attention_factor": 1.2079441541679836, "beta_fast": 32.0, "beta_slow": 1.0}
LLAMA3 = {"rope_type": "llama3", "factor": 16.0, "original_max_position_embeddings": 8192}
LLAMA3 |= {"high_freq_factor": 4.0, "low_freq_factor": 1.0}
MPT_ATTENTION = {"alibi": True, "alibi_bias_max": 8, "attn_impl": "torch", "attn_pdrop": 0}
MPT_ATTENTION |= {"attn_type": "multihead_attention", "attn_uses_sequence_id": False, "clip_qkv": None}
MPT_ATTENTION |= {"prefix_lm": False, "qk_ln": False, "softmax_scale": None}

# (family, fields of a published model, its pattern, options of its layers)
PUBLISHED: list[tuple[str, dict[str, Any], str, dict[str, dict[str, Any]]]] = [
    (
        "gpt_neox",  # EleutherAI/pythia-70m
        {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "num_hidden_layers": 6,
         "rotary_emb_base": 10000, "rotary_pct": 0.25, "use_parallel_residual": True, "vocab_size": 50304},
        "a+f x6",
        {"a": {"rope.fraction": 0.25, "qkv_bias": True}},
    ),
    (
        "gemma2",  # google/gemma-2-27b: heads of 128, scores by 144
        {"cache_implementation": "hybrid", "head_dim": 128, "hidden_act": "gelu_pytorch_tanh",
         "hidden_size": 4608, "intermediate_size": 36864, "num_attention_heads": 32, "num_hidden_layers": 46,
         "num_key_value_heads": 16, "query_pre_attn_scalar": 144, "rope_theta": 10000.0,
         "sliding_window_size": 4096},
        "(w f a f)x23",
        {"w": {"window": 4096, "softcap": 50.0, "scale": 144**-0.5}, "a": {"softcap": 50.0}},
    ),
    (
        "gemma3_text",  # google/gemma-3-1b-pt
        {"cache_implementation": "hybrid", "hidden_size": 1152, "intermediate_size": 6912,
         "max_position_embeddings": 32768, "num_attention_heads": 4, "num_key_value_heads": 1,
         "rope_local_base_freq": 10000, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": 512,
         "sliding_window_pattern": 6, "vocab_size": 262144},
        "((w f)x5 a f)x4 w f w f",
        {"w": {"rope.theta": 1e4, "window": 512}, "a": {"rope.theta": 1e6, "qk_norm_unit_offset": True}},
    ),
    (
        "mpt",  # mosaicml/mpt-7b
        {"attn_config": MPT_ATTENTION, "d_model": 4096, "embedding_fraction": 1.0, "init_device": "cpu",
         "init_config": {"name": "kaiming_normal_", "verbose": 0}, "n_heads": 32, "n_layers": 32,
         "tokenizer_name": "EleutherAI/gpt-neox-20b", "verbose": 0, "vocab_size": 50432},
        "(a f)x32",
        {"a": {"alibi": True}, "f": {"act": "gelu", "d_ff": 16384}},
    ),
    (
        "qwen3",  # Qwen/Qwen3-8B
        {"intermediate_size": 12288, "max_position_embeddings": 40960, "max_window_layers": 36,
         "num_hidden_layers": 36, "num_key_value_heads": 8, "rope_scaling": None, "rope_theta": 1000000,
         "sliding_window": None, "use_sliding_window": False},
        "(a f)x36",
        {"a": {"head_dim": 128, "rope.theta": 1e6, "qk_norm_eps": 1e-6}},
    ),
    (
        "smollm3",  # HuggingFaceTB/SmolLM3-3B
        {"max_position_embeddings": 65536, "max_window_layers": 28, "no_rope_layer_interval": 4,
         "no_rope_layers": [1, 1, 1, 0] * 9, "pretraining_tp": 2, "rope_scaling": None,
         "rope_theta": 5000000.0, "sliding_window": None, "use_sliding_window": False},
        "((a f)x3 A f)x9",
        {"a": {"rope.theta": 5e6}, "A": {"rope": None}},
    ),
    (
        "granite",  # ibm-granite/granite-3.1-2b-base
        {"attention_multiplier": 0.015625, "embedding_multiplier": 12.0, "hidden_size": 2048,
         "intermediate_size": 8192, "logits_scaling": 8.0, "max_position_embeddings": 131072,
         "num_attention_heads": 32, "num_hidden_layers": 40, "num_key_value_heads": 8,
         "residual_multiplier": 0.22, "rope_scaling": None, "rope_theta": 5000000.0,
         "tie_word_embeddings": True, "vocab_size": 49152},
        "(a f)x40",
        {"a": {"scale": 0.015625}},
    ),
    (
        "olmo3",  # allenai/Olmo-3-1025-7B
        {"max_position_embeddings": 65536, "rms_norm_eps": 1e-06, "rope_scaling": YARN, "rope_theta": 500000,
         "vocab_size": 100278},
        "((w f)x3 a f)x8",
        {"w": {"rope.scaling": None, "window": 4096}, "a": {"rope.theta": 5e5}},
    ),
    (
        "exaone4",  # LGAI-EXAONE/EXAONE-4.0-32B
        {"head_dim": 128, "hidden_size": 5120, "intermediate_size": 27392, "num_attention_heads": 40,
         "layer_types": [*["sliding_attention"] * 3, "full_attention"] * 16, "num_hidden_layers": 64,
         "max_position_embeddings": 131072, "num_key_value_heads": 8, "rope_scaling": LLAMA3,
         "rope_theta": 1000000, "sliding_window_pattern": "LLLG"},
        "((w f)x3 a f)x16",
        {"w": {"rope.theta": 1e6}, "a": {"rope": None, "qk_norm": "head"}},
    ),
    (
        "cohere2",  # CohereLabs/c4ai-command-r7b-12-2024
        COMMAND_R7B,
        "(w+f x3 a+f)x8",
        {"w": {"rope.interleaved": True, "rope.theta": 5e4, "window": 4096}, "a": {"rope": None}},
    ),
    (
        "phi3",  # microsoft/Phi-3-mini-4k-instruct
        {"attention_bias": False, "rope_scaling": None, "rope_theta": 10000.0, "sliding_window": 2047},
        "(w f)x32",
        {"w": {"window": 2047, "rope.fraction": 1.0}},
    ),
    (
        "phi3",  # microsoft/Phi-4-mini-instruct
        {"attention_bias": False, "full_attn_mod": 1, "interpolate_factor": 1, "lm_head_bias": False,
         "max_position_embeddings": 131072, "mlp_bias": False, "num_attention_heads": 24,
         "num_key_value_heads": 8, "original_max_position_embeddings": 4096, "partial_rotary_factor": 0.75,
         "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.5] * 48},
         "sliding_window": 262144, "tie_word_embeddings": True, "vocab_size": 200064},
        "(w f)x32",
        {"w": {"rope.fraction": 0.75, "rope.max_positions": 131072}},
    ),
    (
        "stablelm",  # stabilityai/stablelm-2-1_6b
        {"hidden_size": 2048, "intermediate_size": 5632, "num_heads": 32, "num_hidden_layers": 24,
         "partial_rotary_factor": 0.25, "rope_theta": 10000, "rotary_scaling_factor": 1.0,
         "use_qkv_bias": True, "vocab_size": 100352},
        "(a f)x24",
        {"a": {"rope.fraction": 0.25, "qkv_bias": True, "out_bias": False}},
    ),
    (
        "stablelm",  # stabilityai/stablelm-2-12b
        {"hidden_size": 5120, "intermediate_size": 13824, "num_heads": 32, "num_hidden_layers": 40,
         "num_key_value_heads": 8, "qk_layernorm": True, "rotary_scaling_factor": 1.0, "use_norm_bias": False,
         "use_parallel_residual": True, "vocab_size": 100352},
        "a+f x40",
        {"a": {"rope.fraction": 0.25, "qk_norm": "layernorm", "head_dim": 160}},
    ),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "fields", "pattern", "options"), PUBLISHED, ids=[f"{i}-{p[0]}" for i, p in enumerate(PUBLISHED)]
)
def test_published_configurations_are_read(name, fields, pattern, options, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": name, **fields}))
    family = FAMILIES[name]
    config = family.read(AutoConfig.from_pretrained(tmp_path).to_dict())
    assert config.pattern == pattern
    for recipe, wanted in options.items():
        for path, value in wanted.items():
            kind = LAYERS[config.layers[recipe].type]
            found: Any = kind.Options.model_validate(dict(config.layers[recipe].options)).model_dump()
            for key in path.split("."):
                found = found[key]
            assert found == value, (recipe, path)
    again = family.read(AutoConfig.for_model(name, **family.write(config)).to_dict())
    assert architecture_hash(again) == architecture_hash(config)


@pytest.mark.parametrize(
    ("name", "changed", "message"),
    [
        ("cohere2", {"use_qk_norm": True}, "use_qk_norm = True"),
        ("phi3", {"lm_head_bias": True}, "lm_head_bias = True"),
        ("stablelm", {"rotary_scaling_factor": 2.0}, "rotary_scaling_factor = 2.0"),
        ("mpt", {"attn_config": {"rope": True}}, "attn_config.rope = True"),
        ("mpt", {"attn_config": {"alibi_bias_max": 16}}, "attn_config.alibi_bias_max = 16"),
    ],
)
def test_fields_that_the_class_does_not_read_must_say_what_it_does(name, changed, message):
    with pytest.raises(ConversionError, match=message):
        FAMILIES[name].read({**AutoConfig.for_model(name).to_dict(), **changed})
