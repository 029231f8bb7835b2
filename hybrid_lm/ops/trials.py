"""Small inputs for every op with kernels for GPUs that reach all of their code: see `proof.py`.

Sizes are those of models where they decide what is compiled (a head's 64 channels and 128 states), and
elsewhere such as fill no tile.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hybrid_lm.ops.mamba2_mixer import PARTS
from hybrid_lm.ops.proof import Trial

# Carried states and the numbers that make decays: float32 in every model.
KEPT = frozenset({"A", "D", "dt_bias", "initial"})
PARAMETERS = frozenset({"A", "D", "dt_bias", "weight", "bias"})


def generator() -> torch.Generator:
    """Numbers of its own: the caller's stay as they are."""
    return torch.Generator("cpu").manual_seed(0)


def normal(g: torch.Generator, *shape: int) -> Tensor:
    """(shape) float64 on the CPU, whatever the default device is."""
    return torch.randn(*shape, generator=g, dtype=torch.float64, device="cpu")


def starts(g: torch.Generator, b: int, t: int) -> Tensor:
    """(b t): documents of some 30 tokens."""
    return torch.rand(b, t, generator=g, device="cpu") < 1 / 30


def steps(g: torch.Generator, *shape: int) -> dict[str, Tensor]:
    """Decays between 0.999 and 0.5, as models have them: dt before softplus about -3, A from -1 to -8."""
    *_, h = shape
    rate = 1 + 7 * torch.rand(h, generator=g, dtype=torch.float64, device="cpu")
    return {"dt": normal(g, *shape) - 3, "A": -rate, "dt_bias": normal(g, h) / 4}


def ssd(name: str, b: int, t: int, h: int, p: int, n: int, groups: int, **rest: Any) -> Trial:
    g = generator()
    inputs: dict[str, Any] = {
        "x": normal(g, b, t, h, p),
        "B": normal(g, b, t, groups, n),
        "C": normal(g, b, t, groups, n),
        "D": normal(g, h),
        "initial": normal(g, b, h, p, n),
        "reset": starts(g, b, t),
        "dt_softplus": True,
    }
    return Trial(name, inputs | steps(g, b, t, h) | rest, KEPT, PARAMETERS, "donate" not in rest)


def selective_scan(name: str, b: int, t: int, d: int, n: int, **rest: Any) -> Trial:
    g = generator()
    inputs: dict[str, Any] = {
        "x": normal(g, b, t, d),
        **steps(g, b, t, d),
        "A": -(1 + 7 * torch.rand(d, n, generator=g, dtype=torch.float64, device="cpu")),
        "B": normal(g, b, t, n),
        "C": normal(g, b, t, n),
        "D": normal(g, d),
        "z": normal(g, b, t, d),
        "initial": normal(g, b, d, n),
        "reset": starts(g, b, t),
        "dt_softplus": True,
    }
    return Trial(name, inputs | rest, KEPT, PARAMETERS, "donate" not in rest)


def causal_conv1d(name: str, b: int, t: int, d: int, w: int, **rest: Any) -> Trial:
    g = generator()
    inputs: dict[str, Any] = {
        "x": normal(g, b, t, d),
        "weight": normal(g, d, w),
        "bias": normal(g, d),
        "initial": normal(g, b, w - 1, d),
        "reset": starts(g, b, t),
        "activation": "silu",
    }
    return Trial(name, inputs | rest, frozenset(), PARAMETERS, "donate" not in rest)


def mamba2_mixer(name: str, b: int, t: int, h: int, p: int, n: int, **rest: Any) -> Trial:
    """Without gradients, which its kernels leave to those of the parts."""
    g = generator()
    d, c = h * p, h * p + 2 * n
    inputs: dict[str, Any] = {
        "xBC": normal(g, b, t, c),
        "z": normal(g, b, t, d),
        "weight": normal(g, c, 4) / 2,
        "bias": normal(g, c),
        "norm_weight": normal(g, d),
        "D": normal(g, h),
        "conv": normal(g, b, 3, c),
        "initial": normal(g, b, h, p, n),
        "reset": starts(g, b, t),
    }
    plain = {"backends": dict.fromkeys(PARTS, "torch")}
    return Trial(name, inputs | steps(g, b, t, h) | rest, KEPT, gradients=False, plain=plain)


TRIALS: dict[str, tuple[Callable[[], Trial], ...]] = {
    "ssd": (
        # as many heads as fill a GPU, which then walk all chunks; chunks and tiles that are full
        partial(ssd, "many heads", 1, 192, 132, 64, 128, 2),
        partial(ssd, "few heads", 2, 150, 4, 40, 20, 2),
        partial(ssd, "one token", 3, 1, 4, 64, 128, 2, donate=True),
    ),
    "selective_scan": (
        partial(selective_scan, "very many channels", 8, 40, 4096, 16),
        partial(selective_scan, "many channels", 4, 70, 4096, 16),
        partial(selective_scan, "few channels", 2, 150, 40, 16),
        partial(selective_scan, "more states", 2, 70, 40, 40),
        partial(selective_scan, "an odd width", 1, 70, 41, 16),
        partial(selective_scan, "one token", 3, 1, 40, 16, donate=True),
    ),
    "causal_conv1d": (
        # channels that one access takes eight of, as in every model; and such as it cannot
        partial(causal_conv1d, "whole vectors", 2, 300, 128, 4),
        partial(causal_conv1d, "a sequence", 2, 300, 70, 4),
        partial(causal_conv1d, "many taps", 2, 70, 72, 7),
        partial(causal_conv1d, "one token", 3, 1, 70, 4, donate=True),
    ),
    "mamba2_mixer": (
        partial(mamba2_mixer, "a sequence", 2, 150, 4, 64, 128),
        partial(mamba2_mixer, "one token", 3, 1, 4, 64, 128, donate=True),
        # heads enough for a block of each
        partial(mamba2_mixer, "one token of many heads", 9, 1, 64, 64, 128, donate=True),
    ),
}
