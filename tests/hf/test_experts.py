"""Classes of transformers with experts in every layer: published configurations, what the classes have no
words for, and folders in which each expert has keys of its own."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from native_models import CONFIGS, native
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from hybrid_lm.config.schema import ModelConfig
from hybrid_lm.hf import convert
from hybrid_lm.hf.adapters import lora_targets
from hybrid_lm.hf.convert import export, from_hf
from hybrid_lm.hf.families import FAMILIES
from hybrid_lm.hf.native import choose
from hybrid_lm.hf.options import ConversionError
from hybrid_lm.hf.verify import verify_object
from hybrid_lm.model.build import build_model
from hybrid_lm.model.stats import totals

TRAINED = {"router_aux_loss_coef": 0.02, "output_router_logits": False, "torch_dtype": "bfloat16"}
YARN = {"beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096}
YARN |= {"rope_type": "yarn", "truncate": False}

# (family, fields of a published model, its pattern, parameters as its model card or weights' index has them)
PUBLISHED: list[tuple[str, dict[str, Any], str, int]] = [
    (
        "mixtral",  # mistralai/Mixtral-8x7B-v0.1
        {"hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 32768,
         "num_attention_heads": 32, "num_experts_per_tok": 2, "num_hidden_layers": 32,
         "num_key_value_heads": 8, "num_local_experts": 8, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0,
         "sliding_window": None, "tie_word_embeddings": False, "vocab_size": 32000},
        "(a e)x32",
        46_702_792_704,
    ),
    (
        "qwen3_moe",  # Qwen/Qwen3-30B-A3B
        {"attention_bias": False, "decoder_sparse_step": 1, "head_dim": 128, "hidden_size": 2048,
         "intermediate_size": 6144, "max_position_embeddings": 40960, "max_window_layers": 48,
         "mlp_only_layers": [], "moe_intermediate_size": 768, "norm_topk_prob": True,
         "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48,
         "num_key_value_heads": 4, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000.0,
         "sliding_window": None, "tie_word_embeddings": False, "use_sliding_window": False,
         "vocab_size": 151936},
        "(a e)x48",
        30_532_122_624,
    ),
    (
        "gpt_oss",  # openai/gpt-oss-20b, without its quantization
        {"attention_bias": True, "experts_per_token": 4, "head_dim": 64, "hidden_size": 2880,
         "initial_context_length": 4096, "intermediate_size": 2880,
         "layer_types": ["sliding_attention", "full_attention"] * 12, "max_position_embeddings": 131072,
         "num_attention_heads": 64, "num_experts_per_tok": 4, "num_hidden_layers": 24,
         "num_key_value_heads": 8, "num_local_experts": 32, "rms_norm_eps": 1e-05, "rope_scaling": YARN,
         "rope_theta": 150000, "sliding_window": 128, "swiglu_limit": 7.0, "tie_word_embeddings": False,
         "vocab_size": 201088},
        "(w e a e)x12",
        20_914_757_184,
    ),
]  # fmt: skip


def filled(name: str, fields: dict[str, Any], tmp_path) -> dict[str, Any]:
    """Fields of a file as transformers reads them."""
    (tmp_path / "config.json").write_text(json.dumps({**TRAINED, **fields, "model_type": name}))
    return AutoConfig.from_pretrained(tmp_path).to_dict()


@pytest.mark.parametrize(("name", "fields", "pattern", "parameters"), PUBLISHED, ids=lambda x: str(x)[:9])
def test_published_configurations(name, fields, pattern, parameters, tmp_path):
    config = FAMILIES[name].read(filled(name, fields, tmp_path))
    assert config.pattern == pattern
    assert totals(build_model(config, weights=False)).parameters == parameters
    target = choose(config)
    assert target.family is FAMILIES[name]
    assert FAMILIES[name].read(AutoConfig.for_model(name, **target.fields).to_dict()) == config


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("gpt_oss", {"quantization_config": {"quant_method": "mxfp4"}}, "quantised checkpoints are not read"),
        ("gpt_oss", {"experts_per_token": 2}, "experts_per_token = 2: the class has 4"),
        ("gpt_oss", {"initial_context_length": 8192}, "initial_context_length = 8192: the class has 4096"),
        ("mixtral", {"router_jitter_noise": 0.01}, "router_jitter_noise = 0.01: only 0.0"),
        ("qwen3_moe", {"n_shared_experts": 1}, "unknown field n_shared_experts"),
    ],
)
def test_fields_that_are_not_had(name, change, message, tmp_path):
    fields = next(published[1] for published in PUBLISHED if published[0] == name)
    with pytest.raises(ConversionError, match=message):
        FAMILIES[name].read(filled(name, {**fields, **change}, tmp_path))


ATTENTION = {"type": "attention", "n_heads": 4, "rope": {}}
MOE = {"type": "moe", "n_experts": 4, "d_ff": 48}
QWEN = {**ATTENTION, "qk_norm": "head"}
OSS = {**ATTENTION, "qkv_bias": True, "out_bias": True, "sinks": True}
OSS_MOE = {**MOE, "router": "topk_softmax", "router_bias": True, "bias": True, "limit": 7.0}


@pytest.mark.parametrize(
    ("pattern", "a", "e", "wanted"),
    [
        ("a e", ATTENTION, MOE, "mixtral"),
        ("a e", ATTENTION, {**MOE, "balance": "loss", "balance_factor": 0.5, "z_loss": 0.1}, "mixtral"),
        ("a e", ATTENTION, {**MOE, "renormalise": False}, None),
        ("a e", ATTENTION, {**MOE, "scale": 2.0}, None),
        ("a e", ATTENTION, {**MOE, "router": "sigmoid"}, None),
        ("a e", ATTENTION, {**MOE, "d_shared": 40}, None),
        ("e a", ATTENTION, MOE, None),
        ("a e", QWEN, MOE, "qwen3_moe"),
        ("a e a f a e", QWEN, {**MOE, "renormalise": False}, "qwen3_moe"),
        ("a e a f", ATTENTION, MOE, None),
        ("a e w e", QWEN, MOE, None),
        ("a e w e", OSS, OSS_MOE, "gpt_oss"),
        ("a e", OSS, {**OSS_MOE, "renormalise": False, "alpha": 1.5}, "gpt_oss"),
        ("a e", OSS, {**OSS_MOE, "limit": None}, None),
        ("a e", {**OSS, "sinks": False}, OSS_MOE, None),
    ],
)
def test_which_class_fits(pattern, a, e, wanted):
    layers = {"a": a, "w": {**a, "window": 8}, "e": e, "f": {"type": "mlp"}}
    layers = {name: layer for name, layer in layers.items() if name in pattern}
    data = {"d_model": 64, "vocab_size": 257, "pattern": pattern, "layers": layers}
    target = choose(ModelConfig.model_validate(data))
    assert (target.family.name if target.family else None) == wanted
    assert target.family or target.reasons.keys() == set(FAMILIES)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_through_folders(name, tmp_path, monkeypatch):
    def verify(folder, model, **how):
        return verify_object(AutoModelForCausalLM.from_pretrained(folder), model, **how)

    # Another process takes seconds to import transformers.
    monkeypatch.setattr(convert, "verify", verify)
    theirs = native(name, CONFIGS[name][0])
    theirs.save_pretrained(tmp_path / "in")
    ours = from_hf(tmp_path / "in")
    out = export(ours, tmp_path / "out", format=f"native:{name}")
    before, after = (load_file(folder / "model.safetensors") for folder in (tmp_path / "in", out))
    assert before.keys() == after.keys()
    assert all(torch.equal(x, after[key]) for key, x in before.items())
    experts = [key for key in before if ".experts.3." in key]
    assert len(experts) == (0 if name == "gpt_oss" else 3 * theirs.config.num_hidden_layers)


def test_the_expert_for_all_tokens_is_the_mixtures_own():
    """Not one of the MLPs, to which an adapter for MLPs would go."""
    layers = {"f": {"type": "mlp"}, "e": {"type": "moe", "n_experts": 4, "d_shared": 16}}
    config = {"d_model": 16, "vocab_size": 9, "pattern": "f e", "layers": layers}
    made = convert.to_hf(build_model(ModelConfig.model_validate(config)), format="remote")
    shared = {f"model.layers.1.layer.shared.{name}_proj" for name in ("gate", "up", "down")}
    assert set(lora_targets(made, "moe")) == shared
    assert not shared & set(lora_targets(made, "mlp"))
