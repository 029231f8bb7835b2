"""Packages of others as backends: what they are given, what is left to PyTorch, and what they say.

Most of these tests run with stand-ins for the packages (`stand_ins/`), which accept what the real ones
accept. The real ones run where they and a GPU are; without one, those kernels that are Triton's run in its
interpreter, in a process of its own.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef

from hybrid_lm import ops
from hybrid_lm.bench import gpu_cases
from hybrid_lm.ops import backend as table
from hybrid_lm.ops.external import causal_conv1d as conv_package
from hybrid_lm.ops.external import fla, mamba_ssm_norm, mamba_ssm_scan, mamba_ssm_ssd, packages
from hybrid_lm.ops.native import library
from hybrid_lm.ops.precision import wide
from hybrid_lm.ops.triton import tuning
from tests.ops.cases import (
    Case,
    Inputs,
    cast,
    conv,
    delta_rule,
    error,
    leaves_of,
    lru,
    norm,
    outputs,
    run,
    scan,
    ssd,
)

HERE = Path(__file__)
COMPILED, PACKAGES = (HERE.with_name("stand_ins") / name for name in ("compiled", "packages"))
ROOTS = {"mamba_ssm", "selective_scan_cuda", "causal_conv1d", "causal_conv1d_cuda", "fla", "stand_in"}
INTERPRETED = tuning.interpreted()
DEVICE = "cpu" if INTERPRETED else "cuda"
HALF, SINGLE, DOUBLE = torch.bfloat16, torch.float32, torch.float64

if INTERPRETED:
    import tests.ops.external_interpreter  # noqa: F401

    # what nvcc compiles has no interpreter: the packages' own Python runs around a stand-in
    sys.path.append(str(COMPILED))


class Given(NamedTuple):
    """A case, the type of its inputs, and whose kernels it should reach; `later`: those of its gradients."""

    backend: str
    case: Case
    dtype: torch.dtype
    first: str | None
    later: str | None = ""

    @property
    def id(self) -> str:
        return f"{self.backend}-{self.case.id}-{str(self.dtype)[6:]}"


def reached(backend: str, case: Case, dtype: torch.dtype, name: str | None) -> Given:
    return Given(backend, case, dtype, name, None if name is None else f"{name}_backward")


def plain(t: int, **sizes: Any) -> Case:
    """A scan that the kernel has a way for."""
    return scan(t, without=("initial",), reset=False, **sizes)


CONV, SCAN, SSD, NORM = "causal_conv1d", "selective_scan", "ssd", "gated_rms_norm"
WAYS: list[dict[str, Any]] = [
    {},
    {"without": ("initial",)},
    {"reset": False},
    {"full": False, "reset": False},
]
GIVEN = [
    *(
        reached("causal_conv1d", conv(t, w, d=8, **how), dtype, CONV)
        for t in (1, 2, 3, 9)
        for w in (2, 4)
        for dtype in (SINGLE, HALF)
        for how in WAYS
    ),
    *(reached("causal_conv1d", conv(9, 3, d=8, reset=r), SINGLE, CONV) for r in ("first", "all")),
    reached("causal_conv1d", conv(9, 4, d=8, without=("bias",)), torch.float16, CONV),
    # widths, channels and types that the kernel has not
    *(reached("causal_conv1d", conv(9, w, d=8), SINGLE, None) for w in (1, 5)),
    reached("causal_conv1d", conv(9, 4, d=12), SINGLE, None),
    reached("causal_conv1d", conv(9, 4, d=8), DOUBLE, None),
    *(reached("mamba_ssm", plain(t), dtype, SCAN) for t in (1, 2, 17) for dtype in (SINGLE, HALF)),
    reached("mamba_ssm", scan(9, full=False, reset=False), SINGLE, SCAN),
    *(
        reached("mamba_ssm", scan(9, without=("initial", name), reset=False), SINGLE, SCAN)
        for name in ("D", "z", "dt_bias")
    ),
    # a state, documents, a bias without softplus, many states and types that the kernel has not
    reached("mamba_ssm", scan(9, without=("initial",)), SINGLE, None),
    reached("mamba_ssm", scan(9, reset=False), SINGLE, None),
    reached("mamba_ssm", scan(9, without=("initial", "dt_softplus"), reset=False), SINGLE, None),
    reached("mamba_ssm", plain(3, b=1, d=2, n=257), SINGLE, None),
    reached("mamba_ssm", plain(9), DOUBLE, None),
    *(reached("mamba_ssm", ssd(t, groups=g), HALF, SSD) for t, g in ((2, 1), (9, 2))),
    *(reached("mamba_ssm", ssd(9, reset=r), HALF, SSD) for r in (False, "first", "all")),
    *(
        reached("mamba_ssm", ssd(9, without=(name,)), HALF, SSD)
        for name in ("D", "dt_bias", "dt_softplus", "dt_limit", "initial")
    ),
    reached("mamba_ssm", ssd(9, full=False, reset=False), HALF, SSD),
    *(reached("mamba_ssm", ssd(9), dtype, None) for dtype in (SINGLE, torch.float16, DOUBLE)),
    reached("mamba_ssm", ssd(1), HALF, None),
    reached("mamba_ssm", ssd(3, b=1, h=2, n=257), HALF, None),
    *(
        reached("mamba_ssm", norm(gate=True, order=o, groups=k), dtype, NORM)
        for o in ("gate_norm", "norm_gate")
        for k in (1, 2)
        for dtype in (SINGLE, HALF)
    ),
    reached("mamba_ssm", norm(gate=True, weight=False), SINGLE, NORM),
    reached("mamba_ssm", norm(gate=True, order="gate"), SINGLE, None),
    reached("mamba_ssm", norm(gate=True), DOUBLE, None),
    reached("mamba_ssm", norm(gate=True, rows=(1,), d=16392), SINGLE, None),
    *(reached("fla", delta_rule(t, groups=g), HALF, "delta_rule") for t, g in ((2, 1), (9, 2))),
    *(reached("fla", delta_rule(9, reset=r), HALF, "delta_rule") for r in (False, "first", "all")),
    *(reached("fla", delta_rule(9, without=(w,)), HALF, "delta_rule") for w in ("initial", "scale")),
    *(reached("fla", delta_rule(9), dtype, None) for dtype in (SINGLE, torch.float16, DOUBLE)),
    reached("fla", delta_rule(1), HALF, None),
    reached("fla", delta_rule(3, b=1, h=2, k=129), HALF, None),
    *(reached("fla", ssd(9, groups=g), HALF, "simple_gla") for g in (1, 2)),
    *(reached("fla", ssd(9, reset=r), HALF, "simple_gla") for r in (False, "first", "all")),
    *(reached("fla", ssd(9, without=(w,)), HALF, "simple_gla") for w in ("D", "dt_bias", "initial")),
    *(reached("fla", ssd(9), dtype, None) for dtype in (SINGLE, DOUBLE)),
    *(reached("fla", lru(t), dtype, "linear_recurrence") for t in (2, 9) for dtype in (SINGLE, HALF)),
    *(reached("fla", lru(9, reset=r), SINGLE, "linear_recurrence") for r in (False, "first", "all")),
    reached("fla", lru(9, full=False, reset=False), SINGLE, "linear_recurrence"),
    *(reached("fla", lru(t), dtype, None) for t, dtype in ((1, SINGLE), (9, DOUBLE))),
]
# One full and one plain case that reach each kernel.
FEW = [
    Given("causal_conv1d", conv(9, d=8), SINGLE, CONV),
    Given("causal_conv1d", conv(9, d=8, full=False, reset=False), SINGLE, CONV),
    Given("mamba_ssm", plain(9), SINGLE, SCAN),
    Given("mamba_ssm", scan(9, full=False, reset=False), SINGLE, SCAN),
    Given("mamba_ssm", ssd(9), HALF, SSD),
    Given("mamba_ssm", ssd(9, full=False, reset=False), HALF, SSD),
    Given("mamba_ssm", norm(gate=True, groups=2), SINGLE, NORM),
    Given("fla", delta_rule(9), HALF, "delta_rule"),
    Given("fla", delta_rule(9, full=False, reset=False), HALF, "delta_rule"),
    Given("fla", ssd(9), HALF, "simple_gla"),
    Given("fla", lru(9), SINGLE, "linear_recurrence"),
    Given("fla", lru(9, full=False, reset=False), SINGLE, "linear_recurrence"),
]
RECURRENT = [given for given in FEW if given.case.op is not ops.gated_rms_norm]


def over(given: list[Given]) -> Any:
    return pytest.mark.parametrize("given", given, ids=lambda g: g.id)


KNOWN = (packages._broken, packages.no_gpu, fla._wrong_here)


def forget() -> None:
    """What is known of the packages."""
    for answer in KNOWN:
        answer.cache_clear()


def take_out() -> dict[str, Any]:
    """The modules of the packages that are imported, which are not any longer."""
    names = [name for name in sys.modules if name.partition(".")[0] in ROOTS]
    return {name: sys.modules.pop(name) for name in names}


def put(monkeypatch: pytest.MonkeyPatch, *folders: Path) -> None:
    """The packages of these folders in the place of those that are installed."""
    take_out()
    for folder in folders:
        monkeypatch.syspath_prepend(str(folder))
    forget()


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Undoes what a test does to modules."""
    imported = take_out()
    yield monkeypatch
    take_out()
    sys.modules.update(imported)
    forget()


