"""The selective scan's native backend: `csrc/cpu/kernels/scan*.cpp` and `csrc/cuda/scan*.cu`."""

from __future__ import annotations

import torch
from torch import Tensor

from hybrid_lm.ops.backend import register
from hybrid_lm.ops.native.library import why_not
from hybrid_lm.ops.native.operators import (
    NAMESPACE,
    declare,
    may_take,
    on_one_device,
    refuse_second_gradients,
    tracked,
)
from hybrid_lm.ops.precision import wide
from hybrid_lm.ops.selective_scan_torch import selective_scan_torch

# Tokens between two states that are kept for the backward pass: SCAN_CHUNK of csrc/cpu/kernels.h and of
# csrc/cuda/kernels.h.
CHUNKS = {"cpu": 32, "cuda": 32}
# Devices whose kernels compute in float32 alone, and on as many states as a warp has room for (SCAN_STATES of
# csrc/cuda/kernels.h); the rest is left to PyTorch.
NARROW = {"cuda"}
STATES = 256

INPUTS = (
    "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, "
    "bool dt_softplus"
)
declare(
    "selective_scan",
    f"({INPUTS}, Tensor? initial, Tensor? reset, bool keep) -> (Tensor y, Tensor state, Tensor before)",
)
declare("selective_scan_", f"({INPUTS}, Tensor(a!) state, Tensor? reset) -> Tensor y")
declare(
    "selective_scan_backward",
    f"(Tensor? gy, Tensor? gstate, Tensor before, {INPUTS}, Tensor? reset) -> (Tensor gx, Tensor gdt, "
    "Tensor gA, Tensor gB, Tensor gC, Tensor gD, Tensor gz, Tensor gdt_bias, Tensor ginitial)",
)
operators = torch.ops.hybrid_lm_native


def selective_scan_native(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    initial: Tensor | None = None,
    reset: Tensor | None = None,
    donate: bool = False,
) -> tuple[Tensor, Tensor]:
    if x.device.type in NARROW and (x.dtype == torch.float64 or A.shape[1] > STATES):
        rest = {"dt_bias": dt_bias, "dt_softplus": dt_softplus, "initial": initial, "reset": reset}
        return selective_scan_torch(x, dt, A, B, C, D=D, z=z, **rest)
    tensors = (x, dt, A, B, C, D, z, dt_bias)
    on_one_device("selective_scan", *tensors, initial, reset)
    if donate and may_take(initial, wide(x), *tensors):
        return operators.selective_scan_(*tensors, dt_softplus, initial, reset), initial
    keep = tracked(initial, *tensors)
    y, state, _ = operators.selective_scan(*tensors, dt_softplus, initial, reset, keep)
    return y, state


@torch.library.register_fake(f"{NAMESPACE}::selective_scan")
def _(x, dt, A, B, C, D, z, dt_bias, dt_softplus, initial, reset, keep):
    b, t, d = x.shape
    n = A.shape[1]
    chunk = CHUNKS.get(x.device.type, CHUNKS["cpu"])
    before = x.new_empty((-(-t // chunk), b, n, d) if keep else (0,), dtype=wide(x))
    return x.new_empty(x.shape), x.new_empty((b, d, n), dtype=wide(x)), before


@torch.library.register_fake(f"{NAMESPACE}::selective_scan_")
def _(x, dt, A, B, C, D, z, dt_bias, dt_softplus, state, reset):
    return x.new_empty(x.shape)


@torch.library.register_fake(f"{NAMESPACE}::selective_scan_backward")
def _(gy, gstate, before, x, dt, A, B, C, D, z, dt_bias, dt_softplus, reset):
    given = [x.new_empty(0) if v is None else v.new_empty(v.shape) for v in (x, dt, A, B, C, D, z, dt_bias)]
    return *given, x.new_empty((x.shape[0], *A.shape), dtype=wide(x))


def _setup(ctx, inputs, output):
    *tensors, ctx.dt_softplus, initial, reset, _ = inputs
    ctx.initial_type = None if initial is None else initial.dtype
    ctx.save_for_backward(output[2], *tensors, reset)
    # An unused state must not cost zeros of the size of all states between chunks.
    ctx.set_materialize_grads(False)


def _gradient(ctx, gy, gstate, _):
    before, *tensors, reset = ctx.saved_tensors
    *given, ginitial = operators.selective_scan_backward(gy, gstate, before, *tensors, ctx.dt_softplus, reset)
    grads = [None if v is None else g for g, v in zip(given, tensors, strict=True)]
    return *grads, None, None if ctx.initial_type is None else ginitial.to(ctx.initial_type), None, None


torch.library.register_autograd(f"{NAMESPACE}::selective_scan", _gradient, setup_context=_setup)
refuse_second_gradients("selective_scan_backward")
register("selective_scan", "native", run=selective_scan_native, why_not=why_not)
