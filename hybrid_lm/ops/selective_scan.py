"""The selective scan of Mamba (S6): a diagonal linear recurrence whose step, input and output depend on the
token.

Gu & Dao 2023, arXiv:2312.00752, eq. 2 with the discretisation of section 3.6 (A: zero-order hold, B: Euler).
This file: the signature and the reference. The fast form is in `selective_scan_torch.py`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from hybrid_lm.ops.backend import define
from hybrid_lm.ops.precision import full_precision, wide
from hybrid_lm.ops.selective_scan_torch import selective_scan_torch


def selective_scan(
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
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t;  y_t = (C_t . h_t + D x_t) * silu(z_t).

    x, z     (b t d)
    dt       (b t d) step size; `dt_bias` (d) is added first, then softplus if `dt_softplus`
    A        (d n) negative: the rate of decay per unit of dt
    B, C     (b t n)
    D        (d) weight of the direct path from x to y
    initial  (b d n) state before the first token; zeros where it is None
    reset    (b t) bool: the decay into a true token is 0, so nothing that stands before it reaches it
    donate   `initial` is not used again: without gradients, its memory may become the final state's
    Returns y (b t d) in x's dtype and the final state (b d n) in float32 (float64 for float64 x), in which
    all is computed.
    """
    run = _selective_scan(backend, x)
    return run(
        x, dt, A, B, C,
        D=D, z=z, dt_bias=dt_bias, dt_softplus=dt_softplus, initial=initial, reset=reset, donate=donate,
    )  # fmt: skip


@full_precision
def _selective_scan_reference(
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
    dtype, wide_dtype = x.dtype, wide(x)
    x, dt, A, B, C = (v.to(wide_dtype) for v in (x, dt, A, B, C))
    h = x.new_zeros(x.shape[0], *A.shape) if initial is None else initial.to(wide_dtype)  # (b d n)
    # 1. the step of every token and channel
    dt = dt if dt_bias is None else dt + dt_bias.to(wide_dtype)
    dt = F.softplus(dt) if dt_softplus else dt
    ys = []
    for t in range(x.shape[1]):
        # 2. discretise
        A_bar = (dt[:, t, :, None] * A).exp()  # (b d n)
        B_bar = dt[:, t, :, None] * B[:, t, None, :]  # (b d n)
        # 3. a document starts: nothing decays into it
        if reset is not None:
            A_bar = torch.where(reset[:, t, None, None], 0, A_bar)
        # 4. recur and read out
        h = A_bar * h + B_bar * x[:, t, :, None]
        ys.append((h * C[:, t, None, :]).sum(-1))  # (b d)
    y = torch.stack(ys, 1)
    # 5. the direct path and the gate
    y = y if D is None else y + D.to(wide_dtype) * x
    y = y if z is None else y * F.silu(z.to(wide_dtype))
    return y.to(dtype), h


_selective_scan = define("selective_scan", reference=_selective_scan_reference, torch=selective_scan_torch)
