"""Stands for the diagonal recurrence of fla."""

import torch

from fla.ops.recurrences import call
from hybrid_lm import ops


@torch.compiler.disable
def fused_recurrent_hgrn(x, g, initial_state=None, output_final_state=False, cu_seqlens=None):
    def function(x, g, initial):
        return ops.linear_recurrence(x, g, initial=initial, backend="reference")

    return call("linear_recurrence", function, (x, g), initial_state, output_final_state, cu_seqlens)
