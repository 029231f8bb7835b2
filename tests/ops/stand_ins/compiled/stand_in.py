"""What the stand-ins share: packages as this project calls them, with the shapes, layouts and types that the
real ones accept, and our references in the place of their kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

calls: list[str] = []
"""The kernels that have run."""


def gradients(
    function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor | None], grads: Sequence[Tensor | None]
) -> list[Any]:
    """Gradients of the inputs (None for an absent one), from those of the outputs (None: not asked for).

    In a thread of its own: inside an operator, autograd is switched off in this one.
    """

    def work() -> list[Tensor | None]:
        leaves = [None if v is None else v.detach().clone().requires_grad_() for v in inputs]
        outputs = function(*leaves)
        pairs = [(y, g.to(y.dtype)) for y, g in zip(outputs, grads, strict=True) if g is not None]
        wanted = [v for v in leaves if v is not None]
        found = torch.autograd.grad([y for y, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True)
        filled = iter(torch.zeros_like(v) if g is None else g for v, g in zip(wanted, found, strict=True))
        return [None if v is None else next(filled) for v in leaves]

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()
