"""The table of backends: choice, refusal, drift."""

import inspect
import re

import pytest
import torch

from hybrid_lm import ops
from hybrid_lm.ops import backend

NAMES = (
    "attention",
    "causal_conv1d",
    "gated_rms_norm",
    "linear_cross_entropy",
    "rms_norm",
    "selective_scan",
    "ssd",
)


def test_auto_takes_the_best_that_can_run() -> None:
    assert ops.select() == dict.fromkeys(NAMES, "torch") == ops.select("auto", "cuda")
    assert set(ops.select("reference").values()) == {"reference"}
    assert ops.select({"ssd": "reference"}) == dict.fromkeys(NAMES, "torch") | {"ssd": "reference"}


@pytest.mark.parametrize(
    ("requested", "message"),
    [
        ("native", "ssd: backend 'native' cannot run on cpu: this version has no native kernel for it"),
        ("native", "it has: reference, torch"),
        ("troch", "known: auto, fla, mamba_ssm, native, reference, torch. Did you mean 'torch'?"),
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
        ("reference", False, None),
        ("torch", True, None),
        ("native", False, "not built for cuda"),
    ]


def test_drift_of_signatures_names_both(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_OPS", {})

    def reference(x, *, eps=1.0): ...

    def drifted(x, *, eps=2.0): ...

    with pytest.raises(TypeError, match=r"(?s)toy: .*reference\(x, \*, eps=1.0\).*drifted\(x, \*, eps=2.0\)"):
        backend.define("toy", reference=reference, torch=drifted)


@pytest.mark.parametrize("name", NAMES)
def test_the_public_signature_is_the_backends_plus_backend(name: str) -> None:
    public = inspect.signature(getattr(ops, name))
    inner = inspect.signature(backend._OPS[name]["reference"].run)
    assert public.parameters["backend"].default is None
    without = [p for p in public.parameters.values() if p.name != "backend"]
    assert without == list(inner.parameters.values())
