"""The gated delta rule in plain PyTorch: one chunk of tokens at a time, everything inside a chunk as matrix
products and one triangular system.

Within a chunk (Yang et al. 2024, arXiv:2412.06464, section 3.3, and arXiv:2406.06484, section 3; i, j tokens
of the chunk, S the state before it, s_i = sum_{k <= i} g_k), what token i writes is a row delta_i:
    delta_i = beta_i (v_i - exp(s_i) S^T k_i - sum_{j < i} exp(s_i - s_j) (k_i . k_j) delta_j)
    y_i     = exp(s_i) S^T q_i + sum_{j <= i} exp(s_i - s_j) (q_i . k_j) delta_j
    S'      = exp(s_last) S + sum_j exp(s_last - s_j) k_j delta_j^T
The first line is a lower triangular system with a unit diagonal, solved by substitution: its inverse as a
product of powers would overflow long before it is exact. The forward pass keeps only the states between
chunks; the backward pass computes each chunk again. Memory and time are linear in t.

Axes: b batch, c token of the chunk, g group, r head of the group, k width of a key, v width of a value; the
state is held as (b g r k v).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from hybrid_lm.ops.precision import full_precision, wide


@full_precision
def delta_rule_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    initial: Tensor | None = None,
    reset: Tensor | None = None,
    chunk: int = 64,
    donate: bool = False,
) -> tuple[Tensor, Tensor]:
    b, t, h, p = v.shape
    factor: float = q.shape[-1] ** -0.5 if scale is None else scale
    log_decay, beta = log_decay.to(wide(v)), beta.to(wide(v))
    initial = log_decay.new_zeros(b, h, k.shape[-1], p) if initial is None else initial.to(log_decay.dtype)
    if t == 1:
        return _step(q, k, v, log_decay, beta, factor, initial, reset)
    y, state, _ = _delta_rule(q, k, v, log_decay, beta, factor, initial, reset, chunk)
    return y, state


def _step(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, scale: float, S: Tensor,
    reset: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One token (decoding): the recurrence as it stands."""
    r = v.shape[2] // q.shape[2]
    a = log_decay[:, 0].exp()
    if reset is not None:
        a = torch.where(reset, 0, a)
    q, k = (x[:, 0].to(S.dtype).repeat_interleave(r, 1)[:, :, None] for x in (q, k))  # (b h 1 k)
    S = a[..., None, None] * S
    delta = beta[:, 0, :, None, None] * (v[:, 0, :, None].to(S.dtype) - k @ S)  # (b h 1 v)
    S = S + k.transpose(-1, -2) * delta
    return (scale * q @ S).transpose(1, 2).to(v.dtype), S


class _Chunk(NamedTuple):
    """What the forward and the backward pass of one chunk both need."""

    Q: Tensor  # (b g 1 c k)   scaled
    K: Tensor  # (b g 1 c k)
    KK: Tensor  # (b g 1 c c)   k_i . k_j
    V: Tensor  # (b g r c v)
    beta: Tensor  # (b g r c 1)
    L: Tensor  # (b g r c c)   decay from token j to token i; 0 above the diagonal and across documents
    T: Tensor  # (b g r c c)   beta_i (k_i . k_j) L_ij below the diagonal; the system is 1 + T
    M: Tensor  # (b g r c c)   (q_i . k_j) L_ij
    from_start: Tensor  # (b g r c 1)   decay from the state before the chunk to each token
    to_end: Tensor  # (b g r c 1)   decay from each token to the end of the chunk
    whole: Tensor  # (b g r 1 1)   decay over the whole chunk


