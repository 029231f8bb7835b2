"""The cases of `bench gpu`: shapes, the least time that each can take, and what is to be reached.

The floors are arithmetic with three constants of one H200: copying and bf16 matrix products as they were
measured on one, and the rate of exponentials by its number of units (16 in each of 132 multiprocessors, at
1.98 GHz). A run's file has all three as that run found them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hybrid_lm.bench import gpu_peers as peers
from hybrid_lm.bench.gpu_peers import Inputs, Way
from hybrid_lm.bench.measure import Candidate
from hybrid_lm.ops import causal_conv1d, selective_scan, ssd
from hybrid_lm.ops.backend import EXTERNAL, report
from hybrid_lm.ops.native.mamba2_step import mamba2_step, new_tickets, no_mamba2_step

COPY = 4.3e12
"""Bytes read and written in a second."""
EXP = 132 * 16 * 1.98e9
"""Exponentials, logarithms and reciprocals in a second."""
MATMUL = 790e12
"""Operations of bf16 matrix products in a second."""

Sizes = Mapping[str, int]
Floors = dict[str, float]


@dataclass(frozen=True)
class GpuCase:
    """An op at one shape, in bf16 with float32 parameters."""

    name: str
    op: str
    """Its name in the table of backends."""
    sizes: Sizes
    make: Callable[[Sizes, torch.device], Inputs]
    ours: Callable[[Inputs, str], Tensor]
    peers: tuple[Candidate, ...]
    floors: Callable[[Sizes], Floors]
    """Least milliseconds, by quantity; these quantities are what is measured."""
    reach: Floors = field(default_factory=dict)
    """Milliseconds to be reached, by quantity."""
    states: tuple[str, ...] = ()
    """Inputs that are updated in place; such a case has no gradients and runs in a CUDA graph."""
    one_kernel: Callable[[Inputs], Tensor] | None = None
    """Ours in one kernel, of the ops' names or none."""
    small: Sizes = field(default_factory=dict)
    """Sizes of a run that only shows that everything works."""

    def inputs(self, sizes: Sizes, device: torch.device) -> Inputs:
        """The same values in every process, as leaves."""
        torch.manual_seed(0)
        made = self.make(sizes, device)
        return {name: v.requires_grad_(not self.states) for name, v in made.items()}

    def candidates(self, device: str) -> Iterator[Candidate]:
        """Ours, one for each backend that runs on the device, then the peers."""
        for backend in able(self.op, device):
            yield Candidate(backend, partial(self._way, backend), ours=True)
        if (run := self.one_kernel) is not None and no_mamba2_step(device) is None:
            yield Candidate("one_kernel", lambda: Way(run), ours=True)
        yield from self.peers

    def _way(self, backend: str) -> Way:
        return Way(lambda v: self.ours(v, backend))


def able(op: str, device: str) -> list[str]:
    """Our backends of an op that run on a device, best first; neither the reference nor the packages of
    others, which are peers here."""
    rows = report(device, {}, op=op, without=("reference", *EXTERNAL))
    return [row.backend for row in rows if row.why_not is None]


def reasons(op: str, device: str) -> dict[str, str]:
    """Why the others of our backends do not run there."""
    rows = report(device, {}, op=op, without=EXTERNAL)
    return {row.backend: row.why_not for row in rows if row.why_not is not None}


def _bf16(*shape: int, device: torch.device) -> Tensor:
    return torch.randn(*shape, device=device).to(torch.bfloat16)


def scan_inputs(s: Sizes, device: torch.device, gated: bool = False) -> Inputs:
    b, t, d, n = (s[k] for k in "btdn")
    new = partial(_bf16, device=device)
    made = {
        "x": new(b, t, d),
        "dt": (torch.randn(b, t, d, device=device) - 4.0).to(torch.bfloat16),
        "A": -torch.arange(1, n + 1, device=device).float().repeat(d, 1),
        "B": new(b, t, n),
        "C": new(b, t, n),
        "D": torch.randn(d, device=device),
        "dt_bias": torch.randn(d, device=device),
    }
    return made | ({"z": new(b, t, d)} if gated else {})


