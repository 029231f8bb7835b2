"""Mamba-2 between its projections as one op: the ops that it is made of, and who decides how it runs."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hybrid_lm import ops
from hybrid_lm.ops import backend as table
from hybrid_lm.ops import mamba2_mixer as public
from hybrid_lm.ops.native import mamba2_mixer as native
from hybrid_lm.ops.triton import tuning

INTERPRETED = tuning.interpreted()
if INTERPRETED:
    import tests.ops.interpreter  # noqa: F401 - mends it
ORDERS = ("gate_norm", "norm_gate", "gate")


def inputs(
    t: int, *, h: int = 4, p: int = 3, g: int = 2, n: int = 5, w: int = 4, b: int = 2
) -> dict[str, Any]:
    rng = torch.Generator().manual_seed(0)

    def new(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    d, c = h * p, h * p + 2 * g * n
    made: dict[str, Any] = {"xBC": new(b, t, c), "z": new(b, t, d), "dt": new(b, t, h), "A": -new(h).abs()}
    made |= {"weight": new(c, w), "bias": new(c), "norm_weight": new(d), "D": new(h), "dt_bias": new(h)}
    made |= {"dt_limit": (0.1, 2.0), "groups": g, "chunk": 8, "conv": new(b, w - 1, c)}
    return made | {"initial": new(b, h, p, n), "reset": torch.rand(b, t, generator=rng) < 0.2}


def narrow(v: dict[str, Any]) -> dict[str, Any]:
    """In float32."""
    return {k: u.float() if isinstance(u, Tensor) and u.is_floating_point() else u for k, u in v.items()}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("t", [1, 19])
def test_it_is_the_three_ops_one_after_another(t: int, order: Any) -> None:
    v = inputs(t)
    found = public(**v, order=order, eps=1e-2, backend="reference")
    how = {"reset": v["reset"], "backend": "reference"}
    xBC, conv = ops.causal_conv1d(
        v["xBC"], v["weight"], v["bias"], activation="silu", initial=v["conv"], **how
    )  # fmt: skip
    x, B, C = xBC.split([12, 10, 10], -1)
    x, B, C = x.unflatten(-1, (4, 3)), B.unflatten(-1, (2, 5)), C.unflatten(-1, (2, 5))
    y, state = ops.ssd(
        x, v["dt"], v["A"], B, C, D=v["D"], dt_bias=v["dt_bias"], dt_softplus=True, dt_limit=v["dt_limit"],
        initial=v["initial"], **how,
    )  # fmt: skip
    y = ops.gated_rms_norm(
        y.flatten(2), v["z"], v["norm_weight"], eps=1e-2, groups=2, order=order, backend="reference"
    )
    for actual, exact in zip(found, (y, conv, state), strict=True):
        assert torch.equal(actual, exact)
    for actual, exact in zip(public(**v, order=order, eps=1e-2, backend="torch"), found, strict=True):
        # Roundings one after another of float64: tokens, states, taps and the norm's channels.
        bound = (t + 5 + 4 + 6 + 16) * torch.finfo(torch.float64).eps
        assert (actual - exact).abs().max() <= bound * exact.abs().max().clamp(min=1)


def test_each_part_runs_on_its_own_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = dict(zip(table._PARTS["mamba2_mixer"], ("reference", "torch", "reference"), strict=True))
    ran = {}
    for op in asked:
        own = dict(table._OPS[op])
        for name, one in own.items():

            def run(*args, op=op, name=name, one=one, **how):
                ran[op] = name
                return one.run(*args, **how)

            own[name] = table.Implementation(run, one.why_not)
        monkeypatch.setitem(table._OPS, op, own)
    public(**inputs(3), backends=asked, backend="torch")
    assert ran == asked


def can(monkeypatch: pytest.MonkeyPatch, *backends: str) -> None:
    """Kernels of these names are there for CUDA."""
    for op in ("causal_conv1d", "ssd", "mamba2_mixer"):
        own = dict(table._OPS[op])
        for name in backends:
            own[name] = table.Implementation(own["torch"].run, lambda device: None)
        monkeypatch.setitem(table._OPS, op, own)


@pytest.mark.parametrize(
    ("asked", "whole"),
    [
        ("auto", "native"),
        ("torch", "torch"),
        ({"ssd": "triton"}, "triton"),
        ({"ssd": "triton", "causal_conv1d": "native"}, "torch"),
        ({"causal_conv1d": "native"}, "native"),
        ({"ssd": "torch"}, "torch"),
        ({"ssd": "reference"}, "torch"),
        ({"gated_rms_norm": "torch"}, "torch"),
        ({"rms_norm": "torch"}, "native"),
        ({"ssd": "triton", "mamba2_mixer": "torch"}, "torch"),
        ({"mamba2_mixer": "triton"}, "triton"),
        ({"mamba2_mixer": "native", "ssd": "torch"}, "native"),
    ],
)
def test_a_part_that_was_asked_for_runs(monkeypatch: pytest.MonkeyPatch, asked: Any, whole: str) -> None:
    can(monkeypatch, "native", "triton")
    chosen = ops.select(asked, "cuda")
    assert chosen["mamba2_mixer"] == whole
    if isinstance(asked, dict):
        assert {op: chosen[op] for op in asked} == asked


def test_a_part_with_a_kernel_that_the_whole_has_not(monkeypatch: pytest.MonkeyPatch) -> None:
    can(monkeypatch, "mamba_ssm")
    monkeypatch.delitem(table._OPS["mamba2_mixer"], "mamba_ssm")
    assert ops.select({"ssd": "mamba_ssm"}, "cuda")["mamba2_mixer"] == "torch"


def test_a_step_is_one_kernel_only_where_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any, **how: Any) -> None:
        raise AssertionError("the kernel for one token")

    monkeypatch.setattr(native, "mamba2_step", never)
    v = narrow(inputs(1))
    double, two = inputs(1), inputs(2)
    leaf = v | {"xBC": v["xBC"].clone().requires_grad_()}
    wide = v | {"weight": torch.zeros(32, 17), "conv": torch.zeros(2, 16, 32)}
    with pytest.raises(AssertionError, match="the kernel"):
        native.mamba2_mixer_native(**v, donate=True)
    others: list[dict[str, Any]] = [double, two, leaf, wide, v | {"initial": None}]
    for other in (*others, v | {"conv": v["conv"].bfloat16()}):
        native.mamba2_mixer_native(**other, donate=True)
    native.mamba2_mixer_native(**v)


@pytest.mark.skipif(INTERPRETED or find_spec("triton") is None, reason="runs here, or cannot run")
def test_interpreted() -> None:
    # triton looks at this variable when it is imported
    done = subprocess.run(
        [sys.executable, "-m", "pytest", __file__, "-k", "inside"],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


@pytest.mark.skipif(not INTERPRETED, reason="in the interpreter, by the test above")
@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("t", [1, 19])
def test_the_convolution_inside_triton(t: int, bare: bool) -> None:
    v = inputs(t)
    if bare:
        v |= dict.fromkeys(("conv", "initial", "reset", "bias"))
    expected = public(**v, backend="reference")
    v = narrow(v)
    parts = public(**v, backends={"ssd": "triton"}, backend="torch")
    found = public(**v, backend="triton")
    for actual, exact, apart in zip(found, expected, parts, strict=True):
        # Roundings one after another: tokens, states, taps, the norm's channels, the functions.
        bound = (t + 5 + 4 + 6 + 16) * torch.finfo(torch.float32).eps
        assert (actual - exact).abs().max() <= bound * exact.abs().max().clamp(min=1)
        assert (actual - apart).abs().max() <= bound * exact.abs().max().clamp(min=1)
