"""The compiled selective scan of the package mamba_ssm.

The kernel starts from zero and knows no documents: with `initial` or `reset` (but for one token without
gradients), in float64, above 256 states, and with a bias of the step but without softplus, the scan is
PyTorch's. So is the gradient where it comes through the final state too, which the kernel takes for a
constant. Inputs of several types are computed in float32. A change of layout, (b t d) to (b d t) and back, is
part of each call. The gradients of B and C are summed in no fixed order.

Behind the last token the kernel's backward pass goes on with softplus(dt_bias) as step instead of 0
(state-spaces/mamba, issue 368). What it carries there is 0, and a decay of at most 1 leaves it so; without
softplus a negative bias would let it grow to 0 times infinity, which is why that is PyTorch's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybrid_lm.ops.backend import register
from hybrid_lm.ops.external.mamba_ssm import PACKAGE, STATES, STEP, TYPES, one_token, start_of, step_of
from hybrid_lm.ops.external.packages import Needs, aligned, refusing
from hybrid_lm.ops.native.operators import tracked
from hybrid_lm.ops.selective_scan_torch import selective_scan_torch

SCAN = Needs(PACKAGE, "selective_scan_cuda", "selective_scan_cuda")
CHUNK = 2048
"""Tokens between two states that the kernel keeps for the backward pass."""


def selective_scan_mamba_ssm(
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
    tensors = (x, dt, A, B, C, D, z, dt_bias)
    narrow = x.dtype in TYPES and A.shape[1] <= STATES
    if narrow and x.shape[1] == 1 and not tracked(initial, *tensors):
        step = step_of(dt[:, 0], dt_bias, dt_softplus)
        shape = (x.shape[0], *A.shape)
        state = start_of(initial, shape, x, reset, donate)
        gate = None if z is None else z[:, 0, None]
        # channels are those of one head
        y = one_token(
            x[:, 0, None], step[:, None], A[None], B[:, 0, None], C[:, 0, None], _row(D), gate, state[:, None]
        )
        return y.view(x.shape), state
    bare = dt_bias is not None and not dt_softplus
    if not narrow or bare or initial is not None or reset is not None:
        rest = {"dt_bias": dt_bias, "dt_softplus": dt_softplus, "initial": initial, "reset": reset}
        return selective_scan_torch(x, dt, A, B, C, D=D, z=z, **rest, donate=donate)
    same = {v.dtype for v in (x, dt, B, C, z) if v is not None} == {x.dtype}
    dtype = x.dtype if same else torch.float32
    u, step, B, C = (v.transpose(1, 2).to(dtype).contiguous() for v in (x, dt, B, C))
    gate = None if z is None else z.transpose(1, 2).to(dtype).contiguous()
    direct, bias = (None if v is None else v.float().contiguous() for v in (D, dt_bias))
    y, state, _, _ = _scan(u, step, A.float().contiguous(), B, C, direct, gate, bias, dt_softplus)
    return y.transpose(1, 2).to(x.dtype), state


def _row(v: Tensor | None) -> Tensor | None:
    return None if v is None else v[None]


@torch.library.custom_op("hybrid_lm_external::selective_scan", mutates_args=())
def _scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y (b d t), the final state (b d n), and for the backward pass the states between the chunks, and
    y before the gate. x, dt, z (b d t), B, C (b n t), all without gaps."""
    out, kept, *gated = SCAN.load().fwd(x, dt, A, B[:, None], C[:, None], D, z, dt_bias, dt_softplus)
    state = kept[:, :, -1, 1::2].clone(memory_format=torch.contiguous_format)
    return (gated[0], state, kept, out) if gated else (out, state, kept, x.new_empty(0))


@torch.library.custom_op("hybrid_lm_external::selective_scan_backward", mutates_args=())
def _scan_backward(
    gy: Tensor,
    kept: Tensor,
    out: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, dt, A, B, C, D, z and dt_bias; empty for what is absent."""
    gx, gdt, gA, gB, gC, gD, gbias, *gz = SCAN.load().bwd(
        x, dt, A, B[:, None], C[:, None], D, z, dt_bias, gy.contiguous(), kept, None if z is None else out,
        None, dt_softplus, False,
    )  # fmt: skip
    grads = (gx, gdt, gA, gB[:, 0], gC[:, 0], gD, gz[0] if gz else None, gbias)
    a, b, c, d, e, f, g, h = aligned(x, grads, (x, dt, A, B, C, D, z, dt_bias))
    return a, b, c, d, e, f, g, h


@_scan.register_fake
def _(x, dt, A, B, C, D, z, dt_bias, dt_softplus):
    b, d, t = x.shape
    n = A.shape[1]
    kept = A.new_empty(b, d, -(-t // CHUNK), 2 * n)
    return x.new_empty(x.shape), A.new_empty(b, d, n), kept, x.new_empty(0 if z is None else x.shape)


@_scan_backward.register_fake
def _(gy, kept, out, x, dt, A, B, C, D, z, dt_bias, dt_softplus):
    given = (x, dt, A, B, C, D, z, dt_bias)
    return (*(x.new_empty(0) if v is None else v.new_empty(v.shape) for v in given),)


def _setup_scan(ctx, inputs, output):
    *tensors, ctx.dt_softplus = inputs
    ctx.save_for_backward(output[2], output[3], *tensors)
    ctx.set_materialize_grads(False)


def _scan_gradient(ctx, gy, gstate, _, __):
    kept, out, *tensors = ctx.saved_tensors
    if gstate is None:
        grads = _scan_backward(gy, kept, out, *tensors, ctx.dt_softplus)
    else:
        grads = _gradient_by_pytorch(gy, gstate, tensors, ctx.dt_softplus)
    return *(None if v is None else g for g, v in zip(grads, tensors, strict=True)), None


def _gradient_by_pytorch(gy, gstate, given, dt_softplus):
    """The same from the gradients of y and of the final state, by the PyTorch form's operators."""
    operators = torch.ops.hybrid_lm
    x = given[0]
    turned = [v if v is None or v.dim() < 3 else v.transpose(1, 2) for v in given]
    before = operators.selective_scan(*turned, dt_softplus, torch.zeros_like(gstate), None)[2]
    gy = torch.zeros_like(x) if gy is None else gy
    *grads, _ = operators.selective_scan_backward(
        gy.transpose(1, 2), gstate, before, *turned, dt_softplus, None
    )
    back = (g.transpose(1, 2) if g.dim() == 3 else g for g in grads)
    return aligned(x, back, given)


def _why_not(device: str) -> str | None:
    return SCAN.why_not(device) or STEP.why_not(device)


_scan.register_autograd(_scan_gradient, setup_context=_setup_scan)
_scan_backward.register_autograd(refusing("selective_scan", PACKAGE.name))
register("selective_scan", "mamba_ssm", run=selective_scan_mamba_ssm, why_not=_why_not)
