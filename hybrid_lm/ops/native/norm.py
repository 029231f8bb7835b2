"""The native backend of the RMS norms: `csrc/cpu/kernels/norm.cpp` and `norm_backward.cpp`."""

from __future__ import annotations

import torch
from torch import Tensor

from hybrid_lm.ops.backend import register
from hybrid_lm.ops.native.library import why_not_on_cpu
from hybrid_lm.ops.native.operators import NAMESPACE, declare, refuse_second_gradients
from hybrid_lm.ops.norm import GateOrder

# The numbers of NormArgs::Order in csrc/cpu/kernels.h.
ORDERS = {"norm": 0, "gate_norm": 1, "norm_gate": 2, "gate": 3}

INPUTS = "Tensor x, Tensor? gate, Tensor? weight, float eps, float offset, int groups, int order"
declare("rms_norm", f"({INPUTS}) -> Tensor")
declare("rms_norm_backward", f"(Tensor gy, {INPUTS}) -> (Tensor gx, Tensor ggate, Tensor gweight)")
operators = torch.ops.hybrid_lm_native


def rms_norm_native(
    x: Tensor, weight: Tensor | None = None, *, eps: float = 1e-5, unit_offset: bool = False
) -> Tensor:
    offset = 1.0 if unit_offset else 0.0
    y = operators.rms_norm(x.reshape(-1, x.shape[-1]), None, weight, eps, offset, 1, ORDERS["norm"])
    return y.view(x.shape)


def gated_rms_norm_native(
    y: Tensor,
    gate: Tensor,
    weight: Tensor | None = None,
    *,
    eps: float = 1e-5,
    groups: int = 1,
    order: GateOrder = "gate_norm",
) -> Tensor:
    rows, gates = (v.reshape(-1, y.shape[-1]) for v in (y, gate))
    weight = None if order == "gate" else weight
    return operators.rms_norm(rows, gates, weight, eps, 0.0, groups, ORDERS[order]).view(y.shape)


@torch.library.register_fake(f"{NAMESPACE}::rms_norm")
def _(x, gate, weight, eps, offset, groups, order):
    return x.new_empty(x.shape)


@torch.library.register_fake(f"{NAMESPACE}::rms_norm_backward")
def _(gy, x, gate, weight, eps, offset, groups, order):
    return (*(x.new_empty(0) if v is None else v.new_empty(v.shape) for v in (x, gate, weight)),)


def _setup(ctx, inputs, output):
    *tensors, ctx.eps, ctx.offset, ctx.groups, ctx.order = inputs
    ctx.save_for_backward(*tensors)


def _gradient(ctx, gy):
    x, gate, weight = ctx.saved_tensors
    gx, ggate, gweight = operators.rms_norm_backward(
        gy, x, gate, weight, ctx.eps, ctx.offset, ctx.groups, ctx.order
    )
    grads = gx, None if gate is None else ggate, None if weight is None else gweight
    return *grads, None, None, None, None


torch.library.register_autograd(f"{NAMESPACE}::rms_norm", _gradient, setup_context=_setup)
refuse_second_gradients("rms_norm_backward")
register("rms_norm", "native", run=rms_norm_native, why_not=why_not_on_cpu)
register("gated_rms_norm", "native", run=gated_rms_norm_native, why_not=why_not_on_cpu)
