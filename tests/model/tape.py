"""What a CUDA graph does, on any device: the operations of a function, again and again on the same memory.

Python runs once, while they are taken down. What the function makes keeps its place, and holds nothing of
use (NaN, or an index that is none) when a replay begins; what it wrote to outside is as it was before. Where
a GPU would have to be waited for, there is the error that a capture ends with.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def tensors(tree: Any) -> list[Tensor]:
    return [v for v in tree_leaves(tree) if isinstance(v, Tensor)]


def places(tree: Any) -> set[int]:
    return {v.untyped_storage().data_ptr() for v in tensors(tree) if v.numel()}


class Tape(TorchDispatchMode):
    """Takes down operations."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any]] = []
        self.fresh: list[Tensor] = []
        self.own = set[int]()
        self.before: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if torch.Tag.data_dependent_output in func.tags:
            raise RuntimeError(f"operation not permitted when stream is capturing: {func.overloadpacket}")
        written = [
            v
            for argument, v in zip(func._schema.arguments, args, strict=False)
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        for v in tensors(written):
            if not places(v) & self.own:
                self.before.append((v, v.clone()))
        out = func(*args, **kwargs)
        new = [v for v in tensors(out) if not places(v) & places((args, kwargs))]
        if written or new:
            self.calls.append((lambda: func(*args, **kwargs), tensors(out), new))
        self.fresh += new
        self.own |= places(new)
        return out

    def replay(self) -> None:
        for v in self.fresh:
            v.fill_(torch.nan if v.is_floating_point() else v.dtype != torch.bool and -(2**30))
        for call, outs, new in self.calls:
            for v, again in zip(outs, tensors(call()), strict=True):
                if any(v is one for one in new):
                    v.copy_(again)


def tape(step: Callable[[], Tensor]) -> tuple[Callable[[], Any], Tensor]:
    """As `decode.cuda_graph`."""
    taken = Tape()
    try:
        # What was compiled cannot be taken down: it is done as it was before.
        with torch.compiler.set_stance("force_eager"), taken:
            out = step()
    finally:
        for v, was in reversed(taken.before):
            v.copy_(was)
    return taken.replay, out
