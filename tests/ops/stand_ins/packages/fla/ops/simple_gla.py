"""Stands for linear attention with one decay for each head of fla."""

import torch

from fla.ops.recurrences import call
from hybrid_lm import ops


@torch.compiler.disable
def chunk_simple_gla(q, k, v, g, scale=None, initial_state=None, output_final_state=False, cu_seqlens=None):
    assert q.shape == k.shape

    def function(q, k, v, g, initial):
        start = None if initial is None else initial.transpose(2, 3)
        # SSD with steps of 1 whose rates of decay depend on the token, one token at a time
        ys, state = [], start
        for t in range(q.shape[1]):
            here = slice(t, t + 1)
            decayed = None if state is None else state * g[:, t, :, None, None].exp()
            one = torch.ones_like(g[:, here])
            y, state = ops.ssd(
                v[:, here], one, torch.zeros_like(g[0, 0]), k[:, here], q[:, here] * scale, initial=decayed,
                backend="reference",
            )  # fmt: skip
            ys.append(y)
        return torch.cat(ys, 1), state.transpose(2, 3)

    return call("simple_gla", function, (q, k, v, g), initial_state, output_final_state, cu_seqlens)
