"""RecurrentGemma, LFM2 and DeepSeek-V3: published configurations, what the classes have no words for, and
folders."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from native_models import CONFIGS, native
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from hybrid_lm.config.schema import ModelConfig
from hybrid_lm.hf import convert
from hybrid_lm.hf.convert import export, from_hf
from hybrid_lm.hf.families import FAMILIES
from hybrid_lm.hf.native import choose
from hybrid_lm.hf.options import ConversionError
from hybrid_lm.hf.verify import verify_object
from hybrid_lm.model.build import build_model
from hybrid_lm.model.stats import totals

LFM2 = {
    "block_auto_adjust_ff_dim": True, "block_dim": 2048, "block_ff_dim": 12288,
    "block_ffn_dim_multiplier": 1.0, "block_mlp_init_scale": 1.0, "block_multiple_of": 256,
    "block_norm_eps": 1e-05, "block_out_init_scale": 1.0, "block_use_swiglu": True,
    "block_use_xavier_init": True, "conv_L_cache": 3, "conv_bias": False, "conv_dim": 2048,
    "conv_dim_out": 2048, "conv_use_xavier_init": True, "full_attn_idxs": [2, 5, 8, 10, 12, 14],
    "hidden_size": 2048, "max_position_embeddings": 128000, "norm_eps": 1e-05, "num_attention_heads": 32,
    "num_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8, "rope_theta": 1000000.0,
    "tie_embedding": True, "use_pos_enc": True, "vocab_size": 65536,
}  # fmt: skip
RECURRENT_GEMMA = {
    "attention_bias": False, "attention_dropout": 0.0, "attention_window_size": 2048,
    "block_types": ["recurrent", "recurrent", "attention"], "conv1d_width": 4,
    "embeddings_scale_by_sqrt_dim": True, "final_w_init_variance_scale": 0.07692307692307693,
    "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 2560,
    "intermediate_size": 15360, "logits_soft_cap": 30.0, "lru_width": 2560, "num_attention_heads": 10,
    "num_hidden_layers": 26, "num_key_value_heads": 1, "partial_rotary_factor": 0.5, "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0, "vocab_size": 256000, "w_init_variance_scale": 0.01,
}  # fmt: skip
MOONLIGHT = {
    "attention_bias": False, "aux_loss_alpha": 0.001, "ep_size": 1, "first_k_dense_replace": 1,
    "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 11264, "kv_lora_rank": 512,
    "max_position_embeddings": 8192, "moe_intermediate_size": 1408, "moe_layer_freq": 1, "n_group": 1,
    "n_routed_experts": 64, "n_shared_experts": 2, "norm_topk_prob": True, "num_attention_heads": 16,
    "num_experts_per_tok": 6, "num_hidden_layers": 27, "num_key_value_heads": 16,
    "num_nextn_predict_layers": 0, "pretraining_tp": 1, "q_lora_rank": None, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "rms_norm_eps": 1e-05, "rope_theta": 50000.0, "routed_scaling_factor": 2.446,
    "scoring_func": "sigmoid", "seq_aux": True, "tie_word_embeddings": False, "topk_group": 1,
    "topk_method": "noaux_tc", "v_head_dim": 128, "vocab_size": 163840,
}  # fmt: skip
YARN = {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0}
YARN |= {"original_max_position_embeddings": 4096, "type": "yarn"}
DEEPSEEK = {
    **MOONLIGHT, "first_k_dense_replace": 3, "hidden_size": 7168, "intermediate_size": 18432,
    "max_position_embeddings": 163840, "moe_intermediate_size": 2048, "n_group": 8, "n_routed_experts": 256,
    "n_shared_experts": 1, "num_attention_heads": 128, "num_experts_per_tok": 8, "num_hidden_layers": 61,
    "num_key_value_heads": 128, "num_nextn_predict_layers": 1, "q_lora_rank": 1536, "rms_norm_eps": 1e-06,
    "rope_scaling": YARN, "rope_theta": 10000, "routed_scaling_factor": 2.5, "topk_group": 4,
    "vocab_size": 129280,
}  # fmt: skip

# (family, fields of a published model, its pattern, its parameters in billions as its card has them)
PUBLISHED: list[tuple[str, dict[str, Any], str, str]] = [
    ("lfm2", LFM2, "(c f c f a f)x3 (c f a f)x3 c f", "1.17"),  # LiquidAI/LFM2-1.2B
    ("recurrent_gemma", RECURRENT_GEMMA, "(r f r f w f)x8 r f r f", "2.68"),  # google/recurrentgemma-2b
    ("deepseek_v3", MOONLIGHT, "a f (a e)x26", "15.96"),  # moonshotai/Moonlight-16B-A3B
    ("deepseek_v3", DEEPSEEK, "(a f)x3 (a e)x58", "671.03"),  # deepseek-ai/DeepSeek-V3, not quantized
]


def filled(name: str, fields: dict[str, Any], tmp_path) -> dict[str, Any]:
    """Fields of a file as transformers reads them."""
    (tmp_path / "config.json").write_text(
        json.dumps({"torch_dtype": "bfloat16", **fields, "model_type": name})
    )
    return AutoConfig.from_pretrained(tmp_path).to_dict()


@pytest.mark.parametrize(("name", "fields", "pattern", "billions"), PUBLISHED, ids=lambda x: str(x)[:9])
def test_published_configurations(name, fields, pattern, billions, tmp_path):
    config = FAMILIES[name].read(filled(name, fields, tmp_path))
    assert config.pattern == pattern
    assert f"{totals(build_model(config, weights=False)).parameters / 1e9:.2f}" == billions
    target = choose(config)
    assert target.family is FAMILIES[name]
    assert FAMILIES[name].read(AutoConfig.for_model(name, **target.fields).to_dict()) == config


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("lfm2", {"num_heads": 16}, "num_heads = 16: the class has 32"),
        ("lfm2", {"full_attn_idxs": []}, "no layer is attention"),
        ("lfm2", {"rope_scaling": {"rope_type": "other"}}, "rope_parameters.rope_type = 'other'"),
        ("recurrent_gemma", {"block_types": ["recurrent"]}, "no layer is attention"),
        ("recurrent_gemma", {"block_types": ["recurrent", "mlp"]}, "block_types: 'mlp': only recurrent, att"),
        ("recurrent_gemma", {"hidden_activation": "silu"}, "hidden_activation = 'silu'"),
        ("deepseek_v3", {"num_key_value_heads": 4}, "num_key_value_heads = 4: the class has 128"),
        ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func = 'softmax': the class has 'sigmoid'"),
        (
            "deepseek_v3",
            {"quantization_config": {"quant_method": "fp8"}},
            "quantised checkpoints are not read",
        ),
    ],
)
def test_fields_that_are_not_had(name, change, message, tmp_path):
    fields = {**next(published[1] for published in reversed(PUBLISHED) if published[0] == name), **change}
    with pytest.raises(ConversionError, match=message):
        FAMILIES[name].read(filled(name, fields, tmp_path))


F = {"type": "mlp", "d_ff": 48}
QK = {"type": "attention", "n_heads": 4, "qk_norm": "head", "rope": {}}
LATENT = {"type": "mla", "n_heads": 2, "kv_rank": 16, "nope_dim": 8, "rope_dim": 4, "v_dim": 8}
EXPERTS = {"type": "moe", "n_experts": 4, "d_ff": 16, "d_shared": 32, "router": "sigmoid"}
GEMMA = {
    "block": {"unit_offset": True, "eps": 1e-6},
    "embedding": {"multiplier": 8.0},
    "head": {"softcap": 30.0},
    "layers": {
        "r": {"type": "rg_lru", "n_heads": 4},
        "w": {"type": "attention", "n_heads": 4, "window": 8, "rope": {"fraction": 0.5}, "out_bias": True},
        "f": {**F, "act": "gelu_tanh", "bias": True},
    },
}


def gemma(pattern: str, **changes: dict[str, Any]) -> dict[str, Any]:
    layers = {name: {**layer, **changes.pop(name, {})} for name, layer in GEMMA["layers"].items()}
    return {**GEMMA, **changes, "pattern": pattern, "layers": layers}


def plain(pattern: str, **layers: dict[str, Any]) -> dict[str, Any]:
    return {"pattern": pattern, "layers": {name: layers[name] for name in layers if name in pattern}}


def lfm2(pattern: str, a: dict[str, Any] = QK, c: dict[str, Any] | None = None) -> dict[str, Any]:
    return plain(pattern, a=a, c={"type": "short_conv", **(c or {})}, f=F)


def deepseek(
    pattern: str, a: dict[str, Any] | None = None, e: dict[str, Any] | None = None
) -> dict[str, Any]:
    return plain(pattern, a={**LATENT, **(a or {})}, e={**EXPERTS, **(e or {})}, f=F)


@pytest.mark.parametrize(
    ("family", "config", "reason"),
    [
        ("lfm2", lfm2("c f a f c f"), None),
        ("lfm2", lfm2("a f c f", c={"width": 5, "bias": True}), None),
        ("lfm2", lfm2("c f c f"), "no layer is attention"),
        ("lfm2", lfm2("c f a f", a={**QK, "qk_norm": "none"}), "attention.qk_norm is none, it has head"),
        ("lfm2", lfm2("c f a f", a={**QK, "qk_norm_eps": 1e-3}), "layer 2 has qk_norm_eps 0.001"),
        ("lfm2", lfm2("c f a f", a={**QK, "window": 8}), "layer 2 has window 8"),
        ("lfm2", lfm2("c a f"), "layer 1 is attention, it has mlp there"),
        ("recurrent_gemma", gemma("r f r f w f r f"), None),
        ("recurrent_gemma", gemma("w f r f w f w f", r={"d_inner": 96, "d_conv": 2}), None),
        ("recurrent_gemma", gemma("r f r f"), "no layer is attention"),
        ("recurrent_gemma", gemma("r f w f", r={"n_heads": 8}), "layer 0 has n_heads 8, it has 4"),
        ("recurrent_gemma", gemma("r f w f", r={"c": 4.0}), "rg_lru.c is 4.0, it has 8.0"),
        ("recurrent_gemma", gemma("r f w f", r={"bias": False}), "rg_lru.bias is false, it has true"),
        ("recurrent_gemma", gemma("r f w f", embedding={}), "embedding.multiplier is 1.0, it has 8.0"),
        ("recurrent_gemma", gemma("r f w f", head={}), "logits_soft_cap"),
        ("recurrent_gemma", gemma("r f w f", w={"window": None}), "attention_window_size"),
        ("deepseek_v3", deepseek("a f a e a e"), None),
        ("deepseek_v3", deepseek("a f a f", a={"q_rank": 12, "bias": True, "rope": {"theta": 5.0}}), None),
        ("deepseek_v3", deepseek("a e a e", e={"n_groups": 2, "balance": "bias", "scale": 2.0}), None),
        ("deepseek_v3", deepseek("a e a f"), "an MLP stands behind a mixture of experts"),
        ("deepseek_v3", deepseek("a f", a={"rope": None}), "mla.rope is null"),
        ("deepseek_v3", deepseek("a f", a={"scale": 0.5}), "layer 0 has scale 0.5"),
        ("deepseek_v3", deepseek("a f", a={"norm_eps": 1e-3}), "mla.norm_eps is 0.001, it has 1e-06"),
        ("deepseek_v3", deepseek("a e", e={"d_shared": 0}), "moe.d_shared is 0"),
        ("deepseek_v3", deepseek("a e", e={"d_shared": 24}), "n_shared_experts would be 1.5"),
        ("deepseek_v3", deepseek("a e", e={"router": "softmax_topk"}), "moe.router is softmax_topk"),
        ("deepseek_v3", deepseek("a e", e={"bias": True}), "layer 1 has bias true"),
    ],
)  # fmt: skip
def test_which_architectures_fit(family, config, reason):
    made = ModelConfig.model_validate({"d_model": 64, "vocab_size": 257, **config})
    if reason is None:
        assert choose(made).family is FAMILIES[family]
    else:
        with pytest.raises(ConversionError, match=f"not {family}: .*{reason}"):
            choose(made, f"native:{family}")


@pytest.fixture
def here(monkeypatch):
    """Folders are compared in this process: another one takes seconds to import transformers."""

    def verify(folder, model, **how):
        return verify_object(AutoModelForCausalLM.from_pretrained(folder), model, **how)

    monkeypatch.setattr(convert, "verify", verify)


@pytest.mark.parametrize("name", ["recurrent_gemma", "lfm2", "deepseek_v3"])
def test_through_folders(name, tmp_path, here):
    theirs = native(name, CONFIGS[name][0])
    theirs.save_pretrained(tmp_path / "in")
    out = export(from_hf(tmp_path / "in"), tmp_path / "out", format=f"native:{name}")
    before, after = (load_file(folder / "model.safetensors") for folder in (tmp_path / "in", out))
    assert before.keys() == after.keys()
    assert all(torch.equal(x, after[key]) for key, x in before.items())


def test_layers_that_guess_further_ahead_are_left_out(tmp_path):
    theirs = native("deepseek_v3", CONFIGS["deepseek_v3"][2])
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    stored = load_file(path)
    extra = {f"model.layers.61.{name}.weight": torch.ones(64) for name in ("enorm", "hnorm")}
    save_file({**stored, **extra}, path, {"format": "pt"})
    from_hf(tmp_path, check=False)
    save_file({**stored, "model.layers.60.enorm.weight": torch.ones(64)}, path, {"format": "pt"})
    with pytest.raises(ConversionError, match=r"nothing here takes the weight model\.layers\.60"):
        from_hf(tmp_path)


def test_a_padded_batch_is_exact_where_theirs_is_not():
    theirs = native("recurrent_gemma", CONFIGS["recurrent_gemma"][0])
    ours = from_hf(theirs, check=False)
    tokens = torch.randint(257, (1, 11), generator=torch.Generator().manual_seed(1))
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.int64), tokens], 1)
    seen = torch.cat([torch.zeros(1, 5, dtype=torch.int64), torch.ones(1, 11, dtype=torch.int64)], 1)
    with torch.no_grad():
        alone = ours(tokens).logits
        assert (ours(padded, doc_ids=seen.int()).logits[:, 5:] - alone).abs().max() <= 2e-5
        # If theirs becomes exact, the family's docstring no longer holds.
        other = theirs(padded, attention_mask=seen, use_cache=False).logits[:, 5:]
        assert (other - alone).abs().max() > 1e-2
