"""The native backend of the causal convolution: `csrc/cpu/kernels/conv*.cpp` and `csrc/cuda/conv*.cu`."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from hybrid_lm.ops.backend import register
from hybrid_lm.ops.causal_conv1d import causal_conv1d
from hybrid_lm.ops.native.library import why_not
from hybrid_lm.ops.native.operators import (
    NAMESPACE,
    declare,
    may_take,
    on_one_device,
    refuse_second_gradients,
)

# Devices whose kernels compute in float32 alone and have registers for so many taps (CONV_TAPS of
# csrc/cuda/conv.h); the rest is left to PyTorch.
NARROW = {"cuda"}
TAPS = 8

INPUTS = "Tensor x, Tensor weight, Tensor? bias, bool silu"
declare("causal_conv1d", f"({INPUTS}, Tensor? initial, Tensor? reset) -> (Tensor y, Tensor state)")
declare("causal_conv1d_", f"({INPUTS}, Tensor(a!) state, Tensor? reset) -> Tensor y")
declare(
    "causal_conv1d_backward",
    f"(Tensor? gy, Tensor? gstate, {INPUTS}, Tensor? initial, Tensor? reset) -> (Tensor gx, Tensor gweight, "
    "Tensor gbias, Tensor ginitial)",
)
operators = torch.ops.hybrid_lm_native


def causal_conv1d_native(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: Literal["silu"] | None = None,
    initial: Tensor | None = None,
    reset: Tensor | None = None,
    donate: bool = False,
) -> tuple[Tensor, Tensor]:
    if x.device.type in NARROW and (x.dtype == torch.float64 or weight.shape[1] > TAPS):
        rest: dict[str, Any] = {"activation": activation, "initial": initial, "reset": reset}
        return causal_conv1d(x, weight, bias, **rest, backend="torch")
    silu = activation == "silu"
    on_one_device("causal_conv1d", x, weight, bias, initial, reset)
    if donate and may_take(initial, x.dtype, x, weight, bias):
        return operators.causal_conv1d_(x, weight, bias, silu, initial, reset), initial
    # The kernel would read a wider state at its own precision; the op's is that of x.
    initial = None if initial is None else initial.to(x.dtype)
    return operators.causal_conv1d(x, weight, bias, silu, initial, reset)


@torch.library.register_fake(f"{NAMESPACE}::causal_conv1d")
def _(x, weight, bias, silu, initial, reset):
    return x.new_empty(x.shape), x.new_empty((x.shape[0], weight.shape[1] - 1, x.shape[2]))


@torch.library.register_fake(f"{NAMESPACE}::causal_conv1d_")
def _(x, weight, bias, silu, state, reset):
    return x.new_empty(x.shape)


@torch.library.register_fake(f"{NAMESPACE}::causal_conv1d_backward")
def _(gy, gstate, x, weight, bias, silu, initial, reset):
    return (*(x.new_empty(0) if v is None else v.new_empty(v.shape) for v in (x, weight, bias, initial)),)


def _setup(ctx, inputs, output):
    x, weight, bias, ctx.silu, initial, reset = inputs
    ctx.save_for_backward(x, weight, bias, initial, reset)
    ctx.set_materialize_grads(False)


def _gradient(ctx, gy, gstate):
    x, weight, bias, initial, reset = ctx.saved_tensors
    gx, gweight, gbias, ginitial = operators.causal_conv1d_backward(
        gy, gstate, x, weight, bias, ctx.silu, initial, reset
    )
    absent = (None if bias is None else gbias), None, (None if initial is None else ginitial), None
    return gx, gweight, *absent


torch.library.register_autograd(f"{NAMESPACE}::causal_conv1d", _gradient, setup_context=_setup)
refuse_second_gradients("causal_conv1d_backward")
register("causal_conv1d", "native", run=causal_conv1d_native, why_not=why_not)
