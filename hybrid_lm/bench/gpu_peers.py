"""What others compute with on a GPU, each on the inputs of our ops.

A peer is imported where it is used, and only if it is installed; nothing of it is here. A peer that wants
channels before tokens is given them so, and the change of layout is not timed: its own layer has them that
way. What it must compute besides to get the same result is timed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from hybrid_lm.bench.measure import Candidate

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Way:
    """How a candidate computes a case, and which of its inputs, and whether its output, are (b d t)."""

    run: Callable[[Inputs], Tensor]
    turned: tuple[str, ...] = ()

    def given(self, inputs: Mapping[str, Tensor]) -> Inputs:
        """The inputs in this candidate's layout, as leaves."""
        return {
            name: (v.detach().transpose(1, 2).contiguous() if name in self.turned else v.detach())
            .clone()
            .requires_grad_(v.requires_grad)
            for name, v in inputs.items()
        }

    def back(self, name: str, v: Tensor) -> Tensor:
        """A result or a gradient in our layout."""
        return v.transpose(1, 2) if name in self.turned or (name == "y" and self.turned) else v


class Peer(Candidate):
    """Somebody else's; `packages` are the modules that it is imported from."""

    def missing(self) -> str | None:
        absent = [name for name in self.packages if find_spec(name) is None]
        return f"{' and '.join(absent)} not installed" if absent else None


def submodule(name: str) -> ModuleType:
    """A module of mamba_ssm, whose own `__init__` fails where its compiled extension is missing."""
    try:
        return import_module(name)
    except ImportError:
        root = name.partition(".")[0]
        spec = find_spec(root)
        if spec is None or not spec.submodule_search_locations:
            raise
        bare = ModuleType(root)
        bare.__path__ = list(spec.submodule_search_locations)
        sys.modules[root] = bare
        return import_module(name)


def mamba_scan() -> Way:
    """mamba_ssm's CUDA selective scan."""
    fn = import_module("mamba_ssm.ops.selective_scan_interface").selective_scan_fn

    def run(v: Inputs) -> Tensor:
        how = {"D": v["D"], "z": v.get("z"), "delta_bias": v["dt_bias"], "delta_softplus": True}
        return fn(v["x"], v["dt"], v["A"], v["B"], v["C"], **how)

    return Way(run, ("x", "dt", "z", "B", "C"))


def mamba_ssd(chunk: int = 256) -> Way:
    """mamba_ssm's Triton SSD."""
    fn = submodule("mamba_ssm.ops.triton.ssd_combined").mamba_chunk_scan_combined

    def run(v: Inputs) -> Tensor:
        how = {"D": v["D"], "dt_bias": v["dt_bias"], "dt_softplus": True}
        return fn(v["x"], v["dt"], v["A"], v["B"], v["C"], chunk, **how)

    return Way(run)


