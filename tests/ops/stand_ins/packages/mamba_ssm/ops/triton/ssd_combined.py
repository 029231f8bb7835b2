"""Stands for the two functions beneath mamba_chunk_scan_combined."""

import torch
from stand_in import calls, gradients

from hybrid_lm import ops


def _ssd(x, dt, A, B, C, D, dt_bias, initial_states, seq_idx, dt_softplus, dt_limit):
    reset = None
    if seq_idx is not None:
        assert seq_idx.dtype == torch.int32
        reset = torch.diff(seq_idx, dim=1, prepend=torch.zeros_like(seq_idx[:, :1])) != 0
    assert initial_states is None or initial_states.shape == (x.shape[0], *x.shape[2:], B.shape[3])
    return ops.ssd(
        x.float(), dt.float(), A, B.float(), C.float(), D=D, dt_bias=dt_bias, dt_softplus=dt_softplus,
        dt_limit=dt_limit, initial=initial_states, reset=reset, backend="reference",
    )  # fmt: skip


def _mamba_chunk_scan_combined_fwd(
    x, dt, A, B, C, chunk_size, D=None, z=None, dt_bias=None, initial_states=None, seq_idx=None,
    cu_seqlens=None, dt_softplus=False, dt_limit=(0.0, float("inf")),
):  # fmt: skip
    assert z is None
    assert cu_seqlens is None
    assert chunk_size == 256
    calls.append("ssd")
    y, state = _ssd(x, dt, A, B, C, D, dt_bias, initial_states, seq_idx, dt_softplus, dt_limit)
    return y.to(x.dtype), None, dt, None, None, state


def _mamba_chunk_scan_combined_bwd(
    dout, x, dt, A, B, C, out, chunk_size, D=None, z=None, dt_bias=None, initial_states=None,
    dfinal_states=None, seq_idx=None, dt_softplus=False, dt_limit=(0.0, float("inf")),
):  # fmt: skip
    assert out.shape == x.shape
    calls.append("ssd_backward")
    *grads, dbias, dinitial = gradients(
        lambda *v: _ssd(*v, seq_idx, dt_softplus, dt_limit),
        (x, dt, A, B, C, D, dt_bias, initial_states),
        (dout.float(), dfinal_states),
    )
    # of the states of all chunks, which are kept in the type of x
    return (*grads, None, dbias, None if dinitial is None else dinitial.to(x.dtype))