@pytest.fixture
def calls(bare: pytest.MonkeyPatch) -> list[str]:
    """The stand-ins, on the CPU, and which of their kernels have run."""
    put(bare, COMPILED, PACKAGES)
    bare.setattr(packages, "testable", lambda: True)
    return importlib.import_module("stand_in").calls


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def placed(inputs: Inputs, dtype: torch.dtype, device: str = "cpu") -> Inputs:
    """The inputs rounded to a type, as leaves, where the kernels run."""
    return {
        k: v.to(device).detach().requires_grad_(v.requires_grad) if isinstance(v, Tensor) else v
        for k, v in cast(inputs, dtype).items()
    }


def check(
    given: Given, generator: torch.Generator, device: str = "cpu", unused: int | None = None
) -> list[Tensor]:
    """The float64 reference on the rounded inputs, and no more error than the op's tests allow kernels."""
    op, dtype, made = given.case.op, given.dtype, given.case.make(generator)
    rounded = {
        k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in made.items()
    }
    exact = run(op, placed(rounded, DOUBLE, device), unused, backend="reference")
    plain = run(op, placed(made, dtype, device), unused, backend="reference")
    inputs = placed(made, dtype, device)
    actual = run(op, inputs, unused, backend=given.backend)
    assert [(a.dtype, a.shape) for a in actual] == [(p.dtype, p.shape) for p in plain]
    leaves = list(leaves_of(inputs))
    names = [*(f"output {k}" for k in range(len(actual) - len(leaves))), *leaves]
    for name, a, p, e in zip(names, actual, plain, exact, strict=True):
        # roundings of the wide type, one for each link of the case's chain
        limit = given.case.chain * torch.finfo(wide(inputs[leaves[0]])).eps
        if dtype in (HALF, torch.float16):
            # at most twice the error of plain PyTorch in this type, and the half of a last place by which
            # that one may have been lucky: factors are rounded once more
            limit += 2 * error(p, e) + torch.finfo(dtype).eps / 2
        assert error(a, e) <= limit, name
    return actual


