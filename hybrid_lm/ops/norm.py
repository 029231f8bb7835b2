"""Root-mean-square norms: plain, and with the gate of Mamba-2.

RMSNorm: Zhang & Sennrich 2019, arXiv:1910.07467, eq. 4. Gated and grouped: Dao & Gu 2024, arXiv:2405.21060,
section 7.
"""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from hybrid_lm.ops.backend import define
from hybrid_lm.ops.precision import wide

GateOrder = Literal["gate_norm", "norm_gate", "gate"]


def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    *,
    eps: float = 1e-5,
    unit_offset: bool = False,
    backend: str | None = None,
) -> Tensor:
    """y = x / sqrt(mean(x^2) + eps) * w over the last axis.

    x            (... d)
    weight       (d), or None for none
    eps          added to the mean square, in units of x^2
    unit_offset  the factor is (1 + weight), so that a weight of zeros is the identity (Gemma)
    Returns (... d) in x's dtype; the arithmetic is float32 (float64 for float64).
    """
    return _rms_norm(backend, x)(x, weight, eps=eps, unit_offset=unit_offset)


def _rms_norm_reference(
    x: Tensor, weight: Tensor | None = None, *, eps: float = 1e-5, unit_offset: bool = False
) -> Tensor:
    v = x.to(wide(x))
    # 1. the root mean square of each vector
    rms = (v.square().mean(-1, keepdim=True) + eps).sqrt()
    # 2. normalise, then scale each channel
    y = v / rms
    if weight is not None:
        w = weight.to(v.dtype)
        y = y * (1 + w if unit_offset else w)
    return y.to(x.dtype)


def _rms_norm_torch(
    x: Tensor, weight: Tensor | None = None, *, eps: float = 1e-5, unit_offset: bool = False
) -> Tensor:
    v = x.to(wide(x))
    if weight is not None:
        weight = weight.to(v.dtype) + 1 if unit_offset else weight.to(v.dtype)
    return F.rms_norm(v, x.shape[-1:], weight, eps).to(x.dtype)


def gated_rms_norm(
    y: Tensor,
    gate: Tensor,
    weight: Tensor | None = None,
    *,
    eps: float = 1e-5,
    groups: int = 1,
    order: GateOrder = "gate_norm",
    backend: str | None = None,
) -> Tensor:
    """The output norm of Mamba-2: RMS over each of `groups` equal slices of the channels, and a silu gate.

    y, gate  (... d);  weight (d) or None
    order    "gate_norm": norm(y * silu(gate)) (Mamba-2);  "norm_gate": norm(y) * silu(gate);  "gate": y *
             silu(gate)
    Returns (... d) in y's dtype; the arithmetic is float32 (float64 for float64).
    """
    return _gated_rms_norm(backend, y)(y, gate, weight, eps=eps, groups=groups, order=order)


def _gated_rms_norm_reference(
    y: Tensor,
    gate: Tensor,
    weight: Tensor | None = None,
    *,
    eps: float = 1e-5,
    groups: int = 1,
    order: GateOrder = "gate_norm",
) -> Tensor:
    v, s = y.to(wide(y)), F.silu(gate.to(wide(y)))
    # 1. the gate, if it stands before the norm
    if order != "norm_gate":
        v = v * s
    # 2. the norm of each group of channels, then one weight per channel
    if order != "gate":
        v = _rms_norm_reference(v.unflatten(-1, (groups, -1)), None, eps=eps).flatten(-2)
        v = v if weight is None else v * weight.to(v.dtype)
    # 3. the gate, if it stands behind the norm
    if order == "norm_gate":
        v = v * s
    return v.to(y.dtype)


def _gated_rms_norm_torch(
    y: Tensor,
    gate: Tensor,
    weight: Tensor | None = None,
    *,
    eps: float = 1e-5,
    groups: int = 1,
    order: GateOrder = "gate_norm",
) -> Tensor:
    v, s = y.to(wide(y)), F.silu(gate.to(wide(y)))
    if order != "norm_gate":
        v = v * s
    if order != "gate":
        if groups == 1:
            v = F.rms_norm(v, v.shape[-1:], None if weight is None else weight.to(v.dtype), eps)
        else:
            v = F.rms_norm(v.unflatten(-1, (groups, -1)), (v.shape[-1] // groups,), None, eps).flatten(-2)
            v = v if weight is None else v * weight.to(v.dtype)
    if order == "norm_gate":
        v = v * s
    return v.to(y.dtype)


_rms_norm = define("rms_norm", reference=_rms_norm_reference, torch=_rms_norm_torch)
_gated_rms_norm = define("gated_rms_norm", reference=_gated_rms_norm_reference, torch=_gated_rms_norm_torch)
