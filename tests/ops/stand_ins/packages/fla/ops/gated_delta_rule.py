"""Stands for the gated delta rule of fla."""

import torch

from fla.ops.recurrences import call
from hybrid_lm import ops


@torch.compiler.disable
def chunk_gated_delta_rule(
    q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False, cu_seqlens=None
):
    def function(*given):
        *tensors, initial = given
        return ops.delta_rule(*tensors, scale=scale, initial=initial, backend="reference")

    return call("delta_rule", function, (q, k, v, g, beta), initial_state, output_final_state, cu_seqlens)
