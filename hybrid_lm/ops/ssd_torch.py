"""SSD in plain PyTorch: one chunk of tokens at a time, everything inside a chunk as matrix products.

Within a chunk (Dao & Gu 2024, arXiv:2405.21060, section 6; i, j tokens of the chunk, X_j = dt_j x_j, S the
state before it):
    y_i = sum_{j <= i} (C_i . B_j) exp(s_i - s_j) X_j  +  exp(s_i) S C_i,      s_i = sum_{k <= i} dt_k A
    S' = exp(s_last) S + sum_j exp(s_last - s_j) X_j B_j^T
C.B^T is computed once per group, and a group's heads share one product with the state. The forward pass
keeps only the states between chunks; the backward pass computes each chunk again. Memory and time are linear
in t.

Axes: b batch, c token of the chunk, g group, r head of the group, p head dim, n state dim; the state is held
as (b g n r p).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hybrid_lm.ops.precision import full_precision, wide


@full_precision
def ssd_torch(
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
    A, dt = A.to(wide(x)), dt.to(wide(x))
    dt = dt if dt_bias is None else dt + dt_bias.to(A.dtype)
    dt = F.softplus(dt) if dt_softplus else dt
    if dt_limit != (0.0, float("inf")) or not dt_softplus:
        dt = dt.clamp(*dt_limit)
    D = A.new_zeros(h) if D is None else D.to(A.dtype)
    initial = A.new_zeros(b, h, p, B.shape[-1]) if initial is None else initial.to(A.dtype)
    if t == 1:
        return _step(x, dt, A, B, C, D, initial, reset)
    y, state, _ = _ssd(x, dt, A, B, C, D, initial, reset, chunk)
    return y, state


def _step(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, S: Tensor, reset: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One token (decoding): the recurrence as it stands."""
    b, _, h, p = x.shape
    g = B.shape[2]
    a = (dt[:, 0] * A).exp()
    if reset is not None:
        a = torch.where(reset, 0, a)
    v = x[:, 0].to(S.dtype)
    B, C = (m[:, 0, :, None, :].to(S.dtype) for m in (B, C))  # (b g 1 n)
    write = (dt[:, 0, :, None] * v).view(b, g, -1, 1) * B  # (b g rp n)
    S = a[..., None, None] * S + write.view(S.shape)
    y = (S.view(b, g, -1, S.shape[-1]) @ C.transpose(-1, -2)).view(b, h, p) + D[:, None] * v
    return y[:, None].to(x.dtype), S


class _Chunk(NamedTuple):
    """What the forward and the backward pass of one chunk both need."""

    x: Tensor  # (b g r c p)
    dt: Tensor  # (b g r c)
    X: Tensor  # (b g r c p)   dt * x
    B: Tensor  # (b g c n)
    C: Tensor  # (b g c n)
    L: Tensor  # (b g r c c)   decay from token j to token i; 0 above the diagonal and across documents
    M: Tensor  # (b g r c c)   (C_i . B_j) L_ij
    from_start: Tensor  # (b g r c)   decay from the state before the chunk to each token
    to_end: Tensor  # (b g r c)   decay from each token to the end of the chunk
    whole: Tensor  # (b g r)   decay over the whole chunk