def _load(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, scale: float, reset: Tensor | None,
    here: slice,
) -> _Chunk:  # fmt: skip
    g, dtype = q.shape[2], log_decay.dtype
    Q, K = (x[:, here].to(dtype).transpose(1, 2)[:, :, None].contiguous() for x in (q, k))
    V = v[:, here].to(dtype).transpose(1, 2).unflatten(1, (g, -1)).contiguous()
    beta = beta[:, here].transpose(1, 2).unflatten(1, (g, -1))[..., None].contiguous()
    # In float64 the difference of two long sums keeps the precision of the short sum that it stands for.
    exact = dtype if v.device.type == "mps" else torch.float64
    s = log_decay[:, here].transpose(1, 2).to(exact).cumsum(-1)  # (b h c)
    causal = torch.ones(s.shape[-1], s.shape[-1], dtype=torch.bool, device=s.device).tril_()
    difference = (s[..., :, None] - s[..., None, :]).to(dtype)
    until, after = s, s[..., -1:] - s
    if reset is not None:
        document = reset[:, here].cumsum(1)[:, None]  # (b 1 c), 0 before the first reset of the chunk
        causal = causal & (document[..., :, None] == document[..., None, :])
        until = until.masked_fill(document != 0, -torch.inf)
        after = after.masked_fill(document != document[..., -1:], -torch.inf)
    # exp(-inf) = 0 exactly, and the backward pass below multiplies by L: no gradient ever sees the -inf.
    L = difference.masked_fill_(~causal, -torch.inf).exp_().unflatten(1, (g, -1))
    from_start, to_end = (x.to(dtype).exp().unflatten(1, (g, -1))[..., None] for x in (until, after))
    Q = Q * scale
    KK = K @ K.transpose(-1, -2)
    T = (KK * L).mul_(beta).tril_(-1)
    M = (Q @ K.transpose(-1, -2)) * L
    return _Chunk(Q, K, KK, V, beta, L, T, M, from_start, to_end, from_start[..., -1:, :])


def _solve(T: Tensor, right: Tensor, *, transposed: bool = False) -> Tensor:
    """(1 + T)^-1 right, or (1 + T)^-T right; T (... c c) strictly lower triangular, right (... c v)."""
    T = T.transpose(-1, -2) if transposed else T
    return torch.linalg.solve_triangular(T, right, upper=transposed, unitriangular=True)


