"""The gated RMS norm of the package mamba_ssm, in Triton.

Both orders with a norm, of at most 64 KiB for a group of channels; the gate alone and float64 are PyTorch's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybrid_lm.ops.backend import register
from hybrid_lm.ops.external.mamba_ssm import PACKAGE, TYPES
from hybrid_lm.ops.external.packages import Needs, aligned, refusing
from hybrid_lm.ops.norm import GateOrder, gated_rms_norm

NORM = Needs(PACKAGE, "mamba_ssm.ops.triton.layernorm_gated")
GROUP = 65536
"""Bytes of a group of channels that the kernel has room for."""


def gated_rms_norm_mamba_ssm(
    y: Tensor,
    gate: Tensor,
    weight: Tensor | None = None,
    *,
    eps: float = 1e-5,
    groups: int = 1,
    order: GateOrder = "gate_norm",
) -> Tensor:
    wide = y.dtype not in TYPES or y.shape[-1] // groups * y.element_size() > GROUP
    if order == "gate" or wide or gate.dtype not in TYPES:
        return gated_rms_norm(y, gate, weight, eps=eps, groups=groups, order=order, backend="torch")
    rows, gates = (v.reshape(-1, y.shape[-1]).contiguous() for v in (y, gate))
    weight = torch.ones_like(rows[0], dtype=torch.float32) if weight is None else weight.contiguous()
    out, _ = _norm(rows, gates, weight, eps, groups, order == "norm_gate")
    return out.view(y.shape)


@torch.library.custom_op("hybrid_lm_external::gated_rms_norm", mutates_args=())
def _norm(
    x: Tensor, gate: Tensor, weight: Tensor, eps: float, groups: int, first: bool
) -> tuple[Tensor, Tensor]:
    """y (m d), and for the backward pass one number for every row and group. `first`: norm before gate."""
    how = {"group_size": x.shape[1] // groups, "norm_before_gate": first, "is_rms_norm": True}
    y, _, scale = NORM.load()._layer_norm_fwd(x, weight, None, eps, z=gate, **how)
    return y, scale


@torch.library.custom_op("hybrid_lm_external::gated_rms_norm_backward", mutates_args=())
def _norm_backward(
    gy: Tensor, scale: Tensor, x: Tensor, gate: Tensor, weight: Tensor, eps: float, groups: int, first: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, gate and weight."""
    gx, gweight, _, ggate = NORM.load()._layer_norm_bwd(
        gy.contiguous(), x, weight, None, eps, None, scale, gate, x.shape[1] // groups, first, True
    )
    a, b, c = aligned(x, (gx, ggate, gweight), (x, gate, weight))
    return a, b, c


@_norm.register_fake
def _(x, gate, weight, eps, groups, first):
    return x.new_empty(x.shape), x.new_empty(groups * x.shape[0], dtype=torch.float32)


@_norm_backward.register_fake
def _(gy, scale, x, gate, weight, eps, groups, first):
    return (*(v.new_empty(v.shape) for v in (x, gate, weight)),)


def _setup_norm(ctx, inputs, output):
    *tensors, ctx.eps, ctx.groups, ctx.first = inputs
    ctx.save_for_backward(output[1], *tensors)


def _norm_gradient(ctx, gy, _):
    return *_norm_backward(gy, *ctx.saved_tensors, ctx.eps, ctx.groups, ctx.first), None, None, None


_norm.register_autograd(_norm_gradient, setup_context=_setup_norm)
_norm_backward.register_autograd(refusing("gated_rms_norm", PACKAGE.name))
register("gated_rms_norm", "mamba_ssm", run=gated_rms_norm_mamba_ssm, why_not=NORM.why_not)