def _load(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, reset: Tensor | None, here: slice
) -> _Chunk:
    g = B.shape[2]
    B, C = (m[:, here].to(A.dtype).transpose(1, 2).contiguous() for m in (B, C))
    x = x[:, here].to(A.dtype).transpose(1, 2).unflatten(1, (g, -1))
    dt = dt[:, here].transpose(1, 2).contiguous()  # (b h c)
    # In float64 the difference of two long sums keeps the precision of the short sum that it stands for.
    exact = A.dtype if x.device.type == "mps" else torch.float64
    s = (dt.to(exact) * A.to(exact)[:, None]).cumsum(-1)  # (b h c)
    causal = torch.ones(s.shape[-1], s.shape[-1], dtype=torch.bool, device=s.device).tril_()
    difference = (s[..., :, None] - s[..., None, :]).to(A.dtype)
    until, after = s, s[..., -1:] - s
    if reset is not None:
        document = reset[:, here].cumsum(1)[:, None]  # (b 1 c), 0 before the first reset of the chunk
        causal = causal & (document[..., :, None] == document[..., None, :])
        until = until.masked_fill(document != 0, -torch.inf)
        after = after.masked_fill(document != document[..., -1:], -torch.inf)
    # exp(-inf) = 0 exactly, and the backward pass below multiplies by L: no gradient ever sees the -inf.
    L = difference.masked_fill_(~causal, -torch.inf).exp_().unflatten(1, (g, -1))
    from_start, to_end = (v.to(A.dtype).exp().unflatten(1, (g, -1)) for v in (until, after))
    dt = dt.unflatten(1, (g, -1))
    M = (C @ B.transpose(-1, -2))[:, :, None] * L
    X = torch.mul(x, dt[..., None]).contiguous()
    return _Chunk(x, dt, X, B, C, L, M, from_start, to_end, from_start[..., -1])


def _flat(v: Tensor) -> Tensor:
    """(b g r c p) -> (b g c rp): the heads of a group side by side."""
    return v.transpose(2, 3).flatten(3)