def ssd_inputs(s: Sizes, device: torch.device) -> Inputs:
    b, t, h, p, g, n = (s[k] for k in "bthpgn")
    new = partial(_bf16, device=device)
    return {
        "x": new(b, t, h, p),
        "dt": (torch.randn(b, t, h, device=device) - 4.0).to(torch.bfloat16),
        "A": -torch.linspace(1.0, 16.0, h, device=device),
        "B": new(b, t, g, n),
        "C": new(b, t, g, n),
        "D": torch.randn(h, device=device),
        "dt_bias": torch.randn(h, device=device),
    }


def step_inputs(s: Sizes, device: torch.device) -> Inputs:
    state = torch.randn(s["b"], s["h"], s["p"], s["n"], device=device)
    made = ssd_inputs({**s, "t": 1}, device)
    xBC = torch.cat([made[name].flatten(1) for name in ("x", "B", "C")], -1)
    return {"state": state} | made | {"xBC": xBC}


def conv_inputs(s: Sizes, device: torch.device) -> Inputs:
    b, t, d, w = (s[k] for k in "btdw")
    weight, bias = torch.randn(d, w, device=device), torch.randn(d, device=device)
    return {"x": _bf16(b, t, d, device=device), "weight": weight, "bias": bias}


def our_scan(v: Inputs, backend: str) -> Tensor:
    x, dt, A, B, C = (v[k] for k in ("x", "dt", "A", "B", "C"))
    how: dict[str, Any] = {"D": v["D"], "z": v.get("z"), "dt_bias": v["dt_bias"], "dt_softplus": True}
    return selective_scan(x, dt, A, B, C, backend=backend, **how)[0]


def our_ssd(v: Inputs, backend: str) -> Tensor:
    x, dt, A, B, C = (v[k] for k in ("x", "dt", "A", "B", "C"))
    return ssd(x, dt, A, B, C, D=v["D"], dt_bias=v["dt_bias"], dt_softplus=True, backend=backend)[0]


def our_step(v: Inputs, backend: str) -> Tensor:
    x, dt, A, B, C = (v[k] for k in ("x", "dt", "A", "B", "C"))
    how: dict[str, Any] = {"D": v["D"], "dt_bias": v["dt_bias"], "dt_softplus": True, "donate": True}
    y, state = ssd(x, dt, A, B, C, initial=v["state"], backend=backend, **how)
    if state is not v["state"]:
        # A backend that makes a new state has to bring it where the next step looks for it.
        v["state"].copy_(state)
    return y


def one_step(v: Inputs) -> Tensor:
    """The same in one kernel, which takes x, B and C side by side, as Mamba-2 has them."""
    y = mamba2_step(
        v["xBC"], v["dt"][:, 0], v["A"], v["state"], D=v["D"], dt_bias=v["dt_bias"], dt_softplus=True
    )
    return y[:, None]


def mixer_inputs(s: Sizes, device: torch.device) -> Inputs:
    b, h, p, g, n, w = (s[k] for k in "bhpgnw")
    c = h * p + 2 * g * n
    made = {name: v for name, v in step_inputs(s, device).items() if name in ("state", "A", "D", "dt_bias")}
    made["x"] = _bf16(b, c, device=device)
    made["dt"] = (torch.randn(b, h, device=device) - 4.0).to(torch.bfloat16)
    made["z"] = _bf16(b, h, p, device=device)
    made["conv"] = _bf16(b, w - 1, c, device=device)
    made |= {"weight": torch.randn(c, w, device=device), "bias": torch.randn(c, device=device)}
    return made | {"tickets": new_tickets(made["state"], g)}


