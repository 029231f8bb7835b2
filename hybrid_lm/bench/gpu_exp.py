"""The rate of a GPU's unit for exponentials, which no op of torch is bound by: a kernel of nothing else.

Importing this imports triton.
"""

from __future__ import annotations

import statistics
from typing import Any

import torch
import triton
import triton.language as tl

from hybrid_lm.bench.gpu_device import times

BLOCK, STEPS, UNROLLED = 1024, 64, 16


@triton.jit
def exp_kernel(x, y, BLOCK: tl.constexpr, STEPS: tl.constexpr, UNROLLED: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(x + at)
    for _ in range(STEPS):
        for _ in tl.static_range(UNROLLED):  # pyright: ignore[reportGeneralTypeIssues]
            # 2^-v has a fixed point, and the sign is part of the instruction.
            v = tl.inline_asm_elementwise(
                "{ .reg .f32 t; neg.f32 t, $1; ex2.approx.ftz.f32 $0, t; }", "=f,f", [v], tl.float32, True, 1
            )
    tl.store(y + at, v)


def exp_rate(device: torch.device, programs: int = 132 * 64) -> float:
    """Exponentials in a second, the median of ten runs."""
    x = torch.rand(programs * BLOCK, device=device)
    y = torch.empty_like(x)

    kernel: Any = exp_kernel

    def run() -> None:
        kernel[(programs,)](x, y, BLOCK=BLOCK, STEPS=STEPS, UNROLLED=UNROLLED, num_warps=4)

    milliseconds = statistics.median(times(run, device, 10))
    return x.numel() * STEPS * UNROLLED / milliseconds * 1e3
