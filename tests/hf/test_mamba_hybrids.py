"""Mamba hybrids of transformers: what their classes have no words for, and the configurations that were
published for them."""

from __future__ import annotations

import json

import pytest
import torch
from native_models import CONFIGS, native
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from hybrid_lm.config.schema import ModelConfig
from hybrid_lm.hf.convert import from_hf, to_hf
from hybrid_lm.hf.families import FAMILIES
from hybrid_lm.hf.family import TOLERANCE
from hybrid_lm.hf.native import choose
from hybrid_lm.hf.options import ConversionError
from hybrid_lm.hf.verify import verify_object
from hybrid_lm.laws import shake
from hybrid_lm.model.build import build_model

LAYERS = {
    "a": {"type": "attention", "n_heads": 4, "n_kv_heads": 2},
    "r": {"type": "attention", "n_heads": 4, "n_kv_heads": 2, "rope": {}},
    "m": {"type": "mamba", "d_state": 8, "inner_norm": "weighted"},
    "M": {"type": "mamba2", "d_state": 16, "head_dim": 16},
    "f": {"type": "mlp", "d_ff": 96},
    "u": {"type": "mlp", "d_ff": 96, "gated": False, "act": "relu2"},
    "e": {"type": "moe", "n_experts": 4, "d_ff": 96, "renormalise": False},
    "E": {"type": "moe", "n_experts": 4, "d_ff": 48, "router": "topk_softmax"},
    "X": {"type": "moe", "n_experts": 4, "d_ff": 48, "router": "sigmoid", "gated": False, "act": "relu2"},
}
LAYERS["X"]["d_shared"] = 40


def of(pattern: str, **layers: dict[str, object]) -> ModelConfig:
    changed = {name: {**LAYERS[name], **more} for name, more in layers.items()}
    data = {"d_model": 64, "vocab_size": 257, "pattern": pattern, "layers": {**LAYERS, **changed}}
    return ModelConfig.model_validate({**data, "embedding": {"tied": False}})


@pytest.mark.parametrize(
    ("config", "family"),
    [
        (of("(M f r f)x2 M f"), "bamba"),
        (of("M f a f"), "granitemoehybrid"),
        (of("M f+E a f+E"), "granitemoehybrid"),
        (of("a E+f M E+f"), "granitemoehybrid"),
        (of("M+r f r+M f"), "falcon_h1"),
        (of("r+M f", M={"norm": "norm_gate", "d_inner": 96, "multipliers": [2, 1, 3, 5, 4]}), "falcon_h1"),
        (of("m f m e a f m e m f m e a f m e"), "jamba"),
        (of("a e"), "jamba"),
        (of("m f a f m f m f"), "jamba"),
        (of("M M u X a u M X", M={"dt_limit": [0.001, float("inf")]}), "nemotron_h"),
        (of("M a"), "nemotron_h"),
    ],
)  # fmt: skip
def test_goes_out_as_its_class(config, family):
    target = choose(config)
    assert target.family is not None, target.reasons
    assert target.family.name == family, target.reasons
    model = build_model(config)
    shake(model, seed=0)
    theirs = to_hf(model)
    assert type(theirs).__name__ == target.family.class_name
    cached = not target.family.cached_differs(theirs.config.to_dict())
    verify_object(theirs, model, native=TOLERANCE, cached=cached)