@over(GIVEN)
def test_equals_the_reference_and_reaches_the_kernel(
    given: Given, calls: list[str], generator: torch.Generator
) -> None:
    check(given, generator)
    # the final state of a scan is a constant to its kernel: with a gradient of it, all are PyTorch's
    later = None if given.first == SCAN else given.later
    expected = [name for name in (given.first, later) if name is not None]
    # what is called again for its gradients has run twice
    twice = [given.first] if given.backend == "fla" and given.first is not None else []
    assert calls == [*expected[:1], *twice, *expected[1:]]


@over(RECURRENT)
@pytest.mark.parametrize("unused", [0, 1], ids=["only the state is used", "only y is used"])
def test_an_unused_output(given: Given, unused: int, calls: list[str], generator: torch.Generator) -> None:
    check(given, generator, unused=unused)
    if given.first == SCAN:
        assert calls == [SCAN, *[f"{SCAN}_backward"] * unused]


@over([g for g in FEW if g.case.op in (ops.selective_scan, ops.ssd) and g.backend == "mamba_ssm"])
@pytest.mark.parametrize("dtype", [SINGLE, HALF], ids=str)
@pytest.mark.parametrize("donate", [False, True])
def test_one_token_is_one_kernel(
    given: Given, dtype: torch.dtype, donate: bool, calls: list[str], generator: torch.Generator
) -> None:
    full = "bare" not in given.case.id
    case = (scan if given.case.op is ops.selective_scan else ssd)(1, full=full, reset=full)
    made = case.make(generator)
    # beyond the limits of a step, too
    made["dt"] = 4 * made["dt"]
    inputs = {
        k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() and k != "initial" else v
        for k, v in made.items()
    }
    if "initial" in inputs:
        inputs["initial"] = inputs["initial"].float()
    expected = case.op(**inputs, backend="reference")
    state = inputs.get("initial")
    before = None if state is None else state.clone()
    y, last = case.op(**inputs, donate=donate, backend="mamba_ssm")
    assert calls == ["state_update"]
    # roundings of float32, and the last one of y
    limits = case.chain * torch.finfo(SINGLE).eps, torch.finfo(dtype).eps
    assert error(y, expected[0]) <= sum(limits)
    assert error(last, expected[1]) <= limits[0]
    if state is not None and before is not None:
        assert (last is state) == donate
        assert donate or torch.equal(state, before)