@torch.library.custom_op("hybrid_lm::ssd", mutates_args=())
def _ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    initial: Tensor,
    reset: Tensor | None,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """y (b t h p), the final state (b h p n), and the state before every chunk (k b g n rp) for the backward
    pass."""
    b, t, h, p = x.shape
    g, n = B.shape[2:]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    before = A.new_empty(-(-t // chunk), b, g, n, h // g * p)
    S = initial.unflatten(1, (g, -1)).permute(0, 1, 4, 2, 3).flatten(3).contiguous()
    D = D.view(g, -1, 1, 1)
    for k, start in enumerate(range(0, t, chunk)):
        here = slice(start, start + chunk)
        before[k] = S
        v = _load(x, dt, A, B, C, reset, here)
        # 1. what the chunk says to itself, the direct path, and what the state says to it
        out = (v.M @ v.X).addcmul_(v.x, D)  # (b g r c p)
        out += (v.C @ S).unflatten(-1, (-1, p)).transpose(2, 3) * v.from_start[..., None]
        y[:, here] = out.flatten(1, 2).transpose(1, 2)
        # 2. the state after the chunk
        S = (S.unflatten(-1, (-1, p)) * v.whole[:, :, None, :, None]).flatten(3)
        S += v.B.transpose(-1, -2) @ _flat(v.X * v.to_end[..., None])
    return y, _as_state(S, p), before


def _as_state(S: Tensor, p: int) -> Tensor:
    """(b g n rp) -> (b h p n)."""
    return S.unflatten(-1, (-1, p)).permute(0, 1, 3, 4, 2).flatten(1, 2).contiguous()


@torch.library.custom_op("hybrid_lm::ssd_backward", mutates_args=())
@full_precision
def _ssd_backward(
    gy: Tensor, gstate: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor,
    reset: Tensor | None, before: Tensor, chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, dt, A, B, C, D and the initial state, chunk by chunk from the end."""
    p, g = x.shape[3], B.shape[2]
    gx, gdt, gB, gC = (torch.empty(v.shape, dtype=v.dtype, device=v.device) for v in (x, dt, B, C))
    gA, gD = torch.zeros_like(A), torch.zeros_like(D)
    heads = D.view(g, -1, 1, 1)
    # gS: what later tokens ask of the state after the chunk
    gS = gstate.unflatten(1, (g, -1)).permute(0, 1, 4, 2, 3).flatten(3).contiguous()
    for k in reversed(range(len(before))):
        here = slice(k * chunk, (k + 1) * chunk)
        v, S = _load(x, dt, A, B, C, reset, here), before[k]
        gyc = gy[:, here].to(A.dtype).transpose(1, 2).unflatten(1, (g, -1)).contiguous()  # (b g r c p)
        gy_start = gyc * v.from_start[..., None]
        X_end = v.X * v.to_end[..., None]
        # 1. X through the chunk and through the state after it
        gX_end = (v.B @ gS).unflatten(-1, (-1, p)).transpose(2, 3) * v.to_end[..., None]
        gX = v.M.transpose(-1, -2) @ gyc + gX_end
        gx[:, here] = (gX * v.dt[..., None]).addcmul_(gyc, heads).flatten(1, 2).transpose(1, 2)
        gD += (gyc * v.x).sum((0, 3, 4)).flatten()
        # 2. the decays: s_i enters y_i and S' with +, y of later tokens and S' with -
        gM = gyc @ v.X.transpose(-1, -2)
        gCB = (gM * v.L).sum(2)  # (b g c c)
        # the diagonal's two parts cancel: leave them out rather than to rounding
        gs = gM.mul_(v.M).tril_(-1)
        to_state = (gX_end * v.X).sum(-1)
        gs = gs.sum(-1) - gs.sum(-2) - to_state  # (b g r c)
        CS = (v.C @ S).unflatten(-1, (-1, p)).transpose(2, 3)
        gs += (gy_start * CS).sum(-1)
        kept = (S * gS).unflatten(-1, (-1, p)).sum((2, 4)) * v.whole
        gs[..., -1] += to_state.sum(-1) + kept
        gdecay = gs.flip(-1).cumsum(-1).flip(-1)  # of dt_k A, (b g r c)
        if reset is not None:
            gdecay.masked_fill_(reset[:, None, None, here], 0)
        gA += (gdecay * v.dt).sum((0, 3)).flatten()
        step = gdecay.mul_(A.view(g, -1, 1)) + (gX * v.x).sum(-1)
        gdt[:, here] = step.flatten(1, 2).transpose(1, 2)
        # 3. B and C through C.B^T and through the state
        gC[:, here] = (gCB @ v.B + _flat(gy_start) @ S.transpose(-1, -2)).transpose(1, 2)
        gB[:, here] = (gCB.transpose(-1, -2) @ v.C + _flat(X_end) @ gS.transpose(-1, -2)).transpose(1, 2)
        # 4. the state before the chunk
        gS = (gS.unflatten(-1, (-1, p)) * v.whole[:, :, None, :, None]).flatten(3)
        gS += v.C.transpose(-1, -2) @ _flat(gy_start)
    return gx, gdt, gA, gB, gC, gD, _as_state(gS, p)


@_ssd.register_fake
def _(x, dt, A, B, C, D, initial, reset, chunk):
    b, t, h, p = x.shape
    g, n = B.shape[2:]
    return x.new_empty(x.shape), torch.empty_like(initial), A.new_empty(-(-t // chunk), b, g, n, h // g * p)


@_ssd_backward.register_fake
def _(gy, gstate, x, dt, A, B, C, D, reset, before, chunk):
    return (*(v.new_empty(v.shape) for v in (x, dt, A, B, C, D, gstate)),)


def _setup(ctx, inputs, output):
    x, dt, A, B, C, D, _, reset, ctx.chunk = inputs
    ctx.save_for_backward(x, dt, A, B, C, D, reset, output[2])
    # an unused state must not cost zeros of the size of all states between chunks
    ctx.set_materialize_grads(False)


def _gradient(ctx, gy, gstate, _):
    # Once: under activation checkpointing they can be had only once.
    saved = ctx.saved_tensors
    x, before = saved[0], saved[-1]
    gy = torch.zeros_like(x) if gy is None else gy
    gstate = _as_state(torch.zeros_like(before[0]), x.shape[-1]) if gstate is None else gstate
    return *_ssd_backward(gy, gstate, *saved, ctx.chunk), None, None


_ssd.register_autograd(_gradient, setup_context=_setup)
