"""Stands for the compiled part of causal_conv1d 1.7 (csrc/causal_conv1d.cpp)."""

import torch
import torch.nn.functional as F
from stand_in import calls, gradients

TYPES = (torch.float32, torch.float16, torch.bfloat16)


def _check(x, weight, bias, seq_idx, initial_states, *others):
    b, d, t = x.shape
    w = weight.shape[1]
    assert x.dtype in TYPES
    assert weight.dtype in TYPES
    assert 2 <= w <= 4
    assert bias is None or (bias.dtype == weight.dtype and bias.stride(-1) == 1)
    # channels last, in whole vectors
    for v in (x, *others):
        assert v.shape == (b, d, t)
        assert v.stride(1) == 1
        assert v.stride(2) > 1
        assert d % 8 == v.stride(2) % 8 == v.stride(0) % 8 == v.data_ptr() % 16 == 0
    assert seq_idx is None or (seq_idx.dtype == torch.int32 and seq_idx.is_contiguous())
    assert seq_idx is None or seq_idx.shape == (b, t)
    if initial_states is not None:
        assert initial_states.dtype == x.dtype
        assert initial_states.shape == (b, d, w - 1)
        assert initial_states.stride(1) == 1


def _conv(x, weight, bias, initial_states, seq_idx, silu):
    (b, d, t), w = x.shape, weight.shape[1]
    before = x.new_zeros(b, d, w - 1) if initial_states is None else initial_states
    window = torch.cat((before, x), 2).float()
    y = 0 if bias is None else bias.float()[:, None]
    number = None
    if seq_idx is not None:
        # the initial state is the first document's
        first = seq_idx[:, :1].expand(b, w - 1)
        number = torch.cat(
            (first if initial_states is not None else first.new_full(first.shape, -1), seq_idx), 1
        )
    for k in range(w):
        v = window[:, :, k : k + t]
        if number is not None:
            v = torch.where((number[:, k : k + t] == seq_idx)[:, None], v, 0)
        y = y + weight.float()[:, k, None] * v
    return F.silu(y) if silu else y


def causal_conv1d_fwd(x, weight, bias, seq_idx, initial_states, out, final_states_out, silu):
    _check(x, weight, bias, seq_idx, initial_states, out)
    assert final_states_out is None
    calls.append("causal_conv1d")
    out.copy_(_conv(x, weight, bias, initial_states, seq_idx, silu))


def causal_conv1d_bwd(
    x, weight, bias, dout, seq_idx, initial_states, dfinal_states, dx, dweight, dbias, dinitial_states, silu
):
    _check(x, weight, bias, seq_idx, initial_states, dout, dx)
    assert dfinal_states is None
    assert (bias is None) == (dbias is None)
    calls.append("causal_conv1d_backward")
    grads = gradients(
        lambda *v: [_conv(*v, seq_idx, silu)], (x, weight, bias, initial_states), (dout.float(),)
    )
    for given, grad in zip((dx, dweight, dbias, dinitial_states), grads, strict=True):
        if given is not None:
            given.copy_(grad)


def causal_conv1d_update(x, conv_state, weight, bias, out, silu, cache_seqlens, conv_state_indices):
    assert x.dtype == conv_state.dtype
    assert cache_seqlens is conv_state_indices is None
    assert 2 <= weight.shape[1] <= 4
    calls.append("causal_conv1d_update")
    out.copy_(_conv(x, weight, bias, conv_state, None, silu))
    conv_state.copy_(torch.cat((conv_state, x), 2)[:, :, x.shape[2] :])
