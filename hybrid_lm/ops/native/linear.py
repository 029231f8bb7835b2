"""The native backend of the matrix product, for few rows: `csrc/cpu/kernels/linear.cpp`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hybrid_lm.ops.backend import register
from hybrid_lm.ops.native.library import why_not_on_cpu
from hybrid_lm.ops.native.operators import NAMESPACE, declare, tracked

# Rows of x up to which reading the weights decides.
ROWS = 4

declare("linear", "(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
operators = torch.ops.hybrid_lm_native


def linear_native(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Our kernel where a few rows meet the weights and nobody asks for gradients; else PyTorch's product."""
    few = x.numel() <= ROWS * x.shape[-1] and weight.dtype == x.dtype and weight.stride(1) == 1
    if not few or tracked(x, weight, bias) or torch.is_autocast_enabled(x.device.type):
        return F.linear(x, weight, bias)
    y = operators.linear(x.reshape(-1, x.shape[-1]), weight, bias)
    return y.view(*x.shape[:-1], len(weight))


@torch.library.register_fake(f"{NAMESPACE}::linear")
def _(x, weight, bias):
    return x.new_empty((x.shape[0], weight.shape[0]))


register("linear", "native", run=linear_native, why_not=why_not_on_cpu)
