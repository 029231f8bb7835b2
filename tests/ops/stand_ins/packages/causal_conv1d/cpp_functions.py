"""Stands for the functions beneath those of causal_conv1d, which make room for the compiled ones."""

import causal_conv1d_cuda
import torch


def causal_conv1d_fwd_function(x, weight, bias, seq_idx, initial_states, final_states_out, silu_activation):
    out = torch.empty_like(x)
    causal_conv1d_cuda.causal_conv1d_fwd(
        x, weight, bias, seq_idx, initial_states, out, final_states_out, silu_activation
    )
    return out


def causal_conv1d_bwd_function(
    x, weight, bias, dout, seq_idx, initial_states, dfinal_states, dx, return_dinitial_states, silu_activation
):
    assert dx is None
    dx, dweight = torch.empty_like(x), torch.zeros_like(weight, dtype=torch.float32)
    dbias = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)
    dinitial = None
    if return_dinitial_states:
        dinitial = x.new_empty(x.shape[0], weight.shape[1] - 1, x.shape[1]).transpose(1, 2)
    causal_conv1d_cuda.causal_conv1d_bwd(
        x, weight, bias, dout, seq_idx, initial_states, dfinal_states, dx, dweight, dbias, dinitial,
        silu_activation,
    )  # fmt: skip
    return dx, dweight.type_as(weight), dbias if bias is None else dbias.type_as(bias), dinitial


def causal_conv1d_update_function(
    x, conv_state, weight, bias, silu_activation, cache_seqlens, conv_state_indices
):
    out = torch.empty_like(x)
    causal_conv1d_cuda.causal_conv1d_update(
        x, conv_state, weight, bias, out, silu_activation, cache_seqlens, conv_state_indices
    )
    return out