def fla_ssd() -> Way:
    """SSD as fla's gated linear attention with one decay per head: q = C, k = B, v = dt x."""
    fn = import_module("fla.ops.simple_gla").chunk_simple_gla

    def run(v: Inputs) -> Tensor:
        x, h, g = v["x"], v["x"].shape[2], v["B"].shape[2]
        dt = F.softplus(v["dt"].float() + v["dt_bias"])
        B, C = (v[name].repeat_interleave(h // g, 2) for name in "BC")
        y = fn(q=C, k=B, v=(x * dt[..., None]).to(x.dtype), g=dt * v["A"], scale=1.0)[0]
        return y + (v["D"][:, None] * x).to(x.dtype)

    return Way(run)


def causal_conv1d_cuda() -> Way:
    """The CUDA kernel of causal_conv1d on channels last, which it takes as a transposed view."""
    fn = import_module("causal_conv1d").causal_conv1d_fn

    def run(v: Inputs) -> Tensor:
        x = v["x"].transpose(1, 2)
        return fn(x, v["weight"], v["bias"], activation="silu").transpose(1, 2)

    return Way(run)


def fla_conv() -> Way:
    """fla's Triton convolution."""
    fn = import_module("fla.modules.convolution").causal_conv1d

    def run(v: Inputs) -> Tensor:
        y = fn(x=v["x"], weight=v["weight"], bias=v["bias"], activation="silu")
        return y[0] if isinstance(y, tuple) else y

    return Way(run)


def shifted_conv() -> Way:
    """A sum of shifted products under torch.compile."""

    def sums(v: Inputs) -> Tensor:
        x, weight = v["x"], v["weight"]
        t, w = x.shape[1], weight.shape[1]
        padded = F.pad(x, (0, 0, w - 1, 0)).float()
        return F.silu(sum((padded[:, k : k + t] * weight[:, k] for k in range(w)), v["bias"])).to(x.dtype)

    compiled = torch.compile(sums, dynamic=False)
    return Way(lambda v: compiled(v))


def mamba_step() -> Way:
    """mamba_ssm's Triton update of a Mamba-2 state, in place; one decay for a head by strides of zero."""
    fn = submodule("mamba_ssm.ops.triton.selective_state_update").selective_state_update

    def run(v: Inputs) -> Tensor:
        x, state = v["x"][:, 0], v["state"]
        (h, p), n = x.shape[1:], state.shape[-1]
        wide = {name: v[name][:, None].expand(h, p) for name in ("D", "dt_bias")}
        dt, A = v["dt"][:, 0, :, None].expand(x.shape), v["A"][:, None, None].expand(h, p, n)
        y = fn(state, x, dt, A, v["B"][:, 0], v["C"][:, 0], dt_softplus=True, **wide)
        return y[:, None]

    return Way(run)


def mamba_mixer() -> Way:
    """A token as Mamba-2 of mamba_ssm decodes it: causal_conv1d's update, then the state's with the gate."""
    conv = import_module("causal_conv1d").causal_conv1d_update
    fn = submodule("mamba_ssm.ops.triton.selective_state_update").selective_state_update

    def run(v: Inputs) -> Tensor:
        state, z = v["state"], v["z"]
        (h, p), n = z.shape[1:], state.shape[-1]
        xBC = conv(v["x"], v["conv"].transpose(1, 2), v["weight"], v["bias"], "silu")
        x, B, C = xBC.split([h * p, *[(xBC.shape[-1] - h * p) // 2] * 2], -1)
        B, C = (u.unflatten(-1, (-1, n)) for u in (B, C))
        wide = {name: v[name][:, None].expand(h, p) for name in ("D", "dt_bias")}
        dt, A = v["dt"][..., None].expand(z.shape), v["A"][:, None, None].expand(h, p, n)
        return fn(state, x.unflatten(-1, (h, p)), dt, A, B, C, z=z, dt_softplus=True, **wide)

    return Way(run)


def mamba_token() -> Way:
    """A token as Mamba-1 of mamba_ssm decodes it: causal_conv1d's update, then the state's with the gate."""
    conv = import_module("causal_conv1d").causal_conv1d_update
    fn = submodule("mamba_ssm.ops.triton.selective_state_update").selective_state_update

    def run(v: Inputs) -> Tensor:
        u = conv(v["x"][:, 0], v["conv"].transpose(1, 2), v["weight"], v["bias"], "silu")
        dt, B, C, z = (v[name][:, 0] for name in ("dt", "B", "C", "z"))
        how = {"D": v["D"], "z": z, "dt_bias": v["dt_bias"], "dt_softplus": True}
        return fn(v["state"], u, dt, v["A"], B, C, **how)[:, None]

    return Way(run)


SCAN = (Peer("mamba_ssm", mamba_scan, packages=("mamba_ssm",)),)
SSD = (
    Peer("mamba_ssm", mamba_ssd, packages=("mamba_ssm", "triton")),
    Peer("mamba_ssm_chunk128", lambda: mamba_ssd(128), packages=("mamba_ssm", "triton")),
    Peer("fla_simple_gla", fla_ssd, packages=("fla", "triton")),
)
CONV = (
    Peer("causal_conv1d", causal_conv1d_cuda, packages=("causal_conv1d",)),
    Peer("fla", fla_conv, packages=("fla", "triton")),
    Peer("compile_shifted_sums", shifted_conv, packages=("triton",), compiled=True),
)
STEP = (Peer("mamba_ssm", mamba_step, packages=("mamba_ssm", "triton")),)
TOKEN = (Peer("mamba_ssm", mamba_token, packages=("mamba_ssm", "causal_conv1d", "triton")),)
MIXER = (Peer("mamba_ssm", mamba_mixer, packages=("mamba_ssm", "causal_conv1d", "triton")),)
