"""What the state-space layers share: their memory and the starts of their dynamics."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hybrid_lm.layers.base import Init, State


@dataclass
class SSMState(State):
    """The last inputs of the convolution (b w-1 d); the recurrence (b d n) or (b h p n), in float32."""

    conv: Tensor
    ssm: Tensor


def check_dt(dt_min: float, dt_max: float) -> Iterator[tuple[str, str]]:
    """The problem of a range of step sizes that is none."""
    if dt_min > dt_max:
        yield "dt_min", f"{dt_min} is above dt_max {dt_max}"


def conv_start(weight: Tensor, rng: torch.Generator) -> None:
    """Uniform in +-1/sqrt(width): a depthwise tap has `width` inputs."""
    bound = weight.shape[-1] ** -0.5
    weight.uniform_(-bound, bound, generator=rng)


def dt_bias_start(dt_min: float, dt_max: float, dt_floor: float) -> Init:
    """dt_bias such that softplus(dt_bias) is log-uniform in [dt_min, dt_max]. Gu & Dao 2023,
    arXiv:2312.00752, section 3.6."""

    def start(bias: Tensor, rng: torch.Generator) -> None:
        low, high = math.log(dt_min), math.log(dt_max)
        dt = torch.exp(bias.uniform_(low, high, generator=rng)).clamp_(min=dt_floor)
        # The inverse of softplus, written so that it does not lose small dt.
        bias.copy_(dt + torch.log(-torch.expm1(-dt)))

    return start


def log_uniform_A(low: float, high: float) -> Init:
    """A_log with -A uniform in [low, high]. Dao & Gu 2024, arXiv:2405.21060, the authors' `Mamba2`."""

    def start(A_log: Tensor, rng: torch.Generator) -> None:
        A_log.uniform_(low, high, generator=rng).log_()

    return start


def s4d_real(A_log: Tensor, rng: torch.Generator) -> None:
    """A_log (d n) = log(1..n) for every channel: S4D-Real. Gu et al. 2022, arXiv:2206.11893, section 4.2."""
    n = torch.arange(1, A_log.shape[-1] + 1, dtype=torch.float32, device=A_log.device)
    A_log.copy_(n.log().expand_as(A_log))
