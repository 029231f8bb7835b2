"""The memory of attention: an entry per token, of all tokens or of those of a window."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from hybrid_lm.layers.base import State


def slack(window: int) -> int:
    """Tokens of room beyond a window: an eighth of it, so that it is moved once in that many steps."""
    return -(-window // 8)


class TokenState(State):
    """A memory with one entry per token that can still be seen: the tensors that `entries` names, (b s ...),
    the document numbers last.

    The tensors may be longer than `length`: the rest is room to grow.
    """

    entries: ClassVar[tuple[str, ...]]
    length: int
    window: int
    """0: all tokens can be seen."""

    def tensors(self, prefix: str = "") -> dict[str, Tensor]:
        return {name: x[:, : self.length] for name, x in super().tensors(prefix).items()}

    def map(self, fn: Callable[[str, Tensor | None], Tensor | None], prefix: str = "") -> Self:
        # The room stays: who asked for it must not pay for growth because beams were sorted.
        room = self._buffers()[0].shape[1] - self.length

        def used(name: str, x: Tensor | None) -> Tensor | None:
            y = fn(name, None if x is None else x[:, : self.length])
            return None if y is None else _room(y, room)

        return super().map(used, prefix)

    def append(self, *new: Tensor) -> tuple[Tensor, ...]:
        """Remembers t more tokens, given as `entries` are; returns the entries of all that they may look at,
        oldest first."""
        t = new[0].shape[1]
        keep = min(self.length, self.window - 1) if self.window else self.length
        # In place would change what the graph of earlier tokens has saved; and what is long is not copied
        # into room.
        in_graph = torch.is_grad_enabled()
        if in_graph or (self.window and t > slack(self.window)):
            seen = [torch.cat([a, x], 1) for a, x in zip(self._last(keep), new, strict=True)]
            self.length = min(self.window - 1, keep + t) if self.window else keep + t
            room = slack(self.window) if self.window and not in_graph else 0
            self._hold([_room(x[:, keep + t - self.length :], room) for x in seen])
            return tuple(seen)
        if self.length + t > self._buffers()[0].shape[1]:
            room = slack(self.window) if self.window else max(t, self.length)
            self._hold([_room(a, room) for a in self._last(keep)])
            self.length = keep
        buffers, end = self._buffers(), self.length + t
        for buffer, x in zip(buffers, new, strict=True):
            buffer[:, self.length : end] = x
        self.length = end
        return tuple(buffer[:, :end] for buffer in buffers)

    def _buffers(self) -> tuple[Tensor, ...]:
        return tuple(getattr(self, name) for name in self.entries)

    def _last(self, n: int) -> tuple[Tensor, ...]:
        return tuple(x[:, self.length - n : self.length] for x in self._buffers())

    def _hold(self, tensors: Sequence[Tensor]) -> None:
        for name, x in zip(self.entries, tensors, strict=True):
            setattr(self, name, x)


@dataclass
class KVState(TokenState):
    """Keys, values (b s h p) and document numbers (b s)."""

    entries = ("k", "v", "docs")
    k: Tensor
    v: Tensor
    docs: Tensor
    length: int
    window: int


@dataclass
class LatentState(TokenState):
    """What all heads' keys and values are made of (b s r), and document numbers (b s)."""

    entries = ("latent", "docs")
    latent: Tensor
    docs: Tensor
    length: int
    window: int


def _room(x: Tensor, more: int) -> Tensor:
    """x (b s ...) with room for `more` tokens behind it."""
    if not more:
        return x
    grown = x.new_zeros(x.shape[0], x.shape[1] + more, *x.shape[2:])
    grown[:, : x.shape[1]] = x
    return grown
