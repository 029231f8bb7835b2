"""The package mamba_ssm (state-spaces/mamba), and one token of its recurrences in Triton, on CUDA.

Its selective scan, SSD and gated norm are in the modules beside this one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hybrid_lm.ops.external.packages import Needs, Package
from hybrid_lm.ops.native.operators import may_take

PACKAGE = Package("mamba_ssm", "mamba-ssm", (2, 2))
STEP = Needs(PACKAGE, "mamba_ssm.ops.triton.selective_state_update")

STATES = 256
"""Of a channel: what the kernels of the scan and of SSD have room for."""
TYPES = (torch.float32, torch.bfloat16, torch.float16)


def step_of(dt: Tensor, bias: Tensor | None, softplus: bool) -> Tensor:
    """The step of a token, in float32."""
    dt = dt.float() if bias is None else dt.float() + bias.float()
    return F.softplus(dt) if softplus else dt


def start_of(
    initial: Tensor | None, shape: tuple[int, ...], x: Tensor, reset: Tensor | None, donate: bool
) -> Tensor:
    """The state before one token, which may be written: forgotten where a document starts."""
    if initial is None:
        return x.new_zeros(shape, dtype=torch.float32)
    taken = donate and may_take(initial, torch.float32)
    state = initial if taken else initial.to(torch.float32, copy=True).contiguous()
    if reset is not None:
        state.masked_fill_(reset.view(-1, *[1] * (len(shape) - 1)), 0)
    return state


@torch.library.custom_op("hybrid_lm_external::state_update", mutates_args=("state",))
def one_token(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, state: Tensor
) -> Tensor:
    """One token: x, dt, z (b h p), A (h p n), B, C (b g n), D (h p), state (b h p n), updated in place."""
    zero = torch.zeros((), dtype=torch.float32, device=x.device).expand(x.shape[1:])
    update = STEP.load().selective_state_update
    # absent vectors are an error there, and zeros of stride 0 are read from one place
    return update(state, x, dt, A, B, C, zero if D is None else D, z=z, dt_bias=zero, dt_softplus=False)


@one_token.register_fake
def _(x, dt, A, B, C, D, z, state):
    return torch.empty_like(x)
