"""The selective scan in plain PyTorch: chunks of big operations around one fused multiply-add per token.

Inside a chunk the buffers are (c b n d): one token's (b n d) slab is contiguous, so the recurrence is one
`addcmul` per token on a slab that fits in cache, and channels, the long axis, are innermost. The forward
pass keeps only its inputs and the states between chunks; the backward pass computes each chunk again. Memory
and time are linear in t.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hybrid_lm.ops.precision import full_precision, wide

# Tokens per chunk: the fastest of 8, 16, 32 (evals/results/cpu/torch_forms.md).
CHUNK = 16


@full_precision
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
    donate: bool = False,
) -> tuple[Tensor, Tensor]:
    A = A.to(wide(x))
    initial = A.new_zeros(x.shape[0], *A.shape) if initial is None else initial.to(A.dtype)
    if x.shape[1] == 1:
        return _step(x, dt, A, B, C, D, z, dt_bias, dt_softplus, initial, reset)
    y, state, _ = _scan(x, dt, A, B, C, D, z, dt_bias, dt_softplus, initial, reset)
    return y, state


def _step(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    h: Tensor,
    reset: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """One token (decoding): the recurrence as it stands."""
    v, step, B, C = (m[:, 0].to(A.dtype) for m in (x, dt, B, C))  # (b d), (b n)
    step = step if dt_bias is None else step + dt_bias.to(A.dtype)
    step = F.softplus(step) if dt_softplus else step
    decay = (step[..., None] * A).exp()
    if reset is not None:
        decay = torch.where(reset[..., None], 0, decay)
    h = decay * h + (step * v)[..., None] * B[:, None]
    y = (h @ C[..., None])[..., 0]
    y = y if D is None else y + D.to(A.dtype) * v
    y = y if z is None else y * F.silu(z[:, 0].to(A.dtype))
    return y[:, None].to(x.dtype), h


class _Inputs(NamedTuple):
    """One chunk of the inputs, wide and contiguous."""

    x: Tensor  # (c b d)
    raw: Tensor  # (c b d)   dt + dt_bias, before softplus
    dt: Tensor  # (c b d)
    B: Tensor  # (c b n)
    C: Tensor  # (c b n)
    z: Tensor | None  # (c b d)
    reset: Tensor | None  # (c b)


class _Chunks:
    """Cuts the inputs of one call into chunks; the recurrence runs in buffers (c b n d) made once."""

    def __init__(
        self,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        z: Tensor | None,
        dt_bias: Tensor | None,
        dt_softplus: bool,
        reset: Tensor | None,
    ):
        b, self.length, d = x.shape
        self.tensors, self.z = (x, dt, B, C), z
        self.A = A.T.contiguous()  # (n d)
        self.D = None if D is None else D.to(A.dtype)
        self.dt_bias, self.softplus, self.reset = dt_bias, dt_softplus, reset
        shape = (min(CHUNK, self.length), b, A.shape[1], d)
        self.decay, self.states = A.new_empty(shape), A.new_empty(shape)

    def __len__(self) -> int:
        return -(-self.length // CHUNK)

    def cut(self, v: Tensor, k: int) -> Tensor:
        """Chunk k of (b t ...) as (c b ...)."""
        here = v[:, k * CHUNK : (k + 1) * CHUNK].transpose(0, 1)
        return here.to(self.A.dtype).contiguous()

    def load(self, k: int) -> _Inputs:
        x, dt, B, C = (self.cut(v, k) for v in self.tensors)
        z = None if self.z is None else self.cut(self.z, k)
        raw = dt if self.dt_bias is None else dt + self.dt_bias
        dt = F.softplus(raw) if self.softplus else raw
        reset = None if self.reset is None else self.reset[:, k * CHUNK : (k + 1) * CHUNK].T
        return _Inputs(x, raw, dt, B, C, z, reset)

    def run(self, v: _Inputs, h: Tensor) -> tuple[Tensor, Tensor]:
        """Decays and states (c b n d) of a chunk that starts from h (b n d)."""
        decay, states = self.decay[: len(v.x)], self.states[: len(v.x)]
        torch.mul(v.dt[:, :, None], self.A, out=decay).exp_()
        if v.reset is not None:
            decay.masked_fill_(v.reset[:, :, None, None], 0)
        torch.mul((v.dt * v.x)[:, :, None], v.B[..., None], out=states)
        for a, state in zip(decay.unbind(0), states.unbind(0), strict=True):
            h = state.addcmul_(a, h)
        return decay, states

    def read(self, v: _Inputs, states: Tensor) -> Tensor:
        """C_t . h_t + D x_t, before the gate: (c b d)."""
        y = (v.C[:, :, None] @ states)[:, :, 0]
        return y if self.D is None else y.addcmul_(v.x, self.D)


@torch.library.custom_op("hybrid_lm::selective_scan", mutates_args=())
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
    initial: Tensor,
    reset: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """y (b t d), the final state (b d n), and the state before every chunk (k b n d) for the backward."""
    chunks = _Chunks(x, dt, A, B, C, D, z, dt_bias, dt_softplus, reset)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    h = initial.transpose(1, 2)
    before = A.new_empty(len(chunks), *h.shape)
    for k in range(len(chunks)):
        before[k] = h
        v = chunks.load(k)
        _, states = chunks.run(v, before[k])
        out = chunks.read(v, states)
        y[:, k * CHUNK : (k + 1) * CHUNK] = (out if v.z is None else out.mul_(F.silu(v.z))).transpose(0, 1)
        h = states[-1]
    return y, h.transpose(1, 2).contiguous(), before


@torch.library.custom_op("hybrid_lm::selective_scan_backward", mutates_args=())
@full_precision
def _scan_backward(
    gy: Tensor,
    gstate: Tensor,
    before: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    reset: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, dt, A, B, C, D, z, dt_bias and the initial state, chunk by chunk from the end.

    Those of an absent D or z are empty.
    """
    chunks = _Chunks(x, dt, A, B, C, D, z, dt_bias, dt_softplus, reset)
    gx, gdt, gB, gC = (torch.empty(v.shape, dtype=v.dtype, device=v.device) for v in (x, dt, B, C))
    gz = x.new_empty(0) if z is None else torch.empty(z.shape, dtype=z.dtype, device=z.device)
    gA, gD, gbias = torch.zeros_like(chunks.A), torch.zeros_like(A[:, 0]), torch.zeros_like(A[:, 0])
    g_buffer = torch.empty_like(chunks.states)
    # what later tokens ask of the state at the end of the chunk
    g_after = gstate.transpose(1, 2)
    for k in reversed(range(len(chunks))):
        here = slice(k * CHUNK, (k + 1) * CHUNK)
        v = chunks.load(k)
        decay, states = chunks.run(v, before[k])
        # 1. the gate and the direct path
        gout = chunks.cut(gy, k)
        if v.z is not None:
            out = chunks.read(v, states).mul_(gout)
            gz[:, here] = torch.ops.aten.silu_backward(out, v.z).transpose(0, 1)
            gout = gout * F.silu(v.z)
        # 2. g_t = C_t gout_t + decay_{t+1} g_{t+1}: the gradient of every state
        g = torch.mul(gout[:, :, None], v.C[..., None], out=g_buffer[: len(gout)])
        gs, decays = g.unbind(0), decay.unbind(0)
        gs[-1].add_(g_after)
        for i in reversed(range(len(gs) - 1)):
            gs[i].addcmul_(decays[i + 1], gs[i + 1])
        g_after = decays[0] * gs[0]
        # 3. through y_t = C_t h_t and through the input dt_t x_t B_t
        gC[:, here] = (states @ gout[..., None])[..., 0].transpose(0, 1)
        gB[:, here] = (g @ (v.dt * v.x)[..., None])[..., 0].transpose(0, 1)
        ginput = (v.B[:, :, None] @ g)[:, :, 0]  # (c b d)
        gv = ginput * v.dt
        if chunks.D is not None:
            gv.addcmul_(gout, chunks.D)
            gD += (gout * v.x).sum((0, 1))
        gx[:, here] = gv.transpose(0, 1)
        # 4. through the decay exp(dt_t A): its exponent's gradient is decay_t h_{t-1} g_t
        gs[0].mul_(before[k])
        g[1:].mul_(states[:-1])
        g.mul_(decay)
        gstep = torch.mul(g, chunks.A, out=states).sum(2).addcmul_(ginput, v.x)
        gA += g.mul_(v.dt[:, :, None]).sum((0, 1))
        if dt_softplus:
            gstep.mul_(v.raw.sigmoid())
        gbias += gstep.sum((0, 1))
        gdt[:, here] = gstep.transpose(0, 1)
    return gx, gdt, gA.T.contiguous(), gB, gC, gD, gz, gbias, g_after.transpose(1, 2).contiguous()


