"""One token of Mamba-2 between its two matrix products, in one kernel on CUDA: `csrc/cuda/step.cu`."""

from __future__ import annotations

import torch
from torch import Tensor

from hybrid_lm.ops.native.library import why_not
from hybrid_lm.ops.native.operators import NAMESPACE, declare, tracked

declare(
    "mamba2_step_",
    "(Tensor xBC, Tensor dt, Tensor? z, Tensor? weight, Tensor? bias, Tensor A, Tensor? D, Tensor? dt_bias, "
    "bool dt_softplus, float dt_low, float dt_high, int groups, Tensor? reset, Tensor(a!)? conv, "
    "Tensor(b!) state, Tensor(c!)? tickets) -> Tensor",
)
operators = torch.ops.hybrid_lm_native
# Devices that have the kernel. The CPU's ops for one token are its kernels already.
DEVICES = {"cuda"}
# Taps of a convolution that it has room for: STEP_TAPS of csrc/cuda/step.h.
TAPS = 16


def no_mamba2_step(device: str) -> str | None:
    """None where `mamba2_step` runs, else the reason in words."""
    return why_not(device) if device in DEVICES else f"there is no kernel for one token on {device}"


def new_tickets(state: Tensor, groups: int) -> Tensor:
    """What `mamba2_step` counts its blocks with, one number for each sequence and group: zeros, which it
    leaves zeros. Two steps must not share them at the same time."""
    return torch.zeros(state.shape[0], groups, dtype=torch.int32, device=state.device)


def mamba2_step(
    xBC: Tensor,
    dt: Tensor,
    A: Tensor,
    state: Tensor,
    *,
    groups: int = 1,
    z: Tensor | None = None,
    conv: Tensor | None = None,
    tickets: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    reset: Tensor | None = None,
) -> Tensor:
    """silu(causal_conv1d([x B C])), then ssd, then the gate: y silu(z). The states are updated in place,
    nothing is waited for, and nothing but y is new: a CUDA graph can hold it.

    xBC      (b c), c = h p + 2 g n: x, B and C side by side as the input projection gives them
    dt       (b h); A, D, dt_bias (h); dt_softplus, dt_limit as of `ssd`
    state    (b h p n) float32 without gaps
    weight   (c w) and bias (c) of the convolution; None: xBC has been convolved
    conv     (b w-1 c) the inputs before this one
    tickets  `new_tickets`, where there is a convolution of several taps
    z        (b h p); None: no gate
    reset    (b) bool: a document starts
    Returns y (b h p) in xBC's type; everything inside is float32. No gradients.
    """
    assert not tracked(xBC, dt, A, state, z, conv, weight, bias, D, dt_bias), "mamba2_step has no gradients"
    low, high = dt_limit
    rest = (D, dt_bias, dt_softplus, low, high, groups, reset, conv, state, tickets)
    return operators.mamba2_step_(xBC, dt, z, weight, bias, A, *rest)


@torch.library.register_fake(f"{NAMESPACE}::mamba2_step_")
def _(
    xBC,
    dt,
    z,
    weight,
    bias,
    A,
    D,
    dt_bias,
    dt_softplus,
    dt_low,
    dt_high,
    groups,
    reset,
    conv,
    state,
    tickets,
):
    return xBC.new_empty(state.shape[:3])
