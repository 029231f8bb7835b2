"""Models of ours and of transformers, with the same sizes and the same weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from hybrid_lm.bench.measure import backends
from hybrid_lm.bench.peers import quiet
from hybrid_lm.config.schema import ModelConfig
from hybrid_lm.model.build import build_model
from hybrid_lm.model.lm import HybridLM
from hybrid_lm.ops.backend import report, select

RECURRENCE = {"mamba": "selective_scan", "mamba2": "ssd"}
"""The op of a layer that decides which backends a model is measured with."""

NAMES = (
    ("backbone.", ""),
    ("embeddings.", "embed."),
    ("embedding.", "embed."),
    ("norm_f.", "final_norm."),
    (".mixer.norm.weight", ".layer.norm_weight"),
    (".mixer.conv1d.", ".layer.conv_"),
    (".mixer.dt_proj.bias", ".layer.dt_bias"),
    (".mixer.", ".layer."),
    (".norm.", ".pre_norm."),
)
"""Parts of the parameters' names: transformers' or mamba_ssm's, and ours."""


def ours(
    kind: str, *, d_model: int, n_layers: int, vocab_size: int, options: Mapping[str, Any]
) -> ModelConfig:
    """A stack of `mamba` or `mamba2` layers."""
    return ModelConfig.model_validate(
        {
            "d_model": d_model,
            "vocab_size": vocab_size,
            "pattern": f"m{n_layers}",
            "layers": {"m": {"type": kind, **options}},
        }
    )


def build_ours(config: ModelConfig, backend: str) -> HybridLM:
    """The model with the weights of seed 0, on one backend for the ops that have it."""
    able = {row.op for row in report("cpu") if row.backend == backend and row.why_not is None}
    return build_model(config, backend=select(dict.fromkeys(able, backend)))


def model_backends(kind: str) -> list[str]:
    """The backends of the recurrence of `mamba` or `mamba2`; the best first."""
    return backends(RECURRENCE[kind])


def transformers_model(kind: str, *, head: bool, like: HybridLM | None = None, **sizes: Any) -> nn.Module:
    """A model of transformers, with or without logits; with the weights of `like` if that is given."""
    import transformers

    quiet()
    config = {
        "mamba": transformers.MambaConfig,
        "mamba2": transformers.Mamba2Config,
        "llama": transformers.LlamaConfig,
    }[kind](**sizes)
    torch.manual_seed(0)
    build = transformers.AutoModelForCausalLM if head else transformers.AutoModel
    model = build.from_config(config).eval()
    if like is not None:
        take_weights(model, like)
    return model


@torch.no_grad()
def take_weights(theirs: nn.Module, from_ours: HybridLM) -> None:
    """Our weights for transformers' model: its own start is so badly conditioned that rounding grows a
    hundredfold on its way through twelve layers, and bfloat16 could not be checked."""
    weights = dict(from_ours.named_parameters())
    for name, parameter in theirs.named_parameters():
        for old, new in NAMES:
            name = name.replace(old, new)
        parameter.copy_(weights.pop(name).view(parameter.shape))
    assert not weights, f"transformers' model has no {', '.join(weights)}"


def count(model: nn.Module) -> int:
    """Parameters."""
    return sum(parameter.numel() for parameter in model.parameters())
