"""Does the model run? Asked with shapes only, before any data is read or any file is touched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedOperatorException,
)

from hybrid_lm.config.pattern import expand
from hybrid_lm.config.schema import RunConfig
from hybrid_lm.model.build import build_model
from hybrid_lm.model.lm import HybridLM

VOCABULARY = 256
"""Where only the data can tell it: nothing but the embedding's shape depends on it."""
UNKNOWABLE = (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException)
"""A layer that asks for values: shapes alone cannot say whether it runs."""


def dry_run(config: RunConfig) -> None:
    """Builds the model without memory for its weights and sends two tokens through it, with and without a
    state. Less than a second for the shipped configurations.

    Raises ValueError for a model that cannot be built or cannot run, naming the layer.
    """
    at = ["model"]
    try:
        run_fake(config, at)
    except UNKNOWABLE:
        return
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{at[-1]}: {error}") from error
    except ValueError as error:
        # What the builder refuses has its place in the message.
        raise ValueError(f"{at[-1]}: {error}" if len(at) > 1 else str(error)) from error


def run_fake(config: RunConfig, at: list[str]) -> None:
    """The calls of `dry_run`; `at` gets each layer's name when its turn comes."""
    m = config.model
    known = m.model_copy(update={"vocab_size": m.vocab_size or VOCABULARY})
    model = build_model(known, weights=False, backend="torch")

    def tell(where: str) -> Callable[[nn.Module, Any], None]:
        return lambda _module, _arguments: at.append(where)

    for place, (item, layer) in enumerate(
        zip(expand(m.pattern, list(m.layers), m.depth), model.layers, strict=True)
    ):
        layer.register_forward_pre_hook(tell(f"model.pattern, layer {place} ({item})"))
    own = list(model.named_parameters())
    # Fake tensors have a shape and a device and no memory; unlike those on `meta`, autocast knows theirs.
    with FakeTensorMode(), torch.no_grad():
        weights = {f"model.{name}": torch.empty(p.shape, dtype=p.dtype) for name, p in own}
        t = min(2, m.embedding.max_positions or 2)
        torch.func.functional_call(Both(model), weights, (torch.zeros(1, t, dtype=torch.int64),))


class Both(nn.Module):
    """A model called as in training and as in generation."""

    def __init__(self, model: HybridLM):
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> None:
        self.model(tokens)
        self.model(tokens, state=self.model.empty_state(1))