@pytest.mark.parametrize(
    ("config", "family", "reason"),
    [
        (of("(M f)x2"), "bamba", "no layer is attention"),
        (of("M f a f"), "bamba", "attention.rope is null"),
        (of("M f r"), "bamba", "no whole number of blocks"),
        (of("M f r f", M={"d_inner": 96}), "bamba", "mamba_expand would be 1.5"),
        (of("M f r f", M={"norm": "gate"}), "bamba", "layer 0 has norm gate"),
        (of("(M f)x2"), "granitemoehybrid", "no layer is attention"),
        (of("M f a f+E"), "granitemoehybrid", "experts in 1 of 2 layers"),
        (of("r f+E", E={"router": "softmax_topk"}), "granitemoehybrid", "moe.router is softmax_topk"),
        (of("M+r f", M={"in_multiplier": 2.0}), "bamba", "layer 0 is"),
        (of("M f+r f", M={"in_multiplier": 2.0}), "falcon_h1", "layer 0 is mamba2"),
        (of("m f a f", m={"inner_norm": "none"}), "jamba", "mamba.inner_norm is none"),
        (of("a f m f m f a f a f"), "jamba", "attention in the layers 0, 3, 4"),
        (of("m f a e m e"), "jamba", "experts in the layers 1, 2"),
        (of("m f m f"), "jamba", "no layer is attention"),
        (of("m f a e", e={"d_ff": 48}), "jamba", "d_ff 48"),
        (of("M X"), "nemotron_h", "no layer is attention"),
        (of("M a", M={"dt_limit": [0.0, 0.5]}), "nemotron_h", "dt_limit ends at 0.5"),
        (of("M r"), "nemotron_h", "layer 1 has rope"),
        (of("M a f"), "nemotron_h", "mlp.gated is true"),
        (of("a u X", X={"act": "relu"}), "nemotron_h", "layer 2 has act relu"),
    ],
)
def test_what_has_no_words_there_is_told(config, family, reason):
    with pytest.raises(ConversionError, match=f"not {family}: .*{reason}"):
        choose(config, f"native:{family}")


@pytest.mark.parametrize(
    ("family", "changed", "message"),
    [
        ("bamba", {"attn_layer_indices": []}, "bamba: no layer is attention"),
        ("bamba", {"attn_rotary_emb": 16}, "attn_rotary_emb = 16: the class has 8"),
        ("falcon_h1", {"projectors_bias": True}, "mamba_proj_bias = False with projectors_bias = True"),
        ("falcon_h1", {"mamba_use_mlp": False}, "mamba_use_mlp = False"),
        ("jamba", {"mamba_inner_layernorms": False}, "mamba_inner_layernorms = False"),
        ("granitemoehybrid", {"position_embedding_type": "alibi"}, "position_embedding_type = 'alibi'"),
        ("granitemoehybrid", {"layer_types": ["conv"] * 3}, "layer_types: 'conv'"),
        ("granitemoehybrid", {"layer_types": ["full_attention"]}, "1 entries for 3 layers"),
        ("nemotron_h", {"tie_word_embeddings": True}, "tie_word_embeddings = True"),
        ("nemotron_h", {"mlp_bias": True}, "mlp_bias = True"),
        ("nemotron_h", {"norm_eps": 1e-5}, "norm_eps = 1e-05: the class has 0.01"),
        ("nemotron_h", {"sliding_window": 8}, "unknown field sliding_window"),
    ],
)
def test_what_we_have_not_is_refused_by_name(family, changed, message):
    fields = AutoConfig.for_model(family, **CONFIGS[family][0]).to_dict()
    with pytest.raises(ConversionError, match=message):
        FAMILIES[family].read({**fields, **changed})


def test_parts_that_the_class_does_not_run_are_left(tmp_path):
    native("nemotron_h", CONFIGS["nemotron_h"][3]).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    stored = load_file(path)
    for key, message in (("mtp.layers.0.norm.weight", None), ("backbone.mtp.weight", "nothing here takes")):
        save_file({**stored, key: torch.ones(3)}, path, {"format": "pt"})
        if message is None:
            from_hf(tmp_path, check=False)
        else:
            with pytest.raises(ConversionError, match=message):
                from_hf(tmp_path, check=False)