@pytest.mark.parametrize("with_reset", [False, True])
def test_one_token_of_the_convolution_is_one_kernel(with_reset: bool, calls: list[str]) -> None:
    x, weight, bias, state = (torch.randn(*s) for s in ((2, 1, 8), (8, 4), (8,), (2, 3, 8)))
    reset = torch.tensor([[True], [False]]) if with_reset else None
    how: dict[str, Any] = {"activation": "silu", "reset": reset}
    expected = ops.causal_conv1d(x, weight, bias, initial=state.clone(), **how, backend="reference")
    y, last = ops.causal_conv1d(x, weight, bias, initial=state, donate=True, **how, backend="causal_conv1d")
    assert calls == ["causal_conv1d_update"]
    assert last is state
    # 5 roundings: sums of 4 products and a bias
    assert all(error(a, e) <= 8 * torch.finfo(SINGLE).eps for a, e in zip((y, last), expected, strict=True))


def gaps(v: Tensor) -> Tensor:
    """The same numbers, every second of a tensor with NaNs between."""
    return torch.stack((v, torch.full_like(v, torch.nan)), -1)[..., 0]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "every second": gaps,
    "last axis first": lambda v: v.movedim(-1, 0).contiguous().movedim(0, -1),
    "batch after tokens": lambda v: v.movedim(0, 1).contiguous().movedim(1, 0) if v.dim() > 1 else v,
    "slice of a row": lambda v: torch.cat((v, v), -1)[..., : v.shape[-1]],
    "unaligned": lambda v: torch.cat((v[..., :1], v, v[..., 1:]), -1)[..., 1 : v.shape[-1] + 1],
}


@over(FEW)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layout_changes_nothing(
    given: Given, layout: str, calls: list[str], generator: torch.Generator
) -> None:
    made = placed(given.case.make(generator), given.dtype)
    laid = {
        k: LAYOUTS[layout](v.detach()).requires_grad_() if k in leaves_of(made) else v
        for k, v in made.items()
    }
    ys, straight = (outputs(given.case.op(**inputs, backend=given.backend)) for inputs in (laid, made))
    grads = [torch.randn(y.shape, generator=generator).to(y.dtype) for y in ys]
    actual = torch.autograd.grad(ys, list(leaves_of(laid).values()), [LAYOUTS[layout](g) for g in grads])
    expected = torch.autograd.grad(straight, list(leaves_of(made).values()), grads)
    assert given.first in calls
    for a, e in zip([*ys, *actual], [*straight, *expected], strict=True):
        # sums of the reference behind the stand-ins may come in another order
        assert error(a, e) <= given.case.chain * torch.finfo(SINGLE).eps + (a.dtype == HALF) * 2**-7


def test_the_convolution_reads_a_slice_where_it_lies(calls: list[str], bare: pytest.MonkeyPatch) -> None:
    stand_in = importlib.import_module("causal_conv1d_cuda")
    seen: list[int] = []
    forward = stand_in.causal_conv1d_fwd
    bare.setattr(
        stand_in, "causal_conv1d_fwd", lambda x, *rest: (seen.append(x.data_ptr()), forward(x, *rest))
    )
    wide_x, weight = torch.randn(2, 5, 24), torch.randn(8, 4)
    x = wide_x[..., 8:16]
    y, _ = ops.causal_conv1d(x, weight, backend="causal_conv1d")
    assert seen == [x.data_ptr()]
    assert y.is_contiguous()


