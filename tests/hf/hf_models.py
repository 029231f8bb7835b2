"""Small models for these tests, every weight off its start: norms of one and biases of zero hide mistakes."""

from __future__ import annotations

from typing import Any

import torch

from hybrid_lm.config.schema import ModelConfig
from hybrid_lm.laws import shake
from hybrid_lm.layers import LAYERS
from hybrid_lm.model.build import build_model
from hybrid_lm.model.lm import HybridLM

SLACK = 2**10
"""Roundings between two orders of the same sums: see `hybrid_lm.laws`."""

M2 = {"type": "mamba2", "d_state": 8, "head_dim": 16, "chunk": 8}
ATTENTION = {"type": "attention", "n_heads": 4, "n_kv_heads": 2, "rope": {}}
WINDOW = {"type": "attention", "n_heads": 4, "window": 5, "rope": {}}
MLP = {"type": "mlp", "d_ff": 48}

HYBRID = {"pattern": "m f a f m f w f", "layers": {"m": M2, "a": ATTENTION, "w": WINDOW, "f": MLP}}
ZAMBA = {
    "pattern": "m z m z z",
    "layers": {
        "m": M2,
        "sa": {"type": "attention", "n_heads": 4, "head_dim": 16, "share": True},
        "sf": {
            "type": "mlp",
            "d_ff": 40,
            "share": True,
            "per_call": {"lora": {"rank": 3, "on": ["up_proj"]}, "out_proj": True},
        },
        "z": {"type": "inject", "block": "sa sf", "into": "m"},
    },
}
PARALLEL = {
    "pattern": "a+m n c f",
    "layers": {
        "m": M2,
        "a": ATTENTION,
        "n": {"type": "mamba", "d_state": 4},
        "c": {"type": "short_conv"},
        "f": MLP,
    },
    "embedding": {"tied": False, "positions": "learned", "max_positions": 64, "multiplier": 2.0},
    "head": {"bias": True, "multiplier": 0.5, "softcap": 8.0},
}
RECURRENT = {"pattern": "m n", "layers": {"m": M2, "n": {"type": "mamba", "d_state": 4}}}
SINUSOIDAL = {
    "pattern": "w f",
    "layers": {"w": WINDOW, "f": MLP},
    "embedding": {"positions": "sinusoidal"},
    "block": {"placement": "sandwich", "norm": "layernorm", "bias": True},
}
WHOLE = {
    "hybrid": HYBRID,
    "zamba": ZAMBA,
    "parallel_untied_learned": PARALLEL,
    "recurrent": RECURRENT,
    "sinusoidal": SINUSOIDAL,
}


def build(model: dict[str, Any], vocab_size: int = 61, seed: int = 0) -> HybridLM:
    """A model of width 32 from a `model` section without its sizes, in evaluation mode."""
    made = build_model(
        ModelConfig.model_validate({"d_model": 32, "vocab_size": vocab_size, **model}), seed=seed
    )
    shake(made, seed)
    return made


def examples() -> dict[str, dict[str, Any]]:
    """For every example of every registered layer, a model of that layer alone."""
    found = {}
    for kind in LAYERS:
        for i, example in enumerate(LAYERS[kind].EXAMPLES):
            options = dict(example)
            recipes = options.pop("recipes", {})
            found[f"{kind}-{i}"] = {"pattern": "x", "layers": {"x": {"type": kind, **options}, **recipes}}
    return found


def bound(logits: torch.Tensor) -> float:
    """The largest difference of logits that rounding explains."""
    return SLACK * torch.finfo(logits.dtype).eps * float(logits.abs().max())