def our_mixer(v: Inputs, backend: str) -> Tensor:
    """A token of Mamba-2 by three ops, of which the recurrence is this backend's."""
    (h, p), n = v["z"].shape[1:], v["state"].shape[-1]
    how: dict[str, Any] = {"activation": "silu", "initial": v["conv"], "donate": True}
    same: dict[str, Any] = (
        {"backend": backend} if backend in able("causal_conv1d", v["x"].device.type) else {}
    )
    xBC, conv = causal_conv1d(v["x"][:, None], v["weight"], v["bias"], **how, **same)
    if conv is not v["conv"]:
        v["conv"].copy_(conv)
    x, B, C = xBC.split([h * p, *[(xBC.shape[-1] - h * p) // 2] * 2], -1)
    parts = {"x": x.unflatten(-1, (h, p)), "dt": v["dt"][:, None]}
    parts |= {"B": B.unflatten(-1, (-1, n)), "C": C.unflatten(-1, (-1, n))}
    y = our_step({**v, **parts}, backend)[:, 0]
    return y * F.silu(v["z"])


def one_mixer(v: Inputs) -> Tensor:
    kept: dict[str, Any] = {
        name: v[name] for name in ("z", "conv", "tickets", "weight", "bias", "D", "dt_bias")
    }
    groups = (v["x"].shape[1] - v["z"][0].numel()) // (2 * v["state"].shape[-1])
    return mamba2_step(v["x"], v["dt"], v["A"], v["state"], groups=groups, dt_softplus=True, **kept)


def token_inputs(s: Sizes, device: torch.device) -> Inputs:
    """Of a token of Mamba-1 behind its projections, which lie between the convolution and the scan."""
    b, d, n, w = (s[k] for k in "bdnw")
    state = torch.randn(b, d, n, device=device)
    made = {name: v for name, v in scan_inputs({**s, "t": 1}, device, gated=True).items() if name != "x"}
    conv = {"x": _bf16(b, 1, d, device=device), "conv": _bf16(b, w - 1, d, device=device)}
    weights = {"weight": torch.randn(d, w, device=device), "bias": torch.randn(d, device=device)}
    return {"state": state} | made | conv | weights


def our_token(v: Inputs, backend: str) -> Tensor:
    """A token of Mamba-1 by two ops, of which the recurrence is this backend's."""
    same: dict[str, Any] = (
        {"backend": backend} if backend in able("causal_conv1d", v["x"].device.type) else {}
    )
    how: dict[str, Any] = {"activation": "silu", "initial": v["conv"], "donate": True, **same}
    u, conv = causal_conv1d(v["x"], v["weight"], v["bias"], **how)
    given: dict[str, Any] = {name: v[name] for name in ("dt", "A", "B", "C", "D", "z", "dt_bias")}
    given |= {"dt_softplus": True, "initial": v["state"], "donate": True, "backend": backend}
    y, state = selective_scan(u, **given)
    for name, new in (("conv", conv), ("state", state)):
        if new is not v[name]:
            v[name].copy_(new)
    return y


def our_conv(v: Inputs, backend: str) -> Tensor:
    return causal_conv1d(v["x"], v["weight"], v["bias"], activation="silu", backend=backend)[0]


def milliseconds(*seconds: float) -> float:
    """Of the slowest of parts that go on at the same time."""
    return 1e3 * max(seconds)


def scan_floors(s: Sizes, gated: bool = False) -> Floors:
    """Every tensor once, and one exponential for each channel, state and token, softplus and silu besides;
    the backward pass computes them again and reads what the forward pass read."""
    tensor = s["b"] * s["t"] * s["d"]
    matrices = 4.0 * s["b"] * s["t"] * s["n"]  # B and C
    exps = tensor * (s["n"] + 2.0 + 2.0 * gated)
    forward = 2.0 * tensor * (3 + gated) + matrices
    backward = 2.0 * tensor * (5 + 3 * gated) + 2 * matrices
    return {
        "fwd_ms": milliseconds(forward / COPY, exps / EXP),
        "fwd_bwd_ms": milliseconds(forward / COPY, exps / EXP)
        + milliseconds(backward / COPY, (exps + tensor * (2.0 + gated)) / EXP),
    }


def ssd_floors(s: Sizes, chunk: int = 64) -> Floors:
    """Every tensor once, and the products of the chunked form, without its causal half being saved (Dao & Gu
    2024, section 6); backward: the products again and twice as many of gradients."""
    tokens = s["b"] * s["t"]
    x, dt, matrices = (2.0 * tokens * k for k in (s["h"] * s["p"], s["h"], 2 * s["g"] * s["n"]))
    per_token = s["g"] * chunk * s["n"] + s["h"] * chunk * s["p"] + 2 * s["h"] * s["p"] * s["n"]
    flop = 2.0 * tokens * per_token
    forward = milliseconds((2 * x + dt + matrices) / COPY, flop / MATMUL)
    # x, dt, B, C and y's gradient in; the gradients of the four out
    backward = milliseconds((3 * x + 2 * dt + 2 * matrices) / COPY, 3 * flop / MATMUL)
    return {"fwd_ms": forward, "fwd_bwd_ms": forward + backward}


def conv_floors(s: Sizes) -> Floors:
    """x in, y out; backward: x and y's gradient in, x's out."""
    tensor = 2.0 * s["b"] * s["t"] * s["d"]
    return {"fwd_ms": 1e3 * 2 * tensor / COPY, "bwd_ms": 1e3 * 3 * tensor / COPY}


def step_floors(s: Sizes) -> Floors:
    """The float32 state in and out; all else is a fiftieth of it."""
    return {"step_ms": 1e3 * 8.0 * s["b"] * s["h"] * s["p"] * s["n"] / COPY}


def token_floors(s: Sizes) -> Floors:
    """The float32 state and the convolution's in and out; x, dt and z in, y out, all bf16; A, which no batch
    makes larger."""
    channel = 8.0 * s["n"] + 4.0 * (s["w"] - 1) + 8.0
    return {"step_ms": 1e3 * s["d"] * (s["b"] * channel + 4.0 * s["n"]) / COPY}


LAYER = {"b": 8, "t": 4096, "d": 4096}
TINY = {"b": 2, "t": 5, "d": 6}
HEADS = {"h": 64, "p": 64, "g": 1, "n": 128}
FEW = {"b": 2, "h": 2, "p": 4, "g": 1, "n": 8}


def scan_case(name: str, sizes: Sizes, gated: bool, reach: Floors | None = None) -> GpuCase:
    make, floors = partial(scan_inputs, gated=gated), partial(scan_floors, gated=gated)
    small = {**TINY, "n": 4}
    return GpuCase(
        name, "selective_scan", sizes, make, our_scan, peers.SCAN, floors, reach or {}, small=small
    )


def step_case(heads: int, reach: Floors | None = None) -> GpuCase:
    sizes = {**HEADS, "b": heads // HEADS["h"]}
    how: dict[str, Any] = {"reach": reach or {}, "states": ("state",), "small": FEW, "one_kernel": one_step}
    return GpuCase(f"step_{heads}", "ssd", sizes, step_inputs, our_step, peers.STEP, step_floors, **how)


def mixer_case(heads: int) -> GpuCase:
    sizes, small = {**HEADS, "b": heads // HEADS["h"], "w": 4}, {**FEW, "w": 4}
    how: dict[str, Any] = {"states": ("state", "conv"), "small": small, "one_kernel": one_mixer}
    return GpuCase(f"mamba2_{heads}", "ssd", sizes, mixer_inputs, our_mixer, peers.MIXER, step_floors, **how)


def token_case(b: int) -> GpuCase:
    sizes, small = {"b": b, "d": 4096, "n": 16, "w": 4}, {"b": 2, "d": 6, "n": 4, "w": 4}
    how: dict[str, Any] = {"states": ("state", "conv"), "small": small}
    made = (token_inputs, our_token, peers.TOKEN, token_floors)
    return GpuCase(f"mamba_{b}", "selective_scan", sizes, *made, **how)


CASES = {
    case.name: case
    for case in (
        scan_case("scan", {**LAYER, "n": 16}, False, {"fwd_ms": 0.85, "fwd_bwd_ms": 2.8}),
        scan_case("scan_gated", {**LAYER, "n": 16}, True),
        scan_case("scan_one", {**LAYER, "b": 1, "n": 16}, False),
        scan_case("scan_one_long", {**LAYER, "b": 1, "t": 65536, "n": 16}, False),
        GpuCase(
            "ssd",
            "ssd",
            {"b": 8, "t": 4096, **HEADS},
            ssd_inputs,
            our_ssd,
            peers.SSD,
            ssd_floors,
            {"fwd_ms": 0.45, "fwd_bwd_ms": 2.0},
            small={**FEW, "t": 5},
        ),
        GpuCase(
            "ssd_one",
            "ssd",
            {"b": 1, "t": 65536, **HEADS},
            ssd_inputs,
            our_ssd,
            peers.SSD,
            ssd_floors,
            small={**FEW, "t": 5},
        ),
        GpuCase(
            "conv",
            "causal_conv1d",
            {**LAYER, "w": 4},
            conv_inputs,
            our_conv,
            peers.CONV,
            conv_floors,
            {"fwd_ms": 0.15, "bwd_ms": 0.23},
            small={**TINY, "w": 4},
        ),
        # 88 % of the rate of copying
        step_case(8192, {"step_ms": step_floors({**HEADS, "b": 128})["step_ms"] / 0.88}),
        *(step_case(heads) for heads in (64, 512, 1024, 4096, 32768)),
        *(mixer_case(heads) for heads in (64, 1024, 8192)),
        *(token_case(b) for b in (1, 8, 64, 256)),
    )
}
