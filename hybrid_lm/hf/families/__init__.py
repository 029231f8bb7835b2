"""The families of Hugging Face models that are read and written: a file each, and a line here."""

from __future__ import annotations

from hybrid_lm.registry import Registry

FAMILIES = Registry(
    "family",
    {
        "llama": "hybrid_lm.hf.families.llama:FAMILY",
        "mistral": "hybrid_lm.hf.families.mistral:FAMILY",
        "qwen2": "hybrid_lm.hf.families.qwen2:FAMILY",
        "qwen3": "hybrid_lm.hf.families.qwen3:FAMILY",
        "olmo2": "hybrid_lm.hf.families.olmo2:FAMILY",
        "olmo3": "hybrid_lm.hf.families.olmo3:FAMILY",
        "gemma2": "hybrid_lm.hf.families.gemma2:FAMILY",
        "gemma3_text": "hybrid_lm.hf.families.gemma3_text:FAMILY",
        "smollm3": "hybrid_lm.hf.families.smollm3:FAMILY",
        "granite": "hybrid_lm.hf.families.granite:FAMILY",
        "exaone4": "hybrid_lm.hf.families.exaone4:FAMILY",
        "cohere2": "hybrid_lm.hf.families.cohere2:FAMILY",
        "phi3": "hybrid_lm.hf.families.phi3:FAMILY",
        "stablelm": "hybrid_lm.hf.families.stablelm:FAMILY",
        "mixtral": "hybrid_lm.hf.families.mixtral:FAMILY",
        "qwen3_moe": "hybrid_lm.hf.families.qwen3_moe:FAMILY",
        "gpt_oss": "hybrid_lm.hf.families.gpt_oss:FAMILY",
        "gpt2": "hybrid_lm.hf.families.gpt2:FAMILY",
        "gpt_neox": "hybrid_lm.hf.families.gpt_neox:FAMILY",
        "mpt": "hybrid_lm.hf.families.mpt:FAMILY",
        "mamba": "hybrid_lm.hf.families.mamba:FAMILY",
        "falcon_mamba": "hybrid_lm.hf.families.falcon_mamba:FAMILY",
        "mamba2": "hybrid_lm.hf.families.mamba2:FAMILY",
        "bamba": "hybrid_lm.hf.families.bamba:FAMILY",
        "falcon_h1": "hybrid_lm.hf.families.falcon_h1:FAMILY",
        "jamba": "hybrid_lm.hf.families.jamba:FAMILY",
        "zamba2": "hybrid_lm.hf.families.zamba2:FAMILY",
        "zamba": "hybrid_lm.hf.families.zamba:FAMILY",
        "granitemoehybrid": "hybrid_lm.hf.families.granitemoehybrid:FAMILY",
        "nemotron_h": "hybrid_lm.hf.families.nemotron_h:FAMILY",
        "qwen3_5_text": "hybrid_lm.hf.families.qwen3_5_text:FAMILY",
        "olmo_hybrid": "hybrid_lm.hf.families.olmo_hybrid:FAMILY",
        "qwen3_next": "hybrid_lm.hf.families.qwen3_next:FAMILY",
        "lfm2": "hybrid_lm.hf.families.lfm2:FAMILY",
        "recurrent_gemma": "hybrid_lm.hf.families.recurrent_gemma:FAMILY",
        "deepseek_v3": "hybrid_lm.hf.families.deepseek_v3:FAMILY",
    },
)
"""In the order in which an export looks for a class that fits."""
