"""The selective scan in plain PyTorch: chunks of big operations around one fused multiply-add per token.

Inside a chunk the buffers are (c b n d): one token's (b n d) slab is contiguous, so the recurrence is one `addcmul` per
token on a slab that fits in cache, and channels, the long axis, are innermost. The forward pass keeps only the states
between chunks; the backward pass computes each chunk again. Memory and time are linear in t.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# Tokens per chunk: the fastest of 8, 16, 32 (evals/results/cpu/ops.md).
CHUNK = 16


def selective_scan_torch(
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
) -> tuple[Tensor, Tensor]:
    dtype, wide = x.dtype, torch.float64 if x.dtype == torch.float64 else torch.float32
    b, t, d = x.shape
    x, dt, A, B, C = (v.to(wide) for v in (x, dt, A, B, C))
    dt = dt if dt_bias is None else dt + dt_bias.to(wide)
    dt = F.softplus(dt) if dt_softplus else dt
    initial = x.new_zeros(b, *A.shape) if initial is None else initial.to(wide)
    if t == 1:
        y, state = _step(x, dt, A, B, C, initial, reset)
    else:
        y, state, _ = _scan(x, dt, A, B, C, initial, reset)
    y = y if D is None else y + D.to(wide) * x
    y = y if z is None else y * F.silu(z.to(wide))
    return y.to(dtype), state


def _step(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor, reset: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One token (decoding)."""
    step = dt[:, 0, :, None]
    decay = (step * A).exp()
    if reset is not None:
        decay = torch.where(reset[..., None], 0, decay)
    h = decay * h + (dt * x)[:, 0, :, None] * B  # (b d 1) * (b 1 n)
    return (h @ C.transpose(1, 2)).transpose(1, 2), h


class _Buffers:
    """The decays and states of one chunk (c b n d), allocated once per call."""

    def __init__(self, x: Tensor, A: Tensor):
        b, t, d = x.shape
        shape = (min(CHUNK, t), b, A.shape[1], d)
        self.decay, self.states = (torch.empty(shape, dtype=x.dtype, device=x.device) for _ in range(2))
        self.A = A.T.contiguous()  # (n d)

    def run(self, x: Tensor, dt: Tensor, B: Tensor, reset: Tensor | None, h: Tensor) -> tuple[Tensor, Tensor]:
        """Decays and states (c b n d) of a chunk from x, dt (c b d), B (c b n) and the state h (b n d) before it."""
        decay, states = self.decay[: len(x)], self.states[: len(x)]
        torch.mul(dt[:, :, None], self.A, out=decay).exp_()
        if reset is not None:
            decay.masked_fill_(reset[:, :, None, None], 0)
        torch.mul((dt * x)[:, :, None], B[..., None], out=states)
        for a, state in zip(decay.unbind(0), states.unbind(0), strict=True):
            h = state.addcmul_(a, h)
        return decay, states


def _cut(v: Tensor | None, start: int) -> Tensor | None:
    """One chunk of (b t ...) as (c b ...), contiguous."""
    return None if v is None else v[:, start : start + CHUNK].transpose(0, 1).contiguous()


@torch.library.custom_op("hybrid_lm::selective_scan", mutates_args=())
def _scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, initial: Tensor, reset: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """y (b t d), the final state (b d n), and the state before every chunk (k b n d) for the backward pass."""
    b, t, d = x.shape
    chunk = _Buffers(x, A)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    before = x.new_empty(-(-t // CHUNK), b, A.shape[1], d)
    h = initial.transpose(1, 2).contiguous()
    for k, start in enumerate(range(0, t, CHUNK)):
        before[k] = h
        _, states = chunk.run(_cut(x, start), _cut(dt, start), _cut(B, start), _cut(reset, start), before[k])
        y[:, start : start + CHUNK] = (_cut(C, start)[:, :, None] @ states)[:, :, 0].transpose(0, 1)
        h = states[-1]
    return y, h.transpose(1, 2).contiguous(), before


@torch.library.custom_op("hybrid_lm::selective_scan_backward", mutates_args=())
def _scan_backward(
    gy: Tensor,
    gstate: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    reset: Tensor | None,
    before: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, dt, A, B, C and the initial state, chunk by chunk from the end."""
    t = x.shape[1]
    chunk = _Buffers(x, A)
    g_buffer = torch.empty_like(chunk.states)
    gx, gdt, gB, gC = (torch.empty(v.shape, dtype=v.dtype, device=v.device) for v in (x, dt, B, C))
    gA = torch.zeros_like(chunk.A)
    # what later tokens ask of the state at the end of the chunk
    g_after = gstate.transpose(1, 2).contiguous()
    for k in reversed(range(len(before))):
        start = k * CHUNK
        here = slice(start, start + CHUNK)
        xc, dtc, Bc, Cc, gyc = (_cut(v, start) for v in (x, dt, B, C, gy))
        decay, states = chunk.run(xc, dtc, Bc, _cut(reset, start), before[k])
        # 1. g_t = C_t gy_t + decay_{t+1} g_{t+1}: the gradient of every state
        g = torch.mul(gyc[:, :, None], Cc[..., None], out=g_buffer[: len(xc)])
        gs, decays = g.unbind(0), decay.unbind(0)
        gs[-1].add_(g_after)
        for i in reversed(range(len(gs) - 1)):
            gs[i].addcmul_(decays[i + 1], gs[i + 1])
        g_after = decays[0] * gs[0]
        # 2. through y_t = C_t h_t and through the input dt_t x_t B_t
        gC[:, here] = (states @ gyc[..., None])[..., 0].transpose(0, 1)
        gB[:, here] = (g @ (dtc * xc)[..., None])[..., 0].transpose(0, 1)
        ginput = (Bc[:, :, None] @ g)[:, :, 0]  # (c b d)
        gx[:, here] = (ginput * dtc).transpose(0, 1)
        # 3. through the decay exp(dt_t A): its exponent's gradient is decay_t h_{t-1} g_t
        gs[0].mul_(before[k])
        g[1:].mul_(states[:-1])
        g.mul_(decay)
        gdt[:, here] = torch.mul(g, chunk.A, out=states).sum(2).addcmul_(ginput, xc).transpose(0, 1)
        gA += g.mul_(dtc[:, :, None]).sum((0, 1))
    return gx, gdt, gA.T.contiguous(), gB, gC, g_after.transpose(1, 2).contiguous()


@_scan.register_fake
def _(x, dt, A, B, C, initial, reset):
    b, t, d = x.shape
    return x.new_empty(x.shape), x.new_empty(initial.shape), x.new_empty(-(-t // CHUNK), b, A.shape[1], d)


@_scan_backward.register_fake
def _(gy, gstate, x, dt, A, B, C, reset, before):
    return (*(v.new_empty(v.shape) for v in (x, dt, A, B, C)), x.new_empty(x.shape[0], *A.shape))


def _setup(ctx, inputs, output):
    x, dt, A, B, C, _, reset = inputs
    ctx.save_for_backward(x, dt, A, B, C, reset, output[2])
    ctx.mark_non_differentiable(output[2])


def _gradient(ctx, gy, gstate, _):
    return *_scan_backward(gy, gstate, *ctx.saved_tensors), None


_scan.register_autograd(_gradient, setup_context=_setup)
