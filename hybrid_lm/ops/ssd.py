"""State-space duality (SSD), the recurrence of Mamba-2: one scalar decay per head and token, a matrix state
per head.

Dao & Gu 2024, arXiv:2405.21060, eq. 16 and section 6. This file: the signature and the reference. The fast
form is in `ssd_torch.py`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from hybrid_lm.ops.backend import define
from hybrid_lm.ops.precision import full_precision, wide
from hybrid_lm.ops.ssd_torch import ssd_torch


def ssd(
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
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T;  y_t = S_t C_t + D x_t, in every head.

    x        (b t h p)
    dt       (b t h) step size; `dt_bias` (h) is added first, then softplus if `dt_softplus`, then clamped to
             `dt_limit`
    A        (h) negative: the rate of decay per unit of dt
    B, C     (b t g n), h a multiple of g: h / g consecutive heads share one group's B and C
    D        (h) weight of the direct path from x to y
    initial  (b h p n) state before the first token; zeros where it is None
    reset    (b t) bool: the decay into a true token is 0, so nothing that stands before it reaches it
    chunk    tokens that the fast form handles at once; any value gives the same result up to rounding
    donate   `initial` is not used again: without gradients, its memory may become the final state's
    Returns y (b t h p) in x's dtype and the final state (b h p n) in float32 (float64 for float64 x), in
    which all is computed.
    """
    run = _ssd(backend, x)
    return run(
        x, dt, A, B, C,
        D=D, dt_bias=dt_bias, dt_softplus=dt_softplus, dt_limit=dt_limit,
        initial=initial, reset=reset, chunk=chunk, donate=donate,
    )  # fmt: skip


@full_precision
def _ssd_reference(
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
    dtype, wide_dtype = x.dtype, wide(x)
    x, dt, A, B, C = (v.to(wide_dtype) for v in (x, dt, A, B, C))
    b, t, h, p = x.shape
    # 1. the step of every token and head
    dt = dt if dt_bias is None else dt + dt_bias.to(wide_dtype)
    dt = F.softplus(dt) if dt_softplus else dt
    dt = dt.clamp(*dt_limit)
    # 2. every head gets its group's B and C
    B, C = (v.repeat_interleave(h // v.shape[2], dim=2) for v in (B, C))  # (b t h n)
    S = x.new_zeros(b, h, p, B.shape[-1]) if initial is None else initial.to(wide_dtype)
    ys = []
    for i in range(t):
        # 3. the decay of every head; 0 where a document starts
        a = (dt[:, i] * A).exp()  # (b h)
        if reset is not None:
            a = torch.where(reset[:, i, None], 0, a)
        # 4. recur and read out
        S = a[..., None, None] * S + torch.einsum("bh,bhp,bhn->bhpn", dt[:, i], x[:, i], B[:, i])
        ys.append(torch.einsum("bhpn,bhn->bhp", S, C[:, i]))
    y = torch.stack(ys, 1)
    # 5. the direct path
    y = y if D is None else y + D.to(wide_dtype)[:, None] * x
    return y.to(dtype), S


_ssd = define("ssd", reference=_ssd_reference, torch=ssd_torch)
