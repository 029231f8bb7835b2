"""The native backend of Mamba-2's middle: one token in one kernel, everything else by the ops."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from hybrid_lm.ops.backend import register
from hybrid_lm.ops.mamba2_mixer import Once, mamba2_mixer_torch
from hybrid_lm.ops.native.mamba2_step import TAPS, mamba2_step, new_tickets, no_mamba2_step
from hybrid_lm.ops.native.operators import may_take, tracked
from hybrid_lm.ops.norm import GateOrder, gated_rms_norm, rms_norm


def mamba2_mixer_native(
    xBC: Tensor,
    z: Tensor,
    dt: Tensor,
    A: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    *,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    groups: int = 1,
    eps: float = 1e-5,
    order: GateOrder = "gate_norm",
    conv: Tensor | None = None,
    initial: Tensor | None = None,
    reset: Tensor | None = None,
    chunk: int = 64,
    donate: bool = False,
    once: Once | None = None,
    backends: Mapping[str, str] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    b, t, d = z.shape
    others = (xBC, z, dt, A, weight, bias, norm_weight, D, dt_bias)
    # The kernel computes in float32, and writes the states where they lie.
    fits = donate and t == 1 and xBC.dtype != torch.float64 and weight.shape[1] <= TAPS
    held = conv is not None and conv.dtype == xBC.dtype and not tracked(conv)
    if not (fits and held and may_take(initial, torch.float32, *others)):
        return mamba2_mixer_torch(
            xBC, z, dt, A, weight, bias, norm_weight,
            D=D, dt_bias=dt_bias, dt_limit=dt_limit, groups=groups, eps=eps, order=order, conv=conv,
            initial=initial, reset=reset, chunk=chunk, donate=donate, backends=backends,
        )  # fmt: skip
    assert initial is not None
    assert conv is not None
    # The norm sees all heads of a group and comes after the kernel; a gate behind it has to wait for it, and
    # one in front of several norms is theirs.
    gated = order == "gate" or (order == "gate_norm" and groups == 1)
    y = mamba2_step(
        xBC[:, 0], dt[:, 0], A, initial,
        groups=groups, z=z[:, 0].unflatten(-1, (A.shape[0], -1)) if gated else None, conv=conv,
        tickets=tickets(initial, groups, once), weight=weight, bias=bias, D=D, dt_bias=dt_bias,
        dt_softplus=True, dt_limit=dt_limit, reset=None if reset is None else reset[:, 0],
    ).view(b, 1, d)  # fmt: skip
    if order == "gate_norm" and gated:
        y = rms_norm(y, norm_weight, eps=eps, backend=(backends or {}).get("rms_norm"))
    elif not gated:
        how = {"eps": eps, "groups": groups, "order": order}
        y = gated_rms_norm(y, z, norm_weight, **how, backend=(backends or {}).get("gated_rms_norm"))
    return y, conv, initial


def tickets(state: Tensor, groups: int, once: Once | None) -> Tensor:
    """What the kernel's blocks count with. Every step leaves it as it was, so that layers that run one after
    another take turns with one; two calls at the same time have one each."""
    if once is None:
        return new_tickets(state, groups)
    return once(f"tickets of mamba2_step {groups}", lambda: new_tickets(state, groups))


register("mamba2_mixer", "native", run=mamba2_mixer_native, why_not=no_mamba2_step)
