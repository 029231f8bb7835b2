"""The cases of `bench ops`: an op of ours at the shapes of a real layer, and the peers that compute the same.

Batch 2. scan: Mamba-1 in a model of 130 M parameters, d_inner 1536, n 16; ssd: Mamba-2 with 24 heads of 64,
one group, n 128; attention: d_model 768, 12 heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hybrid_lm.bench import peers
from hybrid_lm.bench.measure import Candidate, backends
from hybrid_lm.ops import attention, causal_conv1d, gated_rms_norm, selective_scan, ssd

Inputs = dict[str, Tensor]
Op = Callable[[Inputs], Tensor]

BATCH = 2


@dataclass(frozen=True)
class Case:
    """One op at one shape."""

    name: str
    op: str
    """Its name in the table of backends."""
    make: Callable[[int], Inputs]
    """Random inputs of a length."""
    ours: Callable[[Inputs, str], Tensor]
    """Our op with a backend."""
    peers: tuple[Candidate, ...]
    length: int = 1024
    """Tokens, where none are asked for."""
    flop: Callable[[Inputs], float] = field(default=lambda v: 0.0)
    """Least work of the forward pass, in units of a matrix product's; 0 where it is bound by memory."""

    def inputs(self, length: int, dtype: torch.dtype = torch.float32) -> Inputs:
        """The same values in every process and dtype, as leaves."""
        torch.manual_seed(0)
        return {name: v.to(dtype).requires_grad_() for name, v in self.make(length).items()}

    def candidates(self) -> Iterator[Candidate]:
        """Ours, one for each backend, then the peers."""
        for backend in backends(self.op):
            yield Candidate(backend, lambda backend=backend: lambda v: self.ours(v, backend), ours=True)
        yield from self.peers

    def output(self, inputs: Inputs) -> Tensor:
        """Something of the output's shape: the first input."""
        return next(iter(inputs.values()))


def gradients(run: Op, inputs: Inputs, dy: Tensor) -> dict[str, Tensor]:
    """The output and the gradient of every input, given the output's `dy`."""
    y = run(inputs)
    found = torch.autograd.grad(y, list(inputs.values()), dy)
    return {"y": y.detach(), **{f"d_{name}": g for name, g in zip(inputs, found, strict=True)}}


def scan_inputs(d: int) -> Callable[[int], Inputs]:
    def make(t: int) -> Inputs:
        b, n = BATCH, 16
        return {
            "x": torch.randn(b, t, d),
            "dt": torch.randn(b, t, d) - 4.0,
            "A": -torch.arange(1, n + 1).float().repeat(d, 1),
            "B": torch.randn(b, t, n),
            "C": torch.randn(b, t, n),
            "D": torch.ones(d),
            "z": torch.randn(b, t, d),
            "dt_bias": torch.zeros(d),
        }

    return make


def ssd_inputs(t: int) -> Inputs:
    b, h, p, g, n = BATCH, 24, 64, 1, 128
    return {
        "x": torch.randn(b, t, h, p),
        "dt": torch.randn(b, t, h) - 4.0,
        "A": -torch.arange(1, h + 1).float(),
        "B": torch.randn(b, t, g, n),
        "C": torch.randn(b, t, g, n),
        "D": torch.ones(h),
        "dt_bias": torch.zeros(h),
    }


def conv_inputs(t: int) -> Inputs:
    d, w = 1536, 4
    return {"x": torch.randn(BATCH, t, d), "weight": torch.randn(d, w), "bias": torch.randn(d)}


def attention_inputs(t: int) -> Inputs:
    return {name: torch.randn(BATCH, t, 12, 64) for name in "qkv"}


def norm_inputs(t: int) -> Inputs:
    d = 1536
    return {"y": torch.randn(BATCH, t, d), "gate": torch.randn(BATCH, t, d), "weight": torch.rand(d) + 0.5}


def our_scan(v: Inputs, backend: str) -> Tensor:
    x, dt, A, B, C = (v[k] for k in ("x", "dt", "A", "B", "C"))
    return selective_scan(
        x, dt, A, B, C, D=v["D"], z=v["z"], dt_bias=v["dt_bias"], dt_softplus=True, backend=backend
    )[0]


def our_ssd(v: Inputs, backend: str) -> Tensor:
    x, dt, A, B, C = (v[k] for k in ("x", "dt", "A", "B", "C"))
    return ssd(x, dt, A, B, C, D=v["D"], dt_bias=v["dt_bias"], dt_softplus=True, backend=backend)[0]


def our_conv(v: Inputs, backend: str) -> Tensor:
    return causal_conv1d(v["x"], v["weight"], v["bias"], activation="silu", backend=backend)[0]


def scan_flop(v: Inputs) -> float:
    """9 instructions of the FMA pipe per channel, state and token, the exponential's polynomial among them;
    an FMA counts as two operations of a matrix product."""
    return 2.0 * 9.0 * v["x"].numel() * v["A"].shape[1]


def ssd_flop(v: Inputs, chunk: int = 64) -> float:
    """The four products of the chunked form (Dao & Gu 2024, section 6), the causal half of masked ones."""
    b, t, h, p = v["x"].shape
    g, n = v["B"].shape[2:]
    return float(b * t * (g * chunk * n + h * chunk * p + 4 * h * p * n))


CASES = {
    case.name: case
    for case in (
        Case("scan", "selective_scan", scan_inputs(1536), our_scan, peers.SCAN, flop=scan_flop),
        Case("narrow_scan", "selective_scan", scan_inputs(256), our_scan, peers.SCAN, 256, scan_flop),
        Case("ssd", "ssd", ssd_inputs, our_ssd, peers.SSD, flop=ssd_flop),
        Case("conv", "causal_conv1d", conv_inputs, our_conv, peers.CONV),
        Case(
            "gated_rms_norm",
            "gated_rms_norm",
            norm_inputs,
            lambda v, backend: gated_rms_norm(v["y"], v["gate"], v["weight"], backend=backend),
            peers.NORM,
        ),
        Case(
            "attention",
            "attention",
            attention_inputs,
            lambda v, backend: attention(v["q"], v["k"], v["v"], backend=backend),
            peers.ATTENTION,
        ),
    )
}