@_scan.register_fake
def _(x, dt, A, B, C, D, z, dt_bias, dt_softplus, initial, reset):
    b, t, d = x.shape
    return x.new_empty(x.shape), torch.empty_like(initial), A.new_empty(-(-t // CHUNK), b, A.shape[1], d)


@_scan_backward.register_fake
def _(gy, gstate, before, x, dt, A, B, C, D, z, dt_bias, dt_softplus, reset):
    gx, gdt, gA, gB, gC = (v.new_empty(v.shape) for v in (x, dt, A, B, C))
    gz = x.new_empty(0) if z is None else z.new_empty(z.shape)
    return gx, gdt, gA, gB, gC, A.new_empty(len(A)), gz, A.new_empty(len(A)), gstate.new_empty(gstate.shape)


def _setup(ctx, inputs, output):
    *tensors, ctx.dt_softplus, _, reset = inputs
    ctx.save_for_backward(output[2], *tensors, reset)
    # an unused state must not cost zeros of the size of all states between chunks
    ctx.set_materialize_grads(False)


def _gradient(ctx, gy, gstate, _):
    before, *tensors, reset = ctx.saved_tensors
    gy = torch.zeros_like(tensors[0]) if gy is None else gy
    gstate = before.new_zeros(before.shape[1:]).transpose(1, 2) if gstate is None else gstate
    grads = _scan_backward(gy, gstate, before, *tensors, ctx.dt_softplus, reset)
    *given, initial = grads
    wanted = [None if v is None else g.to(v.dtype) for g, v in zip(given, tensors, strict=True)]
    return *wanted, None, initial, None


_scan.register_autograd(_gradient, setup_context=_setup)
