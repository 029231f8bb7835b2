"""Stands for the functions of fla: one autograd function, beneath which nothing is recorded."""

from itertools import pairwise

import torch
from stand_in import calls, gradients


def _apart(function, tensors, initial, ends):
    if ends is None:
        return function(*tensors, initial)
    assert tensors[0].shape[0] == 1
    assert ends.dtype == torch.int64
    ends = ends.tolist()
    assert initial is None or len(initial) == len(ends) - 1
    parts = [
        function(*(v[:, a:b] for v in tensors), None if initial is None else initial[k : k + 1])
        for k, (a, b) in enumerate(pairwise(ends))
    ]
    return torch.cat([y for y, _ in parts], 1), torch.cat([state for _, state in parts])


class _Call(torch.autograd.Function):
    @staticmethod
    def forward(ctx, name, function, initial, ends, *tensors):
        calls.append(name)
        ctx.save_for_backward(initial, ends, *tensors)
        ctx.name, ctx.function = name, function
        return _apart(function, tensors, initial, ends)

    @staticmethod
    def backward(ctx, gy, gstate):
        calls.append(f"{ctx.name}_backward")
        initial, ends, *tensors = ctx.saved_tensors
        ginitial, *grads = gradients(
            lambda start, *v: _apart(ctx.function, v, start, ends), (initial, *tensors), (gy, gstate)
        )
        return None, None, ginitial, None, *grads


def call(name, function, tensors, initial, final, ends):
    assert final
    assert initial is None or initial.dtype == torch.float32
    assert all(v.dtype == torch.float32 for v in tensors)
    return _Call.apply(name, function, initial, ends, *tensors)
