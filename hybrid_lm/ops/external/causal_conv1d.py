"""The causal convolution of the package causal_conv1d (Dao-AILab/causal-conv1d), on CUDA.

Its kernels have 2 to 4 taps, whole vectors of 8 channels, and float32 or half types: other widths, other
counts of channels and float64 are left to PyTorch. They mark documents by numbers, but give no final state
with these, and let the initial state into the first document always: the state is taken from the inputs here,
and where there are both, the initial inputs stand before the others as a document of their own. The sums of
the weight's gradient have no fixed order.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from hybrid_lm.ops.backend import register
from hybrid_lm.ops.causal_conv1d import causal_conv1d
from hybrid_lm.ops.external.packages import Needs, Package, aligned, refusing
from hybrid_lm.ops.native.operators import may_take

PACKAGE = Package("causal_conv1d", "causal-conv1d", (1, 5, 2))
NEEDS = Needs(PACKAGE, "causal_conv1d.cpp_functions", "causal_conv1d_cuda")

TAPS = (2, 3, 4)
VECTOR = 8
# Bytes of a vector of 8 numbers of 16 bits.
ALIGNMENT = 16
TYPES = {torch.float32, torch.bfloat16, torch.float16}


def causal_conv1d_package(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: Literal["silu"] | None = None,
    initial: Tensor | None = None,
    reset: Tensor | None = None,
    donate: bool = False,
) -> tuple[Tensor, Tensor]:
    d, w = weight.shape
    types = {v.dtype for v in (x, weight, bias) if v is not None}
    if w not in TAPS or d % VECTOR or not types <= TYPES:
        rest: dict[str, Any] = {"activation": activation, "initial": initial, "reset": reset}
        return causal_conv1d(x, weight, bias, **rest, donate=donate, backend="torch")
    silu = activation == "silu"
    if bias is not None and bias.dtype != weight.dtype:
        # one type for both, which holds all of either
        weight, bias = weight.float(), bias.float()
    if x.shape[1] == 1 and donate and may_take(initial, x.dtype, x, weight, bias):
        if reset is not None:
            initial.masked_fill_(reset[..., None], 0)
        return _step(x, weight, bias, initial, silu), initial
    before = x.new_zeros(x.shape[0], w - 1, d) if initial is None else initial.to(x.dtype)
    document = None if reset is None else reset.cumsum(1, dtype=torch.int32)  # 0 before the first reset
    if initial is None or document is None:
        y = _conv(x, weight, bias, None if initial is None else before, document, silu)
    else:
        inputs, known = torch.cat((before, x), 1), F.pad(document, (w - 1, 0))
        y = _conv(inputs, weight, bias, None, known, silu)[:, w - 1 :]
    return y, _state(x, before, document)


def _state(x: Tensor, before: Tensor, document: Tensor | None) -> Tensor:
    """The last inputs (b w-1 d), those of earlier documents zeroed."""
    t, count = x.shape[1], before.shape[1]
    state = torch.cat((before[:, t:], x[:, max(t - count, 0) :]), 1)
    if document is None:
        return state
    known = F.pad(document, (count, 0))[:, t:]
    return torch.where((known == document[:, -1:])[..., None], state, 0)


def _turned(v: Tensor) -> Tensor:
    """(b d t) with channels side by side in memory, and rows that start at whole vectors; (b t d) may lie as
    it likes."""
    fits = v.stride(2) == 1 and v.stride(1) > 1 and not any(s % VECTOR for s in v.stride()[:2])
    if not fits or v.data_ptr() % ALIGNMENT:
        v = v.clone(memory_format=torch.contiguous_format)
    return v.transpose(1, 2)


def _back(v: Tensor) -> Tensor:
    return v.transpose(1, 2).contiguous()


@torch.library.custom_op("hybrid_lm_external::causal_conv1d", mutates_args=())
def _conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial: Tensor | None,
    document: Tensor | None,
    silu: bool,
) -> Tensor:
    before = None if initial is None else _turned(initial)
    bias = None if bias is None else bias.contiguous()
    document = None if document is None else document.contiguous()
    forward = NEEDS.load().causal_conv1d_fwd_function
    return _back(forward(_turned(x), weight, bias, document, before, None, silu))


@torch.library.custom_op("hybrid_lm_external::causal_conv1d_backward", mutates_args=())
def _conv_backward(
    gy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial: Tensor | None,
    document: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    before = None if initial is None else _turned(initial)
    kept = None if bias is None else bias.contiguous()
    document = None if document is None else document.contiguous()
    backward = NEEDS.load().causal_conv1d_bwd_function
    gx, gweight, gbias, gbefore = backward(
        _turned(x), weight, kept, _turned(gy), document, before, None, None, initial is not None, silu
    )
    ginitial = None if gbefore is None else _back(gbefore)
    grads = aligned(x, (_back(gx), gweight, gbias, ginitial), (x, weight, bias, initial))
    return grads[0], grads[1], grads[2], grads[3]


@torch.library.custom_op("hybrid_lm_external::causal_conv1d_step", mutates_args=("state",))
def _step(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, silu: bool) -> Tensor:
    """One token (b 1 d); the state (b w-1 d) is updated in place."""
    bias = None if bias is None else bias.contiguous()
    update = NEEDS.load().causal_conv1d_update_function
    y = update(x.contiguous().transpose(1, 2), state.transpose(1, 2), weight, bias, silu, None, None)
    return _back(y)


@_conv.register_fake
def _(x, weight, bias, initial, document, silu):
    return x.new_empty(x.shape)


@_conv_backward.register_fake
def _(gy, x, weight, bias, initial, document, silu):
    return (*(x.new_empty(0) if v is None else v.new_empty(v.shape) for v in (x, weight, bias, initial)),)


@_step.register_fake
def _(x, weight, bias, state, silu):
    return x.new_empty(x.shape)


def _setup(ctx, inputs, output):
    *tensors, ctx.silu = inputs
    ctx.save_for_backward(*tensors)


def _gradient(ctx, gy):
    x, weight, bias, initial, document = ctx.saved_tensors
    gx, gweight, gbias, ginitial = _conv_backward(gy, x, weight, bias, initial, document, ctx.silu)
    absent = (None if bias is None else gbias), (None if initial is None else ginitial)
    return gx, gweight, *absent, None, None


_conv.register_autograd(_gradient, setup_context=_setup)
_conv_backward.register_autograd(refusing("causal_conv1d", PACKAGE.name))
register("causal_conv1d", "causal_conv1d", run=causal_conv1d_package, why_not=NEEDS.why_not)
