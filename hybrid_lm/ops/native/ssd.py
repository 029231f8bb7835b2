"""The native backend of SSD: `csrc/cpu/kernels/ssd.cpp` and its neighbours."""

from __future__ import annotations

import torch
from torch import Tensor

from hybrid_lm.ops.backend import register
from hybrid_lm.ops.native.library import why_not_on_cpu
from hybrid_lm.ops.native.operators import (
    NAMESPACE,
    declare,
    may_take,
    on_one_device,
    refuse_second_gradients,
    tracked,
)
from hybrid_lm.ops.precision import wide

# Tokens that the kernel works on at once, and between two kept states: SSD_CHUNK of csrc/cpu/kernels.h.
CHUNK = 64

INPUTS = (
    "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? dt_bias, bool dt_softplus, "
    "float dt_low, float dt_high"
)
declare(
    "ssd", f"({INPUTS}, Tensor? initial, Tensor? reset, bool keep) -> (Tensor y, Tensor state, Tensor before)"
)
declare("ssd_", f"({INPUTS}, Tensor(a!) state, Tensor? reset) -> Tensor y")
declare(
    "ssd_backward",
    f"(Tensor? gy, Tensor? gstate, Tensor before, {INPUTS}, Tensor? initial, Tensor? reset) -> (Tensor gx, "
    "Tensor gdt, Tensor gA, Tensor gB, Tensor gC, Tensor gD, Tensor gdt_bias, Tensor ginitial)",
)
operators = torch.ops.hybrid_lm_native


def ssd_native(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    initial: Tensor | None = None,
    reset: Tensor | None = None,
    chunk: int = 64,
    donate: bool = False,
) -> tuple[Tensor, Tensor]:
    tensors = (x, dt, A, B, C, D, dt_bias)
    on_one_device("ssd", *tensors, initial, reset)
    if donate and may_take(initial, wide(x), *tensors):
        return operators.ssd_(*tensors, dt_softplus, *dt_limit, initial, reset), initial
    keep = tracked(initial, *tensors)
    y, state, _ = operators.ssd(*tensors, dt_softplus, *dt_limit, initial, reset, keep)
    return y, state


@torch.library.register_fake(f"{NAMESPACE}::ssd")
def _(x, dt, A, B, C, D, dt_bias, dt_softplus, dt_low, dt_high, initial, reset, keep):
    b, t, h, p = x.shape
    n = B.shape[3]
    before = x.new_empty((-(-t // CHUNK), b, h, n, p) if keep else (0,), dtype=wide(x))
    return x.new_empty(x.shape), x.new_empty((b, h, p, n), dtype=wide(x)), before


@torch.library.register_fake(f"{NAMESPACE}::ssd_")
def _(x, dt, A, B, C, D, dt_bias, dt_softplus, dt_low, dt_high, state, reset):
    return x.new_empty(x.shape)


@torch.library.register_fake(f"{NAMESPACE}::ssd_backward")
def _(gy, gstate, before, x, dt, A, B, C, D, dt_bias, dt_softplus, dt_low, dt_high, initial, reset):
    given = (x, dt, A, B, C, D, dt_bias, initial)
    return (*(x.new_empty(0) if v is None else v.new_empty(v.shape) for v in given),)


def _setup(ctx, inputs, output):
    *tensors, ctx.dt_softplus, ctx.dt_low, ctx.dt_high, initial, reset, _ = inputs
    ctx.save_for_backward(output[2], *tensors, initial, reset)
    # An unused state must not cost zeros of the size of all states between chunks.
    ctx.set_materialize_grads(False)


def _gradient(ctx, gy, gstate, _):
    before, *tensors, initial, reset = ctx.saved_tensors
    options = (ctx.dt_softplus, ctx.dt_low, ctx.dt_high)
    *given, ginitial = operators.ssd_backward(gy, gstate, before, *tensors, *options, initial, reset)
    grads = [None if v is None else g for g, v in zip(given, tensors, strict=True)]
    return *grads, None, None, None, None if initial is None else ginitial, None, None


torch.library.register_autograd(f"{NAMESPACE}::ssd", _gradient, setup_context=_setup)
refuse_second_gradients("ssd_backward")
register("ssd", "native", run=ssd_native, why_not=why_not_on_cpu)