# As in the files of ai21labs/Jamba-v0.1, ibm-ai-platform/Bamba-9B-v1, tiiuae/Falcon-H1-1.5B-Base,
# ibm-granite/granite-4.0-h-tiny and nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16, without what is as the class
# has it; and their sizes in billions.
PUBLISHED = {
    "jamba": (
        {
            **{"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32},
            **{"attn_layer_offset": 4, "attn_layer_period": 8, "num_experts": 16, "num_key_value_heads": 8},
            **{"mamba_dt_rank": 256, "mamba_inner_layernorms": True, "num_logits_to_keep": 1},
            **{"sliding_window": None, "use_mamba_kernels": True, "vocab_size": 65536},
        },
        51.57,
    ),
    "bamba": (
        {
            **{"attn_layer_indices": [9, 18, 27], "attn_rotary_emb": 64, "hidden_size": 4096},
            **{"intermediate_size": 14336, "mamba_d_head": 64, "mamba_d_state": 128, "mamba_n_heads": 128},
            **{"num_hidden_layers": 32, "num_logits_to_keep": 1, "rope_scaling": None, "rope_theta": 10000.0},
            **{"use_mamba_kernels": True, "vocab_size": 128256},
        },
        9.78,
    ),
    "falcon_h1": (
        {
            **{"attn_layer_indices": None, "head_dim": 128, "hidden_size": 2048, "intermediate_size": 4096},
            **{"mamba_d_head": 64, "mamba_d_ssm": 3072, "mamba_d_state": 256, "mamba_n_heads": 48},
            **{"mamba_norm_before_gate": False, "mamba_rms_norm": False, "mamba_use_mlp": True},
            **{"mlp_expansion_factor": 8, "num_attention_heads": 8, "num_key_value_heads": 2},
            **{"num_hidden_layers": 24, "rope_scaling": None, "rope_theta": 1e11, "vocab_size": 65537},
            **{"sliding_window": None, "lm_head_multiplier": 0.01953125},
        },
        1.48,
    ),
    "granitemoehybrid": (
        {
            **{"attention_multiplier": 0.0078125, "embedding_multiplier": 12, "hidden_size": 1536},
            **{"init_method": "mup", "intermediate_size": 512, "logits_scaling": 6, "mamba_d_state": 128},
            **{"layer_types": (["mamba"] * 9 + ["attention"]) * 4, "mamba_n_heads": 48},
            **{"normalization_function": "rmsnorm", "num_attention_heads": 12, "num_experts_per_tok": 6},
            **{"num_hidden_layers": 40, "num_key_value_heads": 4, "num_local_experts": 64},
            **{"position_embedding_type": "nope", "residual_multiplier": 0.22, "rms_norm_eps": 1e-5},
            **{"rope_scaling": None, "rope_theta": 10000, "shared_intermediate_size": 1024},
            **{"tie_word_embeddings": True, "vocab_size": 100352},
        },
        6.94,
    ),
    "nemotron_h": (
        {
            **{"hidden_size": 2688, "intermediate_size": 1856, "mamba_num_heads": 64, "norm_eps": 1e-5},
            **{"hybrid_override_pattern": "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"},
            **{"mamba_ssm_cache_dtype": "float32", "moe_intermediate_size": 1856, "num_hidden_layers": 52},
            **{"moe_shared_expert_intermediate_size": 3712, "n_routed_experts": 128, "rope_theta": 10000},
            **{"num_experts_per_tok": 6, "num_key_value_heads": 2, "partial_rotary_factor": 1.0},
            **{"routed_scaling_factor": 2.5, "sliding_window": None, "use_mamba_kernels": True},
        },
        31.58,
    ),
}


@pytest.mark.parametrize("family", PUBLISHED)
def test_published_configurations_are_read(family, tmp_path):
    fields, billions = PUBLISHED[family]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family, **fields}))
    there = AutoConfig.from_pretrained(tmp_path)
    config = FAMILIES[family].read(there.to_dict())
    ours = build_model(config, weights=False)
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(there)
    corrections = sum(x.numel() for name, x in theirs.named_buffers() if name.endswith("correction_bias"))
    count = sum(p.numel() for p in theirs.parameters()) + corrections
    assert sum(p.numel() for p in ours.parameters()) == count
    assert round(count / 1e9, 2) == billions
    assert FAMILIES[family].read({**there.to_dict(), **FAMILIES[family].write(config)}) == config
