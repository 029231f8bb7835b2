"""Stands for the update of a state by one token."""

import torch.nn.functional as F
from stand_in import calls


def selective_state_update(state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False):
    h, p, n = state.shape[1:]
    assert dt.shape == x.shape
    assert A.shape == (h, p, n)
    assert B.shape == C.shape
    assert B.shape[2] == n
    # the real one reads their strides whether they are there or not
    assert D.shape == dt_bias.shape == (h, p)
    assert not dt_softplus
    calls.append("state_update")
    B, C = (v.float().repeat_interleave(h // v.shape[1], 1)[:, :, None] for v in (B, C))
    step = (dt.float() + dt_bias)[..., None]
    state.copy_(state * (step * A).exp() + step * B * x.float()[..., None])
    y = (state * C).sum(-1) + D * x.float()
    return (y if z is None else y * F.silu(z.float())).to(x.dtype)