def _write(v: _Chunk, S: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What the state says of the chunk's keys, how far that is from the values, and the rows delta: all
    (b g r c v)."""
    KS = v.K @ S
    missing = v.V - v.from_start * KS
    return KS, missing, _solve(v.T, v.beta * missing)


@torch.library.custom_op("hybrid_lm::delta_rule", mutates_args=())
def _delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    scale: float,
    initial: Tensor,
    reset: Tensor | None,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """y (b t h v), the final state (b h k v), and the state before every chunk (n b g r k v) for the backward
    pass."""
    t = v.shape[1]
    y = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    S = initial.unflatten(1, (q.shape[2], -1)).contiguous()
    before = S.new_empty(-(-t // chunk), *S.shape)
    for n, start in enumerate(range(0, t, chunk)):
        here = slice(start, start + chunk)
        before[n] = S
        c = _load(q, k, v, log_decay, beta, scale, reset, here)
        _, _, delta = _write(c, S)
        # 1. what the state says to the chunk, and what the chunk says to itself
        out = (c.Q @ S).mul(c.from_start).add_(c.M @ delta)
        y[:, here] = out.flatten(1, 2).transpose(1, 2)
        # 2. the state after the chunk
        S = c.whole * S + (c.K * c.to_end).transpose(-1, -2) @ delta
    return y, S.flatten(1, 2).clone(), before


@torch.library.custom_op("hybrid_lm::delta_rule_backward", mutates_args=())
@full_precision
def _delta_rule_backward(
    gy: Tensor, gstate: Tensor, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor,
    scale: float, reset: Tensor | None, before: Tensor, chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v, log_decay, beta and the initial state, chunk by chunk from the end."""
    gq, gk, gv, gdecay, gbeta = (
        torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v, log_decay, beta)
    )
    # gS: what later tokens ask of the state after the chunk
    gS = gstate.unflatten(1, (q.shape[2], -1)).contiguous()
    for n in reversed(range(len(before))):
        here = slice(n * chunk, (n + 1) * chunk)
        c, S = _load(q, k, v, log_decay, beta, scale, reset, here), before[n]
        gout = gy[:, here].to(S.dtype).transpose(1, 2).unflatten(1, c.V.shape[1:3])  # (b g r c v)
        KS, missing, delta = _write(c, S)
        # 1. through y and S' to the rows, and through the system to its right side and its matrix
        gdelta = c.M.transpose(-1, -2) @ gout + c.to_end * (c.K @ gS)
        gright = _solve(c.T, gdelta, transposed=True)
        gT = -(gright @ delta.transpose(-1, -2)).tril_(-1)
        gM = gout @ delta.transpose(-1, -2)
        gmissing = c.beta * gright
        # 2. values and betas
        gv[:, here] = gmissing.flatten(1, 2).transpose(1, 2)
        step = (gright * missing).sum(-1) + (gT * c.KK * c.L).sum(-1)
        gbeta[:, here] = step.flatten(1, 2).transpose(1, 2)
        # 3. queries and keys, which all heads of a group share
        gout_start, gmissing_start = c.from_start * gout, c.from_start * gmissing
        delta_S = delta @ gS.transpose(-1, -2)  # (b g r c k)
        gQK = (gM * c.L).sum(2)
        gKK = (gT * c.beta * c.L).sum(2)
        gKK = gKK + gKK.transpose(-1, -2)
        Q, K = c.Q[:, :, 0], c.K[:, :, 0]
        into_S = (c.to_end * delta_S - gmissing_start @ S.transpose(-1, -2)).sum(2)
        gQ = gQK @ K + (gout_start @ S.transpose(-1, -2)).sum(2)
        gq[:, here] = (scale * gQ).transpose(1, 2)
        gk[:, here] = (gQK.transpose(-1, -2) @ Q + gKK @ K + into_S).transpose(1, 2)
        # 4. the decays: s_i enters y_i, row i and S' with +, what later tokens read of row i with -;
        # the diagonal's two parts cancel: leave them out rather than to rounding
        gs = gM.mul_(c.M).tril_(-1).addcmul_(gT, c.T)
        to_state = (c.to_end * delta_S * c.K).sum(-1)
        gs = gs.sum(-1) - gs.sum(-2) - to_state  # (b g r c)
        gs += (gout_start * (c.Q @ S)).sum(-1) - (gmissing_start * KS).sum(-1)
        gs[..., -1] += to_state.sum(-1) + (c.whole * S * gS).sum((-1, -2))
        gs = gs.flip(-1).cumsum(-1).flip(-1)
        if reset is not None:
            gs = gs.masked_fill(reset[:, None, None, here], 0)
        gdecay[:, here] = gs.flatten(1, 2).transpose(1, 2)
        # 5. the state before the chunk
        gS = c.whole * gS + c.Q.transpose(-1, -2) @ gout_start - c.K.transpose(-1, -2) @ gmissing_start
    return gq, gk, gv, gdecay, gbeta, gS.flatten(1, 2).clone()


@_delta_rule.register_fake
def _(q, k, v, log_decay, beta, scale, initial, reset, chunk):
    b, t, h, p = v.shape
    g, d = q.shape[2:]
    before = log_decay.new_empty(-(-t // chunk), b, g, h // g, d, p)
    return v.new_empty(v.shape), log_decay.new_empty(initial.shape), before


@_delta_rule_backward.register_fake
def _(gy, gstate, q, k, v, log_decay, beta, scale, reset, before, chunk):
    return (*(x.new_empty(x.shape) for x in (q, k, v, log_decay, beta, gstate)),)


def _setup(ctx, inputs, output):
    *tensors, ctx.scale, _, reset, ctx.chunk = inputs
    ctx.save_for_backward(*tensors, reset, output[2])
    # an unused state must not cost zeros of the size of all states between chunks
    ctx.set_materialize_grads(False)


def _gradient(ctx, gy, gstate, _):
    *tensors, reset, before = ctx.saved_tensors
    gy = torch.zeros_like(tensors[2]) if gy is None else gy
    gstate = before.new_zeros(before.shape[1:]).flatten(1, 2) if gstate is None else gstate
    *grads, ginitial = _delta_rule_backward(gy, gstate, *tensors, ctx.scale, reset, before, ctx.chunk)
    return *grads, None, ginitial, None, None


_delta_rule.register_autograd(_gradient, setup_context=_setup)
