"""What layers ask of training beside the loss of the next token: that experts are used alike."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hybrid_lm.layers.base import Auxiliary


def detached(auxiliary: Auxiliary) -> Auxiliary:
    """The same numbers without the graph that they came from."""
    terms = [term._replace(value=term.value.detach()) for term in auxiliary.terms]
    return Auxiliary(terms, auxiliary.loads)


def measures(passes: Sequence[Auxiliary]) -> dict[str, Tensor]:
    """Means over the layers and the forward passes of one optimizer step, each ().

    Every loss by its name, without its factor; `max_load`: tokens of a layer's fullest expert over those of
    its mean one, 1 if all are used alike.
    """
    found: dict[str, list[Tensor]] = {}
    for auxiliary in passes:
        for term in auxiliary.terms:
            found.setdefault(term.name, []).append(term.value)
    for counts in per_layer(passes):
        found.setdefault("max_load", []).append(counts.max() / counts.mean().clamp(min=1e-9))
    return {name: torch.stack(values).mean() for name, values in found.items()}


def per_layer(passes: Sequence[Auxiliary]) -> list[Tensor]:
    """Tokens of each expert (e), summed over the passes, for each call of a layer in one pass."""
    calls = zip(*(auxiliary.loads for auxiliary in passes), strict=True)
    return [torch.stack([load.counts for load in call]).sum(0) for call in calls]