@over(RECURRENT)
def test_the_state_does_not_hold_the_inputs(
    given: Given, calls: list[str], generator: torch.Generator
) -> None:
    inputs = {k: v.detach() if isinstance(v, Tensor) else v
              for k, v in placed(given.case.make(generator), given.dtype).items()}  # fmt: skip
    _, state = given.case.op(**inputs, backend=given.backend)
    assert state.untyped_storage().nbytes() == state.nbytes


def test_types_may_be_mixed(calls: list[str], generator: torch.Generator) -> None:
    # the step in float32 beside bfloat16 must not be rounded on its way
    made = plain(9).make(generator)
    inputs: Inputs = {
        k: v.to(HALF if k in ("x", "z") else SINGLE) if isinstance(v, Tensor) else v for k, v in made.items()
    }
    y, state = ops.selective_scan(**inputs, backend="mamba_ssm")
    expected, last = ops.selective_scan(**inputs, backend="reference")
    assert calls == [SCAN]
    assert y.dtype == HALF
    # one rounding each, of the same number up to the last places of float32
    assert error(y, expected) <= torch.finfo(HALF).eps
    assert error(state, last) <= plain(9).chain * torch.finfo(SINGLE).eps


def test_weights_may_be_of_types_of_their_own(calls: list[str], generator: torch.Generator) -> None:
    x, weight, bias = (torch.randn(*s, generator=generator) for s in ((2, 5, 8), (8, 4), (8,)))
    weight = weight.to(HALF)
    y, _ = ops.causal_conv1d(x, weight, bias, backend="causal_conv1d")
    expected, _ = ops.causal_conv1d(x, weight, bias, backend="reference")
    assert calls == [CONV]
    # sums of 4 products and a bias
    assert error(y, expected) <= 8 * torch.finfo(SINGLE).eps


@over(FEW)
def test_operators_as_pytorch_sees_them(
    given: Given, calls: list[str], bare: pytest.MonkeyPatch, generator: torch.Generator
) -> None:
    """Every operator that a case reaches, with what it is given there, forward and backward."""
    found: list[tuple[Any, tuple[Any, ...]]] = []
    modules = (conv_package, mamba_ssm_scan, mamba_ssm_ssd, mamba_ssm_norm, fla)
    for module in modules:
        for name, value in list(vars(module).items()):
            if isinstance(value, CustomOpDef):
                bare.setattr(module, name, Recorder(value, found))
    run(given.case.op, placed(given.case.make(generator), given.dtype), backend=given.backend)
    assert len(found) == (1 if given.first == SCAN else 2)
    bare.undo()
    put(bare, COMPILED, PACKAGES)
    for operator, args in found:
        backward = "backward" in operator._name
        fresh = [fresh_leaf(v, not backward) for v in args]
        torch.library.opcheck(operator, tuple(fresh))


class Recorder:
    """Calls an operator, and keeps what it was called with."""

    def __init__(self, operator: Any, found: list[tuple[Any, tuple[Any, ...]]]) -> None:
        self.operator, self.found = operator, found

    def __call__(self, *args: Any) -> Any:
        self.found.append((self.operator, args))
        return self.operator(*args)


def fresh_leaf(v: Any, wants: bool) -> Any:
    if isinstance(v, list | tuple):
        return [fresh_leaf(u, wants) for u in v]
    if not isinstance(v, Tensor):
        return v
    return v.detach().clone().requires_grad_(wants and v.is_floating_point())


@over(FEW)
def test_gradients_of_gradients_are_refused(
    given: Given, calls: list[str], generator: torch.Generator
) -> None:
    made = placed(given.case.make(generator), given.dtype)
    y = outputs(given.case.op(**made, backend=given.backend))[0]
    leaf = next(iter(leaves_of(made).values()))
    (grad,) = torch.autograd.grad(y.float().sum(), leaf, create_graph=True)
    with pytest.raises(ValueError, match="no gradients of gradients; backend='reference' has them"):
        torch.autograd.grad((grad * grad).float().sum(), leaf)


