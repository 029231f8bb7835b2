"""The table of backends: choice, refusal, drift."""

import inspect
import re

import pytest
import torch

from hybrid_lm import ops
from hybrid_lm.ops import backend
from hybrid_lm.ops.external import packages
from hybrid_lm.ops.native import library
from hybrid_lm.ops.triton import ssd as triton

NAMES = (
    "attention",
    "causal_conv1d",
    "delta_rule",
    "gated_rms_norm",
    "grouped_linear",
    "linear",
    "linear_cross_entropy",
    "linear_recurrence",
    "mamba2_mixer",
    "rms_norm",
    "selective_scan",
    "ssd",
)


NATIVE = ("causal_conv1d", "gated_rms_norm", "linear", "rms_norm", "selective_scan", "ssd")


@pytest.mark.parametrize("why_not", [None, "not built: run `hybrid-lm build-native`"])
def test_auto_takes_the_best_that_can_run(monkeypatch: pytest.MonkeyPatch, why_not: str | None) -> None:
    monkeypatch.setattr(library, "library", lambda: library.Library(None, why_not))
    monkeypatch.setattr(triton, "_gpu", lambda: "PyTorch sees no GPU")
    monkeypatch.setattr(packages, "no_gpu", lambda: "PyTorch sees no GPU")
    plain = dict.fromkeys(NAMES, "torch")
    best = plain if why_not else plain | dict.fromkeys(NATIVE, "native")
    assert ops.select() == best
    assert ops.select("auto", "cuda") == plain
    assert set(ops.select("reference").values()) == {"reference"}
    assert ops.select({"ssd": "reference"}) == best | {"ssd": "reference"}
    rows = [r for r in ops.report() if r.backend == "native"]
    steps = {"mamba2_mixer": "there is no kernel for one token on cpu"}
    assert {r.op: r.why_not for r in rows} == dict.fromkeys(NATIVE, why_not) | steps


def test_a_native_library_that_is_missing_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "library", lambda: library.Library(None, "not built"))
    for op in NATIVE:
        with pytest.raises(ValueError, match=f"^{op}: backend 'native' cannot run on cpu: not built$"):
            ops.select({op: "native"})
    with pytest.raises(ValueError, match="rms_norm: backend 'native' cannot run on cpu: not built"):
        ops.rms_norm(torch.ones(3), backend="native")


@pytest.mark.parametrize(
    ("requested", "message"),
    [
        ("fla", "mamba2_mixer: backend 'fla' cannot run on cpu: this version has no fla kernel for it"),
        (
            "native",
            "attention, grouped_linear, linear_cross_entropy: backend 'native' cannot run on cpu: this",
        ),
        ("native", "it has: reference, torch"),
        ("troch", "known: auto, causal_conv1d, fla, mamba_ssm, native, reference, torch, triton. Did you"),
        ("troch", "Did you mean 'torch'?"),
        ({"sdd": "torch"}, "unknown op 'sdd'; known: attention,"),
        ({"sdd": "torch"}, "Did you mean 'ssd'?"),
    ],
)
def test_what_is_asked_for_and_missing_is_refused(requested: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        ops.select(requested)


def test_a_call_refuses_too() -> None:
    with pytest.raises(
        ValueError, match=r"rms_norm: backend 'fla' cannot run on cpu: this version has no fla"
    ):
        ops.rms_norm(torch.ones(3), backend="fla")


def test_a_kernel_is_one_registration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_OPS", {})

    def reference(x, *, eps=1.0):
        return "reference"

    def torch_form(x, *, eps=1.0):
        return "torch"

    def kernel(x, *, eps=1.0):
        return "native"

    pick = backend.define("toy", reference=reference, torch=torch_form)
    backend.register(
        "toy", "native", run=kernel, why_not=lambda d: None if d == "cpu" else f"not built for {d}"
    )
    assert pick(None, torch.ones(1))(0) == "native"
    assert pick("reference", torch.ones(1))(0) == "reference"
    assert ops.select("auto", "cpu") == {"toy": "native"}
    assert ops.select("auto", "cuda") == {"toy": "torch"}
    with pytest.raises(ValueError, match=r"toy: backend 'native' cannot run on cuda: not built for cuda"):
        ops.select("native", "cuda")
    assert [(r.backend, r.chosen, r.why_not) for r in ops.report("cuda")] == [
        ("native", False, "not built for cuda"),
        ("torch", True, None),
        ("reference", False, None),
    ]


def test_drift_of_signatures_names_both(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_OPS", {})

    def reference(x, *, eps=1.0): ...

    def drifted(x, *, eps=2.0): ...

    shown = r"(?s)toy: .*reference\(x, \*, eps=1.0\).*drifted\(x, \*, eps=2.0\)"
    with pytest.raises(TypeError, match=shown):
        backend.define("toy", reference=reference, torch=drifted)
    # whatever came first
    monkeypatch.setattr(backend, "_OPS", {})
    backend.register("toy", "native", run=reference)
    with pytest.raises(TypeError, match=shown):
        backend.register("toy", "reference", run=drifted)


@pytest.mark.parametrize("name", NAMES)
def test_the_public_signature_is_the_backends_plus_backend(name: str) -> None:
    public = inspect.signature(getattr(ops, name))
    inner = inspect.signature(backend._OPS[name]["reference"].run)
    assert public.parameters["backend"].default is None
    without = [p for p in public.parameters.values() if p.name != "backend"]
    assert without == list(inner.parameters.values())
