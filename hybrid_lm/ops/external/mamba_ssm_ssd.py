"""SSD of the package mamba_ssm, in Triton.

Products run on tensor cores in the type of the inputs. That of float32 is TF32 there, and float16 cannot hold
every state: only where x, B and C are all bfloat16 do the kernels run, with at most 256 states and channels
of a head; all else is PyTorch's. Its decays are differences of sums over a chunk in float32: behind a step
that is thousands of times as large as the next, the decays of that chunk are as much less precise. Sums of
gradients have no fixed order, unless PyTorch's deterministic algorithms are switched on before the package is
imported.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hybrid_lm.ops.backend import register
from hybrid_lm.ops.external.mamba_ssm import PACKAGE, STATES, STEP, TYPES, one_token, start_of, step_of
from hybrid_lm.ops.external.packages import Needs, aligned, refusing
from hybrid_lm.ops.native.operators import tracked
from hybrid_lm.ops.ssd_torch import ssd_torch

SSD = Needs(PACKAGE, "mamba_ssm.ops.triton.ssd_combined")
CHUNK = 256
"""Tokens that the kernels take at once: what the package's own layer gives them."""


def ssd_mamba_ssm(
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
    b, t, h, p = x.shape
    n = B.shape[3]
    tensors = (x, dt, A, B, C, D, dt_bias)
    if x.dtype in TYPES and t == 1 and n <= STATES and not tracked(initial, *tensors):
        step = step_of(dt[:, 0], dt_bias, dt_softplus).clamp(*dt_limit)[..., None].expand(b, h, p)
        state = start_of(initial, (b, h, p, n), x, reset, donate)
        rates = A.float()[:, None, None].expand(h, p, n)
        direct = None if D is None else D[:, None].expand(h, p)
        y = one_token(x[:, 0], step, rates, B[:, 0], C[:, 0], direct, None, state)
        return y[:, None], state
    if any(v.dtype != torch.bfloat16 for v in (x, B, C)) or max(n, p) > STATES or t == 1:
        rest: dict[str, Any] = {"D": D, "dt_bias": dt_bias, "dt_softplus": dt_softplus, "dt_limit": dt_limit}
        rest |= {"initial": initial, "reset": reset, "chunk": chunk, "donate": donate}
        return ssd_torch(x, dt, A, B, C, **rest)
    direct, bias, initial = (None if v is None else v.float() for v in (D, dt_bias, initial))
    document = None if reset is None else reset.cumsum(1, dtype=torch.int32)  # 0 before the first reset
    low, high = map(float, dt_limit)
    return _ssd(x, dt, A.float(), B, C, direct, bias, dt_softplus, low, high, initial, document)


@torch.library.custom_op("hybrid_lm_external::ssd", mutates_args=())
def _ssd(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, dt_bias: Tensor | None,
    dt_softplus: bool, dt_low: float, dt_high: float, initial: Tensor | None, document: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y (b t h p) and the final state (b h p n). `document` (b t) counts from 0, in which `initial` is."""
    options = {"dt_softplus": dt_softplus, "dt_limit": (dt_low, dt_high), "dt_bias": dt_bias}
    options |= {"initial_states": initial, "seq_idx": document}
    y, *_, state = SSD.load()._mamba_chunk_scan_combined_fwd(x, dt, A, B, C, CHUNK, D=D, **options)
    return y.contiguous(), state.contiguous()


@torch.library.custom_op("hybrid_lm_external::ssd_backward", mutates_args=())
def _ssd_backward(
    gy: Tensor | None, gstate: Tensor | None, y: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor,
    C: Tensor, D: Tensor | None, dt_bias: Tensor | None, dt_softplus: bool, dt_low: float, dt_high: float,
    initial: Tensor | None, document: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, dt, A, B, C, D, dt_bias and the initial state; empty for what is absent."""
    gy = torch.zeros_like(x) if gy is None else gy
    options = {"dt_softplus": dt_softplus, "dt_limit": (dt_low, dt_high), "dt_bias": dt_bias}
    options |= {"initial_states": initial, "seq_idx": document}
    options |= {"dfinal_states": None if gstate is None else gstate.contiguous()}
    gx, gdt, gA, gB, gC, gD, _, gbias, ginitial = SSD.load()._mamba_chunk_scan_combined_bwd(
        gy, x, dt, A, B, C, y, CHUNK, D=D, **options
    )
    given = (x, dt, A, B, C, D, dt_bias, initial)
    a, b, c, d, e, f, g, h = aligned(x, (gx, gdt, gA, gB, gC, gD, gbias, ginitial), given)
    return a, b, c, d, e, f, g, h


@_ssd.register_fake
def _(x, dt, A, B, C, D, dt_bias, dt_softplus, dt_low, dt_high, initial, document):
    b, _, h, p = x.shape
    return x.new_empty(x.shape), A.new_empty(b, h, p, B.shape[3])


@_ssd_backward.register_fake
def _(gy, gstate, y, x, dt, A, B, C, D, dt_bias, dt_softplus, dt_low, dt_high, initial, document):
    given = (x, dt, A, B, C, D, dt_bias, initial)
    return (*(x.new_empty(0) if v is None else v.new_empty(v.shape) for v in given),)


def _setup_ssd(ctx, inputs, output):
    *tensors, ctx.dt_softplus, ctx.dt_low, ctx.dt_high, initial, document = inputs
    ctx.save_for_backward(output[0], *tensors, initial, document)
    ctx.set_materialize_grads(False)


def _ssd_gradient(ctx, gy, gstate):
    y, *tensors, initial, document = ctx.saved_tensors
    options = (ctx.dt_softplus, ctx.dt_low, ctx.dt_high)
    *given, ginitial = _ssd_backward(gy, gstate, y, *tensors, *options, initial, document)
    grads = [None if v is None else g for g, v in zip(given, tensors, strict=True)]
    return *grads, None, None, None, None if initial is None else ginitial, None


def _why_not(device: str) -> str | None:
    return SSD.why_not(device) or STEP.why_not(device)


_ssd.register_autograd(_ssd_gradient, setup_context=_setup_ssd)
_ssd_backward.register_autograd(refusing("ssd", PACKAGE.name))
register("ssd", "mamba_ssm", run=ssd_mamba_ssm, why_not=_why_not)
