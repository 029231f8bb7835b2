"""What the operators of the native library share: how they are declared, and when gradients will be asked for.

The schemas stand here, in Python, whether or not a library is loaded; the library adds kernels for a device.
"""

from __future__ import annotations

import torch
from torch import Tensor

NAMESPACE = "hybrid_lm_native"


def declare(name: str, schema: str) -> None:
    """Enters an operator: `schema` is its arguments and results in the schema language of PyTorch."""
    torch.library.define(f"{NAMESPACE}::{name}", schema, tags=(torch.Tag.pt2_compliant_tag,))


def tracked(*tensors: Tensor | None) -> bool:
    """Whether autograd will want a gradient of any of these: what a backward pass needs has to be kept."""
    return torch.is_grad_enabled() and any(v is not None and v.requires_grad for v in tensors)


declare("isa", "() -> str")
declare("use_isa", "(str name) -> bool")
