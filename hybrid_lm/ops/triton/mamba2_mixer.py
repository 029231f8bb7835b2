"""The Triton backend of Mamba-2's middle: the convolution of x inside SSD, where no gradient is asked for.

Its SSD is Triton's, with gradients and for one token as well, whatever `ssd` is elsewhere."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from hybrid_lm.ops.backend import register
from hybrid_lm.ops.causal_conv1d import causal_conv1d
from hybrid_lm.ops.mamba2_mixer import Once, mamba2_mixer_torch
from hybrid_lm.ops.native.operators import tracked
from hybrid_lm.ops.norm import GateOrder, gated_rms_norm
from hybrid_lm.ops.triton.ssd import ssd_conv, why_not


def mamba2_mixer_triton(
    xBC: Tensor,
    z: Tensor,
    dt: Tensor,
    A: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    *,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    groups: int = 1,
    eps: float = 1e-5,
    order: GateOrder = "gate_norm",
    conv: Tensor | None = None,
    initial: Tensor | None = None,
    reset: Tensor | None = None,
    chunk: int = 64,
    donate: bool = False,
    once: Once | None = None,
    backends: Mapping[str, str] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    backends = {**(backends or {}), "ssd": "triton"}
    inputs = (xBC, z, dt, A, weight, bias, norm_weight, D, dt_bias, conv, initial)
    if xBC.shape[1] == 1 or tracked(*inputs):
        return mamba2_mixer_torch(
            xBC, z, dt, A, weight, bias, norm_weight,
            D=D, dt_bias=dt_bias, dt_limit=dt_limit, groups=groups, eps=eps, order=order, conv=conv,
            initial=initial, reset=reset, chunk=chunk, donate=donate, backends=backends,
        )  # fmt: skip
    d, h = z.shape[-1], A.shape[0]
    n = (xBC.shape[-1] - d) // (2 * groups)
    # B and C are the same for all heads of a group: convolved once, and not by each of its programs.
    BC, conv_BC = causal_conv1d(
        xBC[..., d:], weight[d:], None if bias is None else bias[d:], activation="silu",
        initial=None if conv is None else conv[..., d:], reset=reset, backend=backends.get("causal_conv1d"),
    )  # fmt: skip
    B, C = (v.unflatten(-1, (groups, n)) for v in BC.split(groups * n, -1))
    y, conv_x, state = ssd_conv(
        xBC[..., :d].unflatten(-1, (h, d // h)), weight[:d].unflatten(0, (h, d // h)), dt, A, B, C,
        conv_bias=None if bias is None else bias[:d].unflatten(0, (h, d // h)),
        conv_initial=None if conv is None else conv[..., :d].unflatten(-1, (h, d // h)),
        D=D, dt_bias=dt_bias, dt_softplus=True, dt_limit=dt_limit, initial=initial, reset=reset, chunk=chunk,
    )  # fmt: skip
    how = {"eps": eps, "groups": groups, "order": order, "backend": backends.get("gated_rms_norm")}
    y = gated_rms_norm(y.flatten(-2), z, norm_weight, **how)
    conv = conv_x.new_empty(len(z), weight.shape[1] - 1, xBC.shape[-1])
    conv[..., :d], conv[..., d:] = conv_x.flatten(2), conv_BC
    return y, conv, state


register("mamba2_mixer", "triton", run=mamba2_mixer_triton, why_not=why_not)
