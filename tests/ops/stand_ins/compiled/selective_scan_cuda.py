"""Stands for the compiled selective scan of mamba_ssm 2.3.2 (csrc/selective_scan/selective_scan.cpp)."""

import torch
import torch.nn.functional as F
from stand_in import calls, gradients

from hybrid_lm import ops

TYPES = (torch.float32, torch.float16, torch.bfloat16)


def _check(u, delta, A, B, C, D, z, delta_bias):
    b, d, t = u.shape
    n = A.shape[1]
    assert u.dtype in TYPES
    assert A.dtype == torch.float32
    assert n <= 256
    for v in (delta, B, C, *([] if z is None else [z])):
        assert v.dtype == u.dtype
    for v in (u, delta, B, C, *([] if z is None else [z])):
        assert v.stride(-1) == 1 or v.shape[-1] == 1
    assert delta.shape == (b, d, t)
    assert A.shape == (d, n)
    assert B.shape == C.shape == (b, 1, n, t)
    assert z is None or z.shape == (b, d, t)
    for v in (D, delta_bias):
        assert v is None or (v.dtype == torch.float32 and v.shape == (d,) and v.is_contiguous())


def _scan(u, delta, A, B, C, D, delta_bias, softplus):
    """y before the gate and the state, in float32."""
    x, dt, B, C = (v.float().transpose(1, 2) for v in (u, delta, B[:, 0], C[:, 0]))
    y, state = ops.selective_scan(
        x, dt, A, B, C, D=D, dt_bias=delta_bias, dt_softplus=softplus, backend="reference"
    )
    return y.transpose(1, 2), state


def fwd(u, delta, A, B, C, D, z, delta_bias, delta_softplus):
    _check(u, delta, A, B, C, D, z, delta_bias)
    calls.append("selective_scan")
    y, state = _scan(u, delta, A, B, C, D, delta_bias, delta_softplus)
    # of one chunk: products of the decays, and states
    kept = torch.stack((torch.full_like(state, 7), state), -1).flatten(2)[:, :, None]
    assert u.shape[2] <= 2048
    out = torch.empty_like(delta).copy_(y)
    return [out, kept] if z is None else [out, kept, torch.empty_like(z).copy_(y * F.silu(z.float()))]


def bwd(u, delta, A, B, C, D, z, delta_bias, dout, x, out, dz, delta_softplus, recompute_out_z):
    _check(u, delta, A, B, C, D, z, delta_bias)
    assert dout.dtype == u.dtype
    assert dout.shape == u.shape
    assert dout.stride(-1) == 1 or dout.shape[-1] == 1
    assert x.is_contiguous()
    assert x.shape == (*u.shape[:2], 1, 2 * A.shape[1])
    assert dz is None
    assert not recompute_out_z
    calls.append("selective_scan_backward")
    gy = dout.float()
    given = []
    if z is not None:
        assert out.dtype == u.dtype
        assert out.shape == u.shape
        gate = z.float()
        given = [torch.ops.aten.silu_backward(gy * out.float(), gate).to(z.dtype)]
        gy = gy * F.silu(gate)
    grads = gradients(lambda *v: _scan(*v, delta_softplus), (u, delta, A, B, C, D, delta_bias), (gy, None))
    du, ddelta, dA, dB, dC, dD, dbias = grads
    return [du, ddelta, dA, dB, dC, dD, dbias, *given]
