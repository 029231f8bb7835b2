"""A model that computes in another type than its weights have, with one layer of it in memory at a time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hybrid_lm.layers.block import Shared
from hybrid_lm.model.lm import HybridLM


@contextmanager
def widened(model: HybridLM, dtype: torch.dtype) -> Iterator[HybridLM]:
    """`model`, whose layers have weights of type `dtype` while they run, and the old ones in between. Its
    embeddings and final norm have them as long as the block lasts. No gradients."""
    if model.embed.weight.dtype == dtype:
        yield model
        return
    room = Room(dtype)
    around = [part for name, part in model.named_modules() if not name.startswith(("layers", "shared"))]
    with room.used_by(around):
        for layer in model.layers:
            for name in ("forward", "empty_state"):
                setattr(layer, name, running(getattr(layer, name), layer, room))
        try:
            yield model
        finally:
            for layer in model.layers:
                del layer.forward, layer.empty_state


class Room:
    """Tensors of one type that one layer after another uses: memory that is freed and asked for again piece
    by piece grows by half."""

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype
        self.free: dict[torch.Size, list[Tensor]] = defaultdict(list)

    @contextmanager
    def used_by(self, parts: Iterable[nn.Module]) -> Iterator[None]:
        """Modules with their own parameters in this type; the old ones come back, untouched."""
        kept: list[tuple[nn.Module, str, nn.Parameter]] = []
        for part in parts:
            for name, x in part._parameters.items():
                if x is not None and x.dtype != self.dtype:
                    kept.append((part, name, x))
                    there = self.free[x.shape]
                    own = there.pop() if there else torch.empty(x.shape, dtype=self.dtype, device=x.device)
                    part._parameters[name] = nn.Parameter(own.copy_(x.detach()), requires_grad=False)
        try:
            yield
        finally:
            for part, name, x in kept:
                used, part._parameters[name] = part._parameters[name], x
                assert used is not None
                self.free[x.shape].append(used.detach())


def running(call: Callable[..., Any], layer: nn.Module, room: Room) -> Callable[..., Any]:
    """A method of a layer that runs on weights of another type."""

    def run(*args: Any, **how: Any) -> Any:
        with room.used_by(reached(layer)):
            return call(*args, **how)

    return run


def reached(layer: nn.Module) -> Iterator[nn.Module]:
    """The modules of a layer, those of shared weights included."""
    for part in layer.modules():
        yield part
        if isinstance(part, Shared):
            yield from reached(part.core)
