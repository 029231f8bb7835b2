"""Configurations and keys as checkpoints on the hub have them, where they are not what transformers saves."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from native_models import CONFIGS, native
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from hybrid_lm.hf.convert import from_hf
from hybrid_lm.hf.families import FAMILIES

# Fields of Qwen3-Next, of the language models of Qwen3.5 to 3.8, and of OLMo Hybrid as OLMo-core writes it,
# that are not as the classes' defaults, or not the classes' own.
PUBLISHED: dict[str, dict[str, Any]] = {
    "qwen3_next": {
        "decoder_sparse_step": 1,
        "full_attention_interval": 4,
        "intermediate_size": 5120,
        "max_position_embeddings": 262144,
        "mlp_only_layers": [],
        "output_router_logits": False,
        "partial_rotary_factor": 0.25,
        "rope_scaling": None,
        "rope_theta": 10000000,
        "router_aux_loss_coef": 0.001,
        "torch_dtype": "bfloat16",
        "use_sliding_window": False,
    },
    "qwen3_5_text": {
        "attn_output_gate": True,
        "output_gate_type": "swish",
        "full_attention_interval": 4,
        "mamba_ssm_dtype": "float32",
        "mlp_only_layers": [],
        "mtp_num_hidden_layers": 1,
        "mtp_use_dedicated_embeddings": False,
        "partial_rotary_factor": 0.25,
        "rope_parameters": {
            "mrope_interleaved": True,
            "mrope_section": [11, 11, 10],
            "partial_rotary_factor": 0.25,
            "rope_theta": 10000000,
            "rope_type": "default",
        },
    },
    "olmo_hybrid": {"rope_parameters": None, "rope_theta": None, "linear_key_head_dim": 96},
}


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_published_configurations_are_read(name, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": name, **PUBLISHED[name]}))
    fields = AutoConfig.from_pretrained(tmp_path).to_dict()
    config = FAMILIES[name].read(fields)
    ff = "e" if name == "qwen3_next" else "f"
    n = fields["num_hidden_layers"] // 4
    if name == "olmo_hybrid":
        # The MLPs of the two sorts of blocks have their norms in other places.
        assert config.pattern == f"((g f)x3 a F)x{n}"
        assert config.layers["a"].options["rope"] is None
    else:
        assert config.pattern == f"((g {ff})x3 a {ff})x{n}"
        assert config.layers["a"].options["rope"]["fraction"] == 0.25
    again = FAMILIES[name].write(config)
    if name == "qwen3_5_text":
        assert again["rope_parameters"]["mrope_section"] == [11, 11, 10]


def renamed(name: str, kind: str, key: str, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """A tensor of a saved model under the key that published models have."""
    if name == "olmo_hybrid" and kind == "full_attention":
        return {key.replace("feedforward_layer_norm", "post_attention_layernorm"): x}
    if name == "qwen3_5_text":
        return {key.replace("model.", "model.language_model."): x}
    return {key: x}


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_published_keys_are_read(name, tmp_path):
    theirs = native(name, CONFIGS[name][0])
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    stored: dict[str, torch.Tensor] = {}
    for key, x in load_file(path).items():
        number = key.removeprefix("model.layers.").partition(".")[0]
        kind = theirs.config.layer_types[int(number)] if number.isdigit() else ""
        stored |= renamed(name, kind, key, x)
    # Layers that predict further tokens, and what sees images, are not run by the classes.
    stored["mtp.norm.weight"] = torch.ones(64)
    if name == "qwen3_5_text":
        stored["model.visual.merger.norm.weight"] = torch.ones(64)
    if name == "olmo_hybrid":
        taps = [stored.pop(f"model.layers.0.linear_attn.{x}_conv1d.weight") for x in "qkv"]
        parts = torch.cat(taps).split([16, 16, 64])
        stored |= {
            f"model.layers.0.linear_attn.{x}_conv1d.weight": part
            for x, part in zip("qkv", parts, strict=True)
        }
    save_file(stored, path, {"format": "pt"})
    if name == "qwen3_5_text":
        whole = AutoConfig.for_model("qwen3_5", text_config=theirs.config.to_dict())
        whole.save_pretrained(tmp_path)
    x = torch.randint(257, (2, 19))
    with torch.no_grad():
        expected = theirs(x, use_cache=False).logits
        difference = (from_hf(tmp_path, check=False)(x).logits - expected).abs().max()
        assert difference <= FAMILIES[name].tolerance * float(expected.abs().max())