@pytest.mark.compile
@pytest.mark.parametrize("dynamic", [False, True])
@over(FEW)
def test_compiled_equals_eager(
    given: Given, dynamic: bool, calls: list[str], generator: torch.Generator
) -> None:
    torch.compiler.reset()
    made = given.case.make(generator)
    # aot_eager traces forward and backward whole, as inductor does, without seconds of C++ compilation
    compiled = torch.compile(given.case.op, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    expected = run(given.case.op, placed(made, given.dtype), backend=given.backend)
    eager = list(calls)
    calls.clear()
    actual = run(compiled, placed(made, given.dtype), backend=given.backend)
    assert calls == eager
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@over(RECURRENT)
def test_autocast_is_kept_out(given: Given, calls: list[str], generator: torch.Generator) -> None:
    made = given.case.make(generator)
    expected = run(given.case.op, placed(made, given.dtype), backend=given.backend)
    with torch.autocast("cpu", HALF):
        actual = run(given.case.op, placed(made, given.dtype), backend=given.backend)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


OPS = {
    ("selective_scan", "mamba_ssm"),
    ("ssd", "mamba_ssm"),
    ("gated_rms_norm", "mamba_ssm"),
    ("causal_conv1d", "causal_conv1d"),
    ("delta_rule", "fla"),
    ("ssd", "fla"),
    ("linear_recurrence", "fla"),
}


def test_every_backend_is_among_the_cases() -> None:
    names = [*table.EXTERNAL]
    assert {(row.op, row.backend) for row in ops.report() if row.backend in names} == OPS
    assert {(given.case.op.__name__, given.backend) for given in GIVEN} == OPS
    assert {(given.case.op.__name__, given.backend) for given in FEW} == OPS


def said(op: str, backend: str, device: str) -> str | None:
    return next(row.why_not for row in ops.report(device) if (row.op, row.backend) == (op, backend))


def test_auto_takes_ours_then_theirs_then_pytorch(calls: list[str], bare: pytest.MonkeyPatch) -> None:
    names = [name for name in table.BACKENDS if name != "triton"]
    assert names == ["native", "mamba_ssm", "causal_conv1d", "fla", "torch", "reference"]
    bare.setattr(packages, "no_gpu", lambda: None)
    bare.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    bare.setattr(library, "cuda_library", lambda: library.Library(None, "not built"))
    for op, kernels in table._OPS.items():
        if "triton" in kernels:
            bare.delitem(table._OPS[op], "triton")
    chosen = ops.select("auto", "cuda")
    assert {op: name for op, name in chosen.items() if name in table.EXTERNAL} == {
        "selective_scan": "mamba_ssm",
        "ssd": "mamba_ssm",
        "gated_rms_norm": "mamba_ssm",
        "causal_conv1d": "causal_conv1d",
        "delta_rule": "fla",
        "linear_recurrence": "fla",
    }
    ours = table.Implementation(table._OPS["selective_scan"]["torch"].run, lambda device: None)
    bare.setitem(table._OPS["selective_scan"], "native", ours)
    assert ops.select("auto", "cuda")["selective_scan"] == "native"
    bare.delitem(table._OPS["ssd"], "mamba_ssm")
    assert ops.select("auto", "cuda")["ssd"] == "fla"


def test_bench_does_not_ask_them(calls: list[str], bare: pytest.MonkeyPatch) -> None:
    bare.setattr(packages, "no_gpu", lambda: pytest.fail("a package was asked"))
    bare.setattr(packages, "find_spec", lambda name: pytest.fail("a package was asked"))
    for op, _ in OPS:
        names = {*gpu_cases.able(op, "cuda"), *gpu_cases.able(op, "cpu")}
        assert "torch" in names
        assert not names & {*table.EXTERNAL, "reference"}
        assert not gpu_cases.reasons(op, "cpu").keys() & {*table.EXTERNAL}


@pytest.mark.parametrize(("op", "backend"), sorted(OPS))
def test_where_they_do_not_run_they_say_why(op: str, backend: str, bare: pytest.MonkeyPatch) -> None:
    bare.setattr(packages, "testable", lambda: False)
    assert said(op, backend, "cpu") == f"{backend} runs on NVIDIA GPUs, not on cpu"
    assert said(op, backend, "mps") == f"{backend} runs on NVIDIA GPUs, not on mps"
    put(bare, COMPILED, PACKAGES)
    bare.setattr(torch.cuda, "is_available", lambda: False)
    assert said(op, backend, "cuda") == "PyTorch sees no GPU"
    with pytest.raises(ValueError, match=f"^{op}: backend '{backend}' cannot run on cuda: PyTorch sees no"):
        ops.select({op: backend}, "cuda")
    bare.setattr(packages, "no_gpu", lambda: None)
    bare.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert said(op, backend, "cuda") is None
    bare.setattr(packages, "find_spec", lambda name: None)
    take_out()
    assert said(op, backend, "cuda") == f'{backend} is not installed: pip install "hybrid_lm[cuda]"'


@pytest.mark.parametrize(
    ("capability", "triton", "wrong"),
    [((9, 0), "3.6.0", True), ((9, 0), "3.7.1", False), ((9, 0), "3.3.1", False), ((8, 0), "3.6.0", False)],
)
def test_what_a_compiler_gets_wrong_is_not_run(
    capability: tuple[int, int], triton: str, wrong: bool, bare: pytest.MonkeyPatch
) -> None:
    put(bare, COMPILED, PACKAGES)
    bare.setattr(packages, "no_gpu", lambda: None)
    bare.setattr(torch.cuda, "get_device_capability", lambda: capability)
    bare.setattr(fla, "version", lambda name: triton)
    reason = f"its gradients are wrong on this GPU with triton {triton}: triton 3.7.1 or later is needed"
    for op in ("delta_rule", "ssd"):
        assert said(op, "fla", "cuda") == (reason if wrong else None)
    # of sums and products of single numbers
    assert said("linear_recurrence", "fla", "cuda") is None


def test_what_is_wrong_with_a_package_is_said(bare: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bare.setattr(packages, "no_gpu", lambda: None)
    bare.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    put(bare, PACKAGES)
    bare.setattr(packages, "version", lambda name: "1.5.0.post8")
    old = 'causal_conv1d 1.5.0.post8 is too old, 1.5.2 or later is needed: pip install "hybrid_lm[cuda]"'
    assert said("causal_conv1d", "causal_conv1d", "cuda") == old
    bare.setattr(packages, "version", lambda name: "1.10")
    spec = packages.find_spec
    bare.setattr(packages, "find_spec", lambda name: None if name.endswith("_cuda") else spec(name))
    message = said("causal_conv1d", "causal_conv1d", "cuda")
    assert message is not None
    assert message.startswith("causal_conv1d is installed without its compiled extension causal_conv1d_cuda:")
    bare.setattr(packages, "find_spec", spec)
    (tmp_path / "causal_conv1d_cuda.py").write_text(
        'raise ImportError("causal_conv1d_cuda.so: undefined symbol: _ZN3c10\\nmore")\n'
    )
    put(bare, tmp_path)
    broken = "causal_conv1d cannot be imported: ImportError: causal_conv1d_cuda.so: undefined symbol: _ZN3c10"
    assert said("causal_conv1d", "causal_conv1d", "cuda") == broken


def test_a_package_whose_own_module_is_broken_is_left_as_it_was(calls: list[str]) -> None:
    assert said("ssd", "mamba_ssm", "cpu") is None
    assert "mamba_ssm.ops.triton.ssd_combined" in sys.modules
    # nobody else should find a package that is half there
    assert "mamba_ssm" not in sys.modules
    with pytest.raises(ImportError, match="undefined symbol"):
        importlib.import_module("mamba_ssm")


def test_importing_does_not_import_them() -> None:
    code = (
        "import sys; sys.path[:0] = sys.argv[1:]; import hybrid_lm; from hybrid_lm import ops; "
        "ops.select(); ops.report('cpu'); "
        "print(*{name.partition('.')[0] for name in sys.modules} & "
        "{'mamba_ssm', 'selective_scan_cuda', 'causal_conv1d', 'causal_conv1d_cuda', 'fla'})"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(COMPILED), str(PACKAGES)], cwd=HERE.parents[2], env=environment,
        capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


def tiles(t: int, **sizes: Any) -> Case:
    """SSD that the interpreter goes through in a second or two."""
    return ssd(t, **{"b": 1, "h": 2, "groups": 1, **sizes})


REAL = [
    *(given for given in FEW if given.first != "delta_rule"),
    *(Given("mamba_ssm", plain(9, **how), HALF, SCAN) for how in ({}, {"n": 17})),
    Given("causal_conv1d", conv(3, d=8), HALF, CONV),
    Given("causal_conv1d", conv(70, 3, d=8, reset="first"), HALF, CONV),
    Given("mamba_ssm", tiles(37, h=4, groups=2), HALF, SSD),
    Given("mamba_ssm", tiles(21, p=17, n=19), HALF, SSD),
    *(Given("mamba_ssm", tiles(21, reset=r), HALF, SSD) for r in ("first", "all")),
    Given("mamba_ssm", tiles(35, full=False, reset=False), HALF, SSD),
    *(Given("mamba_ssm", norm(gate=True, order=o), HALF, NORM) for o in ("gate_norm", "norm_gate")),
    Given("fla", delta_rule(70, b=1, h=2, groups=1, k=20, p=18, reset=False), HALF, "delta_rule"),
    Given("fla", delta_rule(9, b=1, h=2), HALF, "delta_rule"),
    Given("fla", delta_rule(5, h=2, reset="first"), HALF, "delta_rule"),
    Given("fla", delta_rule(9, h=2, full=False, reset=False), HALF, "delta_rule"),
    Given("fla", tiles(70, reset=False), HALF, "simple_gla"),
    Given("fla", tiles(5, b=2, reset="all"), HALF, "simple_gla"),
    Given("fla", lru(17, b=3), HALF, "linear_recurrence"),
]
# More tokens than the kernels take at once, and numbers that are no multiples of that: for a GPU.
LONG = [
    *(
        Given("mamba_ssm", plain(t, b=1, d=8, n=16), dtype, SCAN)
        for t in (130, 2500)
        for dtype in (SINGLE, HALF)
    ),
    *(Given("causal_conv1d", conv(1000, w, d=72), dtype, CONV) for w in (2, 4) for dtype in (SINGLE, HALF)),
    *(Given("mamba_ssm", tiles(600, h=4, p=64, n=128, reset=r), HALF, SSD) for r in (False, True)),
    Given("mamba_ssm", norm(gate=True, rows=(300,), d=1024, groups=2), HALF, NORM),
    *(
        Given("fla", delta_rule(300, b=2, h=4, k=64, p=128, reset=r), HALF, "delta_rule")
        for r in (False, True)
    ),
    *(Given("fla", tiles(300, p=64, n=64, reset=r), HALF, "simple_gla") for r in (False, True)),
    Given("fla", lru(1000, d=100), SINGLE, "linear_recurrence"),
]


# Their warnings, when they are imported and later, are not ours.
@pytest.mark.filterwarnings("ignore")
@over(REAL if INTERPRETED else REAL + LONG)
def test_the_package_itself(
    given: Given, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    reason = said(given.case.op.__name__, given.backend, DEVICE)
    if reason is not None:
        pytest.skip(reason)
    # several chunks of few tokens
    monkeypatch.setattr(mamba_ssm_ssd, "CHUNK", 16 if INTERPRETED else mamba_ssm_ssd.CHUNK)
    check(given, generator, DEVICE)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("op", "make"), [(ops.selective_scan, scan), (ops.ssd, ssd)], ids=["scan", "ssd"])
@pytest.mark.parametrize("full", [False, True])
def test_the_package_itself_with_one_token(
    op: Callable[..., Any], make: Callable[..., Case], full: bool, generator: torch.Generator
) -> None:
    reason = said(op.__name__, "mamba_ssm", DEVICE)
    if reason is not None:
        pytest.skip(reason)
    case = make(1, full=full, reset=full)
    inputs = {
        k: v.to(DEVICE, SINGLE if v.is_floating_point() else v.dtype) if isinstance(v, Tensor) else v
        for k, v in case.make(generator).items()
    }
    expected = op(**inputs, backend="reference")
    for a, e in zip(op(**inputs, backend="mamba_ssm"), expected, strict=True):
        assert error(a, e) <= case.chain * torch.finfo(SINGLE).eps


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter")
def test_the_packages_in_the_interpreter() -> None:
    there = [name for name in ("mamba_ssm", "fla") if find_spec(name) is not None]
    if not there or find_spec("triton") is None:
        pytest.skip("neither mamba_ssm nor fla is installed beside triton")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU, on which they ran above")
    # triton looks at this variable when it is imported: a process that compiles kernels cannot do both
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
    command += ["-k", "package_itself", str(HERE)]
    done = subprocess.run(command, cwd=HERE.parents[2], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout
