"""What the operators of the native library share: how they are declared, and when gradients are asked for.

The schemas stand in Python and are there without a library, which adds the kernels for a device.
"""

from __future__ import annotations

from typing import TypeGuard

import torch
from torch import Tensor

NAMESPACE = "hybrid_lm_native"


def may_take(initial: Tensor | None, dtype: torch.dtype, *inputs: Tensor | None) -> TypeGuard[Tensor]:
    """Whether a state can be updated where it lies: it is of the type that a new one would have, and nobody
    will ask for gradients."""
    fits = initial is not None and initial.dtype == dtype and initial.is_contiguous()
    return fits and not tracked(initial, *inputs)


def on_one_device(op: str, *tensors: Tensor | None) -> None:
    """ValueError for tensors on several devices: an operator runs where one of them is, and a kernel would
    read the others' memory as if it were its own."""
    found = {v.device for v in tensors if v is not None}
    if len(found) > 1:
        raise ValueError(
            f"{op}: tensors on {' and '.join(sorted(map(str, found)))}; bring them to one device"
        )


def declare(name: str, schema: str) -> None:
    """Enters an operator: `schema` is its arguments and results in the schema language of PyTorch."""
    torch.library.define(f"{NAMESPACE}::{name}", schema, tags=(torch.Tag.pt2_compliant_tag,))


def refuse_second_gradients(name: str) -> None:
    """Makes the gradient of an operator that computes gradients an error: autograd would take it for 0."""

    def refuse(ctx, *grads):
        raise ValueError(
            f"{name}: native kernels have no gradients of gradients; backend='reference' has them"
        )

    torch.library.register_autograd(f"{NAMESPACE}::{name}", refuse)


def tracked(*tensors: Tensor | None) -> bool:
    """Whether autograd will want a gradient of any of these: what a backward pass needs has to be kept."""
    return torch.is_grad_enabled() and any(v is not None and v.requires_grad for v in tensors)


declare("isa", "() -> str")
declare("use_isa", "(str name) -> bool")
